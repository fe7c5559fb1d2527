"""TPU slices by name, and their chips in a mesh's shape: real descriptions, for compiling, or the sizes alone."""

import importlib.util
import math
import os
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh

from bdm_jax.errors import UserError, unknown
from bdm_jax.runtime.costs import CHIPS, Chip
from bdm_jax.runtime.sharding import AXES
from bdm_jax.training.config import MeshConfig


@dataclass(frozen=True)
class Slice:
    """name: as libtpu knows it ("v5e:4x4"); sizes: chips along its axes."""

    name: str
    chip: Chip
    sizes: tuple[int, ...]

    @property
    def chips(self) -> int:
        """How many."""
        return math.prod(self.sizes)


def parse_topology(text: str) -> Slice:
    """ "v5p:4x4x8" -> a slice.

    Raises:
        UserError: no such chip, or sizes that it cannot have: v5e and v6e have two axes, v5p three.
    """
    name, _, sizes = text.lower().partition(":")
    if name not in CHIPS:
        raise unknown("chip", name, CHIPS)
    axes = 3 if name == "v5p" else 2
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", sizes) or sizes.count("x") + 1 != axes:
        example = f"{name}:{'x'.join(['4'] * axes)}"
        raise UserError(f"topology {text!r}: {name} slices have {axes} axes, as in {example}")
    return Slice(f"{name}:{sizes}", CHIPS[name], tuple(int(size) for size in sizes.split("x")))


def mesh_sizes(where: Slice, mesh: MeshConfig) -> tuple[int, int, int]:
    """Chips along data, fsdp and tensor.

    Raises:
        UserError: they do not multiply to the slice's.
    """
    sizes = [mesh.data, mesh.fsdp, mesh.tensor]
    if sizes.count(-1) == 1:
        sizes[sizes.index(-1)] = where.chips // max(-math.prod(sizes), 1)
    if min(sizes) < 1 or math.prod(sizes) != where.chips:
        raise UserError(f"a mesh of {' x '.join(map(str, sizes))} does not fit the {where.chips} chips of {where.name}")
    return sizes[0], sizes[1], sizes[2]


def abstract_mesh(where: Slice, mesh: MeshConfig) -> AbstractMesh:
    """The mesh without its chips: enough for shardings. Raises UserError as `mesh_sizes`."""
    return AbstractMesh(mesh_sizes(where, mesh), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def described_mesh(where: Slice, mesh: MeshConfig) -> Mesh:
    """The mesh of the slice's chips as libtpu describes them, to compile for. Raises UserError as `mesh_sizes`, and
    where libtpu is not installed or does not know the slice.
    """
    sizes = mesh_sizes(where, mesh)
    devices = np.asarray(_topology(where).devices).reshape(sizes)
    return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def _topology(where: Slice) -> Any:
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            'compiling for a TPU needs libtpu: pip install -e ".[tpu]"; --shapes says without it what memory is needed'
        )
    from jax.experimental import topologies

    # No metadata server is asked what machine this is; several processes may compile at once, as none has a TPU.
    quiet = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    for name, value in quiet.items():
        os.environ.setdefault(name, value)
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=where.name)
    except Exception as error:  # libtpu's own, of whatever type the release has
        raise UserError(
            f"topology {where.name}: libtpu does not know it ({' '.join(str(error).split())[:160]})"
        ) from error
