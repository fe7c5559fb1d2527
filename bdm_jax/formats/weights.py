"""The tensors of whatever a user points at: a file of any format, its shards, a component folder."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bdm_jax.errors import FileError
from bdm_jax.formats.files import (
    DIFFUSERS_WEIGHTS,
    JAX_WEIGHTS,
    TRANSFORMERS_WEIGHTS,
    Tensors,
    read_header,
    read_json,
    read_safetensors,
    shown,
)
from bdm_jax.formats.layouts import to_torch
from bdm_jax.formats.pickles import is_checkpoint, state_dict

_INDEX = re.compile(r"\.index(\.\w+)?\.json$")
SOURCE_KEYS = "bdm_jax.names"  # in the header of a file in this library's layout: {our name: the name before}


class FormerName(NamedTuple):
    """What a tensor was called before it came into this library's layout: it was the `part`th of `parts` equal parts of
    the rows of the tensor `key`, which held its matrix as (in, out) where it is `transposed`.
    """

    key: str
    part: int = 0
    parts: int = 1
    transposed: bool = False


_TAESD_FILES = ("taesd_encoder", "taesd_decoder")
# Names of weights in a component folder, the safe format first.
_STEMS = tuple(name.removesuffix(".safetensors") for name in (DIFFUSERS_WEIGHTS, TRANSFORMERS_WEIGHTS))
_NAMES = tuple(f"{stem}{{}}.safetensors" for stem in (*_STEMS, "pytorch_model"))
_NAMES += (JAX_WEIGHTS.replace(".", "{}.", 1),)
_NAMES += ("diffusion_pytorch_model{}.bin", "pytorch_model{}.bin")
VARIANTS = ("", "fp16", "bf16", "non_ema", "ema")


@dataclass(frozen=True)
class Weights:
    """What was read.

    Attributes:
      path: the file.
      tensors: by name, in PyTorch's layouts whatever the file's were; memory-mapped.
      metadata: of the file's header.
      names: where the file is in this library's layout, what its tensors were called before.
    """

    path: Path
    tensors: Tensors
    metadata: dict[str, str]
    names: dict[str, FormerName] = field(default_factory=dict)

    def as_before(self) -> Tensors:
        """The tensors under the names that they had before they came into this library's layout, and fused as then.

        Raises FileError that names a fused tensor of which a part is missing.
        """
        before: dict[str, dict[int, np.ndarray]] = {}
        counts: dict[str, int] = {}
        for key, array in self.tensors.items():
            name = self.names.get(key, FormerName(key))
            before.setdefault(name.key, {})[name.part] = array.T if name.transposed else array
            counts[name.key] = name.parts
        for key, parts in before.items():
            if sorted(parts) != list(range(counts[key])):
                raise FileError(f"{self.path}: {shown(key)} was one tensor of {counts[key]} parts, not all are here")
        return {
            key: parts[0] if len(parts) == 1 else np.concatenate([parts[i] for i in sorted(parts)])
            for key, parts in before.items()
        }


def read_weights(path: str | Path, variant: str | None = None) -> Weights:
    """The tensors of a weight file, of an index and its shards, or of a component folder.

    In a folder, `variant` ("fp16") chooses among the files that diffusers names after it; without it the plain file
    is taken, or the only variant there is. Raises FileError that names the file and what is wrong.
    """
    path = Path(path)
    if is_taesd(path):
        halves = {name: read_safetensors(path / f"{name}.safetensors") for name in _TAESD_FILES}
        tensors = {f"{name}.{key}": array for name, half in halves.items() for key, array in half.items()}
        return Weights(path, tensors, {})
    if path.is_dir():
        path = _file_in(path, variant)
    if _INDEX.search(path.name):
        return _read_shards(path)
    if is_checkpoint(path):
        return Weights(path, state_dict(path), {})
    tensors, metadata = read_safetensors(path), read_header(path)[1]
    if metadata.get("format") == "jax":
        return _from_jax(path, tensors, metadata)
    return Weights(path, tensors, metadata)


def is_taesd(path: Path) -> bool:
    """Whether a folder holds a TAESD as its author publishes it: two files, no config."""
    return all((path / f"{name}.safetensors").is_file() for name in _TAESD_FILES)


def _from_jax(path: Path, tensors: Tensors, metadata: dict[str, str]) -> Weights:
    """The tensors of a file in this library's layout, in PyTorch's, under our names with `weight` at their end."""
    try:
        before = {key: _former_name(value) for key, value in json.loads(metadata.get(SOURCE_KEYS, "{}")).items()}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise FileError(f"{path}: {SOURCE_KEYS} in its header is not a table of names") from error
    torch, names = {}, {}
    for key, array in tensors.items():
        name, torch_array = to_torch(key, array)
        torch[name] = torch_array
        names[name] = before.get(key, FormerName(name))
    if len({(name.key, name.part) for name in names.values()}) < len(tensors):
        raise FileError(f"{path}: two tensors had the same name")
    return Weights(path, torch, metadata, names)


def names_in_header(names: Mapping[str, FormerName]) -> str:
    """What a file in this library's layout keeps under `SOURCE_KEYS`."""
    return json.dumps({key: name.key if name == FormerName(name.key) else list(name) for key, name in names.items()})


def _former_name(value: Any) -> FormerName:
    name = FormerName(value) if isinstance(value, str) else FormerName(*value)
    if [type(part) for part in name] != [str, int, int, bool] or not 0 <= name.part < name.parts:
        raise ValueError(f"{value!r} is no name")
    return name


def _file_in(folder: Path, variant: str | None) -> Path:
    """The weight file, or index, of a component folder."""
    for wanted in VARIANTS if variant is None else (variant,):
        dotted = f".{wanted}" if wanted else ""
        for pattern in _NAMES:
            name = pattern.format(dotted)
            for candidate in (name, f"{name}.index.json", pattern.format("") + f".index{dotted}.json"):
                if (folder / candidate).is_file():
                    return folder / candidate
    which = f"weights of the variant {variant!r}" if variant else "weights"
    raise FileError(f"{folder}: no {which}; expected {DIFFUSERS_WEIGHTS} or {TRANSFORMERS_WEIGHTS}")


def _read_shards(index: Path) -> Weights:
    table = read_json(index).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise FileError(f"{index}: no weight_map")
    tensors: Tensors = {}
    metadata: dict[str, str] = {}
    for shard in sorted(set(map(str, table.values()))):
        if Path(shard).name != shard or _INDEX.search(shard):
            raise FileError(f"{index}: names {shown(shard)}, which is no weight file in its folder")
        found = read_weights(index.parent / shard)
        if twice := sorted(found.tensors.keys() & tensors.keys()):
            raise FileError(f"{index}: {shown(twice[0])} lies in two shards")
        tensors |= found.tensors
        metadata |= found.metadata
    if missing := sorted(table.keys() - tensors.keys()):
        raise FileError(f"{index}: {shown(missing[0])} lies in no shard")
    return Weights(index, tensors, metadata)
