"""What the loop asks of anything that can be trained.

A task (`XTask`: what the command line sets) names the networks and where the ready ones are. `task.sizes()` reads their
configs; of these `task.objective(sizes)` makes a pure loss, and `bdm_jax.plan` needs no more. `task.start(...)` loads
the networks, opens the records and returns a `Training`: the objective with its initial parameters, its samples, its
export and its preview.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from bdm_jax.data.loader import MixturePart
from bdm_jax.errors import UserError
from bdm_jax.models.config import Config
from bdm_jax.models.functional import Params
from bdm_jax.systems.components import config_in
from bdm_jax.training.inputs import Inputs

Trees = dict[str, Params]  # component name -> its parameters
Shapes = tuple[dict[str, Any], dict[str, Any]]  # trees of ShapeDtypeStruct: what is trained, what is frozen
Batch = dict[str, Any]  # what `sample` makes, stacked, and "place": (B,) int32, each sample's in the global batch
Row = dict[str, Any]  # one sample: arrays, or their shapes
Sizes = Mapping[str, Config]  # component name -> config
ReadSizes = Callable[[str, Path], Config]  # component name, its folder or a single file -> config


class Objective(Protocol):
    """A loss made of configs alone: a frozen dataclass that holds no array."""

    def loss(self, params: Trees, frozen: dict, batch: Batch, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Mean loss of a batch and what else to log; pure. Parameters and frozen networks are of the compute type."""

    def shapes(self) -> Shapes:
        """Of `params` and `frozen`, fp32; nothing is allocated."""

    def row(self, size: int) -> Row:
        """Shapes of one sample of square images of `size` pixels."""


@dataclass(frozen=True)
class Training:
    """A task made ready: networks initialised or loaded, records opened.

    params: initial values of what is trained, fp32. frozen: arguments of the loss that stay as they are, in the compute
    type. parts: the mixture of records that samples are made from.
    sample(record, rng): one record -> one row of a batch; runs in the loader's threads; raises BadRecord for a record
    that cannot be used.
    export(params, folder, metadata): writes what was trained as files that `load_component` and PyTorch's tools read.
    preview(params, records): images (H,W,3) uint8 that show the progress, one per record.
    inputs: what was read for it beside the records; see `training.inputs`.
    """

    objective: Objective
    params: Trees
    frozen: dict[str, Any]
    parts: list[MixturePart]
    sample: Callable[[dict, np.random.Generator], Row]
    export: Callable[[Trees, Path, dict[str, str]], None]
    preview: Callable[[Trees, list[dict]], list[np.ndarray]]
    inputs: Inputs = field(default_factory=dict)


def draw(key: jax.Array, places: jax.Array, make: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """(B, ...) draws that depend on the key and each sample's place (B,) in the global batch only: not on devices,
    processes, or the part of the batch that is computed at once.
    """
    return jax.vmap(lambda place: make(jax.random.fold_in(key, place)))(places)


def without_remat(objective: Any) -> Any:
    """The same objective with nothing computed twice: what its FLOPs are counted of."""
    changes = {
        field.name: "none" if field.name == "remat" else without_remat(value)
        for field in dataclasses.fields(objective)
        if field.name == "remat" or dataclasses.is_dataclass(value := getattr(objective, field.name))
    }
    return dataclasses.replace(objective, **changes)


def read_sizes(name: str, folder: Path) -> Config:
    """The config of a network in its component folder, of which no weights are read.

    Raises:
        UserError: no such folder.
    """
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: no such component folder (config.json is missing there)")
    return config_in(folder, name)
