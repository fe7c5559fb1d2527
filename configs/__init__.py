"""Training runs by name: `emoji-vae` is CONFIG in emoji_vae.py. Every file opens with the command, the hardware and
the cost.
"""

import importlib
import pkgutil
from typing import TYPE_CHECKING

from bdm_jax.errors import unknown

if TYPE_CHECKING:  # names alone need no JAX
    from bdm_jax.training.config import TrainConfig


def names() -> list[str]:
    """The runs there are."""
    return sorted(module.name.replace("_", "-") for module in pkgutil.iter_modules(__path__) if module.name != "demo")


def load(name: str) -> "TrainConfig":
    """The run of that name.

    Raises:
        UserError: no such run; the nearest name is offered.
    """
    if name not in names():
        raise unknown("config", name, names())
    return importlib.import_module(f"{__name__}.{name.replace('-', '_')}").CONFIG
