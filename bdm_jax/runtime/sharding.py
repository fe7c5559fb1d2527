"""Where arrays live: one mesh with the axes `data`, `fsdp` and `tensor`, and exactly one rule for every parameter.

Batches are split over `data` and `fsdp`. Large parameters, and what the optimizer keeps of them, are split over `fsdp`
and, where a rule says how, over `tensor`; they are repeated over `data`.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from bdm_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")

# Below this many elements a parameter is kept whole on every device: gathering it would cost more than it saves.
SMALLEST_SPLIT = 2**16

Placement = Literal["whole", "split", "columns", "rows"]

# In pairs, so that what the first makes on each `tensor` device is what the second there needs (Megatron-LM,
# arXiv 1909.08053): a layer whose outputs are split, then one whose inputs are.
_COLUMNS = r"\.(to_[qkv]|[qkv]_proj|query|key|value|net\.0\.proj|fc1|intermediate\.dense|conv1|linear_1)\.kernel$"
_ROWS = r"\.(to_out\.0|out_proj|net\.2|fc2|output\.dense|conv2|linear_2)\.kernel$"

# (pattern of the parameter's path, placement): "whole" on every device, "split" over fsdp only, "columns" also over
# tensor along the outputs, "rows" along the inputs.
RULES: tuple[tuple[str, Placement], ...] = (
    (r"(^|\.)(bias|scale)$", "whole"),
    (r"(^|\.)embedding$", "split"),
    (_COLUMNS, "columns"),
    (_ROWS, "rows"),
    (rf"^(?!.*({_COLUMNS}|{_ROWS}))(.*\.)?kernel$", "split"),
)


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """A mesh over all devices of all processes; -1 takes what the other axes leave.

    Raises:
        UserError: the axes do not multiply to the number of devices.
    """
    devices, sizes = jax.device_count(), [data, fsdp, tensor]
    if sizes.count(-1) == 1:
        sizes[sizes.index(-1)] = devices // max(-int(np.prod(sizes)), 1)
    if min(sizes) < 1 or np.prod(sizes) != devices:
        raise UserError(f"a mesh of data={data} x fsdp={fsdp} x tensor={tensor} does not fit {devices} devices")
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def batch_sharding(mesh: Mesh, stacked: bool = False) -> NamedSharding:
    """The first axis of every array of a batch is split over `data` and `fsdp`; of stacked batches, the second."""
    return NamedSharding(mesh, PartitionSpec(*[None] * stacked, ("data", "fsdp")))


def batch_ways(mesh: Mesh) -> int:
    """Into how many parts a batch is split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def placement(path: str) -> Placement:
    """What the one rule that matches a parameter's path says.

    Raises:
        ValueError: no rule matches, or several do (named).
    """
    matches = [(pattern, place) for pattern, place in RULES if re.search(pattern, path)]
    if len(matches) != 1:
        raise ValueError(f"{path}: {len(matches)} sharding rules match it, not one: {[p for p, _ in matches]}")
    return matches[0][1]


def parameter_sharding(mesh: Mesh, path: str, shape: tuple[int, ...], *, over_fsdp: bool = True) -> NamedSharding:
    """Where a parameter lives; `path` is that within its network ("conv_in.kernel").

    The dimension split over `fsdp` is the largest divisible one that `tensor` leaves; a dimension that is not
    divisible stays whole, and so does a small parameter. Without `over_fsdp` it is split over `tensor` alone.
    """
    place = placement(path)
    axis = {"columns": len(shape) - 1, "rows": len(shape) - 2}.get(place)
    return _split(mesh, shape, axis, over_fsdp) if place != "whole" else replicated(mesh)


def split_sharding(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
    """Where an array lives that belongs to a parameter without having its shape: split over `fsdp` if it is large."""
    return _split(mesh, shape, None)


def tree_sharding(mesh: Mesh, tree: Mapping[str, Any], *, over_fsdp: bool = True) -> dict[str, Any]:
    """`parameter_sharding` for every parameter: network's name -> path -> array, or its shape. What is no network (the
    states of a text) is whole on every device.
    """

    def of_network(params: Mapping[str, Any]) -> dict[str, NamedSharding]:
        return {path: parameter_sharding(mesh, path, leaf.shape, over_fsdp=over_fsdp) for path, leaf in params.items()}

    return {
        name: of_network(part) if isinstance(part, Mapping) else jax.tree.map(lambda _: replicated(mesh), part)
        for name, part in tree.items()
    }


def place(tree: Any, shardings: Any) -> Any:
    """Arrays that every process holds whole -> global arrays with these shardings (one, or a tree of them)."""
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)
    if isinstance(shardings, NamedSharding):
        shardings = jax.tree.map(lambda _: shardings, tree)

    def take(leaf, sharding):  # device_put would first compare the arrays of all processes, byte for byte
        return jax.make_array_from_callback(leaf.shape, sharding, np.asarray(leaf).__getitem__)

    return jax.tree.map(take, tree, shardings)


def place_batch(mesh: Mesh, batch: dict[str, Any], stacked: bool = False) -> dict[str, Any]:
    """This process's rows of a global batch, or of several stacked ones, a tree of NumPy arrays -> global arrays."""
    sharding = batch_sharding(mesh, stacked)
    return jax.tree.map(lambda value: jax.make_array_from_process_local_data(sharding, value), batch)


def to_host(mesh: Mesh, tree: Any) -> Any:
    """Global arrays -> whole NumPy arrays in every process; a collective: every process must call it."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    whole = jax.jit(lambda leaf: leaf, out_shardings=replicated(mesh))
    return jax.tree.map(lambda leaf: np.asarray(whole(leaf)), tree)


def bytes_per_device(leaf: Any, sharding: NamedSharding) -> int:
    """What an array (or its shape) takes on each device."""
    return math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def explain(arrays: Mapping[str, Any], shardings: Mapping[str, NamedSharding]) -> Iterator[str]:
    """A line per array (or its shape): path, type and shape, placement, bytes per device; then their sum."""
    total, width = 0, max(map(len, arrays), default=0)
    for path, leaf in arrays.items():
        size = bytes_per_device(leaf, shardings[path])
        total += size
        axes = [axis if isinstance(axis, str) else "-" for axis in shardings[path].spec]
        where = " x ".join([*axes, *["-"] * (leaf.ndim - len(axes))]) if any(a != "-" for a in axes) else "whole"
        kind = f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"
        yield f"{path:<{width}}  {kind:<28}  {where:<22}  {size:>13,}"
    yield f"{'sum':<{width}}  {'':<28}  {'':<22}  {total:>13,}"


def _split(mesh: Mesh, shape: tuple[int, ...], tensor_axis: int | None, over_fsdp: bool = True) -> NamedSharding:
    axes: list[str | None] = [None] * len(shape)
    if np.prod(shape) < SMALLEST_SPLIT:
        return replicated(mesh)
    if tensor_axis is not None and mesh.shape["tensor"] > 1 and shape[tensor_axis] % mesh.shape["tensor"] == 0:
        axes[tensor_axis] = "tensor"
    free = [axis for axis, size in enumerate(shape) if axes[axis] is None and size % mesh.shape["fsdp"] == 0]
    if free and over_fsdp and mesh.shape["fsdp"] > 1:
        axes[max(free, key=lambda axis: shape[axis])] = "fsdp"
    while axes and axes[-1] is None:
        axes.pop()
    return NamedSharding(mesh, PartitionSpec(*axes))
