"""Image folders with a metadata.jsonl or metadata.csv, in the format of Hugging Face's `imagefolder`: `file_name`, and
captions and more in other fields or columns.
"""

import csv
import hashlib
import io
import math
import posixpath
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from fsspec import AbstractFileSystem

from bdm_jax.data.contents import digest_files
from bdm_jax.data.source import CAPTIONS, make_record, parse_json
from bdm_jax.errors import BadRecord, UserError
from bdm_jax.formats.plain_text import decode_text, wrong_separator
from bdm_jax.images.decode import MAX_BYTES

METADATA = ("metadata.jsonl", "metadata.csv")
_NAME = "file_name"
_READ = 1 << 22
_MAX_LINE = 1 << 20  # bytes of a line of csv; Python's reader takes fields of up to 128 KiB
_MAX_COLUMNS = 1000


class FolderSource:
    """One record per line of `root`/metadata.jsonl, or per row of metadata.csv; `file_name` is relative to `root` and
    must stay inside it.

    They are read on demand; only their offsets are kept, 8 bytes each.

    Raises UserError for a csv file without the column file_name, or in which rows do not end clearly.
    """

    def __init__(self, fs: AbstractFileSystem, root: str, metadata: str = METADATA[0]):
        self._fs, self._root, self._metadata = fs, root.rstrip("/"), metadata
        self._local = "file" in np.atleast_1d(fs.protocol)
        self._lines, self._columns = posixpath.join(self._root, metadata), None
        if metadata.endswith(".csv"):
            self._starts, self._size, self.fingerprint, self._columns = _scan_csv(fs, self._lines)
        else:
            self._starts, self._size, self.fingerprint = _scan(fs, self._lines)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = int(index)
        if not 0 <= index < len(self):
            raise IndexError(index)
        values = self._values(index, self._fs.cat_file(self._lines, *self._span(index)))
        file_name = values.pop(_NAME)
        return make_record(file_name, {**values, "image": self._read(file_name)})

    def contents(self) -> str:
        """See `Source`."""
        with self._fs.open(self._lines, "rb") as file:
            paths = [self._lines, *self._images(file)]
        return digest_files(self._fs, paths)

    def _images(self, file: BinaryIO) -> Iterator[str]:
        for index in range(len(self)):
            start, end = self._span(index)
            file.seek(start)
            try:
                yield self._path(self._values(index, file.read(end - start))[_NAME])
            except BadRecord:
                continue

    def _span(self, index: int) -> tuple[int, int]:
        """Where a line or row begins and ends."""
        return int(self._starts[index]), int(self._starts[index + 1]) if index + 1 < len(self) else self._size

    def _values(self, index: int, data: bytes) -> dict[str, Any]:
        """A line or row, with a file_name that is text."""
        name = f"{self._metadata} {'line' if self._columns is None else 'row'} {index + 1}"
        values = parse_json(name, data) if self._columns is None else _parse_row(name, data, self._columns, self._lines)
        if not isinstance(values.get(_NAME), str):
            raise BadRecord(name, "invalid metadata", f"{_NAME} is missing")
        return values

    def _path(self, file_name: str) -> str:
        path = posixpath.normpath(posixpath.join(self._root, file_name))
        inside = path.startswith(self._root + "/") and "\0" not in file_name
        if inside and self._local:
            inside = Path(path).resolve().is_relative_to(Path(self._root).resolve())  # symbolic links may point outside
        if not inside:
            raise BadRecord(file_name, "outside the folder", f"{_NAME} points outside the folder of {self._metadata}")
        return path

    def _read(self, file_name: str) -> bytes:
        path = self._path(file_name)
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


def _scan_csv(fs: AbstractFileSystem, path: str) -> tuple[np.ndarray, int, str, list[str]]:
    """Offset of each row (N,) int64, the file's size, a digest of its content, its columns."""
    digest, starts, at, separator = hashlib.sha256(), [], 0, ""

    def lines(file: BinaryIO) -> Iterator[str]:
        nonlocal at, separator
        while line := file.readline(_MAX_LINE + 1):
            if len(line) > _MAX_LINE:
                raise UserError(f"{path}: a line of more than {_MAX_LINE >> 20} MiB; is it a csv file?")
            digest.update(line)
            begins, at = at == 0, at + len(line)
            text = line.decode("utf-8-sig" if begins else "utf-8", "surrogateescape")
            if begins and "," not in text:
                separator = wrong_separator(text) or ""
            yield text

    with fs.open(path, "rb") as file:
        rows = csv.reader(lines(file), strict=True)
        try:
            columns = [name.strip() for name in next(rows, [])]
            begin = at
            for row in rows:
                if row:
                    starts.append(begin)
                begin = at
        except csv.Error as error:
            if not separator:
                raise UserError(f"{path}, line {rows.line_num}: {error}") from error
            columns = []
    if separator and _NAME not in columns:
        raise UserError(f"{path}: columns are separated by commas; this file has {separator}")
    if _NAME not in columns or len({*columns}) < len(columns) or len(columns) > _MAX_COLUMNS:
        shown = ", ".join(repr(name[:40]) for name in columns[:5]) or "nothing"
        raise UserError(f"{path}: its first row must name the columns, {_NAME} among them, each once; found {shown}")
    return np.array(starts, np.int64), at, digest.hexdigest()[:16], columns


def _parse_row(name: str, data: bytes, columns: list[str], path: str) -> dict[str, Any]:
    try:
        (row,) = (row for row in csv.reader(io.StringIO(decode_text(data, name, path), newline=""), strict=True) if row)
    except (csv.Error, ValueError) as error:
        raise BadRecord(name, "invalid metadata", f"it cannot be read ({error})") from error
    if len(row) != len(columns):
        raise BadRecord(name, "invalid metadata", f"{len(row)} values in {len(columns)} columns")
    texts = (_NAME, *CAPTIONS)
    return {
        column: value if column in texts else _number(value)
        for column, value in zip(columns, row, strict=True)
        if value
    }


def _number(value: str) -> Any:
    """A number where the text is one, as in the other formats."""
    for kind in (int, float):
        try:
            number = kind(value)
        except ValueError:
            continue
        return number if math.isfinite(number) else value
    return value
