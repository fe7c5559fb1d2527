"""bdm_jax: the Bridge Diffusion Model in JAX.

A frozen English Stable-Diffusion backbone and a trainable branch that reads another language (Chinese first).

    from bdm_jax import BridgePipeline

    pipeline = BridgePipeline.from_pretrained("assets/demo")
    image = pipeline("红灯笼", seed=0).images[0]

docs/architecture.md shows the rooms.
"""

import importlib
import os

TYPE_CHECKING = False
if TYPE_CHECKING:  # as typing.TYPE_CHECKING, which is not worth its import
    from bdm_jax.app.drawing import BridgePipeline
    from bdm_jax.sampling.generate import generate
    from bdm_jax.sampling.settings import Request, Sampling

__all__ = ["BridgePipeline", "Request", "Sampling", "generate"]

# Where each name lives. It is loaded when it is asked for: JAX takes a second, and `--help` does not need it.
_HOMES = {
    "BridgePipeline": "bdm_jax.app.drawing",
    "Request": "bdm_jax.sampling.settings",
    "Sampling": "bdm_jax.sampling.settings",
    "generate": "bdm_jax.sampling.generate",
}

_folder = os.path.dirname(os.path.abspath(__file__))
if not os.path.isdir(os.path.join(_folder, "configs")):
    # A checkout: configs/ and convert/ lie beside this folder and are bdm_jax.configs and bdm_jax.convert all the same,
    # as in a wheel, where they lie within it.
    __path__.append(os.path.dirname(_folder))


def __getattr__(name: str):
    """A public name, from its home (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
