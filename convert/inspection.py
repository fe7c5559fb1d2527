"""What a file or folder holds, and whether its networks are whole: `python -m convert inspect`."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from bdm_jax.errors import FileError, UserError
from bdm_jax.formats.detect import CLONEOFSIMO, Contents, NetworkInFile, detect
from bdm_jax.formats.embeddings import is_picture
from bdm_jax.formats.files import few, is_float, shown
from bdm_jax.formats.hub import is_remote
from bdm_jax.formats.layouts import fit
from bdm_jax.formats.lora import read_lora
from bdm_jax.formats.open import contents_of, names_in_file
from bdm_jax.formats.pickles import is_checkpoint, read_checkpoint
from bdm_jax.formats.tables import ignorable
from bdm_jax.formats.weights import Weights, is_taesd
from bdm_jax.models.config import from_json
from bdm_jax.models.functional import abstract
from bdm_jax.plugins.inversion import load_embeddings
from bdm_jax.systems import families
from bdm_jax.systems.fetch import outlined
from bdm_jax.systems.folder import find_system, is_pipeline, strangers
from bdm_jax.text.tokenizer import Tokenizer


def describe(path: str | Path, variant: str | None = None, allow: tuple[str, ...] = ()) -> dict[str, Any]:
    """What is in a file, a component folder or a pipeline folder, as plain values.

    `allow` are patterns of keys that may be missing, unknown, misshaped or in no network. What is recognised and is no
    network (LoRA, Textual Inversion) is read by its own reader, so that this says what drawing with it would. Of what
    lies on a hub or behind a link the headers are read by ranges, the values not at all. Raises UserError or FileError
    for what cannot be read.
    """
    if not is_remote(path):
        return _describe_here(Path(path), variant, allow, True)
    where = str(path)
    try:
        with outlined(path, variant) as here:
            where = str(here)
            return {**_describe_here(here, variant, allow, False), "path": str(path), "headers_only": True}
    except UserError as error:
        raise type(error)(str(error).replace(where, str(path))) from error


def _describe_here(path: Path, variant: str | None, allow: tuple[str, ...], values: bool) -> dict[str, Any]:
    """`values`: whether those of the tensors are looked at."""
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if path.is_dir() and not is_taesd(path) and not (path / "config.json").is_file() and is_pipeline(path):
        return _describe_pipeline(path, variant, allow, values)
    if path.is_file() and is_picture(path):
        load_embeddings(path)
        weights, contents = Weights(path, {}, {}), Contents()
    else:
        weights, contents = _contents(path, variant)
    tensors = weights.tensors
    recognised, left, refused = list(contents.others), [*map(weights.in_file, contents.left(tensors))], ""
    if not contents.parts:
        recognised, left, refused = _plugin(path, contents, left)
    return {
        "path": str(weights.path),
        "contents": contents.name if contents.parts or not recognised else ", ".join(recognised),
        "tensors": len(tensors),
        "parameters": sum(array.size for array in tensors.values()),
        "dtypes": sorted({array.dtype.name for array in tensors.values()}),
        "not_finite": {
            weights.in_file(key): n for key, array in tensors.items() if values and (n := not_finite(array))
        },
        "metadata": dict(weights.metadata),
        "recognised": recognised,
        "refused": refused,
        "parts": [_describe(part, contents, weights, allow) for part in contents.parts],
        "ignored": [weights.in_file(key) for key in tensors if ignorable(key)],
        "rest": [key for key in left if not _allowed(key, allow)],
    }


def status(report: dict[str, Any]) -> int:
    """What drawing would say of it: 2 where it is refused, being damaged, not finite or nothing that is known; 1 where
    something in it is left out, not being understood; else 0.
    """
    fits = not any(part[name] for part in report["parts"] for name in ("missing", "unknown", "misshaped"))
    damaged = any(name.startswith("damaged ") for name in report["recognised"])
    known = bool(report["parts"] or report["recognised"])
    if not (known and fits) or damaged or report["refused"] or report["not_finite"]:
        return 2
    return 1 if report["rest"] else 0


def show(report: dict[str, Any]) -> None:
    """Print it for people."""
    console = Console()
    console.width = console.width if console.is_terminal else 110
    console.print(f"{report['path']}: {report['contents']}", highlight=False, markup=False)
    if report.get("headers_only"):
        console.print("only headers were read, by ranges: values may still be wrong", highlight=False)
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
                console.print(f"{part['kind']}: {name}: {few(part[name], 20)}", highlight=False, markup=False)
    for key, count in list(report["not_finite"].items())[:5]:
        console.print(f"{key}: {count} values are NaN or infinite", highlight=False, markup=False)
    for name, what in (("refused", "refused: {}"), ("rest", "not understood: {}"), ("ignored", "carries nothing: {}")):
        if report[name]:
            text = report[name] if isinstance(report[name], str) else few(report[name], 20)
            console.print(what.format(text), highlight=False, markup=False)


def not_finite(array: np.ndarray, chunk: int = 1 << 22) -> int:
    """How many values are NaN or infinite; a piece at a time, so that the file is never in memory as a whole."""
    if not is_float(array.dtype):
        return 0
    flat = array.reshape(-1)
    return sum(int(np.count_nonzero(~np.isfinite(flat[i : i + chunk]))) for i in range(0, flat.size, chunk))


def _main(name: str, report: dict[str, Any]) -> list[dict[str, Any]]:
    """The network of a component folder that stands in the place of a part: a whole CLIP has two."""
    kinds = (name, *families.other_kinds(name))
    return [part for part in report["parts"] if part["kind"] in kinds] or report["parts"]


def _describe_pipeline(path: Path, variant: str | None, allow: tuple[str, ...], values: bool) -> dict[str, Any]:
    """The same of all its parts together, each under its folder's name."""
    found = find_system(path, variant)
    reports = {name: _describe_here(path / name, variant, allow, values) for name in found.networks}
    words = {name: Tokenizer.from_pretrained(path / name).vocab_size for name in found.tokenizers}
    parts = [part | {"kind": name} for name, report in reports.items() for part in _main(name, report)]
    left = strangers(path, found)
    others = [f"{name}: {other}" for name, report in reports.items() for other in report["recognised"]]
    schedule = [] if found.schedule is None else [f"scheduler ({found.schedule.prediction_type})"]
    tokenizers = [f"{name} ({count} tokens)" for name, count in words.items()]
    return {
        "path": str(path),
        "contents": f"{found.family.title} pipeline: {', '.join([*reports, *tokenizers, *schedule])}",
        "tensors": sum(report["tensors"] for report in reports.values()),
        "parameters": sum(report["parameters"] for report in reports.values()),
        "dtypes": sorted({name for report in reports.values() for name in report["dtypes"]}),
        "not_finite": {f"{name}/{key}": n for name, one in reports.items() for key, n in one["not_finite"].items()},
        "metadata": {},
        "recognised": [*tokenizers, *schedule, *others],
        "refused": "; ".join(report["refused"] for report in reports.values() if report["refused"]),
        "parts": parts,
        "ignored": [f"{name}/{key}" for name, report in reports.items() for key in report["ignored"]],
        "rest": [*(f"{name}/{key}" for name, report in reports.items() for key in report["rest"]), *left],
    }


def _contents(path: Path, variant: str | None) -> tuple[Weights, Contents]:
    """Of a checkpoint whose values are no tensors by name, as plug-ins have them, what lies in its dicts and lists."""
    try:
        return contents_of(path, variant)
    except FileError:
        if path.is_dir() or not is_checkpoint(path):
            raise
        weights = Weights(path, dict(_arrays(read_checkpoint(path))), {})
        contents = detect({key: array.shape for key, array in weights.tensors.items()})
        if all(key.isdecimal() for key in weights.tensors) and len(weights.tensors) > 1:
            contents = Contents(others=(CLONEOFSIMO,))
        if not contents.others and weights.tensors.keys() != {""}:
            raise
        return weights, contents


def _arrays(value: Any, name: str = "") -> Iterator[tuple[str, np.ndarray]]:
    if isinstance(value, np.ndarray):
        yield name, value
    elif isinstance(value, dict | list | tuple):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _arrays(part, f"{name}.{key}" if name else str(key))


def _plugin(path: Path, contents: Contents, left: list[str]) -> tuple[list[str], list[str], str]:
    """What a file without networks is, the keys in it that its reader does not understand, why it is refused."""
    names = list(contents.others)
    if any(not name.startswith(("LoRA", "Textual Inversion")) for name in names):
        return names, [], ""
    if any(name.startswith("LoRA") for name in names):
        try:
            lora = read_lora(path, families.lora_prefixes())
        except UserError as error:
            return names, [], str(error)
        unknown = [key for key in lora.unknown if not ignorable(key)]
        counts = ", ".join(f"{count} of {network}" for network, count in lora.modules.items())
        names = [f"{name}, modules: {counts}" if name.startswith("LoRA") and counts else name for name in names]
        return names, unknown, "" if counts else "none of its keys is understood"
    try:
        found = load_embeddings(path)
    except UserError as error:
        return names, ([] if names else left), (str(error) if names else "")
    tokens = ", ".join(" or ".join(map(shown, (one.token, *one.aliases))) for one in found)
    return [f"{kind}: {tokens}" for kind in names or ["Textual Inversion"]], [], ""


def _describe(part: NetworkInFile, contents: Contents, weights: Weights, allow: tuple[str, ...]) -> dict[str, Any]:
    tensors = contents.of(part, weights.tensors)
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
    found = fit(tensors, expected, part.table, *names_in_file(weights, part, tensors))
    lists = {"missing": found.missing, "unknown": found.unknown, "misshaped": found.misshaped}
    lists = {name: [key for key in keys if not _allowed(key, allow)] for name, keys in lists.items()}
    lists |= {"ignored": found.ignored}
    return about | {"supported": True, "matched": len(found.tree)} | lists


def _allowed(key: str, patterns: tuple[str, ...]) -> bool:
    return any(re.fullmatch(pattern, key.split(" ")[0]) for pattern in patterns)
