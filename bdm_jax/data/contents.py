"""What lies in the files of a set, so that a run finds out that some were replaced under their names.

Times of change would be cheaper, but a copy on another machine has others, and a run that moves would be refused.
"""

import hashlib
import posixpath
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from fsspec import AbstractFileSystem

_WHOLE = 4 << 30  # bytes of a set that is read as a whole: seconds, on a disk
_BLOCK, _BLOCKS = 1 << 16, 16
_CHECKSUMS = ("md5Hash", "crc32c", "ETag", "etag")  # which buckets keep of their files
_TEXTS = (".txt", ".caption", ".json", ".jsonl", ".csv")
_THREADS = 16


def digest_files(fs: AbstractFileSystem, paths: Sequence[str]) -> str:
    """Of the files in this order, 32 hexadecimal digits; a file that is not there counts as such.

    Sets of up to 4 GiB, and captions always, are read as a whole. Of larger ones, size and sixteen blocks of 64 KiB
    count, evenly over each file with its ends: no other image or shard is alike in all of them. Buckets are asked for
    their checksums.
    """
    with ThreadPoolExecutor(_THREADS) as pool:
        infos = list(pool.map(partial(_info, fs), paths))
        whole = sum(info["size"] for info in infos if info) <= _WHOLE
        parts = pool.map(partial(_digest, fs, whole), paths, infos)
        return hashlib.sha256(b"".join(parts)).hexdigest()[:32]


def _info(fs: AbstractFileSystem, path: str) -> dict[str, Any] | None:
    try:
        return fs.info(path)
    except FileNotFoundError:
        return None


def _digest(fs: AbstractFileSystem, whole: bool, path: str, info: dict[str, Any] | None) -> bytes:
    if info is None:
        return bytes(32)
    size = int(info["size"] or 0)
    sha = hashlib.sha256(f"{size}\n".encode())
    if checksum := next((str(info[name]) for name in _CHECKSUMS if info.get(name)), None):
        sha.update(checksum.encode())
        return sha.digest()
    with fs.open(path, "rb", **({} if whole else {"cache_type": "none"})) as file:
        if whole or size <= _BLOCK * _BLOCKS or posixpath.splitext(path)[1].lower() in _TEXTS:
            while block := file.read(1 << 22):
                sha.update(block)
        else:
            for number in range(_BLOCKS):
                file.seek((size - _BLOCK) * number // (_BLOCKS - 1))
                sha.update(file.read(_BLOCK))
    return sha.digest()
