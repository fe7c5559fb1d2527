"""A stock ControlNet with its hint embedding against diffusers' ControlNetModel."""

from dataclasses import fields

import numpy as np
import torch

from bdm_jax.models.config import ControlNetConfig, EncoderConfig


def test_residuals_equal_diffusers(unet_case, twin, torch_params, inputs, apply, assert_parity, nhwc, rng):
    unet_config, size = unet_case
    shared = {f.name: getattr(unet_config, f.name) for f in fields(EncoderConfig)}
    config = ControlNetConfig(**shared, conditioning_embedding_out_channels=(4, 8, 12, 20))
    reference = twin(config)
    x = inputs(config, size)
    hint = rng.random((size[0], 8 * size[1], 8 * size[2], 3), dtype=np.float32)
    ours = apply(config, torch_params(reference, config), x.latents, x.t, x.cond, hint)
    skips, mid = reference(*x.torch(), torch.from_numpy(hint).permute(0, 3, 1, 2), return_dict=False, **x.added())
    for mine, theirs in zip((*ours.skips, ours.mid), (*skips, mid), strict=True):
        assert_parity(mine, nhwc(theirs))
