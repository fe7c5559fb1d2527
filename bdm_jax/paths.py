"""Where the bundled files lie, and files and folders that appear only when they are whole."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from bdm_jax.errors import FileError

_PACKAGE = Path(__file__).resolve().parent
# Within the package where it is installed, beside it in a checkout.
ASSETS = _PACKAGE / "assets" if (_PACKAGE / "assets").is_dir() else _PACKAGE.parent / "assets"
DEMO = ASSETS / "demo"
EMOJI = ASSETS / "emoji"
TOKENIZERS = ASSETS / "tokenizers"


def no_such(path: str | Path, what: str) -> FileError:
    """The error for a path where nothing is; of a bundled one it says that the installation lacks it."""
    if any(Path(path).is_relative_to(bundled) for bundled in (DEMO, EMOJI, TOKENIZERS)):
        return FileError(
            f"{path}: this installation came without the bundled {what}; name another, or install the whole package"
        )
    return FileError(f"{path}: no such {what}")


@contextmanager
def atomic_file(path: str | Path) -> Iterator[BinaryIO]:
    """A binary file that appears under `path` only when the block ends well: temporary neighbour, fsync, rename.

    Makes the folder where needed. Raises FileError when the folder or file cannot be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:40]}.", suffix=".tmp")
    except OSError as error:
        raise FileError(f"{path}: cannot be written ({error.strerror or error})") from error
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except OSError as error:
        raise FileError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        Path(temporary).unlink(missing_ok=True)


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """A folder that appears under `path` only when the block ends well. Raises FileError when it cannot be written."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name[:40]}.", suffix=".tmp"))
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
