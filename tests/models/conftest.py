"""The small networks that several parity tests share, with their PyTorch twins."""

import json
from dataclasses import dataclass
from functools import lru_cache

import jax
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel

from bdm_jax.models import functional
from bdm_jax.models.config import UNetConfig, to_json
from bdm_jax.models.unet.conditioning import Conditioning

UNETS = {
    # SD1.5's plan: four levels, the last without attention; two layers; latents that are not square.
    "sd15-plan": (
        UNetConfig(block_out_channels=(16, 32, 48, 48), num_heads=4, cross_attention_dim=24, norm_num_groups=8),
        (2, 16, 24),
    ),
    # Attention elsewhere, one layer, other channels; latents that do not halve evenly (the decoder must crop).
    "odd-latents": (
        UNetConfig(
            in_channels=3,
            out_channels=5,
            block_out_channels=(16, 24, 32),
            transformer_layers=(0, 1, 1),
            layers_per_block=1,
            num_heads=2,
            cross_attention_dim=20,
            norm_num_groups=4,
        ),
        (3, 11, 10),
    ),
    # SDXL's plan: depth and heads per level, dense projections, pooled text and size ids added to the time embedding.
    "sdxl-plan": (
        UNetConfig(
            block_out_channels=(16, 24, 32),
            transformer_layers=(0, 1, 2),
            num_heads=(2, 3, 4),
            cross_attention_dim=20,
            norm_num_groups=4,
            use_linear_projection=True,
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 10,
        ),
        (2, 8, 12),
    ),
}


@dataclass(frozen=True)
class Inputs:
    """Random inputs of one forward pass; `torch()` gives them in PyTorch's layout and argument order."""

    latents: np.ndarray
    t: np.ndarray
    tokens: np.ndarray
    pooled: np.ndarray | None = None
    time_ids: np.ndarray | None = None

    @property
    def cond(self):
        return Conditioning(self.tokens, pooled=self.pooled, time_ids=self.time_ids)

    def torch(self):
        latents = torch.from_numpy(np.ascontiguousarray(np.moveaxis(self.latents, -1, 1)))
        return latents, torch.from_numpy(self.t), torch.from_numpy(self.tokens)

    def added(self):
        """The keyword in which diffusers takes the pooled text and the size ids."""
        if self.pooled is None:
            return {}
        parts = {"text_embeds": self.pooled, "time_ids": self.time_ids}
        return {"added_cond_kwargs": {name: torch.from_numpy(part) for name, part in parts.items()}}


@pytest.fixture(params=UNETS)
def unet_case(request):
    """(config, (batch, height, width) of the latents) of one small UNet."""
    return UNETS[request.param]


@pytest.fixture
def small_case():
    """The smaller of the UNets, where one is enough."""
    return UNETS["odd-latents"]


@pytest.fixture
def inputs(rng):
    """A function from (config, latents' size, tokens) to random Inputs, a different timestep for each sample."""

    def draw(config, size, length=7):
        batch, added = size[0], {}
        if config.has_addition:
            added["pooled"] = rng.standard_normal((batch, config.pooled_dim), dtype=np.float32)
            added["time_ids"] = rng.integers(0, 1025, (batch, 6)).astype(np.float32)
        return Inputs(
            latents=rng.standard_normal((*size, config.in_channels), dtype=np.float32),
            t=rng.integers(0, 1000, batch).astype(np.int32),
            tokens=rng.standard_normal((batch, length, config.text_dim), dtype=np.float32),
            **added,
        )

    return draw


@pytest.fixture
def twin(randomised):
    """A function from our config to a randomly filled diffusers network, made from our config.json."""
    classes = {cls.__name__: cls for cls in (UNet2DConditionModel, ControlNetModel, AutoencoderKL)}

    def build(config, **extra):
        values = json.loads(json.dumps(to_json(config)))
        return randomised(classes[values["_class_name"]].from_config({**values, **extra}))

    return build


@pytest.fixture
def apply():
    """A function that runs one method of a network: apply(config, params, *arguments, method="__call__")."""
    return lambda config, params, *arguments, method="__call__": _compiled(config, method)(params, *arguments)


@lru_cache
def _compiled(config, method):
    """Shared by all tests, so that each network is compiled once per shape of its arguments."""
    return jax.jit(lambda params, *arguments: getattr(functional.bind(config, params), method)(*arguments))
