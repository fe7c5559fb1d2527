"""The loss of a whole text-to-image system, whatever of it is trained: its texts through their encoders, perhaps
through the branch and a ControlNet, the UNet's error at a random noise level (arXiv 2309.00952, figure 1).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from bdm_jax.models.config import UNetConfig
from bdm_jax.models.functional import abstract, bind, input_dtype
from bdm_jax.models.unet.conditioning import Conditioning
from bdm_jax.systems.families import Family
from bdm_jax.training.objectives.denoising import Denoising
from bdm_jax.training.objectives.objective import Batch, Row, Shapes, Sizes, Trees
from bdm_jax.training.objectives.reading import Reading, reading_of
from bdm_jax.training.objectives.remat import Remat, rematerialise

BACKBONE, BRANCH = "backbone", "branch"  # text sources

Residuals = Callable[[jax.Array, jax.Array, Conditioning], Any]  # noisy (B,h,w,C), t (B,), text -> UNet residuals


class Binding(Protocol):
    """How a network is made of what is trained and what is frozen."""

    def __call__(self, name: str, params: Trees, frozen: dict) -> nnx.Module:
        """The network of that name."""


@dataclass(frozen=True)
class WholeNetworks:
    """Every network has a tree of its own, trained or frozen."""

    sizes: Sizes

    def __call__(self, name: str, params: Trees, frozen: dict) -> nnx.Module:
        return bind(self.sizes[name], params[name] if name in params else frozen[name])


@dataclass(frozen=True)
class SystemObjective:
    """The denoising loss of a backbone that reads English (source "backbone") or of a backbone with the prompt "" and a
    branch that reads another language (source "branch").

    sizes: of the networks in a step. trained: shapes of what is trained, by the names of its trees. network: how the
    networks are made of it. reading: who reads the source's texts. empty: shapes of the backbone's states of the prompt
    "", for a branch.
    """

    sizes: Sizes
    trained: dict[str, Any]
    network: Binding
    denoising: Denoising
    reading: Reading
    empty: Conditioning | None = None
    remat: Remat = "none"

    @property
    def source(self) -> str:
        """Whose texts are read."""
        return self.reading.reader.source

    def loss(self, params: Trees, frozen: dict, batch: Batch, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """See `Objective`."""
        x, t, target = self.denoising.noised(batch, key)
        prediction = self.predict(params, frozen, batch["texts"][self.source], x, t)
        return self.denoising.error(prediction, target, t), {}

    def shapes(self) -> Shapes:
        """See `Objective`."""
        names = ("unet", *(["branch"] if self.source == BRANCH else []), *self.reading.reader.encoders)
        frozen = {name: abstract(self.sizes[name]) for name in names if name not in self.trained}
        return self.trained, {**frozen, **({} if self.empty is None else {"empty": self.empty})}

    def row(self, size: int) -> Row:
        """See `Objective`."""
        ids = jax.ShapeDtypeStruct(self.reading.shape, jnp.int32)
        return {**self.denoising.row(size), "texts": {self.source: ids}}

    def predict(
        self,
        params: Trees,
        frozen: dict,
        ids: jax.Array,
        x: jax.Array,
        t: jax.Array,
        residuals: Residuals | None = None,
    ) -> jax.Array:
        """Noisy latents (B,h,w,C) fp32 at t (B,) with texts (B,S), or (B,T,S) for several tokenizers -> what the UNet
        predicts, (B,h,w,C).

        residuals: what is added to the bare backbone's skips and middle.
        """
        x = x.astype(input_dtype(params["unet"] if "unet" in params else frozen["unet"]))
        text = self._read(params, frozen, ids, x)
        if self.source == BACKBONE:
            unet = self.bound("unet", params, frozen)
            return unet(x, t, text, None if residuals is None else residuals(x, t, text))
        empty = jax.tree.map(lambda states: jnp.broadcast_to(states, (len(x), *states.shape[1:])), frozen["empty"])
        unet, branch = self.bound("unet", params, frozen), self.bound("branch", params, frozen)
        return unet(x, t, self._with_sizes(empty, "unet", x), branch(x, t, text))

    def bound(self, name: str, params: Trees, frozen: dict) -> nnx.Module:
        """The network of that name, as it is computed with."""
        remat = "none" if name in self.reading.reader.encoders else self.remat
        return rematerialise(self.network(name, params, frozen), remat)

    def _read(self, params: Trees, frozen: dict, ids: jax.Array, x: jax.Array) -> Conditioning:
        text = self.reading(lambda name: self.bound(name, params, frozen), ids, x.dtype)
        return self._with_sizes(text, "unet" if self.source == BACKBONE else "branch", x)

    def _with_sizes(self, text: Conditioning, reader: str, x: jax.Array) -> Conditioning:
        """With SDXL's size ids (arXiv 2307.01952, section 2.2), where the reader wants them: an image that was neither
        scaled nor cropped.
        """
        if not self.sizes[reader].has_addition:
            return text
        factor = 1 if self.denoising.vae is None else self.denoising.vae.factor
        height, width = (side * factor for side in x.shape[1:3])
        ids = jnp.asarray((height, width, 0, 0, height, width), jnp.float32)
        return replace(text, time_ids=jnp.broadcast_to(ids, (len(x), 6)))


def empty_text(family: Family, sizes: Sizes) -> Conditioning:
    """Shapes of what the UNet reads of the prompt "", in one window."""
    unet: UNetConfig = sizes["unet"]
    length = reading_of(family.reader(BACKBONE), unet, sizes).shape[-1]
    tokens = jax.ShapeDtypeStruct((1, length, unet.text_dim), jnp.float32)
    pooled = jax.ShapeDtypeStruct((1, unet.pooled_dim), jnp.float32) if unet.has_addition else None
    return Conditioning(tokens, pooled=pooled)
