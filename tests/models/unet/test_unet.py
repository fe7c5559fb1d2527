"""The backbone against diffusers' UNet2DConditionModel, random weights, fp32 on both sides."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bdm_jax.models import functional
from bdm_jax.models.unet.branch import Residuals
from bdm_jax.models.unet.conditioning import Conditioning


def test_prediction_equals_diffusers(unet_case, twin, torch_params, inputs, apply, assert_parity, nhwc):
    config, size = unet_case
    reference = twin(config)
    x = inputs(config, size)
    ours = apply(config, torch_params(reference, config), x.latents, x.t, x.cond)
    assert_parity(ours, nhwc(reference(*x.torch(), **x.added()).sample))


def test_injected_residuals_equal_diffusers(
    unet_case, twin, torch_params, inputs, apply, assert_parity, nhwc, nchw, rng
):
    """Residuals reach the skips after the whole down path, and the output of the middle: the decoder only."""
    config, size = unet_case
    reference = twin(config)
    x = inputs(config, size)
    params = torch_params(reference, config)
    shapes = jax.eval_shape(lambda: functional.bind(config, params).encode(x.latents, x.t, x.cond))
    residuals = jax.tree.map(lambda a: rng.standard_normal(a.shape, dtype=np.float32), Residuals(*shapes))
    latents, t, tokens = x.torch()
    expected = reference(
        latents,
        t,
        tokens,
        down_block_additional_residuals=tuple(nchw(r) for r in residuals.skips),
        mid_block_additional_residual=nchw(residuals.mid),
        **x.added(),
    ).sample
    ours = apply(config, params, x.latents, x.t, x.cond, residuals)
    assert_parity(ours, nhwc(expected))
    plain = nhwc(reference(latents, t, tokens, **x.added()).sample)
    assert np.abs(np.asarray(ours) - plain).max() > 1e-2 * np.abs(plain).max()


def test_masked_tokens_are_not_seen(small_case, inputs, apply):
    config, size = small_case
    params = functional.init(config, 0)
    x = inputs(config, size)
    mask = np.broadcast_to(np.arange(x.tokens.shape[1]) < 4, x.tokens.shape[:2])
    masked = apply(config, params, x.latents, x.t, Conditioning(x.tokens, mask))
    garbage = np.where(mask[..., None], x.tokens, 9.0)
    np.testing.assert_array_equal(masked, apply(config, params, x.latents, x.t, Conditioning(garbage, mask)))
    everything = apply(config, params, x.latents, x.t, Conditioning(x.tokens, np.ones_like(mask)))
    np.testing.assert_allclose(everything, apply(config, params, x.latents, x.t, x.cond), atol=1e-5, rtol=1e-5)
    assert np.abs(np.asarray(everything) - np.asarray(masked)).max() > 1e-3


@pytest.fixture
def traced_for(monkeypatch):
    """A function that has everything traced as for that backend, until the test ends."""

    def trace_for(backend):
        jax.clear_caches()
        monkeypatch.setattr(jax, "default_backend", lambda: backend)

    yield trace_for
    jax.clear_caches()


@pytest.mark.parametrize(("backend", "dtype"), [("cpu", jnp.float32), ("gpu", jnp.bfloat16)])
def test_bf16_weights_are_near_fp32(small_case, inputs, apply, traced_for, backend, dtype):
    """Tensors keep their dtype, but on a CPU, where only operands of products are in bf16; norms and softmax in fp32
    keep the result within bf16's own error (2^-8 a step).
    """
    traced_for(backend)
    config, size = small_case
    params = functional.init(config, 0)
    x = inputs(config, size)
    exact = np.asarray(apply(config, params, x.latents, x.t, x.cond))
    latents, tokens = jnp.asarray(x.latents, jnp.bfloat16), jnp.asarray(x.tokens, jnp.bfloat16)
    rough = apply(config, functional.cast(params, jnp.bfloat16), latents, x.t, Conditioning(tokens))
    assert rough.dtype == dtype
    assert np.abs(np.asarray(rough, np.float32) - exact).max() < 0.05 * np.abs(exact).max()


def test_bind_names_a_missing_parameter(small_case):
    config, _ = small_case
    params = functional.init(config, 0)
    del params["conv_in.kernel"]
    with pytest.raises(KeyError, match="conv_in.kernel"):
        functional.bind(config, params)
