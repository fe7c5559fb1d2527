"""Networks inside a loss: bound to their parameters, with less memory for the gradient where that is asked for."""

from typing import Literal

import jax
from flax import nnx

from bdm_jax.models.config import Config
from bdm_jax.models.functional import Params, bind

Remat = Literal["none", "blocks"]


def network(config: Config, params: Params, remat: Remat) -> nnx.Module:
    """The network with these parameters, as `rematerialise` leaves it."""
    return rematerialise(bind(config, params), remat)


def rematerialise(bound: nnx.Module, remat: Remat) -> nnx.Module:
    """With "blocks" every resnet and transformer keeps only its inputs for the gradient and is computed once more there
    (Chen et al., arXiv 1604.06174): the same numbers, a third more work.
    """
    if remat == "blocks":
        for _, module in list(nnx.iter_modules(bound)):
            for name in ("resnets", "attentions"):
                if hasattr(module, name):
                    setattr(module, name, nnx.List([_Remat(part) for part in getattr(module, name)]))
    return bound


class _Remat(nnx.Module):
    def __init__(self, part: nnx.Module):
        self.part = part

    @property
    def time_emb_proj(self) -> nnx.Module:
        """A resnet's layer that the UNet calls itself, once for all."""
        return self.part.time_emb_proj

    def __call__(self, *inputs):
        numbers = tuple(place for place, value in enumerate(inputs) if isinstance(value, float))  # never traced
        return jax.checkpoint(lambda *inputs: self.part(*inputs), static_argnums=numbers)(*inputs)
