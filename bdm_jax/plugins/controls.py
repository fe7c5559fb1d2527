"""Networks that read a map, beside the branch: ControlNets (Zhang et al. 2023) and T2I-Adapters (Mou et al. 2023).

What they add adds up. The Chinese prompt goes to the branch; a ControlNet, which was trained on CLIP's English states,
gets the English or the empty prompt. A T2I-Adapter reads its map only, once per image; what it adds inside the
backbone's encoder is seen by the backbone alone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from bdm_jax.errors import UserError
from bdm_jax.models.config import ControlNetConfig, T2IAdapterConfig, UNetConfig
from bdm_jax.models.functional import Params, bind, input_dtype
from bdm_jax.runtime.programs import program
from bdm_jax.systems.components import Component


@dataclass(frozen=True)
class Control:
    """A ControlNet or a T2I-Adapter at work: `hint` is its map (H,W,3) uint8; start and end are fractions of the
    steps.
    """

    network: Component
    hint: np.ndarray
    strength: float = 1.0
    start: float = 0.0
    end: float = 1.0
    name: str = "control"


def check(control: Control, unet: UNetConfig, factor: int) -> None:
    """Raises UserError for a network of another base model and for settings that are not valid.

    `factor`: pixels per latent on a side.
    """
    config = control.network.config
    if isinstance(config, T2IAdapterConfig):
        widths, strides = unet.block_out_channels, unet.feature_strides
        if config.adapter_type == "full_adapter_xl":  # one more, of the middle
            widths, strides = widths + widths[-1:], (*strides, 2 ** (unet.levels - 1))
        strides = tuple(factor * stride for stride in strides)
        sizes = [("channels", config.widths, widths), ("pixels per feature", config.strides, strides)]
        if config.in_channels not in (1, 3):
            raise UserError(f"{control.name}: reads {config.in_channels} channels; maps have 3, or 1 where grey")
    elif isinstance(config, ControlNetConfig):
        sizes = [
            ("text width", config.cross_attention_dim, unet.cross_attention_dim),
            ("skip channels", config.skip_channels, unet.skip_channels),
            ("latent channels", config.in_channels, unet.in_channels),
        ]
    else:
        raise UserError(f"{control.name}: a {type(config).__name__} in place of a ControlNet or a T2I-Adapter")
    for what, own, other in sizes:
        if own != other:
            raise UserError(f"{control.name}: made for another base model ({what} {own}, the backbone's {other})")
    if not math.isfinite(control.strength):
        raise UserError(f"{control.name}: strength {control.strength} is not a finite number")
    if not 0.0 <= control.start < control.end <= 1.0:
        raise UserError(f"{control.name}: start {control.start} and end {control.end}: 0 <= start < end <= 1")


def check_sizes(control: Control, sizes: Sequence[tuple[int, int]]) -> None:
    """Raises UserError for a map that is not as large as the images of the first pass, and for images, of any pass,
    that an adapter cannot divide.
    """
    config = control.network.config
    own, wanted, *_ = (f"{width}x{height}" for height, width in (control.hint.shape[:2], *sizes))
    if own != wanted:
        raise UserError(f"{control.name}: its map has {own} pixels, the image {wanted}; draw or resize it to that")
    for height, width in sizes if isinstance(config, T2IAdapterConfig) else ():
        if height % (unit := config.downscale_factor) or width % unit:
            raise UserError(f"{control.name}: an image of {width}x{height} pixels; it needs multiples of {unit}")


def embed(control: Control, hint: np.ndarray) -> jax.Array | tuple[jax.Array, ...]:
    """A map (H,W,3) uint8 -> what a ControlNet adds after its first convolution, (1,h,w,C), or what a T2I-Adapter adds
    at each level; once per image.
    """
    config, params = control.network
    if isinstance(config, T2IAdapterConfig) and config.in_channels == 1:
        hint = np.asarray(Image.fromarray(hint).convert("L"))[..., None]
    return _embed(config, params, hint[None])


@program
def _embed(config: ControlNetConfig | T2IAdapterConfig, params: Params, hints: jax.Array):
    network = bind(config, params)
    read = network if isinstance(config, T2IAdapterConfig) else network.controlnet_cond_embedding
    return read((hints.astype(jnp.float32) / 255).astype(input_dtype(params)))
