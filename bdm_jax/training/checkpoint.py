"""Checkpoints of a run, through Orbax, each with a sidecar that proves it whole; the newest good one back.

    checkpoints/500/state/         what Orbax writes, in the background
    checkpoints/500/sidecar.json   step, config digest, every array's type, shape and digest, every file's SHA-256, what
                                   the loop needs to resume (data position, metrics not yet logged), its own digest
    checkpoints/newest.json        the step of the newest one: folders that are gone are missed

A step is written as `.saving-500` and gets its name last, so a folder with a number that lacks something is damaged,
not unfinished. Orbax itself restores flipped bits without a word: so it is given no file that has changed, and what it
returns must have the digests that the arrays had on the devices.
"""

import contextlib
import hashlib
import json
import logging
import re
import secrets
import shutil
import sys
import threading
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import Mesh

from bdm_jax.errors import FileError, UserError
from bdm_jax.formats.files import read_json, write_json
from bdm_jax.runtime.processes import all_agree, broadcast_from_first, is_first
from bdm_jax.training import digests
from bdm_jax.training.remote import RemoteRun, file_digest
from bdm_jax.training.state import TrainState, state_sharding

_SAVING, _REMOVING = ".saving-", ".removing-"


class Checkpoints:
    """The checkpoints in one folder, on a file system that all processes see.

    keep: how many of the newest are kept. config: digest of the run's config; a checkpoint of another run is refused.
    remote: where the run is kept in a bucket; then every process has a folder of its own, which holds a checkpoint only
    while it is written or read. `good` is the step of the newest checkpoint known to be whole, None before there is
    one.
    """

    def __init__(self, folder: Path, keep: int, config: str, remote: RemoteRun | None = None):
        self.folder, self.good = folder.absolute(), None
        self._keep, self._config, self._remote = keep, config, remote
        self._session = broadcast_from_first(secrets.randbelow(2**31))
        self._apart = remote is not None and jax.process_count() > 1
        if self._apart:  # no common disk: each writes what its devices hold, in files that need no merging
            alone = ocp.options.MultiprocessingOptions(primary_host=None)
            handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, multiprocessing_options=alone)
            self._orbax = ocp.AsyncCheckpointer(handler, multiprocessing_options=alone)
        else:
            self._orbax = ocp.AsyncCheckpointer(ocp.StandardCheckpointHandler())
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        logging.getLogger("absl").addFilter(_not_reported_by_us)
        if is_first() and self.folder.is_dir():
            for pattern in (f"{_SAVING}*", f"{_REMOVING}*"):
                for leftover in self.folder.glob(pattern):
                    shutil.rmtree(leftover, ignore_errors=True)

    def save(self, step: int, state: TrainState, mesh: Mesh, notes: dict[str, Any]) -> None:
        """Begin to write the state after `step`; `notes` (JSON) come back with it.

        Raises:
            UserError: this or the last checkpoint could not be written (the newest good one is named).
        """
        self.wait()
        sums = digests.begin(state, mesh)
        target = self.folder / f"{_SAVING}{step}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            args = ocp.args.PyTreeSave(state) if self._apart else ocp.args.StandardSave(state)
            self._orbax.save(target / "state", args=args, force=True)
        except Exception as error:
            raise self._failed(step, error) from error
        sidecar = {"step": step, "config": self._config, "notes": notes, "structure": digests.structure(state)}
        self._thread = threading.Thread(target=self._finish, args=(step, target, sidecar, sums), name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Until what is being written is whole. Raises UserError as `save` does."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def check(self) -> None:
        """Raise the UserError of a checkpoint that failed in the background, if one did."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def restore(self, like: TrainState, mesh: Mesh) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest good state, in the shapes of `like`, placed on the mesh whatever mesh wrote it, and its notes;
        None if there has never been a checkpoint.

        Damaged ones are skipped, each with a line that says what is wrong.

        Raises:
            UserError: it is of another run or model, or none is good; nothing is trained from scratch instead.
        """
        steps, promised = self._steps(), self._promised()
        if broadcast_from_first(-1 if not steps and promised is None else 0) < 0:
            return None
        faults = []
        if promised is not None and promised not in steps:
            faults.append(f"step {promised}: its folder is missing" if promised >= 0 else "newest.json is damaged")
            _warn(f"{self.folder}: {faults[-1]}; trying older ones")
        while (step := broadcast_from_first(steps.pop() if steps else -1)) >= 0:
            try:
                found = self._restore(step, like, mesh)
            except _Damage as damage:
                faults.append(f"step {step}: {damage}")
                _warn(f"{self.folder}: the checkpoint of step {step} is damaged ({damage}); trying the one before")
                continue
            self.good = step
            if faults:
                _warn(f"{self.folder}: going on from step {step}")
            return found
        raise UserError(
            f"{self.folder}: no checkpoint can be used ({'; '.join(faults)}); nothing is trained from scratch instead: "
            "bring one back, or remove the run's folder to start from scratch"
        )

    def close(self) -> None:
        """Wait until everything is on disk. Raises UserError as `save` does."""
        try:
            self.wait()
        finally:
            self._orbax.close()

    def _finish(self, step: int, target: Path, sidecar: dict[str, Any], sums: dict[str, jax.Array]) -> None:
        """In the background: wait for Orbax, add the sidecar, give the folder its name, remove old ones."""
        try:
            self._orbax.wait_until_finished()
            files = self._remote.send(step, target, self._session) if self._remote else _digests(target)
            if is_first():
                sidecar = {**sidecar, "digests": digests.finish(sums), "files": files}
                write_json(target / "sidecar.json", {**sidecar, "digest": _digest(sidecar)})
                final = self.folder / str(step)
                self._remove(final)
                target.rename(final)
                write_json(self.folder / "newest.json", {"step": step})
                if self._remote:
                    self._remote.commit(step, final)
            if self._remote:
                shutil.rmtree(self.folder / str(step) if is_first() else target, ignore_errors=True)
            self.good = step
        except Exception as error:
            self._error = self._failed(step, error)
            self._error.__cause__ = error
            return
        if is_first():  # newer folders than this step were found damaged: they are no reason to remove good ones
            with contextlib.suppress(OSError, FileError):
                for old in [other for other in self._steps() if other <= step][: -self._keep]:
                    if self._remote:
                        self._remote.remove(old)
                    else:
                        self._remove(self.folder / str(old))

    def _failed(self, step: int, error: Exception) -> UserError:
        shutil.rmtree(self.folder / f"{_SAVING}{step}", ignore_errors=True)
        good = "there is none before it" if self.good is None else f"the one of step {self.good} is good"
        return UserError(f"{self.folder}: the checkpoint of step {step} could not be written ({_line(error)}); {good}")

    def _remove(self, folder: Path) -> None:
        if folder.is_dir():
            going = folder.with_name(f"{_REMOVING}{folder.name}")
            shutil.rmtree(going, ignore_errors=True)
            folder.rename(going)
            shutil.rmtree(going, ignore_errors=True)

    def _steps(self) -> list[int]:
        """Steps that have a folder, whatever is in it (in a bucket: a sidecar); the oldest first."""
        if self._remote:
            return self._remote.steps()
        names = [path.name for path in self.folder.glob("*")] if self.folder.is_dir() else []
        return sorted(int(name) for name in names if name.isascii() and name.isdigit() and str(int(name)) == name)

    def _promised(self) -> int | None:
        """Step of the newest checkpoint there has been; -1 if that cannot be read, None if there was none."""
        path = self.folder / "newest.json"
        if not path.exists():
            return None
        try:
            step = read_json(path).get("step")
        except FileError:
            return -1
        return step if isinstance(step, int) and step >= 0 else -1

    def _restore(self, step: int, like: TrainState, mesh: Mesh) -> tuple[TrainState, dict[str, Any]]:
        """Raises _Damage in every process if it is damaged for one."""
        folder = self.folder / str(step)
        if self._remote:
            _everywhere(lambda: self._remote.fetch(step, folder))
        sidecar = _everywhere(lambda: _read_sidecar(folder, step))
        if sidecar["config"] != self._config:
            raise UserError(f"{folder} is of a run with another config ({sidecar['config']}, here {self._config})")
        _check_structure(folder, sidecar["structure"], digests.structure(like))
        _everywhere(lambda: _check_files(folder, sidecar["files"], shared=self._remote is None))
        target = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            like,
            state_sharding(mesh, like),
        )
        state = _everywhere(lambda: self._orbax.restore(folder / "state", args=self._restore_args(target)))
        if self._remote:
            shutil.rmtree(folder, ignore_errors=True)
        found = digests.finish(digests.begin(state, mesh))
        if wrong := [path for path, digest in found.items() if digest != sidecar["digests"].get(path)]:
            raise _Damage(f"{wrong[0]} has other values than were saved, {len(wrong)} of {len(found)} arrays have")
        return state, sidecar["notes"]

    def _restore_args(self, target: TrainState) -> Any:
        if not self._apart:
            return ocp.args.StandardRestore(target)
        return ocp.args.PyTreeRestore(target, restore_args=ocp.checkpoint_utils.construct_restore_args(target))


class _Damage(Exception):
    """What is wrong with one checkpoint."""


def _everywhere(read):
    """`read()` if it succeeds in every process; _Damage in every process if it fails in one."""
    try:
        value, damage = read(), None
    except Exception as error:  # of Orbax and TensorStore: whatever damaged bytes lead to
        value, damage = None, _Damage(_line(error))
    if not all_agree(damage is None):
        raise damage or _Damage("another process cannot read it")
    return value


def _read_sidecar(folder: Path, step: int) -> dict[str, Any]:
    sidecar = read_json(folder / "sidecar.json")
    if sidecar.pop("digest", None) != _digest(sidecar):
        raise _Damage("sidecar.json is not as it was written")
    if sidecar["step"] != step:
        raise _Damage(f"sidecar.json is that of step {sidecar['step']}")
    return sidecar


def _check_structure(folder: Path, stored: dict[str, list], wanted: dict[str, list]) -> None:
    for path in sorted({*stored, *wanted}):
        if stored.get(path) != wanted.get(path):
            has, needs = (str(tree.get(path, "nothing")) for tree in (stored, wanted))
            raise UserError(f"{folder} is of another model: {path} is {has} there, {needs} here")


def _check_files(folder: Path, written: dict[str, str], shared: bool) -> None:
    """Of a folder that they share, the processes share the work."""
    for name in sorted(written)[jax.process_index() :: jax.process_count()] if shared else written:
        if not (folder / name).is_file():
            raise _Damage(f"{name} is missing")
        if file_digest(folder / name) != written[name]:
            raise _Damage(f"{name} is not as it was written")


def _digests(folder: Path) -> dict[str, str]:
    """Of the state's files; in the first process, which writes them down."""
    return {str(path.relative_to(folder)): file_digest(path) for path in _files(folder / "state")} if is_first() else {}


def _not_reported_by_us(record: logging.LogRecord) -> bool:
    """Drops the tracebacks that Orbax logs of what it also raises: one line of ours reports it."""
    return not any(words in str(record.msg) for words in ("background save thread", "run() raised an exception"))


def _digest(sidecar: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(sidecar, sort_keys=True).encode()).hexdigest()


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _line(error: BaseException) -> str:
    """The error in one line: TensorStore's messages are pages, in which the system's own error is what matters."""
    text = " ".join(str(error).split()) or type(error).__name__
    system = re.search(r"([^:]+) \[os_error_code", text)
    return f"{text[:60]}...: {system[1].strip()}" if system else text[:200]


def _warn(message: str) -> None:
    if is_first():
        print(f"warning: {message}", file=sys.stderr, flush=True)
