"""IP-Adapters (Ye et al. 2023, arXiv 2308.06721): a image is read beside the text, by the backbone alone.

A CLIP vision tower and the adapter's projection make tokens of the image, and the adapter's layers keys and values of
these for every cross-attention of the backbone: once for all steps and images. What guidance leads away from is, as
in diffusers, the base adapter's reading of a vector of zeros, or Plus' of a image of zeros.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bdm_jax.errors import UserError
from bdm_jax.formats.layouts import to_jax, tree_from_torch
from bdm_jax.formats.networks.ip_adapter import read_original
from bdm_jax.formats.pickles import is_checkpoint, read_checkpoint
from bdm_jax.formats.weights import read_weights
from bdm_jax.models.config import (
    CLIPVisionConfig,
    EncoderConfig,
    ImageProjectionConfig,
    ResamplerConfig,
    UNetConfig,
)
from bdm_jax.models.functional import Params, abstract, bind, input_dtype
from bdm_jax.models.towers.clip import normalised
from bdm_jax.models.unet.ip_adapter import cross_attentions, image_keys
from bdm_jax.runtime.programs import program
from bdm_jax.systems.components import Component
from bdm_jax.systems.fetch import local


@dataclass(frozen=True)
class ImagePrompt:
    """A image (H,W,3) uint8, the vision tower that looks at it, and the tensors of an IP-Adapter's file."""

    adapter: Mapping[str, Any]
    vision: Component
    image: np.ndarray
    strength: float = 1.0
    name: str = "image prompt"


def read_adapter(path: str | Path) -> Mapping[str, Any]:
    """The tensors of an IP-Adapter's file, flat (safetensors) or nested (a checkpoint). Raises FileError."""
    path = local(path)
    return read_checkpoint(path) if path.is_file() and is_checkpoint(path) else read_weights(path).tensors


def read(prompt: ImagePrompt, unet: UNetConfig) -> tuple[Component, Params]:
    """The adapter's projection and its layers for this backbone, as they lie in the file.

    Raises UserError or FileError for what is no IP-Adapter, is one of another backbone or vision tower, or is damaged;
    and for a strength that is not a number.
    """
    if not math.isfinite(prompt.strength):
        raise UserError(f"{prompt.name}: strength {prompt.strength} is not a finite number")
    if not isinstance(tower := prompt.vision.config, CLIPVisionConfig):
        raise UserError(f"{prompt.name}: a {type(tower).__name__} in place of a CLIP vision tower")
    attentions = [(layer.path, layer.channels) for layer in cross_attentions(unet)]
    try:
        file = read_original(_arrays(prompt.adapter), attentions, unet.cross_attention_dim)
    except ValueError as error:
        raise UserError(f"{prompt.name}: {error}") from error
    plus = "hidden_dims" in file.values
    config = ResamplerConfig(**file.values) if plus else ImageProjectionConfig(**file.values)
    own, given = (config.embed_dims, tower.hidden_size) if plus else (config.image_embed_dim, tower.projection_dim)
    if own != given:
        raise UserError(f"{prompt.name}: made for another vision tower (width {own}, this one's {given})")
    projection = tree_from_torch(file.projection, abstract(config), f"{prompt.name}: image_proj", file.table)
    return Component(config, projection), dict(to_jax(key, array) for key, array in file.layers.items())


def keys(prompt: ImagePrompt, unet: Component) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Keys and values (2,T,N,K) by transformer, for the negative and the positive half, the strength in the values."""
    (config, projection), layers = read(prompt, unet.config)
    dtype = input_dtype(unet.params)
    projection, layers = ({key: np.asarray(a, dtype) for key, a in tree.items()} for tree in (projection, layers))
    image = normalised(prompt.image, prompt.vision.config.image_size)
    configs = unet.config, prompt.vision.config, config
    return _keys(configs, prompt.vision.params, projection, layers, image, np.float32(prompt.strength))


@program
def _keys(
    configs: tuple[EncoderConfig, CLIPVisionConfig, ImageProjectionConfig | ResamplerConfig],
    vision: Params,
    projection: Params,
    layers: Params,
    image: jax.Array,
    strength: jax.Array,
) -> dict[str, tuple[jax.Array, jax.Array]]:
    unet, tower, config = configs
    both = jnp.stack([jnp.zeros_like(image), image]).astype(input_dtype(vision))
    vectors, states = bind(tower, vision)(both)
    seen = states if isinstance(config, ResamplerConfig) else vectors.at[0].set(0)
    dtype = input_dtype(projection)
    tokens = bind(config, projection)(seen.astype(dtype))
    made = image_keys(unet, layers, tokens.astype(dtype))  # norms give fp32, which would spread to the backbone
    return {path: (key, strength.astype(value.dtype) * value) for path, (key, value) in made.items()}


def _arrays(adapter: Any) -> dict[str, Any]:
    """The tensors, in a dict or in dicts of a dict. Raises ValueError for anything else: a file may hold any value."""
    parts = [adapter] if isinstance(adapter, Mapping) else []
    parts += [part for part in adapter.values() if isinstance(part, Mapping)] if parts else []
    leaves = [leaf for part in parts for leaf in part.values() if not (part is adapter and isinstance(leaf, Mapping))]
    if not leaves or not all(isinstance(leaf, np.ndarray) for leaf in leaves):
        raise ValueError("not an IP-Adapter: expected image_proj.* and ip_adapter.*, nothing else")
    return adapter
