"""PyTorch's array layouts and JAX's: a rename and a transpose per kind of leaf, and the exact way back.

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

_EMBEDDING = re.compile(r"(^|\.)\w*_embeddings?\.weight$")
_TO_JAX = {2: (1, 0), 3: (2, 1, 0), 4: (2, 3, 1, 0)}
_TO_TORCH = {2: (1, 0), 3: (2, 1, 0), 4: (3, 2, 0, 1)}


def to_jax(key: str, array: np.ndarray) -> tuple[str, np.ndarray]:
    """One leaf from PyTorch's name and layout to ours; the array may be a view."""
    stem = key.removesuffix("weight")
    if stem == key or not stem.endswith("."):
        return key, array
    if array.ndim == 1:
        return stem + "scale", array
    if array.ndim == 2 and _EMBEDDING.search(key):
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


@dataclass(frozen=True)
class Fit:
    """How a file's tensors fit a network: those that do, in our names and layouts; the names of those that do not."""

    tree: Tensors
    missing: list[str]
    unknown: list[str]
    misshaped: list[str]
    ignored: list[str]
    duplicates: list[str]


def fit(tensors: Mapping[str, np.ndarray], expected: Mapping[str, Any], table: KeyTable = PLAIN) -> Fit:
    """Match tensors by the file's key (PyTorch's layouts) to a network's shapes by ours; arrays are views."""
    found: Tensors = {}
    ignored, twice = [], []
    for key, array in tensors.items():
        here = table.here(key)
        if here is None:
            ignored.append(key)
            continue
        here, array = to_jax(here, array)
        if here in found:
            twice.append(here)
        found[here] = _as_wanted(array, expected.get(here))
    wrong = [key for key in expected if key in found and found[key].shape != tuple(expected[key].shape)]
    return Fit(
        tree={key: found[key] for key in expected if key in found and key not in wrong},
        missing=[key for key in expected if key not in found],
        unknown=[key for key in found if key not in expected],
        misshaped=[f"{key} {found[key].shape} instead of {tuple(expected[key].shape)}" for key in wrong],
        ignored=ignored,
        duplicates=twice,
    )


def tree_from_torch(
    tensors: Mapping[str, np.ndarray], expected: Mapping[str, Any], name: str, table: KeyTable = PLAIN
) -> Tensors:
    """A flat tree in our names and layouts, checked against the network that it is for.

    Args:
      tensors: arrays by the file's key, in PyTorch's layouts.
      expected: by our key, anything with a `.shape` (`bdm_jax.models.functional.abstract`).
      name: what to call the file in an error.
      table: how the file's keys are called here.

    Returns views where possible, in the file's dtypes and `expected`'s order. Raises FileError that names the first
    missing, unknown and misshaped keys and counts the rest.
    """
    found = fit(tensors, expected, table)
    if found.duplicates:
        raise FileError(f"{name}: holds {found.duplicates[0]} under two names")
    problems = [
        _few("missing", found.missing),
        _few("unknown", found.unknown),
        _few("of another shape", found.misshaped),
    ]
    if any(problems):
        raise FileError(f"{name}: weights do not fit the config: {'; '.join(filter(None, problems))}")
    return found.tree


def tree_to_torch(params: Mapping[str, Any], table: KeyTable = PLAIN) -> Tensors:
    """A flat tree of arrays of ours in PyTorch's layouts and a file's names, as NumPy arrays (views where possible)."""
    tensors: Tensors = {}
    for key, array in params.items():
        ours, array = to_torch(key, np.asarray(array))
        if array.ndim == 2 and re.fullmatch(table.convolutions, ours):
            array = array[..., None, None]
        tensors[table.there(ours)] = array
    return tensors


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
