"""Run folders in buckets: a session works in a folder of this machine's disk, whose files are kept in the bucket.

    config.json, metrics.jsonl, samples/, export/ ...   every half a minute, before every checkpoint and at the end
    checkpoints/500/state/...                           each process writes the arrays' parts that its devices hold
    checkpoints/500/sidecar.json                        the last: without it there is no checkpoint
    checkpoints/newest.json

Files in a bucket appear whole but have no common name to be given last, so that the sidecar stands for the folder.
"""

import contextlib
import hashlib
import json
import re
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import jax

from bdm_jax.errors import FileError, UserError
from bdm_jax.runtime.buckets import Bucket, BucketLock, url_of
from bdm_jax.runtime.processes import all_agree, is_first

_EVERY = 30.0  # seconds between two looks at what has changed
_LARGE = 2**28  # bytes: only latents are
_PATIENCE = 1800.0  # seconds that the first process waits for the others' parts of a checkpoint
_LOCK = "run.lock"
_CHECKPOINTS = "checkpoints/"
_NEWEST = "checkpoints/newest.json"
# What a session that resumes does not read.
_ONLY_WRITTEN = (_CHECKPOINTS, "samples/", "export/", "profile/", "tensorboard/", "wandb/", _LOCK)
# What Orbax writes the same of in every process: the first one's is kept.
_COMMON = re.compile(r"(^|/)(_[A-Z_]+|_sharding|\.z\w+|zarr\.json|commit_success\.txt|manifest\.\w+)$")


class RemoteRun:
    """The folder of one session, and the bucket that keeps what is written there."""

    def __init__(self, bucket: Bucket, folder: Path, lock: BucketLock | None):
        self.folder, self._bucket, self._lock = folder, bucket, lock
        self._sent: dict[str, tuple[int, int]] = {}  # name -> size and time of change
        self._sending = threading.Lock()

    def pull(self) -> None:
        """Bring what a session that resumes reads; checkpoints are fetched one by one."""
        names = [name for name in self._bucket.names() if name == _NEWEST or not name.startswith(_ONLY_WRITTEN)]
        files = {name: self.folder / name for name in names}
        for path in files.values():
            if not path.resolve().is_relative_to(self.folder.resolve()):
                raise FileError(f"{self._bucket.url}: holds a file whose name leads out of the folder")
        self._bucket.get(files)
        self._sent = {name: _state(path) for name, path in files.items()}

    def push(self) -> None:
        """Send what has changed since the last time. Raises FileError, and UserError where the run is another's now."""
        self._check()
        with self._sending:
            changed = {}
            for path in sorted(self.folder.rglob("*")):
                name = path.relative_to(self.folder).as_posix()
                with contextlib.suppress(FileNotFoundError):  # gone meanwhile
                    if path.is_file() and self._is_ours(name) and self._sent.get(name) != (state := _state(path)):
                        changed[name] = state
            with tempfile.TemporaryDirectory(dir=self.folder.parent) as scratch:
                self._bucket.put({name: self._still(name, state[0], Path(scratch)) for name, state in changed.items()})
            self._sent |= changed

    def steps(self) -> list[int]:
        """Of the checkpoints in the bucket that have their sidecar, the oldest first."""
        found = (re.fullmatch(r"checkpoints/(0|[1-9]\d*)/sidecar\.json", name) for name in self._names())
        return sorted(int(match[1]) for match in found if match)

    def send(self, step: int, folder: Path, session: int) -> dict[str, str]:
        """This process's files of a checkpoint; in the first process the digests of all, once all processes have sent
        theirs. session: a number that the processes share.
        """
        self._check()
        own = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
        if not is_first():
            own = {name: path for name, path in own.items() if not _COMMON.search(name)}
        self._bucket.put({f"{_CHECKPOINTS}{step}/{name}": path for name, path in own.items()})
        files = {name: file_digest(path) for name, path in own.items()}
        if not is_first():
            self._bucket.write(self._part(step, session, jax.process_index()), json.dumps(files).encode("utf-8"))
            return files
        deadline = time.monotonic() + _PATIENCE
        for index in range(1, jax.process_count()):
            part = self._part(step, session, index)
            while (data := self._bucket.read(part)) is None:
                if time.monotonic() > deadline:
                    raise FileError(f"{self._bucket.url}: process {index} has not sent its part of step {step}")
                time.sleep(0.5)
            files |= json.loads(data)
        return files

    def commit(self, step: int, folder: Path) -> None:
        """Make a checkpoint one, of which all is there. folder: has its sidecar, and newest.json beside it."""
        self.push()
        self._bucket.put({f"{_CHECKPOINTS}{step}/sidecar.json": folder / "sidecar.json"})
        self._bucket.put({_NEWEST: folder.parent / "newest.json"})

    def fetch(self, step: int, folder: Path) -> None:
        """Bring a checkpoint, the files that its sidecar lists. Raises FileError."""
        shutil.rmtree(folder, ignore_errors=True)
        source = f"{_CHECKPOINTS}{step}"
        self._bucket.get({f"{source}/sidecar.json": folder / "sidecar.json"})
        try:
            files = list(json.loads((folder / "sidecar.json").read_text("utf-8"))["files"])
            inside = all((folder / name).resolve().is_relative_to(folder.resolve()) for name in files)
        except (ValueError, KeyError, TypeError) as error:
            raise FileError(f"{self._bucket.url}/{source}/sidecar.json: not as it was written") from error
        if not inside:
            raise FileError(f"{self._bucket.url}/{source}/sidecar.json: names a file out of its folder")
        there = set(self._names(f"{source}/"))
        if missing := [name for name in files if f"{source}/{name}" not in there]:
            raise FileError(f"{missing[0]} is missing")
        self._bucket.get({f"{source}/{name}": folder / name for name in files})

    def remove(self, step: int) -> None:
        """A checkpoint, its sidecar first."""
        names = self._names(f"{_CHECKPOINTS}{step}/")
        self._bucket.remove([name for name in names if name.endswith("/sidecar.json")])
        self._bucket.remove([name for name in names if not name.endswith("/sidecar.json")])

    def _still(self, name: str, size: int, scratch: Path) -> Path:
        """A file as it is now: what grows while it is sent is refused by some stores. Large ones appear as a whole."""
        if size > _LARGE:
            return self.folder / name
        return Path(shutil.copyfile(self.folder / name, scratch / hashlib.sha256(name.encode()).hexdigest()))

    def _names(self, below: str = _CHECKPOINTS) -> list[str]:
        return self._bucket.names(below)

    def _part(self, step: int, session: int, index: int) -> str:
        return f"{_CHECKPOINTS}{step}/part-{session}-{index}.json"

    def _is_ours(self, name: str) -> bool:
        """Whether this process keeps a file: the first all but the others' own."""
        if name.startswith(_CHECKPOINTS) or name == _LOCK or name.endswith(".tmp"):
            return False
        return is_first() or name == f"left_out-{jax.process_index()}.jsonl"

    def _check(self) -> None:
        if self._lock is not None and self._lock.lost:
            raise UserError(
                f"{self._bucket.url}: another process has taken over this run, whose lock had not been renewed"
            )


@contextlib.contextmanager
def opened(run: Path) -> Iterator[tuple[Path, RemoteRun | None]]:
    """The folder that a session works in, which is `run` itself on a disk, and what keeps it in a bucket, if it is one.

    The folder of a bucket is locked meanwhile by the first process. At the end, also of a session that fails, what has
    changed is sent. To be called by all processes.

    Raises:
        UserError: another training writes to it; a bucket that cannot be read or written, or whose package is missing.
    """
    url = url_of(run)
    if url is None:
        yield run, None
        return
    bucket = Bucket(url)
    with contextlib.ExitStack() as stack:
        lock, fault = None, None
        try:
            if is_first():
                lock = stack.enter_context(BucketLock(bucket, _LOCK, "training this run", "choose another --run"))
        except UserError as error:
            fault = error
        if not all_agree(fault is None):
            raise fault or UserError(f"{url}: the first process cannot train this run, and says why")
        scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="bdm-run-", ignore_cleanup_errors=True))
        folder = Path(scratch) / url.rpartition("/")[2]  # a run's name is its folder's
        folder.mkdir()
        remote, done = RemoteRun(bucket, folder, lock), threading.Event()
        remote.pull()
        sending = threading.Thread(target=_send_changes, args=(remote, done), name="bucket", daemon=True)
        sending.start()
        try:
            yield folder, remote
        except UserError as error:  # in the user's words
            with contextlib.suppress(UserError):
                remote.push()
            raise type(error)(str(error).replace(str(folder), url)) from error
        except BaseException:  # Ctrl-C too: whatever ends the session, what it has written reaches the bucket
            with contextlib.suppress(UserError):
                remote.push()
            raise
        else:
            remote.push()
        finally:
            done.set()
            sending.join()


def shown(path: Path) -> str:
    """A path or URL as the user wrote it."""
    return url_of(path) or str(path)


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _send_changes(remote: RemoteRun, done: threading.Event) -> None:
    told = False
    while not done.wait(_EVERY):
        try:
            remote.push()
            told = False
        except UserError as error:
            if not told:
                print(f"warning: {error}; tried again until the end", file=sys.stderr, flush=True)
            told = True


def _state(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns
