"""What a weight file or component folder holds, and whether its networks are whole: `python -m convert inspect`."""

import re
from typing import Any

import ml_dtypes
import numpy as np
from rich.console import Console
from rich.table import Table

from bdm_jax.formats.detect import Contents, NetworkInFile
from bdm_jax.formats.files import shown
from bdm_jax.formats.layouts import fit
from bdm_jax.formats.weights import Weights
from bdm_jax.models.config import from_json
from bdm_jax.models.functional import abstract


def describe(weights: Weights, contents: Contents, allow: tuple[str, ...] = ()) -> dict[str, Any]:
    """What is in a file, as plain values; `allow` are patterns of keys that may be missing, unknown or misshaped."""
    tensors = weights.tensors
    wrong = {key: count for key, array in tensors.items() if (count := _not_finite(array))}
    return {
        "path": str(weights.path),
        "contents": contents.name,
        "tensors": len(tensors),
        "parameters": sum(array.size for array in tensors.values()),
        "dtypes": sorted({array.dtype.name for array in tensors.values()}),
        "not_finite": wrong,
        "metadata": dict(weights.metadata),
        "recognised": list(contents.others),
        "parts": [_describe(part, weights, allow) for part in contents.parts],
        "rest": [key for key in tensors if not any(key.startswith(part.prefix) for part in contents.parts)],
    }


def is_whole(report: dict[str, Any]) -> bool:
    """Whether networks were recognised, none lacks a tensor or has one too many, and all values are finite."""
    fits = not any(part[name] for part in report["parts"] for name in ("missing", "unknown", "misshaped"))
    return fits and bool(report["parts"] or report["recognised"]) and not report["not_finite"]


def show(report: dict[str, Any]) -> None:
    """Print it for people."""
    console = Console()
    console.width = console.width if console.is_terminal else 110
    console.print(f"{report['path']}: {report['contents']}", highlight=False, markup=False)
    kinds = ", ".join(report["dtypes"])
    console.print(f"{report['tensors']} tensors, {report['parameters']:,} parameters, {kinds}", highlight=False)
    if report["parts"]:
        table = Table("network", "family", "layout", "parameters", "matched", "missing", "unknown", "ignored")
        for part in report["parts"]:
            counts = [str(len(part.get(name, []))) for name in ("missing", "unknown", "ignored")]
            row = part["kind"], part["family"], part["layout"], f"{part['parameters']:,}", str(part["matched"])
            table.add_row(*row, *counts)
        console.print(table)
    for part in report["parts"]:
        if part["supported"] is not True:
            console.print(f"{part['kind']}: not supported: {part['supported']}", highlight=False, markup=False)
        for name in ("missing", "unknown", "misshaped"):
            if part[name]:
                console.print(f"{part['kind']}: {name}: {_few(part[name])}", highlight=False, markup=False)
    for key, count in list(report["not_finite"].items())[:5]:
        console.print(f"{key}: {count} values are NaN or infinite", highlight=False, markup=False)
    if report["rest"]:
        console.print(f"in no network: {_few(report['rest'])}", highlight=False, markup=False)


def _describe(part: NetworkInFile, weights: Weights, allow: tuple[str, ...]) -> dict[str, Any]:
    tensors = part.of(weights.tensors)
    about = {
        "kind": part.kind,
        "family": part.family,
        "layout": part.layout,
        "prefix": part.prefix,
        "prediction": part.prediction or "not told",
        "dtypes": sorted({array.dtype.name for array in tensors.values()}),
        "parameters": sum(array.size for array in tensors.values()),
    }
    try:
        expected = abstract(from_json(part.config))
    except ValueError as error:
        return about | {"supported": str(error), "matched": 0, "missing": [], "unknown": [], "misshaped": []}
    found = fit(tensors, expected, part.table)
    lists = {"missing": found.missing, "unknown": found.unknown, "misshaped": found.misshaped}
    lists = {name: [key for key in keys if not _allowed(key, allow)] for name, keys in lists.items()}
    lists |= {"ignored": found.ignored}
    return about | {"supported": True, "matched": len(found.tree)} | lists


def _allowed(key: str, patterns: tuple[str, ...]) -> bool:
    return any(re.fullmatch(pattern, key.split(" ")[0]) for pattern in patterns)


def _few(keys: list[str], most: int = 20) -> str:
    more = [f"and {len(keys) - most} more"] if len(keys) > most else []
    return ", ".join([*map(shown, keys[:most]), *more])


def _not_finite(array: np.ndarray, chunk: int = 1 << 22) -> int:
    """How many values are NaN or infinite; a piece at a time, so that the file is never in memory as a whole."""
    if array.dtype.kind != "f" and array.dtype != ml_dtypes.bfloat16:
        return 0
    flat = array.reshape(-1)
    return sum(int(np.count_nonzero(~np.isfinite(flat[i : i + chunk]))) for i in range(0, flat.size, chunk))
