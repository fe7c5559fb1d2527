"""What is asked of the service, and what becomes of it."""

import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from bdm_jax.app.parts import Parts
from bdm_jax.errors import UserError
from bdm_jax.sampling.settings import Request, Sampling

State = Literal["waiting", "loading", "drawing", "done", "stopped", "failed"]
FINISHED = ("done", "stopped", "failed")


class QueueFull(UserError):
    """So many jobs wait that no more are taken: to be asked again later."""


@dataclass(frozen=True)
class Job:
    """Images to be drawn with the same settings and parts.

    Attributes:
      requests: one for each image; their images and masks as arrays, or files of the caller's own choice.
      parts: which networks and plug-ins draw; the service's own where None. Paths in them are opened: what comes from
        strangers goes through `ModelsFolder.path` first.
      owner: the name of who asked; "" where there is only one. Letters, digits, `-`, `_`.
    """

    requests: tuple[Request, ...]
    settings: Sampling = Sampling()
    parts: Parts | None = None
    owner: str = ""


class Ticket:
    """One job on its way. Everything may be read from any thread, at any time.

    Attributes:
      job: with the seeds that were chosen for -1, and with the LoRAs that its prompts name among its parts.
      state: waiting, loading, drawing; then done, stopped or failed.
      done, total: evaluations of the networks over all its images, as far as they are known.
      preview: what is being drawn, (h,w,3) uint8, its images side by side; None before the first preview.
      error: why it failed, in one line.
      notes: warnings, one line each.
      future: done when the job is finished: its pictures, or the error (`UserError`); stopped is done.
      times: when it was "submitted", "started" and "finished", by `time.monotonic`.
    """

    def __init__(self, job: Job, stop: Callable[["Ticket"], None], position: Callable[["Ticket"], int]):
        self.id = uuid.uuid4().hex
        self.job = job
        self.state: State = "waiting"
        self.done, self.total = 0, job.settings.steps * len(job.requests)
        self.preview: np.ndarray | None = None
        self.error: str | None = None
        self.notes: list[str] = []
        self.future: Future[list[Path]] = Future()
        self.times = {"submitted": time.monotonic()}
        self._files: dict[int, Path] = {}
        self._version, self._changed = 0, threading.Condition()
        self._stop, self._position = stop, position

    @property
    def pictures(self) -> list[Path]:
        """The files so far, in the order of the requests."""
        return [path for _, path in sorted(dict(self._files).items())]

    @property
    def position(self) -> int:
        """How many jobs are before it, those being drawn included."""
        return self._position(self)

    @property
    def finished(self) -> bool:
        """Whether it is done, stopped or failed."""
        return self.state in FINISHED

    def stop(self) -> None:
        """Draw no more of it; finished pictures stay. One that is being drawn ends with the call of the networks that
        is on its way; one that is finished stays as it is.
        """
        self._stop(self)

    def wait(self, timeout: float | None = None) -> bool:
        """Until it is finished, or so many seconds; returns whether it is."""
        try:
            self.future.exception(timeout)
        except FutureTimeout:
            return False
        return True

    def changes(self, timeout: float | None = None) -> Iterator["Ticket"]:
        """The ticket now and whenever something has changed, the last time when it is finished.

        `timeout`: seconds after which it comes again without a change; None waits for one.
        """
        seen = -1
        while True:
            with self._changed:
                self._changed.wait_for(lambda seen=seen: self._version != seen, timeout)
                seen, last = self._version, self.finished
            yield self
            if last:
                return

    def _update(self, **values: Any) -> None:
        """Of the service alone."""
        with self._changed:
            for name, value in values.items():
                setattr(self, name, value)
            self._version += 1
            self._changed.notify_all()
        if self.finished and not self.future.done():
            self.times["finished"] = time.monotonic()
            if self.state == "failed":
                self.future.set_exception(UserError(self.error or "failed"))
            else:
                self.future.set_result(self.pictures)

    def _keep(self, index: int, path: Path) -> None:
        self._files[index] = path
        self._update()

    def _note(self, notes: list[str]) -> None:
        self._update(notes=[*self.notes, *(note for note in notes if note not in self.notes)])
