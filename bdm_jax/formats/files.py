"""Safe readers and writers of weight files.

A file from elsewhere is untrusted: its header is bounded and checked before a byte of it is used, and tensors are
memory-mapped, so that reading costs no memory until a tensor is needed. What is written appears under its final name
only when it is whole.

The safetensors format (https://huggingface.co/docs/safetensors): 8 bytes little-endian length N, N bytes of JSON
`{name: {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": {str: str}}`, then the data.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from bdm_jax.errors import FileError
from bdm_jax.paths import atomic_file

Tensors = dict[str, np.ndarray]

# The two names under which diffusers and transformers look for the weights of a component folder.
DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"
TRANSFORMERS_WEIGHTS = "model.safetensors"
JAX_WEIGHTS = "jax_model.safetensors"  # the same in this library's layout; no other library takes it for its own

_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_EXTENDED = frozenset(_DTYPES[name] for name in ("BF16", "F8_E4M3", "F8_E5M2"))
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MAX_HEADER = 100 * 2**20


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies in a safetensors file; `begin` and `end` count from the file's first byte."""

    dtype: np.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(path: str | Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """Entries by tensor name and the metadata of a safetensors file; reads no tensor.

    Raises FileError for a file that is missing, truncated or padded, whose names repeat, or whose entries overlap,
    leave gaps, or have a size that is not shape times dtype.
    """
    path = Path(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER):
                raise FileError(f"{path}: {_what(path, length)}")
            text = file.read(length)
    except OSError as error:
        raise FileError(f"{path}: cannot be read ({error.strerror or error})") from error
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except _Duplicate as error:
        raise FileError(f"{path}: the safetensors header names {error} twice") from error
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path}: the safetensors header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise FileError(f"{path}: the safetensors header is not a JSON object")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise FileError(f"{path}: the safetensors metadata is not a table of strings")
    entries = {name: _entry(path, name, fields, start=8 + length) for name, fields in header.items()}
    _check_cover(path, entries, start=8 + length, size=size)
    return entries, metadata


def read_safetensors(path: str | Path) -> Tensors:
    """Tensors by name, as read-only views of the memory-mapped file (bfloat16 and 8-bit floats through
    ml_dtypes). Raises FileError."""
    entries, _ = read_header(path)
    if not any(entry.end > entry.begin for entry in entries.values()):
        return {name: np.zeros(entry.shape, entry.dtype) for name, entry in entries.items()}
    data = np.memmap(path, dtype=np.uint8, mode="r")
    return {
        name: np.asarray(data[entry.begin : entry.end]).view(entry.dtype).reshape(entry.shape)
        for name, entry in entries.items()
    }


def read_json(path: str | Path) -> dict[str, Any]:
    """A JSON object from a file. Raises FileError when it is missing, unreadable, not JSON, or not an object."""
    path = Path(path)
    try:
        value = json.loads(path.read_text("utf-8"), object_pairs_hook=_unique)
    except OSError as error:
        raise FileError(f"{path}: cannot be read ({error.strerror or error})") from error
    except _Duplicate as error:
        raise FileError(f"{path}: names {error} twice") from error
    except (ValueError, RecursionError) as error:
        raise FileError(f"{path}: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise FileError(f"{path}: expected a JSON object")
    return value


def write_safetensors(path: str | Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Write tensors, whole or not at all, one at a time (no second copy of the tree in memory).

    The same tensors and metadata give the same bytes: entries are ordered by item size, then by name, as the
    reference implementation orders them. Raises FileError for a dtype that safetensors does not know, or when the
    folder cannot be written.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    offset = 0
    for name in order:
        array = tensors[name]
        if array.dtype not in _NAMES:
            raise FileError(f"{path}: {name} has dtype {array.dtype}, which safetensors cannot hold")
        header[name] = {
            "dtype": _NAMES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [offset, offset + array.nbytes],
        }
        offset += array.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    with atomic_file(path) as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name in order:
            file.write(np.ascontiguousarray(tensors[name]).reshape(-1).view(np.uint8).data)


def write_json(path: str | Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object, whole or not at all, as people read it (indented, UTF-8)."""
    with atomic_file(path) as file:
        file.write((json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode("utf-8"))


def is_float(dtype: np.dtype) -> bool:
    """Whether a type is one of floating-point numbers, those of ml_dtypes among them."""
    return dtype.kind == "f" or dtype in _EXTENDED


def few(names: Sequence[str], most: int = 3) -> str:
    """Some names from a file, fit for one line: the first ones, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(shown, names[:most])) + more


def shown(value: Any) -> str:
    """A value from a file, fit for one line of a terminal: short, without control characters."""
    return repr(str(value)[:200])[1:-1]


# What other files begin with that people take for weights.
_HEADS = (
    (b"version https://git-lfs", "a pointer of Git LFS: the file itself was not downloaded"),
    (b"<", "a web page or XML: not the file itself, perhaps a failed download"),
    (b"GGUF", "a GGUF file, which is not read"),
    (b"\x89HDF", "an HDF5 file, which is not read"),
    (b"\x1f\x8b", "compressed by gzip: unpack it first"),
    (b"7z\xbc\xaf", "a 7z archive: unpack it first"),
    (b"Rar!", "a RAR archive: unpack it first"),
    (b"\x89PNG", "a picture (PNG)"),
    (b"\xff\xd8\xff", "a picture (JPEG)"),
    (b"RIFF", "a picture (WebP)"),
)


def _what(path: Path, length: int) -> str:
    """What a file is whose first 8 bytes, read as a header's length, are no length that it can have."""
    with path.open("rb") as file:
        head = file.read(32).lstrip()
    return next(
        (f"not a safetensors file but {what}" for start, what in _HEADS if head.startswith(start)),
        f"not a safetensors file, or a truncated one (header of {length} bytes)",
    )


class _Duplicate(Exception):
    """A key that a JSON object holds twice; most parsers let the last one win without a word."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        seen: set[str] = set()
        raise _Duplicate(next(shown(name) for name, _ in pairs if name in seen or seen.add(name)))
    return result


def _entry(path: Path, name: str, fields: Any, start: int) -> Entry:
    name_shown = shown(name)
    try:
        name.encode()  # half a surrogate pair could neither be written nor printed
        dtype, shape, (begin, end) = fields["dtype"], fields["shape"], fields["data_offsets"]
        numbers = [*shape, begin, end]
    except (TypeError, KeyError, ValueError) as error:
        raise FileError(f"{path}: {name_shown} lacks a proper name, dtype, shape or data_offsets") from error
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise FileError(f"{path}: {name_shown} has dtype {shown(dtype)}; known are {', '.join(_DTYPES)}")
    if not all(type(number) is int and 0 <= number < 2**48 for number in numbers) or len(shape) > 8:
        raise FileError(f"{path}: {name_shown} has an impossible shape {shown(shape)} or offsets")
    if end - begin != math.prod(shape) * _DTYPES[dtype].itemsize:
        raise FileError(f"{path}: {name_shown} has {end - begin} bytes, which is not what {shape} of {dtype} takes")
    return Entry(_DTYPES[dtype], tuple(shape), start + begin, start + end)


def _check_cover(path: Path, entries: Mapping[str, Entry], start: int, size: int) -> None:
    """Every byte after the header belongs to exactly one tensor."""
    position = start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != position:
            raise FileError(f"{path}: the bytes of {shown(name)} overlap others or leave a gap before them")
        position = entry.end
    if position != size:
        raise FileError(f"{path}: {size} bytes long, but its header describes {position}: truncated or padded")
