"""The branch against a diffusers ControlNet whose hint embedding is zero, and in front of a diffusers UNet."""

from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from bdm_jax.models import functional
from bdm_jax.models.config import BDM_BRANCH, SD15_UNET, BranchConfig, EncoderConfig
from bdm_jax.models.unet.branch import init_branch_from_unet

HINT = "controlnet_cond_embedding."


def branch_of(unet_config, width):
    """The branch of a backbone, reading text states of another width."""
    shared = {f.name: getattr(unet_config, f.name) for f in fields(EncoderConfig)}
    return BranchConfig(**{**shared, "cross_attention_dim": width})


@pytest.fixture
def branch_twin(twin):
    """A function from a BranchConfig to a random diffusers ControlNet whose hint embedding gives exactly zero."""

    def build(config):
        module = twin(config)
        module.controlnet_cond_embedding.conv_out.weight.zero_()
        module.controlnet_cond_embedding.conv_out.bias.zero_()
        return module

    return build


def run_torch(module, x):
    """The ControlNet's residuals for a picture that its zero hint embedding does not see."""
    latents, t, tokens = x.torch()
    picture = torch.rand(latents.shape[0], 3, 8 * latents.shape[2], 8 * latents.shape[3])
    return module(latents, t, tokens, picture, return_dict=False, **x.added())


def test_residuals_equal_diffusers(unet_case, branch_twin, torch_params, inputs, apply, assert_parity, nhwc):
    unet_config, size = unet_case
    config = branch_of(unet_config, 28)
    reference = branch_twin(config)
    x = inputs(config, size, length=9)
    ours = apply(config, torch_params(reference, config, drop=HINT), x.latents, x.t, x.cond)
    skips, mid = run_torch(reference, x)
    assert len(ours.skips) == len(skips)
    for mine, theirs in zip((*ours.skips, ours.mid), (*skips, mid), strict=True):
        assert_parity(mine, nhwc(theirs))


def test_branch_and_backbone_equal_diffusers(
    unet_case, twin, branch_twin, torch_params, inputs, apply, assert_parity, nhwc
):
    """The whole Bridge Diffusion Model: two texts of different width and length, one prediction."""
    unet_config, size = unet_case
    config = branch_of(unet_config, 28)
    unet, branch = twin(unet_config), branch_twin(config)
    english = inputs(unet_config, size)
    chinese = replace(inputs(config, size, length=9), latents=english.latents, t=english.t)
    residuals = apply(config, torch_params(branch, config, drop=HINT), chinese.latents, chinese.t, chinese.cond)
    ours = apply(unet_config, torch_params(unet, unet_config), english.latents, english.t, english.cond, residuals)
    skips, mid = run_torch(branch, chinese)
    added = {"down_block_additional_residuals": skips, "mid_block_additional_residual": mid, **english.added()}
    expected = unet(*english.torch(), **added).sample
    assert_parity(ours, nhwc(expected))


def test_fresh_branch_leaves_the_backbone_unchanged_bit_for_bit(unet_case, inputs, apply, seed):
    unet_config, size = unet_case
    config = branch_of(unet_config, 28)
    unet, branch = functional.init(unet_config, seed), functional.init(config, seed + 1)
    x, chinese = inputs(unet_config, size), inputs(config, size, length=9)

    residuals = apply(config, branch, x.latents, x.t, chinese.cond)
    plain = np.asarray(apply(unet_config, unet, x.latents, x.t, x.cond))
    bridged = np.asarray(apply(unet_config, unet, x.latents, x.t, x.cond, residuals))
    assert plain.tobytes() == bridged.tobytes()


def test_start_from_the_backbone_copies_all_but_text_projections_and_zero_convolutions(unet_case, seed):
    unet_config, _ = unet_case
    config = branch_of(unet_config, 28)
    fresh, unet = functional.init(config, seed), functional.init(unet_config, seed + 1)
    started = init_branch_from_unet(fresh, unet)
    kept = {key for key in started if started[key] is fresh[key]}
    expected = {key for key in fresh if key.startswith("controlnet_") or ".attn2.to_k." in key or ".attn2.to_v." in key}
    assert kept == expected
    assert all(started[key] is unet[key] for key in started.keys() - kept)


def test_sd15_branch_leaves_fourteen_tensors_fresh():
    """bdm.md 9.12: 14 tensors, 11,796,480 parameters, read text of another width than the backbone's."""
    branch, unet = functional.abstract(BDM_BRANCH), functional.abstract(SD15_UNET)
    fresh = {
        key: value
        for key, value in branch.items()
        if not key.startswith("controlnet_") and unet[key].shape != value.shape
    }
    assert len(fresh) == 14
    assert functional.count(fresh) == 11_796_480
    assert all(key.endswith(("attn2.to_k.kernel", "attn2.to_v.kernel")) for key in fresh)
