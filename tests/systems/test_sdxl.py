"""SDXL end to end against diffusers: its folder opens, reads prompts alike, draws alike, and is read back."""

import sys
import warnings

import diffusers
import jax
import numpy as np
import pytest
import torch
from bdm_jax.convert.conversion import to_torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image
from safetensors.torch import save_file
from sdxl import WIDTHS

from bdm_jax.errors import FileError, UserError
from bdm_jax.paths import TOKENIZERS
from bdm_jax.plugins.install import with_embeddings, with_loras
from bdm_jax.plugins.inversion import Embedding
from bdm_jax.plugins.spec import Spec
from bdm_jax.sampling import passes as module
from bdm_jax.sampling.generate import generate
from bdm_jax.sampling.settings import Request, Sampling
from bdm_jax.systems import folder as on_disk
from bdm_jax.systems.pipeline import BridgePipeline
from bdm_jax.text import readers

SIZE = (32, 48)


@pytest.fixture(scope="module")
def ours(sdxl_folder):
    return BridgePipeline.from_pretrained(sdxl_folder)


@pytest.fixture(scope="module")
def theirs(sdxl):
    return sdxl


@pytest.fixture(scope="module")
def folder(sdxl_folder):
    return sdxl_folder


def test_opens(ours):
    assert ours.family.name == "sdxl" and ours.branch is None and ours.guidance == 5.0 and ours.zero_empty
    assert list(ours.parts) == ["unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"]
    assert ours.text_encoder_2.config.projection_dim == 24 and ours.text_encoder.config.projection_dim is None
    assert ours.tokenizer.pad == ours.tokenizer.end and ours.tokenizer_2.pad == 0
    with pytest.raises(AttributeError, match="no attribute 'text_encoder_9'"):
        ours.text_encoder_9  # noqa: B018


@pytest.mark.parametrize("negative", ["", "blurry, film grain"])
@pytest.mark.parametrize("clip_skip", [1, 2])
def test_prompts_are_read_as_diffusers_does(negative, clip_skip, ours, theirs, assert_parity):
    prompt = "a red lantern under a roof"
    reference = theirs.encode_prompt(
        prompt, negative_prompt=negative or None, device="cpu", clip_skip=None if clip_skip == 1 else clip_skip - 1
    )
    embeds, negative_embeds, pooled, negative_pooled = (tensor.numpy() for tensor in reference)
    reader = ours.readers["backbone"]
    tokens = readers.read(reader, ours.parts, [negative, prompt])
    cond = readers.encode(reader, ours.parts, tokens, clip_skip=clip_skip)
    assert cond.tokens.shape == (2, 16, sum(WIDTHS)) and cond.pooled.shape == (2, 24)
    assert_parity(cond.tokens[1:], embeds)
    assert_parity(cond.pooled[1:], pooled)
    if negative:  # diffusers counts clip_skip from the positive prompt only
        plain = readers.encode(reader, ours.parts, tokens)
        assert_parity(plain.tokens[:1], negative_embeds)
        assert_parity(cond.pooled[:1], negative_pooled)
    else:
        assert not np.any(cond.tokens[0]) and not np.any(cond.pooled[0])
        assert not negative_embeds.any() and not negative_pooled.any()


def test_an_empty_prompt_is_encoded_where_the_folder_says_so(ours):
    plain = ours.replace(zero_empty=False)
    reader = plain.readers["backbone"]
    cond = readers.encode(reader, plain.parts, readers.read(reader, plain.parts, [""]))
    assert np.any(cond.tokens) and np.any(cond.pooled)


@pytest.fixture
def latents(ours, monkeypatch):
    """A function from requests to the latents that the pictures are decoded from, (B,C,h,w)."""

    def draw(requests, **settings):
        seen = []
        with monkeypatch.context() as patch:
            decode = module.decode
            patch.setattr(module, "decode", lambda vae, x, tile: seen.append(np.asarray(x)) or decode(vae, x, tile))
            list(generate(ours, requests, Sampling(steps=6, size=SIZE, **settings)))
        return np.moveaxis(np.concatenate(seen), -1, 1)

    return draw


@pytest.mark.parametrize("negative", ["", "blurry"])
def test_draws_as_diffusers_does(negative, latents, theirs, assert_parity):
    """Whole runs of the system's own sampler."""
    seed = 7
    noise = np.asarray(jax.random.normal(jax.random.key(seed), (SIZE[0] // 8, SIZE[1] // 8, 4)))
    theirs.set_progress_bar_config(disable=True)
    reference = theirs(
        "a red lantern",
        negative_prompt=negative or None,
        num_inference_steps=6,
        height=SIZE[0],
        width=SIZE[1],
        latents=torch.from_numpy(np.moveaxis(noise, -1, 0).copy())[None],
        output_type="latent",
    ).images.numpy()
    found = latents([Request("a red lantern", negative, seed=seed)])
    assert_parity(found, reference)


@pytest.mark.parametrize("masked", [False, True])
def test_an_image_is_redrawn_as_diffusers_does(masked, latents, theirs, assert_parity, monkeypatch, rng):
    """The image's latents are their mean on both sides, the noise is ours; four of six steps."""
    seed, picture, mask = 7, rng.integers(0, 256, (*SIZE, 3), np.uint8), np.zeros(SIZE, np.uint8)
    mask[8:24, 16:40] = 255
    noise = np.asarray(jax.random.normal(jax.random.key(seed), (SIZE[0] // 8, SIZE[1] // 8, 4)))
    cls = diffusers.StableDiffusionXLInpaintPipeline if masked else diffusers.StableDiffusionXLImg2ImgPipeline
    given = {"mask_image": Image.fromarray(mask), "height": SIZE[0], "width": SIZE[1]} if masked else {}
    drawn = torch.from_numpy(np.moveaxis(noise, -1, 0).copy())[None]
    monkeypatch.setattr(sys.modules[cls.__module__], "randn_tensor", lambda *_, **__: drawn)
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mean)
    pipeline = cls(**theirs.components)
    pipeline.set_progress_bar_config(disable=True)
    reference = pipeline(
        "a red lantern",
        image=Image.fromarray(picture),
        strength=0.67,
        num_inference_steps=6,
        guidance_scale=5.0,
        output_type="latent",
        **given,
    ).images.numpy()
    request = Request("a red lantern", seed=seed, image=picture, mask=mask if masked else None)
    found = latents([request], strength=0.67)
    assert_parity(found, reference)


def test_the_size_is_told(latents, ours):
    """Two requests of a batch, and the same alone; another size is another picture even where its latents agree."""
    requests = [Request("a red lantern", seed=1), Request("a cat on a roof", seed=2)]
    both = latents(requests)
    for request, found in zip(requests, both, strict=True):
        np.testing.assert_allclose(latents([request])[0], found, atol=1e-4)


def test_saved_by_us_opens_in_diffusers(ours, folder, tmp_path):
    ours.save_pretrained(tmp_path, "float32")
    back = diffusers.StableDiffusionXLPipeline.from_pretrained(tmp_path, local_files_only=True)
    assert type(back.scheduler).__name__ == "EulerDiscreteScheduler" and back.config.force_zeros_for_empty_prompt
    first = diffusers.StableDiffusionXLPipeline.from_pretrained(folder, local_files_only=True)
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        state = getattr(first, name).state_dict()
        found = getattr(back, name).state_dict()
        assert state.keys() == found.keys()
        for key, tensor in state.items():
            assert torch.equal(tensor, found[key]), key
    assert back.tokenizer_2.pad_token_id == 0 and back.tokenizer.model_max_length == 16
    again = BridgePipeline.from_pretrained(tmp_path)
    assert again.family is ours.family and again.schedule == ours.schedule


def test_second_text_encoder_in_place_of_the_own(ours, folder):
    other = BridgePipeline.from_pretrained(folder, text_encoder_2=folder / "text_encoder_2")
    assert other.text_encoder_2.config == ours.text_encoder_2.config
    with pytest.raises(UserError, match="unet and text_encoder and text_encoder_2 do not belong together: text width"):
        ours.replace(text_encoder_2=ours.text_encoder)


def test_lora_for_the_second_text_encoder(ours, tiny, tmp_path, rng):
    """kohya's `lora_te2_`, found by its row; a system without the part refuses it by the family's name."""
    up, down = rng.standard_normal((32, 2), np.float32), rng.standard_normal((2, 32), np.float32)
    name = "lora_te2_text_model_encoder_layers_1_self_attn_q_proj"
    save_file(
        {f"{name}.lora_up.weight": torch.from_numpy(up), f"{name}.lora_down.weight": torch.from_numpy(down)},
        tmp_path / "a.safetensors",
    )
    spec = Spec(tmp_path / "a.safetensors", 1.0, 0.5)
    changed = with_loras(ours, [spec])
    path = "text_model.encoder.layers.1.self_attn.q_proj.kernel"
    expected = np.asarray(ours.text_encoder_2.params[path]) + 0.5 * (up @ down).T
    np.testing.assert_allclose(changed.text_encoder_2.params[path], expected, rtol=1e-5, atol=1e-6)
    assert changed.text_encoder is ours.text_encoder or all(
        changed.text_encoder.params[key] is value for key, value in ours.text_encoder.params.items()
    )
    with pytest.raises(FileError, match="a LoRA for SDXL"):
        with_loras(tiny, [spec])


def test_embedding_for_both_text_encoders(ours, rng):
    rows = {
        name: rng.standard_normal((2, width), np.float32)
        for name, width in zip(("text_encoder", "text_encoder_2"), WIDTHS, strict=True)
    }
    taught = with_embeddings(ours, [Embedding("<thing>", rows)])
    size = ours.tokenizer.vocab_size
    reader = taught.readers["backbone"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for tokens in readers.read(reader, taught.parts, ["a <thing>"]):
            assert {size, size + 1} <= set(tokens.ids.ravel().tolist())
    for name, vectors in rows.items():
        table = taught.networks[name].params["text_model.embeddings.token_embedding.embedding"]
        np.testing.assert_array_equal(table[-2:], vectors)


def test_single_file(ours, folder, tmp_path, monkeypatch):
    """In Stability's names, as checkpoints of SDXL are passed on; its tokenizers are the bundled ones."""
    to_torch(folder, tmp_path / "model.safetensors", layout="ldm")
    monkeypatch.setitem(on_disk._BUNDLED, ours.tokenizer.vocab_size, (TOKENIZERS / "english", 16))
    single = BridgePipeline.from_pretrained(tmp_path / "model.safetensors")
    assert single.family is ours.family and list(single.parts) == list(ours.parts)
    assert (single.tokenizer.pad, single.tokenizer_2.pad) == (ours.tokenizer.end, 0)
    assert single.schedule.prediction_type == "epsilon"
    for name, component in ours.networks.items():
        assert component.params.keys() == single.networks[name].params.keys()
        for key, value in component.params.items():
            np.testing.assert_array_equal(value, single.networks[name].params[key], err_msg=f"{name} {key}")
    assert single.unet.config == ours.unet.config and single.vae.config == ours.vae.config


def test_parts_that_the_family_does_not_have_are_refused(folder, tiny_folder):
    """A part that was asked for is never left out without a word."""
    with pytest.raises(UserError, match="SD1.x, which has no text_encoder_2"):
        BridgePipeline.from_pretrained(tiny_folder, text_encoder_2=folder / "text_encoder_2")
