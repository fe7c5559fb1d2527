"""Kolors end to end against diffusers: its folder opens, reads prompts alike, draws alike, and is read back."""

import copy
import shutil

import diffusers
import jax
import kolors
import numpy as np
import pytest
import torch
import transformers
from ip_adapters import published
from torch_parts import fill

from bdm_jax.errors import UserError
from bdm_jax.plugins.controls import Control
from bdm_jax.plugins.image_prompts import ImagePrompt
from bdm_jax.sampling import passes as module
from bdm_jax.sampling.generate import generate
from bdm_jax.sampling.settings import Request, Sampling
from bdm_jax.systems.components import load_component
from bdm_jax.systems.pipeline import BridgePipeline
from bdm_jax.text import readers
from bdm_jax.text.tokenizer import Tokenizer

SIZE = (32, 48)
PROMPT, NEGATIVE = "红灯笼在屋檐下", "a photo"


@pytest.fixture(scope="module")
def theirs(request, tmp_path_factory):
    return kolors.tiny(tmp_path_factory.mktemp("tokenizer"), request.config.option.seed)


@pytest.fixture(scope="module")
def folder(theirs, tmp_path_factory):
    """As diffusers saves it."""
    folder = tmp_path_factory.mktemp("kolors")
    theirs.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def ours(folder):
    return BridgePipeline.from_pretrained(folder)


def test_opens(ours):
    assert ours.family.name == "kolors" and ours.guidance == 5.0 and not ours.zero_empty
    assert list(ours.parts) == ["unet", "vae", "text_encoder", "tokenizer"]
    assert ours.schedule == ours.family.default_schedule() and ours.schedule.num_train_timesteps == 1100
    assert ours.tokenizer.length == 256 and ours.tokenizer.format.left


@pytest.mark.parametrize("negative", ["", NEGATIVE])
def test_prompts_are_read_as_diffusers_does(negative, ours, theirs, assert_parity):
    """States of the padding too, which the UNet reads; an empty prompt is encoded."""
    embeds, negative_embeds, pooled, negative_pooled = theirs.encode_prompt(
        PROMPT, negative_prompt=negative, device="cpu"
    )
    reader = ours.readers["backbone"]
    cond = readers.encode(reader, ours.parts, readers.read(reader, ours.parts, [negative, PROMPT]))
    assert cond.mask is None
    assert_parity(cond.tokens, torch.cat([negative_embeds, embeds]).numpy())
    assert_parity(cond.pooled, torch.cat([negative_pooled, pooled]).numpy())


@pytest.fixture
def latents(ours, monkeypatch):
    """A function from a request to the latents that its picture is decoded from, (C,h,w)."""

    def draw(request, pipeline=ours, controls=(), **settings):
        seen = []
        with monkeypatch.context() as patch:
            decode = module.decode
            patch.setattr(module, "decode", lambda vae, x, tile: seen.append(np.asarray(x)) or decode(vae, x, tile))
            list(generate(pipeline, [request], Sampling(steps=3, size=SIZE, **settings), controls=controls))
        return np.moveaxis(seen[0][0], -1, 0)

    return draw


def test_draws_as_diffusers_does(latents, theirs):
    """The system's own sampler, guidance and schedule, from the same noise; 1e-3: three steps, each with rounding."""
    noise = np.asarray(jax.random.normal(jax.random.key(7), (SIZE[0] // 8, SIZE[1] // 8, 4)))
    theirs.set_progress_bar_config(disable=True)
    reference = theirs(
        PROMPT,
        negative_prompt=NEGATIVE,
        num_inference_steps=3,
        guidance_scale=5.0,
        height=SIZE[0],
        width=SIZE[1],
        latents=torch.from_numpy(np.moveaxis(noise, -1, 0).copy())[None],
        output_type="latent",
    ).images.numpy()[0]
    found = latents(Request(PROMPT, NEGATIVE, seed=7))
    difference = np.abs(found - reference).max() / np.abs(reference).max()
    print(f"relative difference {difference:.2e}")
    assert difference <= 1e-3


def test_controlnet_and_ip_adapter_plus(ours, theirs, latents, tmp_path, request, rng):
    """Both at once, against diffusers' networks in a loop written out; the ControlNet has its own text projection."""
    seed = request.config.option.seed
    network, unet = kolors.controlnet(theirs.unet, seed), copy.deepcopy(theirs.unet)
    network.save_pretrained(tmp_path / "controlnet")
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    config = transformers.CLIPVisionConfig(**sizes, image_size=28, patch_size=7, projection_dim=12)
    tower = transformers.CLIPVisionModelWithProjection(config)
    fill(tower, torch.Generator().manual_seed(seed))
    tower.save_pretrained(tmp_path / "vision")
    parts = published("plus", unet, seed)
    adapter = {part: {key: value.numpy() for key, value in own.items()} for part, own in parts.items()}
    unet._load_ip_adapter_weights([parts], low_cpu_mem_usage=False)
    unet.save_pretrained(tmp_path / "with-image")  # its text projection is called otherwise then
    again = load_component(tmp_path / "with-image")
    assert again.config == ours.unet.config
    assert all(np.array_equal(again.params[path], value) for path, value in ours.unet.params.items())
    for processor in unet.attn_processors.values():
        if hasattr(processor, "scale"):
            processor.scale = [0.5]
    hint, image = (rng.integers(0, 256, (*size, 3), np.uint8) for size in (SIZE, (28, 28)))
    controls = [
        Control(load_component(tmp_path / "controlnet"), hint, 0.7),
        ImagePrompt(adapter, load_component(tmp_path / "vision"), image, 0.5),
    ]
    found = latents(Request(PROMPT, NEGATIVE, seed=7), controls=controls)

    embeds, negative_embeds, pooled, negative_pooled = theirs.encode_prompt(PROMPT, "cpu", negative_prompt=NEGATIVE)
    states, pooled = torch.cat([negative_embeds, embeds]), torch.cat([negative_pooled, pooled])
    added = {"text_embeds": pooled, "time_ids": torch.tensor([[*SIZE, 0, 0, *SIZE]] * 2)}
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    pixels = processor(image, return_tensors="pt").pixel_values
    seen = [tower(x, output_hidden_states=True).hidden_states[-2] for x in (torch.zeros_like(pixels), pixels)]
    with_image = {**added, "image_embeds": [torch.cat(seen)[:, None]]}
    map_ = torch.from_numpy(np.moveaxis(hint, -1, 0).astype(np.float32) / 255)[None]
    scheduler = copy.deepcopy(theirs.scheduler)
    scheduler.set_timesteps(3)
    noise = np.asarray(jax.random.normal(jax.random.key(7), (SIZE[0] // 8, SIZE[1] // 8, 4)))
    x = torch.from_numpy(np.moveaxis(noise, -1, 0).copy())[None] * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        both = scheduler.scale_model_input(torch.cat([x, x]), t)
        how = dict(conditioning_scale=0.7, added_cond_kwargs=added, return_dict=False)
        own = network.encoder_hid_proj(states)  # which Kolors' ControlNet does itself, and diffusers' leaves undone
        down, mid = network(both, t, own, torch.cat([map_, map_]), **how)
        residuals = dict(down_block_additional_residuals=down, mid_block_additional_residual=mid)
        away, towards = unet(both, t, states, added_cond_kwargs=with_image, **residuals).sample.chunk(2)
        x = scheduler.step(away + 5.0 * (towards - away), t, x).prev_sample
    difference = np.abs(found - x[0].numpy()).max() / x.abs().max()
    print(f"relative difference {difference:.2e}")
    assert difference <= 1e-3
    plain = latents(Request(PROMPT, NEGATIVE, seed=7))
    for number in range(2):  # each of them changes the picture
        other = latents(Request(PROMPT, NEGATIVE, seed=7), controls=controls[number : number + 1])
        assert min(np.abs(other - one).max() for one in (plain, found)) > 1e-2 * np.abs(plain).max()


def test_saved_by_us_opens_in_diffusers(ours, folder, tmp_path):
    """Bit for bit, but for the layer that predicts words and a table of angles, which reading has no use for."""
    ours.save_pretrained(tmp_path, "float32")
    back = diffusers.KolorsPipeline.from_pretrained(tmp_path, local_files_only=True)
    assert back.scheduler.config.num_train_timesteps == 1100 and back.scheduler.config.beta_end == 0.014
    first = diffusers.KolorsPipeline.from_pretrained(folder, local_files_only=True)
    for name in ("unet", "vae", "text_encoder"):
        state, found = getattr(first, name).state_dict(), getattr(back, name).state_dict()
        assert state.keys() == found.keys()
        for key in state.keys() - {"output_layer.weight", "rotary_pos_emb.inv_freq"}:
            assert torch.equal(state[key], found[key]), key
    for states in zip(*(pipeline.encode_prompt(PROMPT, "cpu") for pipeline in (first, back)), strict=True):
        assert torch.equal(*states)
    assert back.tokenizer("红灯笼")["input_ids"] == first.tokenizer("红灯笼")["input_ids"]
    again = BridgePipeline.from_pretrained(tmp_path)
    assert again.family is ours.family and again.schedule == ours.schedule


def test_the_tokenizer_may_lie_in_the_text_encoder_s_folder(folder, latents, tmp_path):
    """As in Kwai's own folders, whose model_index.json names another class, or is not there."""
    shutil.copytree(folder, tmp_path / "own")
    for file in (tmp_path / "own/tokenizer").iterdir():
        file.rename(tmp_path / "own/text_encoder" / file.name)
    (tmp_path / "own/tokenizer").rmdir()
    (tmp_path / "own/model_index.json").unlink()
    own = BridgePipeline.from_pretrained(tmp_path / "own")
    assert own.family.name == "kolors"
    (tmp_path / "own/text_encoder/tokenizer.model").unlink()
    with pytest.raises(UserError, match="own: not a whole model folder; missing: tokenizer"):
        BridgePipeline.from_pretrained(tmp_path / "own")


def test_a_tokenizer_of_another_vocabulary_is_refused(folder, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(kolors.pieces(byte_fallback=False))
    other = Tokenizer.from_pretrained(tmp_path)
    with pytest.raises(
        UserError, match=f"tokenizer and text_encoder do not belong together: {other.vocab_size} tokens"
    ):
        BridgePipeline.from_pretrained(folder).replace(tokenizer=other)
