"""The tensors of whatever a user points at: a file of any format, its shards, a component folder."""

import json
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
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
from bdm_jax.formats.scales import scaled
from bdm_jax.formats.tables import ignorable

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


TAESD_FILES = ("taesd_encoder", "taesd_decoder")
# Names of weights in a component folder, the safe format first.
_STEMS = tuple(name.removesuffix(".safetensors") for name in (DIFFUSERS_WEIGHTS, TRANSFORMERS_WEIGHTS))
_NAMES = tuple(f"{stem}{{}}.safetensors" for stem in (*_STEMS, "pytorch_model"))
_NAMES += (JAX_WEIGHTS.replace(".", "{}.", 1),)
_NAMES += ("diffusion_pytorch_model{}.bin", "pytorch_model{}.bin")
VARIANTS = ("", "fp16", "bf16", "non_ema", "ema")

# What trainers put around the names of a network: torch.compile, FSDP and activation checkpointing wherever the wrapped
# module lies; DataParallel, DeepSpeed and Lightning before all names.
_INNER = re.compile(r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_OUTER = ("module.", "_forward_module.", "model.")
_IN_MODEL = re.compile(
    r"model\.(model|(first|cond)_stage_model|conditioner|control_model|unet|vae|text_(model|encoder)|embeddings|encoder"
    r"|input_blocks|(down|up|mid)_blocks?)\."
)
_MAX_WRAPPERS = 10  # one within another; each takes time in proportion to the names
_LDM_UNET = "model.diffusion_model."  # which is no wrapper


@dataclass(frozen=True)
class Weights:
    """What was read.

    Attributes:
      path: the file.
      tensors: by name, in PyTorch's layouts whatever the file's were; memory-mapped.
      metadata: of the file's header.
      names: where the file is in this library's layout, what its tensors were called before.
      keys: what the tensors that are called otherwise here are called in the file.
    """

    path: Path
    tensors: Tensors
    metadata: dict[str, str]
    names: dict[str, FormerName] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)

    def in_file(self, key: str) -> str:
        """What a tensor is called in the file."""
        return self.keys.get(key, key)

    def as_before(self) -> Tensors:
        """The tensors under the names that they had before they came into this library's layout, and fused as then.

        Raises FileError that names a fused tensor of which a part is missing.
        """
        before: dict[str, dict[int, np.ndarray]] = {}
        counts: dict[str, int] = {}
        for key, array in self.tensors.items():
            name = self.names.get(key, FormerName(self.in_file(key)))
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
    is taken, or the only variant there is. What trainers put around all names is taken off (`unwrapped`), and weights
    that come with a scale are multiplied by it. Raises FileError that names the file and what is wrong.
    """
    weights = _read(Path(path), variant)
    names = unwrapped(weights.tensors)
    tensors = {name: weights.tensors[key] for name, key in names.items()}
    keys = {name: weights.in_file(key) for name, key in names.items() if weights.in_file(key) != name}
    formerly = {name: weights.names[key] for name, key in names.items() if key in weights.names}
    return replace(weights, tensors=scaled(weights.path, tensors), names=formerly, keys=keys)


def unwrapped(keys: Iterable[str]) -> dict[str, str]:
    """Names of tensors without what trainers wrap them in -> the names as they are. No two become the same."""
    found = _shorter({key: key for key in keys}, lambda name: _INNER.sub("", name))
    for _ in range(_MAX_WRAPPERS):
        if (prefix := _wrapper(found)) is None:
            break
        shorter = _shorter(found, lambda name, prefix=prefix: name.removeprefix(prefix))
        if shorter is found:
            break
        found = shorter
    return found


def _shorter(names: dict[str, str], change: Any) -> dict[str, str]:
    changed = {change(name): key for name, key in names.items()}
    return changed if len(changed) == len(names) and "" not in changed else names


def _wrapper(names: Iterable[str]) -> str | None:
    """What all names of weights begin with that says nothing."""
    weights = [name for name in names if not ignorable(name)]
    found = next((prefix for prefix in _OUTER if weights and all(name.startswith(prefix) for name in weights)), None)
    if found == "model." and any(name.startswith(_LDM_UNET) for name in weights):
        return None
    return found if found != "model." or any(map(_IN_MODEL.match, weights)) else None


def _read(path: Path, variant: str | None = None) -> Weights:
    if is_taesd(path):
        halves = {name: read_safetensors(path / f"{name}.safetensors") for name in TAESD_FILES}
        tensors = {f"{name}.{key}": array for name, half in halves.items() for key, array in half.items()}
        return Weights(path, tensors, {})
    if path.is_dir():
        path = _file_in(path, variant)
    if is_index(path.name):
        return _read_shards(path)
    if is_checkpoint(path):
        return Weights(path, state_dict(path), {})
    tensors, metadata = read_safetensors(path), read_header(path)[1]
    if metadata.get("format") == "jax":
        return _from_jax(path, tensors, metadata)
    return Weights(path, tensors, metadata)


def is_taesd(path: Path) -> bool:
    """Whether a folder holds a TAESD as its author publishes it: two files, no config."""
    return all((path / f"{name}.safetensors").is_file() for name in TAESD_FILES)


def _from_jax(path: Path, tensors: Tensors, metadata: dict[str, str]) -> Weights:
    """The tensors of a file in this library's layout, in PyTorch's, under our names with `weight` at their end."""
    try:
        before = {key: _former_name(value) for key, value in json.loads(metadata.get(SOURCE_KEYS, "{}")).items()}
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise FileError(f"{path}: {SOURCE_KEYS} in its header is not a table of names") from error
    torch, names, keys = {}, {}, {}
    for key, array in tensors.items():
        name, torch_array = to_torch(key, array)
        torch[name] = torch_array
        keys[name] = key
        names[name] = before.get(key, FormerName(name))
    if len({(name.key, name.part) for name in names.values()}) < len(tensors):
        raise FileError(f"{path}: two tensors had the same name")
    return Weights(path, torch, metadata, names, keys)


def names_in_header(names: Mapping[str, FormerName]) -> str:
    """What a file in this library's layout keeps under `SOURCE_KEYS`."""
    return json.dumps({key: name.key if name == FormerName(name.key) else list(name) for key, name in names.items()})


def _former_name(value: Any) -> FormerName:
    name = FormerName(value) if isinstance(value, str) else FormerName(*value)
    if [type(part) for part in name] != [str, int, int, bool] or not 0 <= name.part < name.parts:
        raise ValueError(f"{value!r} is no name")
    return name


def weights_among(names: Collection[str], variant: str | None = None) -> str | None:
    """Which of the files in a component folder is read: its weight file, or the index of their shards; None for none.

    `variant` as of `read_weights`.
    """
    for wanted in VARIANTS if variant is None else (variant,):
        dotted = f".{wanted}" if wanted else ""
        for pattern in _NAMES:
            name = pattern.format(dotted)
            for candidate in (name, f"{name}.index.json", pattern.format("") + f".index{dotted}.json"):
                if candidate in names:
                    return candidate
    return None


def weight_map(index: Path) -> dict[str, str]:
    """Tensor -> the file, in the index's own folder, that it lies in. Raises FileError for what is no such index."""
    table = read_json(index).get("weight_map")
    if not isinstance(table, dict) or not table:
        raise FileError(f"{index}: no weight_map")
    for shard in sorted(map(str, table.values())):
        if Path(shard).name != shard or is_index(shard):
            raise FileError(f"{index}: names {shown(shard)}, which is no weight file in its folder")
    return {key: str(shard) for key, shard in table.items()}


def is_index(name: str) -> bool:
    """Whether a file is the index of others, by its name."""
    return bool(_INDEX.search(name))


def _file_in(folder: Path, variant: str | None) -> Path:
    """The weight file, or index, of a component folder."""
    name = weights_among({path.name for path in folder.iterdir() if path.is_file()}, variant)
    if name is None:
        which = f"weights of the variant {variant!r}" if variant else "weights"
        raise FileError(f"{folder}: no {which}; expected {DIFFUSERS_WEIGHTS} or {TRANSFORMERS_WEIGHTS}")
    return folder / name


def _read_shards(index: Path) -> Weights:
    table = weight_map(index)
    tensors: Tensors = {}
    metadata: dict[str, str] = {}
    for shard in sorted(set(table.values())):
        found = _read(index.parent / shard)
        if twice := sorted(found.tensors.keys() & tensors.keys()):
            raise FileError(f"{index}: {shown(twice[0])} lies in two shards")
        tensors |= found.tensors
        metadata |= found.metadata
    if missing := sorted(table.keys() - tensors.keys()):
        raise FileError(f"{index}: {shown(missing[0])} lies in no shard")
    return Weights(index, tensors, metadata)
