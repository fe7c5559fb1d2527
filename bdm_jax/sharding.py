"""Where arrays live: one mesh with the axes `data` and `fsdp`, and a rule for every parameter.

Batches are split over both axes. Parameters and optimizer state are split over `fsdp` and repeated over `data`.
"""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from bdm_jax.errors import UserError

# Below this many elements a parameter is kept whole on every device: gathering it would cost more than it saves.
SMALLEST_SPLIT = 2**16


def make_mesh(data: int = -1, fsdp: int = 1) -> Mesh:
    """A mesh over all devices of all processes; -1 takes what the other axis leaves.

    Raises:
        UserError: the axes do not multiply to the number of devices.
    """
    devices = jax.device_count()
    if fsdp == -1:
        fsdp = devices // max(data, 1)
    if data == -1:
        data = devices // max(fsdp, 1)
    if min(data, fsdp) < 1 or data * fsdp != devices:
        raise UserError(f"a mesh of data={data} x fsdp={fsdp} does not fit {devices} devices")
    return jax.make_mesh((data, fsdp), ("data", "fsdp"), axis_types=(AxisType.Auto, AxisType.Auto))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first axis of every array of a batch is split over all devices."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def parameter_sharding(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
    """Large arrays are split over `fsdp` along their largest divisible dimension; the rest is replicated."""
    ways = mesh.shape["fsdp"]
    divisible = [axis for axis, size in enumerate(shape) if size % ways == 0]
    if ways == 1 or not divisible or np.prod(shape) < SMALLEST_SPLIT:
        return replicated(mesh)
    widest = max(divisible, key=lambda axis: shape[axis])
    return NamedSharding(mesh, PartitionSpec(*[None] * widest, "fsdp"))


def tree_sharding(mesh: Mesh, tree):
    """`parameter_sharding` for every leaf of a tree of arrays or of their shapes."""
    return jax.tree.map(lambda leaf: parameter_sharding(mesh, leaf.shape), tree)


def place_batch(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """This process's rows of a global batch -> global arrays."""
    sharding = batch_sharding(mesh)
    return {key: jax.make_array_from_process_local_data(sharding, value) for key, value in batch.items()}
