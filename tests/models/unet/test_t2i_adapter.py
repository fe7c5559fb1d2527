"""T2I-Adapters against diffusers' T2IAdapter; the names of files at full size."""

from dataclasses import asdict, replace

import jax
import numpy as np
import pytest
import torch
from diffusers import T2IAdapter

from bdm_jax.formats.layouts import to_torch, tree_from_torch, tree_to_torch
from bdm_jax.formats.networks.t2i_adapter import find_adapter, original_t2i_adapter
from bdm_jax.models import functional
from bdm_jax.models.config import T2IAdapterConfig, UNetConfig, from_json
from bdm_jax.models.unet.t2i_adapter import unshuffle

LIGHT, XL = "light_adapter", "full_adapter_xl"
CASES = {
    "full": (T2IAdapterConfig(channels=(8, 12, 16, 16), downscale_factor=4), (2, 64, 96)),
    "full, odd": (
        T2IAdapterConfig(in_channels=1, channels=(6, 6, 10), num_res_blocks=3, downscale_factor=2),
        (1, 22, 14),
    ),
    "light": (
        T2IAdapterConfig(channels=(8, 12, 16), num_res_blocks=4, downscale_factor=4, adapter_type=LIGHT),
        (2, 64, 96),
    ),
    "xl": (T2IAdapterConfig(1, (8, 12, 16, 16), downscale_factor=4, adapter_type=XL), (2, 64, 96)),
    "light, odd": (
        T2IAdapterConfig(1, channels=(8, 16), num_res_blocks=1, downscale_factor=2, adapter_type=LIGHT),
        (1, 22, 14),
    ),
}
FULL_SIZE = {
    "full": T2IAdapterConfig(),
    "light": T2IAdapterConfig(channels=(320, 640, 1280), num_res_blocks=4, adapter_type=LIGHT),
    "xl": T2IAdapterConfig(downscale_factor=16, adapter_type=XL),
}


def build(config):
    """diffusers' network of the same sizes."""
    return T2IAdapter(**{**asdict(config), "channels": list(config.channels)})


@pytest.mark.parametrize("name", CASES)
def test_features_equal_diffusers(name, randomised, torch_params, apply, assert_parity, nhwc, nchw, rng):
    config, (batch, height, width) = CASES[name]
    reference = randomised(build(config))
    params = torch_params(reference, config)
    picture = rng.random((batch, height, width, config.in_channels), np.float32)
    features, expected = apply(config, params, picture), reference(nchw(picture))
    assert len(features) == len(expected)
    for ours, theirs in zip(features, expected, strict=True):
        assert_parity(ours, nhwc(theirs))


def test_unshuffle_is_exact(rng, nhwc, nchw):
    x = rng.random((2, 16, 24, 3), np.float32)
    np.testing.assert_array_equal(unshuffle(x, 8), nhwc(torch.nn.functional.pixel_unshuffle(nchw(x), 8)))


@pytest.mark.parametrize("name", FULL_SIZE)
def test_full_size(name):
    """Every tensor is there, in diffusers' names and, there and back, in the original ones."""
    config = FULL_SIZE[name]
    with torch.device("meta"):
        reference = build(config)
    ours = {key: np.broadcast_to(np.float32(0), leaf.shape) for key, leaf in functional.abstract(config).items()}
    shapes = {key: array.shape for key, array in (to_torch(*item) for item in ours.items())}
    assert shapes == {key: tuple(tensor.shape) for key, tensor in reference.state_dict().items()}
    light = config.adapter_type == LIGHT
    table = original_t2i_adapter(len(config.channels) + light, config.num_res_blocks, light)
    original = tree_to_torch(ours, table)
    assert tree_from_torch(original, functional.abstract(config), "original", table).keys() == ours.keys()
    layers = ("block1.weight", "block1.bias", "block2.weight", "block2.bias")
    if name != "light":
        expected = {f"body.{i}.{layer}" for i in range(8) for layer in layers}
        expected |= {
            f"{conv}.{leaf}" for conv in ("conv_in", "body.2.in_conv", "body.4.in_conv") for leaf in ("weight", "bias")
        }
    else:
        expected = {f"body.{i}.body.{j}.{layer}" for i in range(4) for j in range(4) for layer in layers}
        expected |= {
            f"body.{i}.{side}_conv.{x}" for i in range(4) for side in ("in", "out") for x in ("weight", "bias")
        }
    assert original.keys() == expected


def test_where_the_features_go(inputs, twin):
    """In diffusers a feature joins a level's last layer: in the skip, and in what goes on to the downsampler."""
    config = UNetConfig(
        block_out_channels=(8, 16, 24),
        transformer_layers=(1, 1, 0),
        num_heads=2,
        cross_attention_dim=8,
        norm_num_groups=4,
    )
    unet, seen = twin(config), {}

    def keep(name, module, part):
        module.register_forward_hook(lambda _, given, made: seen.update({name: part(given, made).clone()}))

    for i, block in enumerate(unet.down_blocks):
        with_text = config.transformer_layers[i]
        last = block.attentions[-1] if with_text else block.resnets[-1]
        keep(("layer", i), last, lambda _, made, text=with_text: made[0] if text else made)
        if block.downsamplers:
            keep(("onward", i), block.downsamplers[0], lambda given, _: given[0])
            keep(("skip", i), block, lambda _, made: made[1][config.layers_per_block - 1])
    keep(("onward", 2), unet.mid_block, lambda given, _: given[0])
    keep(("skip", 2), unet.up_blocks[0].resnets[0], lambda given, _: given[0][:, config.block_out_channels[-1] :])
    features = [torch.randn(1, width, 16 >> i, 16 >> i) for i, width in enumerate(config.block_out_channels)]
    residuals = [feature.clone() for feature in features]
    unet(*inputs(config, (1, 16, 16)).torch(), down_intrablock_additional_residuals=residuals)
    for i, feature in enumerate(features):
        for place in ("skip", "onward"):
            torch.testing.assert_close(seen[place, i], seen["layer", i] + feature, rtol=0, atol=1e-6)


@pytest.mark.parametrize("unet_case", ["sdxl-plan"], indirect=True)
def test_sdxl_s_features(unet_case, inputs, twin, torch_params, apply, randomised, assert_parity, nhwc, nchw, rng):
    """Whole networks: after the downsampler of a level without text, before that of one with, and in the middle."""
    config, (batch, height, width) = unet_case
    widths = config.block_out_channels
    adapter_config = T2IAdapterConfig(channels=(*widths, widths[-1]), downscale_factor=16, adapter_type=XL)
    assert [8 * stride for stride in config.feature_strides] == [*adapter_config.strides[: config.levels]]
    unet, adapter = twin(config), randomised(build(adapter_config))
    picture, x = rng.random((1, 8 * height, 8 * width, 3), np.float32), inputs(config, (batch, height, width))
    added = [feature.repeat(batch, 1, 1, 1) for feature in adapter(nchw(picture))]
    expected = unet(*x.torch(), **x.added(), down_intrablock_additional_residuals=added).sample
    features = apply(adapter_config, torch_params(adapter, adapter_config), picture)
    params = torch_params(unet, config)

    @jax.jit
    def run(params, features):
        net = functional.bind(config, params)
        return net.decode(*net.encode(x.latents, x.t, x.cond, features=features), x.t, x.cond)

    assert_parity(run(params, features), nhwc(expected))
    without = unet(*x.torch(), **x.added()).sample
    assert (expected - without).abs().max() > 0.01 * without.abs().max()


@pytest.mark.parametrize(("channels", "inputs"), [(3, 768), (1, 256)])
def test_a_file_for_sdxl_is_told_by_its_pixels(channels, inputs):
    config = replace(FULL_SIZE["xl"], in_channels=channels)
    ours = {key: np.broadcast_to(np.float32(0), leaf.shape) for key, leaf in functional.abstract(config).items()}
    original = tree_to_torch(ours, original_t2i_adapter(4, config.num_res_blocks))
    assert original["conv_in.weight"].shape[1] == inputs
    (found,) = find_adapter({key: array.shape for key, array in original.items()}, {})
    assert found.family == "SDXL" and from_json(found.config) == config


def test_what_is_no_kind_of_adapter():
    with pytest.raises(ValueError, match="adapter_type 'full' is not implemented .full_adapter, light_adapter, full_"):
        T2IAdapterConfig(adapter_type="full")
