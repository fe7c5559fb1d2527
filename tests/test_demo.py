"""The model in the repository: what it was trained on, that PyTorch reads it, that it draws what it is told."""

import json

import jax
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel

from bdm_jax.data.captions import concepts
from bdm_jax.data.records import open_source
from bdm_jax.images.decode import decode_image
from bdm_jax.models.functional import bind
from bdm_jax.paths import ASSETS, DEMO, EMOJI
from bdm_jax.sampling.generate import generate
from bdm_jax.sampling.settings import Request
from bdm_jax.systems.pipeline import BridgePipeline
from bdm_jax.text.encode import encode, tokenize

MOST_BYTES = 60_000_000


@pytest.fixture(scope="module")
def demo():
    """The bundled pipeline."""
    return BridgePipeline.from_pretrained(DEMO)


@pytest.fixture(scope="module")
def training():
    """What was written down when it was trained."""
    return json.loads((DEMO / "training.json").read_text())


def close(ours, reference):
    reference = reference.numpy()
    return np.abs(np.asarray(ours) - reference).max() <= 1e-4 * np.abs(reference).max()


def test_all_assets_are_small():
    assert sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()) <= MOST_BYTES


def test_record_of_the_training(training):
    """The English backbone saw none of the zh_only concepts; the branch saw all of them."""
    source = open_source(EMOJI)
    rows = [source[int(i)] for i in concepts(source, training["style"], language="zh")]
    zh_only = {row["id"] for row in rows if row["zh_only"]}
    assert len(zh_only) >= 25 and zh_only <= set(training["concepts"]) <= {row["id"] for row in rows}
    assert [run["task_name"] for run in training["runs"]] == ["VAETask", "BackboneTask", "TextTask", "BranchTask"]
    assert [run["task"]["language"] for run in training["runs"][1:]] == ["en", "zh", "zh"]
    assert all(np.isfinite(run["final"]["loss"]) for run in training["runs"])


def test_pytorch_predicts_the_same(demo, rng):
    """Text tower, UNet and autoencoder, each opened by its own library; fp32 on both sides."""
    text, unet, vae = (
        cls.from_pretrained(DEMO / name, torch_dtype=torch.float32).eval()
        for cls, name in ((CLIPTextModel, "text_encoder"), (UNet2DConditionModel, "unet"), (AutoencoderKL, "vae"))
    )
    prompts = ["red heart", "a cat with wry smile"]
    ids = torch.from_numpy(tokenize(demo.tokenizer, prompts)[:, 0]).long()
    cond, states = encode(demo.tokenizer, *demo.text_encoder, prompts), text(ids).last_hidden_state
    assert close(cond.tokens, states)

    x = rng.standard_normal((2, 8, 8, demo.unet.config.in_channels), np.float32)
    t = np.array([999, 250])
    ours = jax.jit(lambda p, *a: bind(demo.unet.config, p)(*a))(demo.unet.params, x, t, cond)
    x_bchw = torch.from_numpy(x).permute(0, 3, 1, 2)
    assert close(ours, unet(x_bchw, torch.from_numpy(t), states).sample.permute(0, 2, 3, 1))

    pixels = jax.jit(lambda p, z: bind(demo.vae.config, p).decode(z))(demo.vae.params, x)
    assert close(pixels, vae.decode(x_bchw).sample.permute(0, 2, 3, 1))


@pytest.mark.slow
def test_a_red_lantern_is_drawn(demo, training):
    """Among the artwork of all concepts, the lantern's is the nearest to the picture, pixel by pixel."""
    source = open_source(EMOJI)
    rows = [source[int(i)] for i in concepts(source, training["style"], language="zh")]
    artwork = np.stack([decode_image(row["image"])[::4, ::4] for row in rows]).astype(np.float32)
    picture = next(generate(demo, [Request("红灯笼")]))[::4, ::4].astype(np.float32)
    distance = np.square(artwork - picture).mean(axis=(1, 2, 3))
    assert rows[int(distance.argmin())]["zh"] == "红灯笼"
