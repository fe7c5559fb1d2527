"""Kolors end to end against diffusers: its folder opens, reads prompts alike, draws alike, and is read back."""

import shutil

import diffusers
import jax
import kolors
import numpy as np
import pytest
import torch

from bdm_jax.errors import UserError
from bdm_jax.sampling import passes as module
from bdm_jax.sampling.generate import generate
from bdm_jax.sampling.settings import Request, Sampling
from bdm_jax.systems.pipeline import BridgePipeline
from bdm_jax.text import readers

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

    def draw(request, pipeline=ours, **settings):
        seen = []
        with monkeypatch.context() as patch:
            decode = module.decode
            patch.setattr(module, "decode", lambda vae, x, tile: seen.append(np.asarray(x)) or decode(vae, x, tile))
            list(generate(pipeline, [request], Sampling(steps=3, size=SIZE, **settings)))
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
