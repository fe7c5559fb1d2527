"""PyTorch's array layouts and JAX's: a rename and a transpose per kind of leaf, perhaps a split, and the way back.

Here convolutions are HWIO and dense layers (in, out), under `kernel`; the weight of a norm is `scale`, of an embedding
table `embedding`. PyTorch has OIHW and (out, in), and calls them all `weight`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from bdm_jax.errors import FileError
from bdm_jax.formats.files import Tensors, shown
from bdm_jax.formats.tables import PLAIN, KeyTable

_TO_JAX = {2: (1, 0), 3: (2, 1, 0), 4: (2, 3, 1, 0)}
_TO_TORCH = {2: (1, 0), 3: (2, 1, 0), 4: (3, 2, 0, 1)}


def to_jax(key: str, array: np.ndarray, embedding: bool = False) -> tuple[str, np.ndarray]:
    """One leaf from PyTorch's name and layout to ours; the array may be a view. `embedding`: a matrix is a table of
    embeddings.
    """
    stem = key.removesuffix("weight")
    if stem == key or not stem.endswith("."):
        return key, array
    if array.ndim == 1:
        return stem + "scale", array
    if array.ndim == 2 and embedding:
        return stem + "embedding", array
    if array.ndim not in _TO_JAX:
        return key, array
    return stem + "kernel", array.transpose(_TO_JAX[array.ndim])


def to_torch(key: str, array: np.ndarray) -> tuple[str, np.ndarray]:
    """The inverse of `to_jax`, bit for bit; the array may be a view."""
    stem, _, leaf = key.rpartition(".")
    if leaf in ("scale", "embedding"):
        return f"{stem}.weight", array
    if leaf == "kernel":
        return f"{stem}.weight", array.transpose(_TO_TORCH[array.ndim])
    return key, array


def leaves(key: str, array: np.ndarray, table: KeyTable = PLAIN) -> dict[str, np.ndarray]:
    """What a file's tensor is here: our names and layouts, views; none for a key that the table ignores.

    Rows of a fused tensor that cannot be shared out evenly come whole under each name: they fit nowhere.
    """
    names = table.to_ours(key)
    even = len(names) > 1 and array.ndim > 0 and len(array) % len(names) == 0
    pieces = np.split(array, len(names)) if even else [array] * len(names)
    return dict(_leaf(name, piece, table) for name, piece in zip(names, pieces, strict=True))


@dataclass(frozen=True)
class Fit:
    """How a file's tensors fit a network: those that do, in our names and layouts; those that do not, as the file calls
    them.
    """

    tree: Tensors
    missing: list[str]
    unknown: list[str]
    misshaped: list[str]
    ignored: list[str]
    duplicates: list[str]


def fit(
    tensors: Mapping[str, np.ndarray],
    expected: Mapping[str, Any],
    table: KeyTable = PLAIN,
    names: Mapping[str, str] | None = None,
    prefix: str = "",
) -> Fit:
    """Match tensors by the file's key (PyTorch's layouts) to a network's shapes by ours; arrays are views.

    `names`: what keys are called in the file that are called otherwise in `tensors`; `prefix`: what those begin with
    there. They serve what is said of a file.
    """
    found: Tensors = {}
    origin: dict[str, str] = {}
    ignored, twice = [], []
    for key, array in tensors.items():
        parts = leaves(key, array, table)
        if not parts:
            ignored.append(key)
        twice += [f"{_called(origin[name], names)} and {_called(key, names)}" for name in parts if name in found]
        found |= {name: _as_wanted(part, expected.get(name)) for name, part in parts.items()}
        origin |= dict.fromkeys(parts, key)
    wrong = {key: origin[key] for key in expected if key in found and found[key].shape != tuple(expected[key].shape)}
    inner = table.prefix_of(tensors)
    missing = [prefix + _in_file(key, expected[key], table, inner)[0] for key in expected if key not in found]
    misshaped = {
        f"{_called(key, names)} {np.shape(tensors[key])} instead of {_in_file(name, expected[name], table)[1]}"
        for name, key in wrong.items()
    }
    return Fit(
        tree={key: found[key] for key in expected if key in found and key not in wrong},
        missing=list(dict.fromkeys(missing)),
        unknown=list(dict.fromkeys(_called(origin[key], names) for key in found if key not in expected)),
        misshaped=sorted(misshaped),
        ignored=[_called(key, names) for key in ignored],
        duplicates=twice,
    )


def tree_from_torch(
    tensors: Mapping[str, np.ndarray],
    expected: Mapping[str, Any],
    name: str,
    table: KeyTable = PLAIN,
    names: Mapping[str, str] | None = None,
    prefix: str = "",
) -> Tensors:
    """A flat tree in our names and layouts, checked against the network that it is for.

    Args:
      tensors: arrays by the file's key, in PyTorch's layouts.
      expected: by our key, anything with a `.shape` (`bdm_jax.models.functional.abstract`).
      name: what to call the file in an error.
      table: how the file's keys are called here.
      names, prefix: what they are called in the file (see `fit`).

    Returns views where possible, in the file's dtypes and `expected`'s order. Raises FileError that names the first
    missing, unknown and misshaped keys and counts the rest.
    """
    found = fit(tensors, expected, table, names, prefix)
    if found.duplicates:
        raise FileError(f"{name}: holds one weight under two names, {found.duplicates[0]}")
    problems = [
        _few("missing", found.missing),
        _few("unknown", found.unknown),
        _few("of another shape", found.misshaped),
    ]
    if any(problems):
        raise FileError(f"{name}: weights do not fit the config: {'; '.join(filter(None, problems))}")
    return found.tree


def tree_to_torch(params: Mapping[str, Any], table: KeyTable = PLAIN) -> Tensors:
    """A flat tree of arrays of ours in PyTorch's layouts and a file's names, as NumPy arrays (views where possible).

    Raises KeyError for a tree that has only some of the parts of a tensor that is one in the file.
    """
    torch: Tensors = {}
    for key, array in params.items():
        ours, array = _filed(key, np.asarray(array), table)
        torch[ours] = array
    tensors: Tensors = {}
    for ours, array in torch.items():
        theirs = table.to_theirs(ours)
        if theirs not in tensors:
            parts = table.parts(theirs)
            tensors[theirs] = np.concatenate([torch[part] for part in parts]) if parts else array
    return tensors


def _leaf(name: str, array: np.ndarray, table: KeyTable) -> tuple[str, np.ndarray]:
    if array.ndim == 2 and re.fullmatch(table.transposed, name):
        array = array.T
    return to_jax(name, array, embedding=re.fullmatch(table.embeddings, name) is not None)


def _filed(key: str, array: np.ndarray, table: KeyTable) -> tuple[str, np.ndarray]:
    """A leaf in PyTorch's layout and under our name there, its matrix as the file keeps it."""
    ours, array = to_torch(key, array)
    if array.ndim == 2 and re.fullmatch(table.convolutions, ours):
        array = array[..., None, None]
    return ours, array.T if array.ndim == 2 and re.fullmatch(table.transposed, ours) else array


def _in_file(key: str, leaf: Any, table: KeyTable, prefix: str = "") -> tuple[str, tuple[int, ...]]:
    """What a leaf of ours is called in a file whose keys have this prefix in place of the table's, and the shape of the
    tensor that it lies in there.
    """
    ours, array = _filed(key, np.broadcast_to(np.int8(0), leaf.shape), table)
    theirs = table.to_theirs(ours)
    parts = len(table.parts(theirs)) or 1
    shape = (array.shape[0] * parts, *array.shape[1:]) if parts > 1 else array.shape
    inside = not re.fullmatch(table.outside, ours)
    return (prefix + theirs.removeprefix(table.prefix) if inside else theirs), shape


def _called(key: str, names: Mapping[str, str] | None) -> str:
    return (names or {}).get(key, key)


def _as_wanted(array: np.ndarray, wanted: Any) -> np.ndarray:
    """A 1x1 convolution where a linear layer is wanted, or the other way round: the same numbers."""
    if wanted is not None and {array.ndim, len(wanted.shape)} == {2, 4} and array.shape[-2:] == wanted.shape[-2:]:
        return array.reshape(wanted.shape) if array.size == np.prod(wanted.shape) else array
    return array


def _few(what: str, items: list[str], few: int = 3) -> str:
    if not items:
        return ""
    more = f" and {len(items) - few} more" if len(items) > few else ""
    return f"{len(items)} {what} ({', '.join(map(shown, items[:few]))}{more})"
