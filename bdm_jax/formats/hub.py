"""Models by name: repositories of the Hugging Face hub, or of a mirror of it, through `huggingface_hub`.

    OWNER/NAME                      a repository: a pipeline or component folder, or its only weight file
    OWNER/NAME@REVISION             a branch, tag or commit of it
    OWNER/NAME:PLACE                a file or folder in it
    https://HOST/...                one file (`formats.links`); an address on the hub stands for the name there

What lies on this machine under that very text is a path, not a name. Cache, token, mirror and offline mode are the
library's own (HF_HOME, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE). A file comes into its cache only once it has the digest
that the hub gives for it (SHA-256 of large files, git's SHA-1 of others). A transfer that broke off goes on where it
was, also in the next run.
"""

import contextlib
import hashlib
import os
import re
import shutil
import warnings
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO
from urllib.parse import unquote, urlsplit

from bdm_jax.errors import FileError, UserError
from bdm_jax.formats.files import few, shown

_PUBLIC = "https://huggingface.co"
_WORD = r"[A-Za-z0-9](?:[\w.-]*[\w])?"
_NAME = re.compile(rf"(?P<name>{_WORD}/{_WORD})(?:@(?P<revision>[\w.-][\w./-]*))?(?::(?P<place>[^:@]+))?", re.ASCII)
_PAGE = re.compile(r"/(?P<name>[^/]+/[^/]+)(?:/(?:resolve|blob|tree|raw)/(?P<revision>[^/]+)(?:/(?P<place>.+?))?)?/?")
_LINK = re.compile(r"https?://[^/\s]", re.IGNORECASE)
# What no repository is called.
_FILE = re.compile(r".*\.(safetensors|ckpt|bin|pth?|json|png|jpe?g|webp)", re.IGNORECASE)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_MAX_TEXT = 100 * 2**20  # bytes of a config or vocabulary
_TIMEOUT = 20  # seconds until a hub has to answer


@dataclass(frozen=True)
class HubName:
    """A name, taken apart. `place` is "" for the whole repository; `written` is as the user has it."""

    written: str = field(compare=False)
    name: str
    revision: str = "main"
    place: str = ""


@dataclass(frozen=True)
class RemoteFile:
    """What a hub says of a file: its bytes, and its SHA-256 (64 digits) or git's SHA-1 of it (40), "" for neither."""

    size: int
    digest: str


@dataclass(frozen=True)
class Repository:
    """One commit of a repository: its files by their path in it. Of one that only the cache knows (`offline` says why),
    those that are there.
    """

    asked: HubName
    commit: str
    files: dict[str, RemoteFile]
    offline: str = ""

    @property
    def folder(self) -> Path:
        """Where its files lie in the cache."""
        return _storage(self.asked.name) / "snapshots" / self.commit

    def __str__(self) -> str:
        return f"{self.asked.name}@{self.commit[:12]}"


def parse_name(text: str) -> HubName | None:
    """The name that a text is, by its form alone; None for a path or another link."""
    text = str(text)
    if is_link(text):
        return _of_address(text)
    match = _NAME.fullmatch(text)
    if match is None or ".." in text or "--" in match["name"]:
        return None
    if not match["place"] and not match["revision"] and _FILE.fullmatch(text):
        return None  # models/sd15.safetensors: a file that is not there
    place = (match["place"] or "").strip("/")
    return HubName(text, match["name"], match["revision"] or "main", place)


def is_link(text: str | Path) -> bool:
    """Whether a text is that of an http(s) address."""
    return bool(_LINK.match(str(text)))


def is_remote(text: str | Path) -> bool:
    """Whether a text names a model on a hub, or one file by its address: nothing lies here under it, and it has the
    form of such a name.
    """
    if not str(text) or os.path.exists(text):
        return False
    return is_link(text) or parse_name(text) is not None


def open_repository(asked: HubName) -> Repository:
    """The commit that a name stands for now, and its files.

    Where the hub is not asked (HF_HUB_OFFLINE) or does not answer, what the cache has of it; a warning says the latter.

    Raises UserError, one line, for a repository or revision that there is not, or is not for this user, and where
    neither hub nor cache has it.
    """
    from huggingface_hub import HfApi, constants, errors

    try:
        if constants.HF_HUB_OFFLINE:
            raise errors.OfflineModeIsEnabled
        info = HfApi(endpoint=constants.ENDPOINT).model_info(
            asked.name, revision=asked.revision, files_metadata=True, timeout=_TIMEOUT
        )
    except Exception as error:
        reason = _unreachable(error)
        if reason is None:
            refusal = _refusal(asked, error)
            if refusal is not None and _COMMIT.fullmatch(asked.revision) and (found := _cached(asked, str(refusal))):
                return found  # what a run began with, and the hub has no more
            raise refusal or error from error
        found = _cached(asked, reason)
        if found is None:
            raise UserError(f"{asked.written}: no such file or folder here, and {reason}") from error
        if not constants.HF_HUB_OFFLINE:
            warnings.warn(f"{asked.written}: {reason}; what the cache has is taken", stacklevel=2)
        return found
    files = {}
    for sibling in info.siblings or ():
        if _is_plain(sibling.rfilename):
            digest = sibling.lfs.sha256 if sibling.lfs else sibling.blob_id
            files[sibling.rfilename] = RemoteFile(sibling.size or 0, digest or "")
    if not _COMMIT.fullmatch(str(info.sha)):
        raise UserError(f"{asked.written}: {constants.ENDPOINT} names no commit of it: no hub, or one of another kind")
    return Repository(asked, info.sha, files)


def fetch(repository: Repository, names: Sequence[str]) -> None:
    """Have these files in the cache, under `repository.folder`; those that are there are not asked for again.

    Raises UserError or FileError, one line, for what cannot be had: then no part of it is in the cache.
    """
    missing = [name for name in names if not (repository.folder / name).exists()]
    if not missing:
        return
    if repository.offline:
        raise lacking(repository, missing)
    from huggingface_hub import constants, hf_hub_download

    for name in missing:
        if name.endswith((".json", ".txt")) and (size := repository.files[name].size) > _MAX_TEXT:
            raise FileError(f"{repository.asked.written}: {name} has {size} bytes; at most {_MAX_TEXT} are read")
    _check_space(repository, missing)
    for name in missing:
        with told(repository, name):
            _fetch_blob(repository, name)
            # it makes the entry of the file in this commit; what has no digest it fetches itself
            hf_hub_download(
                repository.asked.name,
                name,
                revision=repository.commit,
                cache_dir=constants.HF_HUB_CACHE,
                endpoint=constants.ENDPOINT,
            )
    if not _COMMIT.fullmatch(repository.asked.revision):
        ref = _storage(repository.asked.name) / "refs" / repository.asked.revision
        with contextlib.suppress(OSError):  # it is for offline use only
            ref.parent.mkdir(parents=True, exist_ok=True)
            ref.write_text(repository.commit, "utf-8")


def lacking(repository: Repository, names: Sequence[str]) -> UserError:
    """The error for files that are needed where there is nothing but the cache."""
    written, lost = repository.asked.written, few(names)
    return UserError(f"{written}: {repository.offline}, and the cache lacks {lost}: fetch it once with a network")


def file_address(repository: Repository, name: str) -> tuple[str, dict[str, str]]:
    """The address of one file, and the headers (the user's token among them) to ask for it with."""
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.utils import build_hf_headers

    url = hf_hub_url(repository.asked.name, name, revision=repository.commit, endpoint=constants.ENDPOINT)
    return url, {**build_hf_headers(), "accept-encoding": "identity"}


def transfer(url: str, headers: dict[str, str], target: BinaryIO, size: int | None, name: str) -> None:
    """The rest of a file of `size` bytes, of which `target`, opened for appending, has the beginning; with a bar.

    Begun again where it breaks off, as long as something comes. Raises what the library does.
    """
    from huggingface_hub import errors
    from huggingface_hub.file_download import http_get

    while True:
        there = target.tell()
        try:
            http_get(url, target, resume_size=there, headers=headers, expected_size=size, displayed_filename=name)
            return
        except errors.HTTPError as error:
            if isinstance(error, errors.HfHubHTTPError) or target.tell() <= there:
                raise


@contextlib.contextmanager
def told(repository: Repository, name: str) -> Iterator[None]:
    """What goes wrong with the transfer of a file, in one line."""
    try:
        yield
    except (UserError, KeyboardInterrupt):
        raise
    except Exception as error:
        if (refusal := _refusal(repository.asked, error)) is not None:
            raise refusal from error
        if (reason := _unreachable(error)) is None and not isinstance(error, OSError):
            raise
        what = f"{reason}; what has come is kept, the same command goes on from there" if reason else one_line(error)
        raise FileError(f"{repository.asked.written}: {name}: {what}") from error


def name_of(path: str | Path) -> str | None:
    """OWNER/NAME@COMMIT[:PLACE] of a path in the cache, as a user would write it; None for any other."""
    if "snapshots" not in Path(path).parts:
        return None
    from huggingface_hub import constants

    try:
        repository, snapshots, commit, *place = Path(path).absolute().relative_to(constants.HF_HUB_CACHE).parts
    except ValueError:
        return None
    if snapshots != "snapshots" or not repository.startswith("models--"):
        return None
    name = repository.removeprefix("models--").replace("--", "/", 1)
    return f"{name}@{commit}" + (f":{'/'.join(place)}" if place else "")


def _of_address(link: str) -> HubName | None:
    """What the address of a page or file on the hub is the name of."""
    from huggingface_hub import constants

    for host in {_PUBLIC, constants.ENDPOINT.rstrip("/")}:
        if link.startswith(f"{host}/") and (match := _PAGE.fullmatch(unquote(urlsplit(link[len(host) :]).path))):
            revision, place = match["revision"] or "main", match["place"] or ""
            page = _NAME.fullmatch(match["name"]) and (match["revision"] or not _FILE.fullmatch(match["name"]))
            if page and _is_plain(place or "."):
                return HubName(link, match["name"], revision, place)
    return None


def _is_plain(name: str) -> bool:
    """Whether a path from a hub stays where it is put."""
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and "\\" not in name and ":" not in name and bool(name)


def _storage(name: str) -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}"


def _cached(asked: HubName, reason: str) -> Repository | None:
    storage, commit = _storage(asked.name), asked.revision
    if not _COMMIT.fullmatch(commit):
        try:
            commit = (storage / "refs" / commit).read_text("utf-8").strip()
        except OSError:
            return None
    folder = storage / "snapshots" / commit
    if not _COMMIT.fullmatch(commit) or not folder.is_dir():
        return None
    found = [path for path in folder.rglob("*") if path.is_file()]
    files = {path.relative_to(folder).as_posix(): RemoteFile(path.stat().st_size, "") for path in found}
    return Repository(asked, commit, files, reason)


def _check_space(repository: Repository, names: Collection[str]) -> None:
    """Before the first byte, not after hours."""
    storage = _storage(repository.asked.name)
    needed = sum(repository.files[name].size for name in names)
    there = next((folder for folder in (storage, *storage.parents) if folder.exists()), None)
    with contextlib.suppress(OSError):
        if there is not None and (free := shutil.disk_usage(there).free) < needed:
            raise FileError(
                f"{repository.asked.written}: {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free in "
                f"{storage.parent}: set HF_HOME to a folder on another disk"
            )


def _fetch_blob(repository: Repository, name: str) -> None:
    """The content of a file, in the cache under its digest, where it is checked before it appears."""
    from huggingface_hub.utils import WeakFileLock

    file, storage = repository.files[name], _storage(repository.asked.name)
    if not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", file.digest):
        return
    blob = storage / "blobs" / file.digest
    lock = storage.parent / ".locks" / storage.name / f"{file.digest}.lock"
    for folder in (blob.parent, lock.parent):
        folder.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):  # the library's own: another program's download of the file is waited for
        part = blob.with_name(f"{file.digest}.part")
        again = part.exists()
        while not blob.exists():
            if part.exists() and part.stat().st_size > file.size:
                part.unlink()
            with part.open("ab") as target:
                transfer(*file_address(repository, name), target, file.size, name)
            if (found := _digest(part, file)) == file.digest:
                os.replace(part, blob)
                break
            part.unlink()
            if not again:
                raise FileError(
                    f"{repository.asked.written}: {name}: what came has the digest {found[:16]}..., the hub gives "
                    f"{file.digest[:16]}...: damaged on the way, nothing of it is kept; try again"
                )
            again = False  # what an earlier run left may be what is wrong


def _digest(path: Path, file: RemoteFile) -> str:
    with path.open("rb") as source:
        if len(file.digest) == 64:
            return hashlib.file_digest(source, "sha256").hexdigest()
        sha = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
        while piece := source.read(1 << 20):
            sha.update(piece)
        return sha.hexdigest()


def _unreachable(error: BaseException) -> str | None:
    """Why a hub could not be asked; None where it has answered."""
    from huggingface_hub import constants, errors

    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE keeps the hub from being asked"
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        return f"{constants.ENDPOINT} is out of order (status {status})" if status >= 500 or status == 429 else None
    if isinstance(error, errors.HTTPError | ConnectionError | TimeoutError):
        return f"{constants.ENDPOINT} cannot be reached ({one_line(error)})"
    return None


def _refusal(asked: HubName, error: BaseException) -> UserError | None:
    """What a hub's answer means to the user; None for what is no answer."""
    from huggingface_hub import constants, errors

    page, log_in = f"{constants.ENDPOINT}/{asked.name}", "log in with `hf auth login`, or set HF_TOKEN"
    if isinstance(error, errors.GatedRepoError):
        return UserError(f"{asked.written}: asks for consent to its terms: agree on {page}, then {log_in}")
    if isinstance(error, errors.RevisionNotFoundError):
        return UserError(f"{asked.written}: {page} has no revision {asked.revision}")
    if isinstance(error, errors.RepositoryNotFoundError):
        return UserError(
            f"{asked.written}: no such file or folder here, and no such model on {constants.ENDPOINT} (for a private "
            f"one {log_in})"
        )
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        if status in (401, 403):
            return UserError(f"{asked.written}: {constants.ENDPOINT} refuses it (status {status}): {log_in}")
        if status < 500:
            return UserError(f"{asked.written}: {constants.ENDPOINT} answers with status {status}")
    if isinstance(error, errors.HFValidationError):
        return UserError(f"{asked.written}: no such file or folder here, and no name that a hub has")
    return None


def one_line(error: Any) -> str:
    """The first line of what a library says, or the kind of error where it says nothing."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return shown(lines[0]) if lines else type(error).__name__
