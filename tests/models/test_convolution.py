"""Winograd's convolutions against the plain ones; which layers `prepare` transforms, and for which maps."""

from collections import Counter
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from bdm_jax.models import convolution, functional
from bdm_jax.models.config import BranchConfig, UNetConfig, VAEConfig
from bdm_jax.models.convolution import Conv, patches, prepare, tile_size, transform_filters, winograd
from bdm_jax.models.linear import product
from bdm_jax.models.unet.conditioning import Conditioning

# fp32, relative to the largest output; measured 1e-6 and 5e-6.
TOLERANCE = {2: 1e-5, 4: 5e-5}

UNET = UNetConfig(block_out_channels=(64, 64, 96), transformer_layers=(1, 1, 0), num_heads=4)


def plain(x, kernel):
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=numbers)


@pytest.mark.parametrize("m", [2, 4])
@pytest.mark.parametrize("size", [(8, 8), (7, 9), (1, 5), (16, 3)])
@pytest.mark.parametrize("strip_bytes", [1e9, 1])
@pytest.mark.parametrize("outputs", [7, 260])  # fewer and more than 16 for each tile: the order of the product
def test_winograd_equals_plain(monkeypatch, rng, assert_parity, m, size, strip_bytes, outputs):
    monkeypatch.setattr(convolution, "_STRIP_BYTES", strip_bytes)
    x = jnp.asarray(rng.standard_normal((2, *size, 12), np.float32))
    kernel = jnp.asarray(rng.standard_normal((3, 3, 12, outputs), np.float32))
    assert_parity(winograd(x, transform_filters(kernel, m)), plain(x, kernel), TOLERANCE[m])


@pytest.mark.parametrize(("stride", "padding"), [(1, (1, 1)), (2, (1, 1)), (2, (0, 1)), (3, (0, 0))])
@pytest.mark.parametrize("size", [(6, 7), (9, 4)])
def test_a_product_of_patches_is_the_convolution(rng, assert_parity, stride, padding, size):
    x = jnp.asarray(rng.standard_normal((2, *size, 5), np.float32))
    kernel = jnp.asarray(rng.standard_normal((3, 3, 5, 8), np.float32))
    ours = patches(x, kernel, stride, padding) @ kernel.reshape(-1, 8)
    numbers = ("NHWC", "HWIO", "NHWC")
    theirs = jax.lax.conv_general_dilated(x, kernel, (stride,) * 2, (padding,) * 2, dimension_numbers=numbers)
    assert_parity(ours, theirs)


def test_small_maps_of_many_channels_are_products_of_patches_on_a_cpu(monkeypatch):
    def products(side, outputs):
        conv = Conv(4, outputs, nnx.Rngs(0), stride=2)
        jaxpr = jax.make_jaxpr(lambda x: nnx.merge(*nnx.split(conv))(x))(jnp.zeros((1, side, side, 4)))
        return "dot_general" in str(jaxpr)

    assert products(16, 64) and not products(16, 63)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert not products(16, 64)


def test_few_channels_and_tiny_maps_stay_plain():
    assert tile_size(64, 64, 4, 320) == tile_size(64, 64, 320, 4) == tile_size(2, 2, 1280, 1280) == 0
    assert tile_size(64, 64, 320, 320) == tile_size(33, 32, 640, 640) == 4
    assert tile_size(8, 8, 1280, 1280) == 2


def calls(config, size):
    """(how to call the network, its abstract inputs) for latents of `size`."""
    latents = jax.ShapeDtypeStruct((1, *size, 4), jnp.float32)
    if isinstance(config, VAEConfig):
        pictures = jax.ShapeDtypeStruct((1, *(config.factor * side for side in size), 3), jnp.float32)
        return lambda net, x, y: (net.decode(x), net.encode(y)), (latents, pictures)
    cond = Conditioning(jax.ShapeDtypeStruct((1, 5, config.cross_attention_dim), jnp.float32))
    return lambda net, *inputs: net(*inputs), (latents, jax.ShapeDtypeStruct((1,), jnp.float32), cond)


CONFIGS = {
    "unet": (UNET, (11, 8)),
    "branch": (BranchConfig(block_out_channels=(64, 96), transformer_layers=(1, 0), num_heads=4), (16, 24)),
    "vae": (VAEConfig(block_out_channels=(64, 64, 96)), (5, 8)),
}


@pytest.mark.parametrize(("config", "size"), CONFIGS.values(), ids=CONFIGS)
def test_prepare_knows_the_size_of_every_map(monkeypatch, config, size):
    """The maps that `prepare` expects are those that the network's 3x3 convolutions of stride 1 then see."""
    expected, seen, original = Counter(), Counter(), Conv.__call__

    def expect(height, width, inputs, outputs):
        expected[(height, width, inputs, outputs)] += 1
        return 0

    def see(self, x):
        if self.kernel.shape[:2] == (3, 3) and self.stride == 1:
            seen[(*x.shape[1:3], *self.kernel.shape[2:])] += 1
        return original(self, x)

    monkeypatch.setattr(convolution, "tile_size", expect)
    monkeypatch.setattr(Conv, "__call__", see)
    params = functional.init(config, 0)
    assert prepare(config, params, size) == params
    call, inputs = calls(config, size)
    jax.eval_shape(lambda params, *inputs: call(functional.bind(config, params), *inputs), params, *inputs)
    assert expected == seen and seen


@pytest.mark.parametrize(("config", "size"), CONFIGS.values(), ids=CONFIGS)
def test_prepared_networks_compute_the_same(rng, assert_parity, seed, config, size):
    call, inputs = calls(config, size)
    inputs = jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape, np.float32)), inputs)
    params = functional.init(config, seed)
    params = {k: v + 0.1 if k.startswith("controlnet_") else v for k, v in params.items()}
    prepared = prepare(config, params, size)
    assert any(value.ndim == 3 and path.endswith("kernel") for path, value in prepared.items())
    assert all(prepared[path] is value for path, value in params.items() if value.ndim != 4)
    apply = jax.jit(lambda params, *inputs: call(functional.bind(config, params), *inputs))
    ours, expected = apply(prepared, *inputs), apply(params, *inputs)
    for mine, theirs in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        assert_parity(mine, theirs)


@pytest.mark.parametrize(("config", "size"), CONFIGS.values(), ids=CONFIGS)
def test_prepared_networks_in_bf16_are_as_near_to_fp32_as_plain_ones(rng, seed, config, size):
    """Of 8 bits, Winograd's F(2,3) loses less than one more."""
    call, inputs = calls(config, size)
    inputs = jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape, np.float32)), inputs)
    params = functional.init(config, seed)
    params = {k: v + 0.1 if k.startswith("controlnet_") else v for k, v in params.items()}
    apply = jax.jit(lambda params, *inputs: call(functional.bind(config, params), *inputs))
    expected = apply(params, *inputs)
    short = functional.cast(params, jnp.bfloat16)
    prepared = prepare(config, short, size)
    dense = [value for path, value in short.items() if path.endswith("kernel") and value.ndim == 2]
    assert len([value for value in prepared.values() if value.ndim == 3 and len(value) == 1]) >= len(dense) > 0
    assert all(value.dtype == jnp.bfloat16 for value in prepared.values())

    def away(params):
        found = apply(params, *inputs)
        assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(found))
        pairs = zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True)
        return [float(jnp.sqrt(jnp.mean((x - y) ** 2) / jnp.mean(y**2))) for x, y in pairs]

    plain_ones, prepared_ones = away(short), away(prepared)
    print(plain_ones, prepared_ones)
    assert max(plain_ones) < 0.03
    assert all(ours < 2 * plain for ours, plain in zip(prepared_ones, plain_ones, strict=True))


def test_prepared_dense_layers_have_their_outputs_first(rng, assert_parity):
    x, kernel, bias = (jnp.asarray(rng.standard_normal(shape, np.float32)) for shape in ((2, 5, 12), (12, 7), (7,)))
    expected = np.asarray(x) @ np.asarray(kernel) + np.asarray(bias)
    assert_parity(product(x, kernel, bias), expected)
    assert_parity(product(x, kernel.T[None], bias), expected)
    low = product(x.astype(jnp.bfloat16), kernel.T[None].astype(jnp.bfloat16), bias.astype(jnp.bfloat16))
    assert low.dtype == jnp.float32
    assert_parity(low, expected, 0.01)


def test_only_on_a_cpu_is_anything_prepared(monkeypatch):
    params = functional.init(replace(UNET, layers_per_block=1), 0)
    half = functional.cast(params, jnp.float16)
    assert prepare(UNET, half, (32, 32)) == half
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert prepare(UNET, params, (32, 32)) is params
