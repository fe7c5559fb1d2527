"""Numbers of the images in a folder, each taken by one run, whatever processes and hosts draw into it at once.

A run's numbers are a file `.0007.claim` (7 is the first of them) while it draws: made under that name by one process
only, with no lock, as every file system can. The number of images is in it, and who draws them.
"""

import contextlib
import json
import os
import random
import re
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bdm_jax.images.pictures import next_index
from bdm_jax.paths import atomic_file
from bdm_jax.runtime.processes import is_alive

_NAME = re.compile(r"\.(\d{4,9})\.claim")
_EXPIRY = 7 * 24 * 3600  # seconds, for claims of other hosts, of which nobody here knows whether they are alive
_MAX_COUNT = 10**6


@dataclass(frozen=True)
class Claim:
    """The numbers from `first` on are this run's until `release`."""

    first: int
    path: Path
    made_folder: bool

    def release(self) -> None:
        """To be called when the images are there, or will never be."""
        self.path.unlink(missing_ok=True)
        if self.made_folder:
            with contextlib.suppress(OSError):  # it holds images
                self.path.parent.rmdir()


def claim(folder: Path, count: int) -> Claim:
    """Take `count` numbers after all that the folder's images have and other runs have taken.

    Raises FileError when the folder cannot be written.
    """
    made = not folder.exists()
    owner = {
        "count": min(max(count, 1), _MAX_COUNT),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "time": time.time(),
    }
    while True:
        first = _free(folder)
        path = folder / f".{first:04d}.claim"
        try:
            with atomic_file(path, replace=False) as file:
                file.write(json.dumps(owner).encode())
        except FileExistsError:
            time.sleep(random.uniform(0, 0.01))
            continue
        if _free(folder, path) <= first:
            break
        path.unlink(missing_ok=True)  # what was looked at before had changed meanwhile
        time.sleep(random.uniform(0, 0.05))
    for other, _, dead in _claims(folder):
        if dead:  # the numbers go on after this run's: nobody makes a claim of that name again
            other.unlink(missing_ok=True)
    return Claim(first, path, made)


def _free(folder: Path, own: Path | None = None) -> int:
    """The number after all that are taken, by others than `own`."""
    ends = [end for path, end, _ in _claims(folder) if path != own]
    return max([next_index(folder), *ends])


def _claims(folder: Path) -> Iterator[tuple[Path, int, bool]]:
    """Each claim, the number after its last, and whether its run is known to be dead."""
    for path in folder.glob(".*.claim"):
        if not (found := _NAME.fullmatch(path.name)):
            continue
        try:
            with path.open("rb") as file:
                values = json.loads(file.read(4096))
            count, host, pid = (values[name] for name in ("count", "host", "pid"))
            if not (isinstance(count, int) and isinstance(pid, int) and 1 <= count <= _MAX_COUNT):
                raise ValueError("not ours")
        except FileNotFoundError:
            continue
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            count, host, pid = 1, "", 0  # being written, where the file system has no links
        try:
            dead = time.time() - path.stat().st_mtime > _EXPIRY
        except OSError:
            continue
        dead = dead or (host == socket.gethostname() and not is_alive(pid))
        yield path, int(found[1]) + count, dead
