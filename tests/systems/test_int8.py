"""Text towers in eight bits: how large, how near, and where they do not go."""

import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdm_jax.errors import UserError
from bdm_jax.models import functional
from bdm_jax.models.config import CLIPTextConfig, RobertaConfig
from bdm_jax.paths import DEMO
from bdm_jax.sampling.generate import generate
from bdm_jax.sampling.settings import Request, Sampling
from bdm_jax.systems.components import Component
from bdm_jax.systems.int8 import to_int8
from bdm_jax.systems.pipeline import BridgePipeline
from bdm_jax.text.encode import EncoderCall, encode_ids, encode_windows

SIZES = dict(hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, vocab_size=300)
TOWERS = {"clip": CLIPTextConfig(**SIZES), "roberta": RobertaConfig(**SIZES)}


def numbers(path, value, exact):
    """What a parameter kept in eight bits stands for, in numpy: its integers times its scales."""
    kind = path.rpartition(".")[2]
    if kind not in ("kernel", "embedding"):
        assert value is exact
        return value
    assert value.qvalue.dtype == np.int8
    exact = np.asarray(exact)
    # 255 steps and the half of one at each end, as many scales as outputs, or words
    step = np.abs(exact).max(axis=0 if kind == "kernel" else 1, keepdims=True) / np.float32(127.5)
    found = np.asarray(value.qvalue) * step
    assert (np.abs(found - exact) <= 0.5001 * step).all()
    return jnp.asarray(found)


@pytest.mark.parametrize("config", TOWERS.values(), ids=TOWERS)
def test_states_are_those_of_the_rounded_weights(config, seed, rng, assert_parity):
    params = functional.init(config, seed)
    kept = to_int8(Component(config, params))
    ids = jnp.asarray(rng.integers(0, config.vocab_size, (2, 1, 20), np.int32))
    rounded = {path: numbers(path, kept.params[path], value) for path, value in params.items()}
    ours, exact = (encode_ids(config, given, ids).tokens for given in (kept.params, params))
    assert_parity(ours, encode_ids(config, rounded, ids).tokens)
    away = float(jnp.linalg.norm(ours - exact) / jnp.linalg.norm(exact))
    assert 1e-4 < away < 0.03  # rounded indeed, and by little


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_and_type(dtype, seed):
    config = TOWERS["clip"]
    params = functional.cast(functional.init(config, seed), jnp.dtype(dtype))
    kept = to_int8(Component(config, params)).params

    def size(tree):
        return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))

    assert size(kept) < {"float32": 0.3, "bfloat16": 0.57}[dtype] * size(params)
    ids = jnp.zeros((1, 1, 8), jnp.int32)
    assert encode_ids(config, kept, ids).tokens.dtype == encode_ids(config, params, ids).tokens.dtype
    assert all(kept[path] is value for path, value in params.items() if value.ndim == 1)


def test_both_towers_and_once_only(tmp_path):
    pipeline = BridgePipeline.from_pretrained(DEMO).with_int8_text()
    for name in ("text_encoder", "branch_text_encoder"):
        assert any(map(functional.is_int8, getattr(pipeline, name).params.values()))
    assert not any(map(functional.is_int8, pipeline.unet.params.values()))
    again = pipeline.with_int8_text()
    assert all(again.text_encoder.params[path] is value for path, value in pipeline.text_encoder.params.items())
    with pytest.raises(UserError, match="a text_encoder in int8 cannot be saved"):
        pipeline.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_pictures_are_near(tiny):
    """Whole drawings, in which every network is made ready. Mean difference in levels of 255, measured 0.2 to 2."""
    request, settings = Request("红灯笼", english="a lantern", seed=5), Sampling(steps=2, size=(32, 48))
    exact, found = (
        next(generate(pipeline, [request], settings)).astype(float) for pipeline in (tiny, tiny.with_int8_text())
    )
    away = np.abs(found - exact).mean()
    print(f"{away:.3f} levels away")
    assert 0 < away < 8


def test_without_qwix(monkeypatch):
    monkeypatch.setitem(sys.modules, "qwix", None)
    with pytest.raises(UserError, match=r'int8 weights need qwix: pip install -e "\.\[int8\]"'):
        to_int8(Component(TOWERS["clip"], functional.init(TOWERS["clip"], 0)))


def test_read_from_disk_in_int8():
    """Tensor by tensor: the same as if all had been there before."""
    whole = BridgePipeline.from_pretrained(DEMO).with_int8_text()
    read = BridgePipeline.from_pretrained(DEMO, text_weights="int8")
    for name, component in whole.networks.items():
        for mine, theirs in zip(jax.tree.leaves(read.networks[name]), jax.tree.leaves(component), strict=True):
            np.testing.assert_array_equal(mine, theirs)


def test_layers_become_numbers_one_by_one(seed):
    """What an encoding program takes beside its arguments is less than two layers as numbers, of however many."""
    config = replace(TOWERS["clip"], num_hidden_layers=12)
    kept = to_int8(Component(config, functional.init(config, seed))).params
    ids = jnp.zeros((1, 1, 8), jnp.int32)
    memory = encode_windows.jitted.lower(EncoderCall(config), kept, ids).compile().memory_analysis()
    layer = sum(4 * np.prod(x.shape) for path, x in kept.items() if ".layers.0." in path)
    table = 4 * config.vocab_size * config.hidden_size
    assert memory.temp_size_in_bytes < 2 * layer + 2 * table
