"""Where the bundled files lie, and files and folders that appear only when they are whole."""

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from bdm_jax.errors import FileError

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

_STALE = 3600  # seconds without a change, after which a temporary file is nobody's where the file system has no locks
_KEPT = 40  # characters of a file's name that its temporary neighbour keeps
_PACKAGE = Path(__file__).resolve().parent
# Within the package where it is installed, beside it in a checkout.
ASSETS = _PACKAGE / "assets" if (_PACKAGE / "assets").is_dir() else _PACKAGE.parent / "assets"
DEMO = ASSETS / "demo"
EMOJI = ASSETS / "emoji"
HANZI = ASSETS / "hanzi"
TOKENIZERS = ASSETS / "tokenizers"


def no_such(path: str | Path, what: str) -> FileError:
    """The error for a path where nothing is; of a bundled one it says that the installation lacks it."""
    if any(Path(path).is_relative_to(bundled) for bundled in (DEMO, EMOJI, HANZI, TOKENIZERS)):
        return FileError(
            f"{path}: this installation came without the bundled {what}; name another, or install the whole package"
        )
    return FileError(f"{path}: no such {what}")


def check_output(flag: str, path: Path | None) -> None:
    """Refuse a file that long work would end in before it, not after it; None is no file. Leaves nothing behind.

    Raises FileError, naming the flag, for a folder and for what cannot be written.
    """
    if path is None:
        return
    if path.is_dir():
        raise FileError(f"{flag} {path}: a folder; name a file")
    try:
        tempfile.TemporaryFile(dir=next(folder for folder in path.absolute().parents if folder.exists())).close()
    except OSError as error:
        raise FileError(f"{flag} {path}: cannot be written ({error.strerror or error})") from error


def leads_to(path: str | Path, handle: int) -> bool:
    """Whether a path still leads to an open file, or another process has put another in its place."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(handle))
    except FileNotFoundError:
        return False


def user_cache() -> Path | None:
    """Our folder in the user's cache folder; None for a user without a home, as in a container with a bare uid."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bdm_jax"
    except RuntimeError:
        return None


@contextmanager
def atomic_file(path: str | Path, *, replace: bool = True) -> Iterator[BinaryIO]:
    """A binary file that appears under `path` only when the block ends well: temporary neighbour, fsync, rename.

    Makes the folder where needed. replace: False leaves a file that is there already as it is.

    Raises FileError when the folder or file cannot be written; FileExistsError for a file that is not to be replaced.
    """
    path, give_name = Path(path), os.replace if replace else _link
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = _temporary(path)
    except OSError as error:
        raise FileError(f"{path}: cannot be written ({error.strerror or error})") from error
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            os.chmod(temporary, 0o666 & ~_umask())
            if fcntl:  # while it is locked, so that nobody takes it for a leftover
                give_name(temporary, path)
        if not fcntl:  # Windows renames no open file
            give_name(temporary, path)
    except FileExistsError:
        raise
    except OSError as error:
        raise FileError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        Path(temporary).unlink(missing_ok=True)


def remove_leftovers(folder: Path, names: set[str] | None = None) -> None:
    """Remove the temporary neighbours of these files, or of any, that a killed process has left; not those being
    written.
    """
    starts = None if names is None else {name[:_KEPT] for name in names}
    for path in folder.glob(".*.*.tmp"):
        if (starts is None or path.name[1:].rsplit(".", 2)[0] in starts) and path.is_file() and _abandoned(path):
            path.unlink(missing_ok=True)


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """A folder that appears under `path` only when the block ends well. Raises FileError when it cannot be written."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name[:_KEPT]}.", suffix=".tmp"))
    except OSError as error:
        raise FileError(f"{path}: cannot be written ({error.strerror or error})") from error
    try:
        yield temporary
        temporary.chmod(0o777 & ~_umask())
        temporary.rename(path)
    except OSError as error:
        raise FileError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _umask() -> int:
    """mkstemp makes private files; a finished one gets the rights that any new file of this user has."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _temporary(path: Path) -> tuple[int, str]:
    """A new temporary neighbour, locked for as long as it is open where the file system has locks."""
    while True:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:_KEPT]}.", suffix=".tmp")
        if fcntl:
            with contextlib.suppress(OSError):
                fcntl.flock(handle, fcntl.LOCK_EX)
        if os.path.exists(temporary):  # another process may have taken it for a leftover before it was locked
            return handle, temporary
        os.close(handle)


def _abandoned(path: Path) -> bool:
    """Whether no process is writing it."""
    if fcntl:
        try:
            handle = os.open(path, os.O_RDWR)
        except OSError:
            return False
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            return False
        except OSError:  # no locks here: its age is all there is to go by
            pass
        finally:
            os.close(handle)
    with contextlib.suppress(OSError):
        return time.time() - path.stat().st_mtime > _STALE
    return False


def _link(temporary: str, path: Path) -> None:
    """Give a finished file its name. Raises FileExistsError where there is one, which stays."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        if os.stat(temporary).st_nlink < 2:  # over NFS an answer may be lost, and the link be there when asked again
            raise
    except OSError:  # no hard links on this file system: the name is taken first, then filled
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        os.replace(temporary, path)
