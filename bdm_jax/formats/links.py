"""One file by its http(s) address, kept in `huggingface_hub`'s folder for such files (HF_HOME, HF_ASSETS_CACHE).

A server gives no digest of a file, so what is kept is its ETag and size: while these are the same it is not fetched
again, and a transfer that broke off goes on where it was.
"""

import contextlib
import hashlib
import json
import os
import re
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from email.message import Message
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit

from bdm_jax.errors import FileError, UserError
from bdm_jax.formats.files import read_json, write_json
from bdm_jax.formats.hub import one_line, transfer

IDENTITY = {"accept-encoding": "identity"}  # sizes and ranges are those of the file, not of a compressed one
_ABOUT, _TIMEOUT = "link.json", 20


@dataclass(frozen=True)
class Answer:
    """What a server says of a file: its size in bytes, its name, its ETag ("" where it has none or a weak one)."""

    size: int | None
    name: str
    etag: str = ""


def fetch(url: str) -> Path:
    """The file, fetched where it is not there yet or has changed; what is there already where its server is not to be
    reached, which a warning says. Raises UserError or FileError, one line, for what cannot be had.
    """
    folder = _folder(url)
    kept = _kept(folder)
    try:
        answer = ask(url)
    except Unreachable as error:
        if kept is None:
            raise UserError(f"{plain(url)}: {error}, and it was not fetched before") from error
        if not error.wanted:
            warnings.warn(f"{plain(url)}: {error}; the file that was fetched before is taken", stacklevel=2)
        return folder / kept.name
    if kept is not None and kept == answer:
        return folder / kept.name
    from huggingface_hub.utils import WeakFileLock

    folder.mkdir(parents=True, exist_ok=True)
    try:
        with WeakFileLock(folder / ".lock"), told(url):
            if _kept(folder) != answer:  # another process may have fetched it
                _transfer(url, folder, answer)
    except Unreachable as error:
        raise FileError(f"{plain(url)}: {error}; what has come is kept, the same command goes on from there") from error
    return folder / answer.name


def ask(url: str) -> Answer:
    """What the server says of the file. Raises UserError for an address that it has no file at, and Unreachable."""
    from huggingface_hub.utils import get_session

    with (
        told(url),
        # of its first byte, as not all servers answer HEAD
        get_session().stream("GET", url, headers={"Range": "bytes=0-0", **IDENTITY}, timeout=_TIMEOUT) as response,
    ):
        headers, status = response.headers, response.status_code
        if status not in (200, 206, 416):
            raise _refused(url, status)
        total = headers.get("content-range", "").rpartition("/")[2] if status != 200 else headers.get("content-length")
        size = int(total) if total and total.isdecimal() else None
        etag = headers.get("etag", "")
        return Answer(size, _file_name(url, headers.get("content-disposition")), "" if etag.startswith("W/") else etag)


def link_of(path: str | Path) -> str | None:
    """The address that a file here was fetched from, without what follows a `?`, which may be a secret; None of any
    other file.
    """
    if "links" not in Path(path).parts:
        return None
    with contextlib.suppress(ValueError, OSError):
        Path(path).absolute().relative_to(_root())
        return plain(str(read_json(Path(path).absolute().parent / _ABOUT)["url"]))
    return None


def plain(url: str) -> str:
    """An address without user, password, query and fragment."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


class Unreachable(Exception):
    """Why a server could not be asked; `wanted` where the user wants it so."""

    def __init__(self, reason: str, wanted: bool = False):
        super().__init__(reason)
        self.wanted = wanted


@contextlib.contextmanager
def told(url: str) -> Iterator[None]:
    """What goes wrong with a request, in one line: UserError, FileError or Unreachable."""
    from huggingface_hub import errors

    try:
        yield
    except errors.OfflineModeIsEnabled as error:
        raise Unreachable("HF_HUB_OFFLINE keeps it from being asked for", wanted=True) from error
    except errors.HfHubHTTPError as error:
        raise _refused(url, error.response.status_code) from error
    except (errors.HTTPError, ConnectionError, TimeoutError) as error:
        raise Unreachable(f"its server cannot be reached ({one_line(error)})") from error
    except OSError as error:
        raise FileError(f"{plain(url)}: {error.strerror or one_line(error)}") from error


def _refused(url: str, status: int) -> UserError:
    why = {401: "only after a login", 403: "refused", 404: "no such file there", 410: "no longer there"}
    return UserError(f"{plain(url)}: {why.get(status, 'cannot be had')} (status {status})")


def _root() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_ASSETS_CACHE).absolute() / "bdm_jax" / "links"


def _folder(url: str) -> Path:
    return _root() / hashlib.sha256(url.encode()).hexdigest()[:32]


def _kept(folder: Path) -> Answer | None:
    """What is there, whole."""
    try:
        values: dict[str, Any] = json.loads((folder / _ABOUT).read_text("utf-8"))
        answer = Answer(values["size"], str(values["name"]), str(values["etag"]))
        size = (folder / answer.name).stat().st_size
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return answer if answer.size in (None, size) else None


def _transfer(url: str, folder: Path, answer: Answer) -> None:
    part = folder / f"{hashlib.sha256(answer.etag.encode()).hexdigest()[:16]}.part"  # of this version of the file
    with contextlib.suppress(OSError):
        if not answer.etag or (answer.size is not None and part.stat().st_size > answer.size):
            part.unlink()
    with part.open("ab") as file:
        transfer(url, IDENTITY, file, answer.size, answer.name)
    os.replace(part, folder / answer.name)
    write_json(folder / _ABOUT, {"url": url, **asdict(answer)})


def _file_name(url: str, disposition: str | None) -> str:
    """What a server calls a file, else the end of its address; never a path."""
    message = Message()
    message["content-disposition"] = disposition or ""
    name = message.get_filename() if disposition else None
    name = name or unquote(urlsplit(url).path)
    name = re.sub(r'[\x00-\x1f<>:"|?*]', "_", re.split(r"[/\\]", name)[-1]).lstrip(".")[-120:]
    return name if name and name != _ABOUT else "file"
