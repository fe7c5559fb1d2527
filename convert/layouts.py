"""PyTorch's array layouts and JAX's: a rename and a transpose per kind of leaf, and the exact way back.

Here convolutions are HWIO and dense layers (in, out), under `kernel`; the weight of a norm is `scale`, of an embedding
table `embedding`. PyTorch has OIHW and (out, in), and calls them all `weight`.
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from convert.files import FileError, Tensors
from convert.keys import PLAIN, KeyTable

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
    found: Tensors = {}
    for key, array in tensors.items():
        here = table.here(key)
        if here is None:
            continue
        here, array = to_jax(here, array)
        if here in found:
            raise FileError(f"{name}: holds {here} under two names")
        found[here] = array
    misshaped = [
        f"{key} {found[key].shape} instead of {tuple(expected[key].shape)}"
        for key in expected
        if key in found and found[key].shape != tuple(expected[key].shape)
    ]
    problems = [
        _few("missing", [key for key in expected if key not in found]),
        _few("unknown", [key for key in found if key not in expected]),
        _few("of another shape", misshaped),
    ]
    if any(problems):
        raise FileError(f"{name}: weights do not fit the config: {'; '.join(filter(None, problems))}")
    return {key: found[key] for key in expected}


def tree_to_torch(params: Mapping[str, Any]) -> Tensors:
    """A flat tree of arrays of ours in PyTorch's names and layouts, as NumPy arrays (views where possible)."""
    return dict(to_torch(key, np.asarray(array)) for key, array in params.items())


def _few(what: str, items: list[str], shown: int = 3) -> str:
    if not items:
        return ""
    more = f" and {len(items) - shown} more" if len(items) > shown else ""
    return f"{len(items)} {what} ({', '.join(items[:shown])}{more})"
