"""Folders in buckets (`gs://`, `s3://`), through fsspec: files that appear whole, and a lock without a file system's.

Credentials and endpoints are what gcsfs and s3fs find by themselves (AWS_ENDPOINT_URL, STORAGE_EMULATOR_HOST, ...).
"""

import contextlib
import json
import os
import re
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import fsspec

from bdm_jax.errors import FileError, UserError
from bdm_jax.runtime import locks
from bdm_jax.runtime.processes import is_alive

EXTRAS = {"gs": "gcs", "s3": "s3"}  # scheme -> extra of this package


def url_of(path: str | Path) -> str | None:
    """The URL that a path stands for, as it was before pathlib made `gs:/bucket/x` of it; None for a path on a disk.

    Raises UserError for a URL of another kind, or of a bucket as a whole.
    """
    found = re.match(r"([a-z][a-z0-9+.-]+):/+(.*)$", str(path))
    if not found:
        return None
    scheme, rest = found.groups()
    if scheme not in EXTRAS:
        raise UserError(f"{scheme}://{rest}: buckets are gs://BUCKET/FOLDER and s3://BUCKET/FOLDER")
    if not re.fullmatch(r"[^/]+(/[^/]+)+/?", rest):
        raise UserError(f"{scheme}://{rest}: name a bucket and a folder in it, as {scheme}://BUCKET/FOLDER")
    return f"{scheme}://{rest.rstrip('/')}"


class Bucket:
    """One folder in a bucket. Names are relative to it, with slashes.

    Raises UserError where the package for it is missing. All methods raise FileError, one line, where the store fails.
    """

    def __init__(self, url: str):
        self.url, scheme = url, url.partition(":")[0]
        try:
            self._fs, self._root = fsspec.core.url_to_fs(url, use_listings_cache=False)
        except ImportError as error:
            raise UserError(f"{url}: needs another package: pip install 'bdm_jax[{EXTRAS[scheme]}]'") from error

    def names(self, below: str = "") -> list[str]:
        """Of all files, or of those below one of its folders."""
        with self._told(below):
            found = self._fs.find(f"{self._root}/{below}".rstrip("/"))
        prefix = f"{self._root.lstrip('/')}/"
        return sorted(name.lstrip("/").removeprefix(prefix) for name in found)

    def put(self, files: Mapping[str, Path]) -> None:
        """Files from the disk, each of which appears as a whole."""
        if files:
            with self._told(next(iter(files))):
                self._fs.put([str(path) for path in files.values()], [self._path(name) for name in files])

    def get(self, files: Mapping[str, Path]) -> None:
        """Files to the disk, whose folders are made."""
        for path in files.values():
            path.parent.mkdir(parents=True, exist_ok=True)
        if files:
            with self._told(next(iter(files))):
                self._fs.get([self._path(name) for name in files], [str(path) for path in files.values()])

    def read(self, name: str) -> bytes | None:
        """A file's bytes, None where there is none."""
        with self._told(name):
            try:
                return self._fs.cat_file(self._path(name))
            except FileNotFoundError:
                return None

    def write(self, name: str, data: bytes, *, new: bool = False) -> bool:
        """Write a file; whether it was. new: only where there is none, of several writers one."""
        with self._told(name):
            try:
                self._fs.pipe_file(self._path(name), data, mode="create" if new else "overwrite")
            except FileExistsError:
                return False
            except OSError as error:  # what s3fs makes of "412 PreconditionFailed" and 409
                if new and re.search("precondition|conditional", str(error), re.IGNORECASE):
                    return False
                raise
        return True

    def remove(self, names: list[str]) -> None:
        """Files; those that are not there are no error."""
        if names:
            with self._told(names[0]), contextlib.suppress(FileNotFoundError):
                self._fs.rm([self._path(name) for name in names])

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    @contextlib.contextmanager
    def _told(self, name: str) -> Iterator[None]:
        """Whatever the store's library raises, in one line."""
        try:
            yield
        except Exception as error:  # gcsfs, s3fs and what they are built on share no class
            said = " ".join(str(error).split())[:200] or type(error).__name__
            raise FileError(f"{self.url}/{name}: {said}") from error


class BucketLock:
    """Held by one process at a time, as `locks.held` does it where the operating system's locks do not reach: its
    holder counts on in a file of the bucket for as long as it lives. `lost`: another process has taken it nevertheless,
    because this one was not heard for too long.
    """

    def __init__(self, bucket: Bucket, name: str, doing: str, instead: str):
        self.lost = False
        self._bucket, self._name, self._doing, self._instead = bucket, name, doing, instead
        self._own = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
            "token": secrets.token_hex(8),
            "count": 0,
        }
        self._done = threading.Event()
        self._counting = threading.Thread(target=self._count, name="bucket lock", daemon=True)

    def __enter__(self) -> "BucketLock":
        """Raises UserError where another process holds it (who is said)."""
        while not self._taken():
            before = self._read()
            if self._is_dead(before):
                if self._read() == before:
                    self._bucket.remove([self._name])
            else:
                who = f"process {before['pid']} on {before['host']}"
                raise UserError(
                    f"{self._bucket.url}: {who} has been {self._doing} since {before['since']}: wait until it ends, "
                    f"stop it, or {self._instead}"
                )
        self._counting.start()
        return self

    def __exit__(self, *_) -> None:
        self._done.set()
        self._counting.join()
        with contextlib.suppress(FileError):
            if not self.lost and self._read().get("token") == self._own["token"]:
                self._bucket.remove([self._name])

    def _taken(self) -> bool:
        """Whether the file was not there, and is this process's now. Not every store knows a condition of writing: who
        wrote last has the lock, and whoever else wrote at the same time sees it after a moment.
        """
        if self._bucket.read(self._name) is not None or not self._write(new=True):
            return False
        time.sleep(locks.SETTLED)
        return self._read().get("token") == self._own["token"]

    def _is_dead(self, before: dict[str, Any]) -> bool:
        """Whether the holder that the file names is dead; watches it where it runs elsewhere, or its number is in use
        (in containers it is 1 of all that follow each other).
        """
        if not before:
            return True
        if before["host"] == self._own["host"] and not is_alive(before["pid"]):
            return True
        who = f"process {before['pid']} on {before['host']}"
        where = f"{self._bucket.url}/{self._name}"
        print(f"note: {where} is {who}'s: waiting {locks.PATIENCE:.0f} s for a sign of life", file=sys.stderr)
        deadline = time.monotonic() + locks.PATIENCE
        while time.monotonic() < deadline:
            time.sleep(min(2.0, locks.PATIENCE / 5))
            if self._read() != before:
                return not self._read()
        return True

    def _count(self) -> None:
        while not self._done.wait(locks.BEAT):
            with contextlib.suppress(FileError):
                if self._read().get("token") != self._own["token"]:
                    self.lost = True
                    return
                self._own["count"] += 1
                self._write()

    def _write(self, new: bool = False) -> bool:
        return self._bucket.write(self._name, json.dumps(self._own).encode("utf-8"), new=new)

    def _read(self) -> dict[str, Any]:
        """What the file says of its holder, {} for nothing."""
        try:
            values = json.loads(self._bucket.read(self._name) or b"")
        except ValueError:
            return {}
        kinds = {"host": str, "pid": int, "since": str, "count": int, "token": str}
        whole = isinstance(values, dict) and all(isinstance(values.get(name), kind) for name, kind in kinds.items())
        return values if whole else {}
