"""Work that one process at a time may do: a lock in a file that dies with its process.

On one host, and over network file systems that share them, the operating system's lock decides. Where it does not reach
(another host on some clusters, object stores mounted as folders), the file's own words do: its holder counts on in it
for as long as it lives, and whoever comes later watches whether it does. No two clocks are compared.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bdm_jax.errors import FileError, UserError
from bdm_jax.paths import leads_to
from bdm_jax.runtime.processes import is_alive

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

BEAT = 15.0  # seconds between two counts
PATIENCE = 75.0  # seconds without a count after which a holder is dead; mounted stores are up to a minute late
SETTLED = 2.0  # seconds after which a competitor's words would be seen, where nothing is locked
_SIZE = 512  # bytes of the file: it is written over in place


@contextlib.contextmanager
def held(path: Path, doing: str, instead: str) -> Iterator[None]:
    """Hold the lock while the block runs; the file is there for as long.

    Args:
        path: the lock's file, in a folder that is there.
        doing: what its holder does, for the error of others: "training this run".
        instead: what these can do: "choose another --run".

    Raises:
        UserError: another process holds it (its host, number and start are named).
        FileError: the file cannot be written.
    """
    handle, own = _take(path, doing, instead)
    done = threading.Event()
    counting = threading.Thread(target=_count, args=(handle, own, done), name="lock", daemon=True)
    counting.start()
    try:
        yield
    finally:
        done.set()
        counting.join()
        with contextlib.suppress(OSError):
            _write(handle, {})
            path.unlink(missing_ok=True)  # while it is locked: afterwards it could be another's
        os.close(handle)


def _take(path: Path, doing: str, instead: str) -> tuple[int, dict[str, Any]]:
    """The file, open and locked as far as the file system can, and what stands in it."""
    own = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S"), "count": 0}
    while True:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise FileError(f"{path}: cannot be written ({error.strerror or error})") from error
        with contextlib.ExitStack() as undo:
            undo.callback(os.close, handle)
            locked = _lock(handle)
            if locked is False or (leads_to(path, handle) and not _free(path, locked, own)):
                raise _busy(path, doing, instead)
            if leads_to(path, handle):  # else its holder has ended, and taken the file away
                try:
                    _write(handle, own)
                except OSError as error:
                    raise FileError(f"{path}: cannot be written ({error.strerror or error})") from error
                if locked is None:
                    time.sleep(SETTLED)
                    if {**_read(path), "count": 0} != own:
                        raise _busy(path, doing, instead)
                undo.pop_all()
                return handle, own


def _lock(handle: int) -> bool | None:
    """Whether the operating system gave the lock; None where it has none for this file."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _free(path: Path, locked: bool | None, own: dict[str, Any]) -> bool:
    """Whether the holder that the file names, if any, is dead, as far as the lock alone does not tell."""
    before = _read(path)
    if not before:
        return True
    if before["host"] == own["host"] and (locked or not is_alive(before["pid"])):
        return True
    who = f"process {before['pid']} on {before['host']}"
    print(f"note: {path} is {who}'s: waiting {PATIENCE:.0f} s for a sign of life", file=sys.stderr, flush=True)
    deadline, empty = time.monotonic() + PATIENCE, 0
    while time.monotonic() < deadline and empty < 2:  # once may be in the middle of its writing
        time.sleep(min(1.0, PATIENCE / 5))
        now = _read(path)
        if now and now != before:
            return False  # it counts on
        empty = 0 if now else empty + 1
    return True


def _busy(path: Path, doing: str, instead: str) -> UserError:
    now = _read(path)
    who = f"process {now['pid']} on {now['host']}" if now else "another process"
    since = f" since {now['since']}" if now else ""
    return UserError(f"{path.parent}: {who} has been {doing}{since}: wait until it ends, stop it, or {instead}")


def _count(handle: int, own: dict[str, Any], done: threading.Event) -> None:
    while not done.wait(BEAT):
        own["count"] += 1
        with contextlib.suppress(OSError):
            _write(handle, own)


def _write(handle: int, values: dict[str, Any]) -> None:
    os.lseek(handle, 0, os.SEEK_SET)
    os.write(handle, json.dumps(values).encode().ljust(_SIZE)[:_SIZE])
    os.fsync(handle)


def _read(path: Path) -> dict[str, Any]:
    """What the file says of its holder, {} for nothing. Opened anew: only so is seen what another host has written."""
    try:
        with path.open("rb") as file:
            values = json.loads(file.read(_SIZE))
    except (OSError, ValueError, RecursionError):
        return {}
    kinds = {"host": str, "pid": int, "since": str, "count": int}
    whole = isinstance(values, dict) and all(isinstance(values.get(name), kind) for name, kind in kinds.items())
    return {name: values[name] for name in kinds} if whole else {}
