"""Tar shards as WebDataset writes them, with random access: headers are read once and an index is kept.

A sample is a run of consecutive members with the same name up to the first dot (`000123.jpg`, `000123.txt`,
`000123.json`). The index holds the byte range of each sample, 16 bytes per sample, memory-mapped. A record is one read
of that range, which on a bucket is one request.
"""

import hashlib
import io
import posixpath
import tarfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from fsspec import AbstractFileSystem

from bdm_jax.data.contents import digest_files
from bdm_jax.data.source import make_record, parse_json, parse_text
from bdm_jax.errors import BadRecord, UserError
from bdm_jax.images.decode import MAX_BYTES, SUFFIXES
from bdm_jax.paths import atomic_file, user_cache

_CACHE = ".bdm_jax_index"
_STAMPS = ("mtime", "etag", "ETag", "md5Hash")  # how file systems report a file's version
_PARALLEL = 16  # shards indexed at a time
_READ_AHEAD = 1 << 20
_BLOCK = 512


class TarSource:
    """The samples of tar shards, in order.

    Args:
        fs, paths: the shards, on any fsspec file system.
        cache: folder for the index; by default beside the shards, for buckets ~/.cache/bdm_jax.

    Attributes:
        left_out: cause -> names of what the index skipped (samples without an image, truncated shards, ...).

    Raises:
        UserError: a shard is compressed, no shard has a sample, or the cache cannot be written.
    """

    def __init__(self, fs: AbstractFileSystem, paths: Sequence[str], cache: Path | None = None):
        self._fs, self._paths = fs, list(paths)
        with ThreadPoolExecutor(_PARALLEL) as pool:
            infos = list(pool.map(fs.info, self._paths))
        sizes = [int(info["size"]) for info in infos]
        stamps = [str(next((info[name] for name in _STAMPS if info.get(name)), "")) for info in infos]
        if cache is None:
            local = "file" in np.atleast_1d(fs.protocol)
            beside = Path(posixpath.dirname(self._paths[0])) / _CACHE
            cache = beside if local else user_cache()
            if cache is None:
                raise UserError(f"{self._paths[0]}: no home folder to keep its index in; name a folder as cache")
        shards = list(zip(self._paths, sizes, stamps, strict=True))
        self._ranges, self._ends, self.left_out = _index(fs, shards, cache)
        names = [f"{posixpath.basename(path)} {size}" for path, size in zip(self._paths, sizes, strict=True)]
        self.fingerprint = _digest("tars", *names)
        if not len(self):
            raise UserError(f"{', '.join(self._paths[:3])}: no tar files with samples; skipped: {self.left_out}")

    def __len__(self) -> int:
        return len(self._ranges)

    def __getitem__(self, index: int) -> dict[str, Any]:
        index = int(index)
        if not 0 <= index < len(self):
            raise IndexError(index)
        path = self._paths[int(np.searchsorted(self._ends, index, side="right"))]
        start, end = map(int, self._ranges[index])
        name = f"{posixpath.basename(path)} at {start}"
        data = self._fs.cat_file(path, start, end)
        try:
            if len(data) != end - start:
                raise tarfile.ReadError("it is truncated")
            with tarfile.open(fileobj=io.BytesIO(data), mode="r:", ignore_zeros=True) as tar:
                files = {_split(member.name)[1]: _content(tar, member) for member in tar if member.isreg()}
                stem = _split(tar.getmembers()[0].name)[0] if tar.getmembers() else ""
        except (tarfile.TarError, EOFError, ValueError) as error:
            raise BadRecord(name, "damaged record", f"its range in the shard cannot be read ({error})") from error
        key = f"{posixpath.basename(path)}/{stem}"
        image = next((files[kind] for kind in SUFFIXES if kind in files), None)
        if image is None:
            raise BadRecord(key, "no image", "the sample no longer contains an image")
        values = parse_json(key, files[".json"]) if ".json" in files else {}
        if ".txt" in files:
            values["txt"] = parse_text(key, files[".txt"], posixpath.dirname(path))
        return make_record(key, {**values, "image": image})

    def contents(self) -> str:
        """See `Source`."""
        return digest_files(self._fs, self._paths)

    def __repr__(self) -> str:
        return f"TarSource({posixpath.dirname(self._paths[0])}, {len(self._paths)} shards, {len(self)} records)"


def _index(
    fs: AbstractFileSystem, shards: Sequence[tuple[str, int, str]], cache: Path
) -> tuple[np.ndarray, np.ndarray, dict[str, list[str]]]:
    """Byte ranges (N,2) uint64, memory-mapped; index of each shard's end (shards,); skipped names by cause."""
    whole = cache / f"all-{_digest(*(part for shard in shards for part in map(str, shard)))}"
    ranges, notes = whole.with_suffix(".npy"), whole.with_suffix(".ends.npz")
    if not (ranges.is_file() and notes.is_file()):
        try:
            cache.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"{cache}: the index cannot be written there ({error.strerror}): choose another cache folder"
            ) from error
        with ThreadPoolExecutor(_PARALLEL) as pool:
            parts = list(pool.map(lambda shard: _shard_index(fs, shard, cache), shards))
        counts, left_out = [], []
        for part in parts:
            with np.load(part) as stored:
                counts.append(len(stored["ranges"]))
                left_out += stored["left_out"].tolist()
        with atomic_file(ranges) as file:
            header = {"descr": "<u8", "fortran_order": False, "shape": (sum(counts), 2)}
            np.lib.format.write_array_header_1_0(file, header)
            for part in parts:
                with np.load(part) as stored:
                    file.write(stored["ranges"].astype("<u8").tobytes())
        with atomic_file(notes) as file:
            np.savez(file, ends=np.cumsum(counts), left_out=np.array(left_out, dtype=str).reshape(-1, 2))
    with np.load(notes) as stored:
        named: dict[str, list[str]] = {}
        for cause, name in stored["left_out"].tolist():
            named.setdefault(cause, []).append(name)
        ends = stored["ends"]
    if not ends[-1]:
        return np.zeros((0, 2), np.uint64), ends, named  # an empty file cannot be memory-mapped
    return np.load(ranges, mmap_mode="r"), ends, named


def _shard_index(fs: AbstractFileSystem, shard: tuple[str, int, str], cache: Path) -> Path:
    """The index file of one shard, written if it does not exist: interrupted indexing resumes at the next shard."""
    path, size, _ = shard
    to = cache / f"{posixpath.basename(path)}-{_digest(*map(str, shard))}.npz"
    if not to.is_file():
        ranges, left_out = _scan(fs, path, size)
        with atomic_file(to) as file:
            np.savez(file, ranges=ranges, left_out=np.array(left_out, dtype=str).reshape(-1, 2))
    return to


def _scan(fs: AbstractFileSystem, path: str, size: int) -> tuple[np.ndarray, list[tuple[str, str]]]:
    """Byte range of each sample in a shard (n,2) uint64, and (cause, name) of each that cannot be used.

    Invalid blocks are skipped, so that samples after a damaged header are found.
    """
    groups: list[list] = []  # stem, start, end, has an image
    ended = False
    with fs.open(path, "rb", block_size=_READ_AHEAD) as file:
        if file.read(2) in (b"\x1f\x8b", b"BZ"):
            raise UserError(f"{path}: compressed shards have no random access: decompress them first")
        file.seek(0)
        try:
            with tarfile.open(fileobj=file, mode="r:", ignore_zeros=True) as tar:
                for member in tar:
                    tar.members = []  # otherwise tarfile keeps every header
                    stem, kind = _split(member.name)
                    if member.isreg():
                        end = member.offset_data + -(-member.size // _BLOCK) * _BLOCK
                        if not groups or groups[-1][0] != stem:
                            groups.append([stem, member.offset, end, False])
                        groups[-1][2] = end
                        groups[-1][3] |= kind in SUFFIXES
                ended = groups and file.seek(groups[-1][2]) and file.read(2 * _BLOCK) == bytes(2 * _BLOCK)
        except tarfile.ReadError:
            pass
    kept, left_out, shard = [], [], posixpath.basename(path)
    for stem, start, end, has_image in groups:
        large = end - start > MAX_BYTES
        if end <= size and has_image and not large:
            kept.append((start, end))
        else:
            cause = "truncated shard" if end > size else "too large" if large else "no image"
            left_out.append((cause, f"{shard}/{stem}"))
    if not groups:
        left_out.append(("not a tar file", shard))
    elif not ended:
        left_out.append(("no end-of-archive marker", shard))
    return np.array(kept, np.uint64).reshape(-1, 2), left_out


def _split(name: str) -> tuple[str, str]:
    """Member name -> stem and extension, split at the first dot of the file name, as WebDataset does."""
    folder, _, file = name.rpartition("/")
    stem, dot, kind = file.partition(".")
    return posixpath.join(folder, stem), (dot + kind).lower()


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    data = tar.extractfile(member).read()
    if len(data) != member.size:
        raise tarfile.ReadError(f"{member.name} is truncated")
    return data


def _digest(*texts: str) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]
