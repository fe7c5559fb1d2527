"""Of a weight file that lies elsewhere, what says which tensors it holds, read by HTTP ranges.

What is read is put in its place into a file of the same size, of which the rest is a hole (it takes no room on disk,
and reads as zeros): the readers of files here then read, and check, the one that lies elsewhere. Of safetensors that is
the header, of PyTorch's zip archives the directory, the pickle and each member's own header.
"""

import shutil
import struct
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np

from bdm_jax.errors import FileError, UserError
from bdm_jax.formats import hub, links
from bdm_jax.formats.archives import Refused, directory
from bdm_jax.formats.files import read_header
from bdm_jax.formats.hub import Repository

_WHOLE = 1 << 20  # bytes up to which a file is read whole
_HEAD, _TAIL = 1 << 18, 1 << 19  # what is read first of one, and last: most headers and directories are in there
_HEADER = 100 << 20  # the largest header or directory that is read
_SMALL = 64  # bytes of tensors that are read too: scales and strengths, by which files are told apart
_GAP, _AT_ONCE, _TIMEOUT = 1 << 15, 16, 60
_MEMBERS = 200_000

Read = Callable[[int, int], bytes]  # (begin, end) -> the bytes of the file


def outline(repository: Repository, name: str, target: Path) -> None:
    """Make `target` the outline of a file in a repository; of one that is in the cache, that file itself.

    Raises UserError or FileError, one line.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    there = repository.folder / name
    if target.exists():
        return
    if repository.offline or there.exists():
        hub.fetch(repository, [name])  # says what is missing
        try:
            target.symlink_to(there.resolve())
        except OSError:  # no rights to make links, as on Windows
            shutil.copyfile(there, target)
        return
    url, headers = hub.file_address(repository, name)
    with hub.told(repository, name):
        _write(target, repository.files[name].size, _ranges(url, headers, name))


def outline_of_link(url: str, folder: Path) -> Path:
    """The outline of the file at an address, in a folder. Raises UserError or FileError, one line."""
    try:
        answer = links.ask(url)
        if answer.size is None:
            raise FileError(f"{links.plain(url)}: its server does not say how large it is: fetch it, inspect the file")
        with links.told(url):
            _write(folder / answer.name, answer.size, _ranges(url, links.IDENTITY, answer.name))
    except links.Unreachable as error:
        raise UserError(f"{links.plain(url)}: {error}") from error
    return folder / answer.name


def _write(target: Path, size: int, read: Read) -> None:
    """`target`, of `size` bytes, with what `read` gives of those that matter."""
    with target.open("wb") as file:
        file.truncate(size)

        def put(begin: int, end: int) -> bytes:
            begin, end = max(begin, 0), min(end, size)
            data = read(begin, end) if end > begin else b""
            file.seek(begin)
            file.write(data)
            return data

        head = put(0, size if size <= _WHOLE else _HEAD)
        if size <= _WHOLE:
            return
        if head.startswith(b"PK\3\4"):
            spans = _in_archive(target, size, put, file.flush)
        else:
            length = int.from_bytes(head[:8], "little")
            if 8 + length > len(head) and length <= min(size, _HEADER):
                put(len(head), 8 + length)
            file.flush()
            spans = _small_tensors(target)
        merged = [span for span in _merged(spans) if span[1] > len(head)]
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            for (begin, _), data in zip(merged, pool.map(lambda span: read(*span), merged), strict=True):
                file.seek(begin)
                file.write(data)


def _in_archive(target: Path, size: int, put: Callable[[int, int], bytes], flush: Callable[[], None]) -> list:
    """Where in a zip archive the members' own headers lie, and the members that are no tensors."""
    begin = size - _TAIL
    start = _directory_begin(put(begin, size))
    if start is not None and size - _HEADER < start < begin:  # it begins before what was read
        put(start, begin)
    flush()
    try:
        _, members = directory(memoryview(np.memmap(target, np.uint8, "r")), _MEMBERS)
    except (Refused, struct.error, ValueError, LookupError):  # damaged: its reader says how
        return []
    spans = []
    for name, (offset, length, *_) in members.items():
        whole = length if "/data/" not in name and length <= _HEADER else 0
        spans.append((offset, min(offset + 30 + 4 * len(name) + 128 + whole, size)))
    return [span for span in spans if span[0] < span[1]]


def _directory_begin(tail: bytes) -> int | None:
    """Where a zip directory begins, by the record at the end of the file (its 64-bit one where the other is full)."""
    if tail[-22:-18] != b"PK\5\6":
        return None
    (start,) = struct.unpack_from("<L", tail, len(tail) - 6)
    if tail[-42:-38] == b"PK\6\7" and tail[-98:-94] == b"PK\6\6":
        (start,) = struct.unpack_from("<Q", tail, len(tail) - 98 + 48)
    return start


def _small_tensors(target: Path) -> list[tuple[int, int]]:
    try:
        entries, _ = read_header(target)
    except FileError:  # said by who reads it
        return []
    return [(entry.begin, entry.end) for entry in entries.values() if 0 < entry.end - entry.begin <= _SMALL]


def _merged(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same with those in one that lie near each other: a request costs more than some bytes."""
    merged: list[tuple[int, int]] = []
    for begin, end in sorted(spans):
        if merged and begin <= merged[-1][1] + _GAP:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((begin, end))
    return merged


def _ranges(url: str, headers: dict[str, str], name: str) -> Read:
    """A reader of ranges, which goes to where the address leads at once after the first."""
    from huggingface_hub.utils import get_session, hf_raise_for_status

    session, place = get_session(), [url, headers]

    def read(begin: int, end: int) -> bytes:
        address, own = place
        asked = {**own, "Range": f"bytes={begin}-{end - 1}"}
        with session.stream("GET", address, headers=asked, timeout=_TIMEOUT) as response:
            if response.status_code == 200 and begin == 0 and int(response.headers.get("content-length", -1)) == end:
                return response.read()
            if response.status_code == 200:
                raise FileError(f"{name}: its server gives files only as a whole: fetch it and inspect the file")
            hf_raise_for_status(response)
            data = response.read()
        if len(data) != end - begin:
            raise FileError(f"{name}: {len(data)} bytes came where {end - begin} were asked for")
        if str(response.url) != address:
            # the token is for the hub alone
            place[:] = [str(response.url), own if response.url.host == urlsplit(address).hostname else links.IDENTITY]
        return data

    return read
