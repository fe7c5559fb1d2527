"""Image folders with a metadata.jsonl, in the format of Hugging Face's `imagefolder`: `file_name` and captions."""

import hashlib
import posixpath
from pathlib import Path
from typing import Any

import numpy as np
from fsspec import AbstractFileSystem

from bdm_jax.data.source import make_record, parse_json
from bdm_jax.errors import BadRecord
from bdm_jax.images.decode import MAX_BYTES

METADATA = "metadata.jsonl"
_READ = 1 << 22


class FolderSource:
    """One record per line of `root`/metadata.jsonl; `file_name` is relative to `root` and must stay inside it.

    Lines are read on demand; only their offsets are kept, 8 bytes each.
    """

    def __init__(self, fs: AbstractFileSystem, root: str):
        self._fs, self._root = fs, root.rstrip("/")
        self._local = "file" in np.atleast_1d(fs.protocol)
        self._lines = posixpath.join(self._root, METADATA)
        self._starts, self._size, self.fingerprint = _scan(fs, self._lines)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = int(index)
        if not 0 <= index < len(self):
            raise IndexError(index)
        name = f"{METADATA} line {index + 1}"
        end = int(self._starts[index + 1]) if index + 1 < len(self) else self._size
        values = parse_json(name, self._fs.cat_file(self._lines, int(self._starts[index]), end))
        file_name = values.pop("file_name", None)
        if not isinstance(file_name, str):
            raise BadRecord(name, "invalid metadata", "file_name is missing")
        return make_record(file_name, {**values, "image": self._read(file_name)})

    def _read(self, file_name: str) -> bytes:
        path = posixpath.normpath(posixpath.join(self._root, file_name))
        inside = path.startswith(self._root + "/")
        if inside and self._local:
            inside = Path(path).resolve().is_relative_to(Path(self._root).resolve())  # symbolic links may point outside
        if not inside or "\0" in file_name:
            raise BadRecord(file_name, "outside the folder", "file_name points outside the folder of metadata.jsonl")
        try:
            # a local read allocates as much as it is asked for; on a bucket, asking for the size costs another request
            size = Path(path).stat().st_size if self._local else MAX_BYTES
            data = self._fs.cat_file(path, 0, min(size, MAX_BYTES) + 1)
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
            raise BadRecord(file_name, "missing file", "no such file") from error
        if len(data) > MAX_BYTES:
            raise BadRecord(file_name, "too large", f"larger than {MAX_BYTES >> 20} MiB")
        return data

    def __repr__(self) -> str:
        return f"FolderSource({self._root}, {len(self)} records)"


def _scan(fs: AbstractFileSystem, path: str) -> tuple[np.ndarray, int, str]:
    """Offset of each non-blank line (N,) int64, the file's size, a digest of its content."""
    digest, starts, at, rest = hashlib.sha256(), [], 0, b""
    with fs.open(path, "rb") as file:
        while block := file.read(_READ):
            digest.update(block)
            lines = (rest + block).split(b"\n")
            for line in lines[:-1]:
                if line.strip():
                    starts.append(at)
                at += len(line) + 1
            rest = lines[-1]
    if rest.strip():
        starts.append(at)
    return np.array(starts, np.int64), at + len(rest), digest.hexdigest()[:16]
