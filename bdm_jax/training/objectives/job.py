"""What the loop asks of anything that can be trained, and the draws that all of it makes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from bdm_jax.data.loader import MixturePart
from bdm_jax.models.functional import Params

Trees = dict[str, Params]  # component name -> its parameters
Shapes = tuple[dict[str, Any], dict[str, Any]]  # trees of ShapeDtypeStruct: what is trained, what is left alone
TimestepBias = Literal["none", "later"]
Batch = dict[str, jax.Array]  # what `sample` makes, stacked, and "place": (B,) int32, each one's in the global batch


class Objective(Protocol):
    """A task made ready: networks initialised or loaded, sets opened. `parts` are what its samples are drawn from."""

    params: Trees
    frozen: dict[str, Any]
    parts: list[MixturePart]

    def sample(self, record: dict, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """One record of `parts` -> one row of a batch; runs in the loader's threads. Raises BadRecord for a record that
        cannot be used.
        """

    def loss(self, params: Trees, frozen: dict, batch: Batch, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Mean loss of a batch and what else to log; pure. Parameters and frozen networks are of the compute type."""

    def export(self, params: Trees, folder: Path, metadata: dict[str, str]) -> None:
        """Write what came out as files that `load_component` and PyTorch's tools read, `metadata` in what was
        trained.
        """

    def pictures(self, params: Trees, records: list[dict]) -> list[np.ndarray]:
        """Pictures (H,W,3) uint8 that show how far training is, one per record."""


def draw(key: jax.Array, places: jax.Array, make: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """(B, ...) draws that depend on the key and each sample's place (B,) in the global batch only: not on devices,
    processes, or the part of the batch that is computed at once.
    """
    return jax.vmap(lambda place: make(jax.random.fold_in(key, place)))(places)


def timestep(key: jax.Array, count: int, bias: TimestepBias) -> jax.Array:
    """One of 0..count-1, each as likely as the others, or, with "later", likely in proportion to itself: the noisier
    half, where the words decide what the picture shows, then gets three quarters of the training.
    """
    if bias == "none":
        return jax.random.randint(key, (), 0, count)
    return jnp.minimum(jnp.int32(count * jnp.sqrt(jax.random.uniform(key))), count - 1)
