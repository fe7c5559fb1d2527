"""Stock ControlNets beside the branch (Zhang et al. 2023): each reads a map and the English text, the residuals add up.

The Chinese words go to the branch; a ControlNet, which was trained on CLIP's English states, gets the English or the
empty prompt.
"""

import math
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from bdm_jax.components import Component, load_component
from bdm_jax.data.images import read_picture
from bdm_jax.errors import UserError, unknown
from bdm_jax.models.config import ControlNetConfig, UNetConfig
from bdm_jax.models.functional import Params, bind
from bdm_jax.plugins.spec import parse_control


@dataclass(frozen=True)
class Control:
    """A ControlNet at work: `hint` is its map (H,W,3) uint8; start and end are fractions of the steps."""

    network: Component
    hint: np.ndarray
    strength: float = 1.0
    start: float = 0.0
    end: float = 1.0
    name: str = "control"


def load(text: str, dtype: str | None = None) -> Control:
    """A control as it is written on the command line (see `spec.parse_control`); with `from`, its map is made of a
    picture.
    """
    network, picture, values = parse_control(text)
    hint = read_picture(picture)
    if (maker := values.pop("from", None)) is not None:
        from bdm_jax.plugins.hints import HINTS  # OpenCV, where it is asked for

        if maker not in HINTS:
            raise unknown("map", maker, HINTS)
        hint = HINTS[maker](hint)
    return Control(load_component(network, dtype, "controlnet"), hint, **values, name=network.name)


def check(control: Control, unet: UNetConfig) -> None:
    """Raises UserError for a network of another base model and for settings that cannot be."""
    config = control.network.config
    if not isinstance(config, ControlNetConfig):
        raise UserError(f"{control.name}: a {type(config).__name__} in place of a ControlNet")
    for what, own, other in (
        ("text width", config.cross_attention_dim, unet.cross_attention_dim),
        ("skip channels", config.skip_channels, unet.skip_channels),
        ("latent channels", config.in_channels, unet.in_channels),
    ):
        if own != other:
            raise UserError(f"{control.name}: made for another base model ({what} {own}, the backbone's {other})")
    if not math.isfinite(control.strength):
        raise UserError(f"{control.name}: strength {control.strength} is not a finite number")
    if not 0.0 <= control.start < control.end <= 1.0:
        raise UserError(f"{control.name}: start {control.start} and end {control.end}: 0 <= start < end <= 1")


def check_size(control: Control, size: tuple[int, int]) -> None:
    """Raises UserError for a map that is not as large as the pictures."""
    if control.hint.shape[:2] != size:
        own, wanted = (f"{shape[1]}x{shape[0]}" for shape in (control.hint.shape, size))
        raise UserError(f"{control.name}: its map has {own} pixels, the picture {wanted}; draw or resize it to that")


def embed(control: Control, hint: np.ndarray) -> jax.Array:
    """A map (H,W,3) uint8 -> what the ControlNet adds after its first convolution, (1,h,w,C); once per picture."""
    return _embed(*control.network, hint[None])


@partial(jax.jit, static_argnums=0)
def _embed(config: ControlNetConfig, params: Params, hints: jax.Array) -> jax.Array:
    dtype = params["conv_in.kernel"].dtype
    return bind(config, params).controlnet_cond_embedding((hints.astype(jnp.float32) / 255).astype(dtype))
