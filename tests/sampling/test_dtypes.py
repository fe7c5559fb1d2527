"""Weights and computation in other types than fp32: near it, and no black pictures in float16."""

import warnings
from dataclasses import replace
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from bdm_jax.app.metadata import describe, restore
from bdm_jax.errors import UserError
from bdm_jax.models.functional import param_dtype
from bdm_jax.sampling.generate import generate
from bdm_jax.sampling.settings import Request, Sampling, check
from bdm_jax.systems import components

REQUEST = Request("红灯笼", english="a lantern", seed=5)
SETTINGS = Sampling(steps=2, size=(32, 48))
# Mean difference in levels of 255: float16 has 11 bits of precision, bfloat16 8. Measured 0.05 and 0.4.
NEAR = {"float16": 0.5, "bfloat16": 4.0}


def draw(pipeline, dtype):
    return next(generate(pipeline, [REQUEST], replace(SETTINGS, dtype=dtype))).astype(float)


@pytest.fixture(scope="module")
def exact(tiny):
    return draw(tiny, "float32")


@pytest.mark.parametrize("dtype", NEAR)
def test_other_types_are_near(tiny, exact, dtype):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing overflows here
        found = draw(tiny, dtype)
    away = np.abs(found - exact).mean()
    print(f"{dtype}: {away:.3f} levels away")
    assert 0 < away < NEAR[dtype]


def test_auto_is_the_pipeline_s_own(tiny, exact):
    np.testing.assert_array_equal(draw(tiny, "auto"), exact)


def grown(component, name, factor):
    """A layer that gives `factor` as much: beyond float16's range, within fp32's."""
    params = {key: x * factor if key.startswith(name) else x for key, x in component.params.items()}
    return component._replace(params=params)


@pytest.mark.parametrize(
    ("part", "layer", "said"),
    [
        ("vae", "decoder.conv_in.", "the autoencoder overflows in float16: it goes on in float32"),
        ("unet", "conv_in.", "a network overflows in float16: all of them go on in float32"),
    ],
)
def test_what_overflows_in_float16_goes_on_in_float32(tiny, part, layer, said):
    pipeline = tiny.replace(**{part: grown(getattr(tiny, part), layer, 2e4)})
    with pytest.warns(UserWarning, match=said) as notes:
        found = draw(pipeline, "float16")
    assert len(notes) == 1
    away = np.abs(found - draw(pipeline, "float32")).mean()
    print(f"{away:.3f} levels away")
    assert away < 8 and found.std() > 1


def test_it_is_kept_with_the_picture_and_checked():
    settings = replace(SETTINGS, dtype="float16")
    assert restore(describe(REQUEST, settings, {}))[1].dtype == "float16"
    with pytest.raises(UserError, match="unknown dtype 'fp16': did you mean 'float16'"):
        check(replace(SETTINGS, dtype="fp16"))


def test_int8_text_encoders_stay(tiny):
    pytest.importorskip("qwix")
    pipeline = tiny.with_int8_text().in_dtype("bfloat16")
    assert param_dtype(pipeline.unet.params) == "bfloat16"
    assert pipeline.in_dtype("bfloat16").unet is pipeline.unet


@pytest.mark.parametrize(
    ("backend", "capability", "dtype"),
    [
        ("gpu", "7.5", "float16"),  # T4
        ("gpu", "7.0", "float16"),  # V100
        ("gpu", "8.0", "bfloat16"),
        ("gpu", "12.0", "bfloat16"),
        ("gpu", "gfx90a", "bfloat16"),  # AMD's
        ("tpu", None, "bfloat16"),
    ],
)
def test_what_a_device_can(backend, capability, dtype, monkeypatch):
    device = SimpleNamespace(**({"compute_capability": capability} if capability else {}))
    monkeypatch.delenv("BDM_JAX_DTYPE")
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    assert components.default_dtype() == dtype


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [
        ("flags : fpu avx512f avx512_bf16 avx512_vnni", "bfloat16"),
        ("flags : fpu amx_tile amx_bf16", "bfloat16"),
        ("flags : fpu avx2 avx512f avx512_vnni", "float32"),
        ("Features : fp asimd bf16", "float32"),  # ARM's were never measured
        ("", "float32"),
    ],
)
def test_what_a_processor_can(flags, dtype, monkeypatch):
    monkeypatch.delenv("BDM_JAX_DTYPE")
    monkeypatch.setattr(components, "instructions", lambda: flags)
    assert components.default_dtype() == dtype


def test_the_environment_names_another(monkeypatch):
    monkeypatch.setenv("BDM_JAX_DTYPE", "float16")
    assert components.default_dtype() == "float16"
    monkeypatch.setenv("BDM_JAX_DTYPE", "fp32")
    with pytest.raises(UserError, match="unknown BDM_JAX_DTYPE 'fp32': did you mean 'float32'"):
        components.default_dtype()
