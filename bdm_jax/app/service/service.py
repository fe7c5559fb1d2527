"""A queue of jobs and the one thread that draws them, in batches that jobs of equal settings share.

The thread takes the first job that waits, and with it images of later jobs with the same settings and parts that go
into one batch (`PreparedRequest.kind`), until the batch is full. An image is the same as alone: that is what
`sampling.generate` promises. Batches are filled up to the next power of two, so that few sizes are compiled.

Images go into OUT, those of a named owner into OUT/NAME, through `app.runs`: names, settings inside and the log are
those of sample.py. What was finished when the process was killed is there; the next start removes what was not.
"""

import itertools
import logging
import random
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from bdm_jax.app import preview, runs
from bdm_jax.app.arguments import check_folder, check_texts
from bdm_jax.app.parts import Parts
from bdm_jax.app.service.jobs import Job, QueueFull, Ticket
from bdm_jax.app.service.kept import KeptSystem, KeptSystems
from bdm_jax.app.service.models import ModelsFolder
from bdm_jax.app.service.notes import collected
from bdm_jax.app.tags import shared_tags, without_tags, written
from bdm_jax.diffusion.samplers import check_sampler
from bdm_jax.errors import UserError, out_of_memory, short
from bdm_jax.images.decode import array_image
from bdm_jax.images.pictures import numbered
from bdm_jax.plugins.controls import Control
from bdm_jax.plugins.spec import Spec
from bdm_jax.sampling.batching import as_english, name_unused, read_jobs
from bdm_jax.sampling.generate import generate, resolve
from bdm_jax.sampling.settings import ANY_SEED, Sampling, check, with_seeds

_log = logging.getLogger(__name__)
_OWNER = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
STAGES = ("waiting", "loading", "drawing", "saving")


@dataclass
class Counts:
    """What a service has done since it began. seconds, times: of each stage, and how often there was one. jobs: that
    are finished, by their last state.
    """

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    times: dict[str, int] = field(default_factory=lambda: dict.fromkeys(STAGES, 0))
    jobs: dict[str, int] = field(default_factory=dict)
    pictures: int = 0
    batches: int = 0


@dataclass
class _Planned:
    """A ticket that can be drawn: its run, what goes into one batch with what, which images are still to be drawn."""

    run: runs.Run
    kinds: list[tuple]
    left: list[int]
    skipping: bool = False


class _Stopped(Exception):
    """Nobody wants the batch that is being drawn any more."""


class Service:
    """Draws what is submitted, one batch at a time.

    Args:
      out: where images go. What a killed process has left half-written there is removed.
      models: what requests may name.
      parts: what draws jobs that name no parts.
      batch_size: images at a time.
      max_waiting: jobs that may wait; more raise QueueFull.
      preview_every: steps between previews; 0 for none.
    """

    def __init__(
        self,
        out: Path,
        models: ModelsFolder | None = None,
        *,
        parts: Parts | None = None,
        batch_size: int = 8,
        max_waiting: int = 64,
        preview_every: int = 5,
    ):
        for name, value, least in (("batch size", batch_size, 1), ("queue", max_waiting, 1)):
            if value < least:
                raise UserError(f"{name} {value} is less than {least}")
        self.out, self.models, self.parts = Path(out), models or ModelsFolder(), parts or Parts()
        self.batch_size, self.max_waiting, self.preview_every = batch_size, max_waiting, preview_every
        self.counts = Counts()
        check_folder(self.out)
        for folder in (self.out, *self.out.glob("*/")):
            if folder == self.out or _OWNER.fullmatch(folder.name):
                runs.recover(folder)
        self._systems = KeptSystems()
        self._lock = threading.RLock()
        self._wake = threading.Condition(self._lock)
        self._queue: list[Ticket] = []
        self._active: list[Ticket] = []  # being loaded or drawn
        self._planned: dict[Ticket, _Planned] = {}  # of the drawing thread
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="drawing", daemon=True)
        self._thread.start()

    def load(self) -> None:
        """Read what draws jobs that name no parts, before the first of them comes. Raises UserError as `Parts.load`."""
        self._systems.get(self.parts, Sampling.dtype)

    def submit(self, job: Job) -> Ticket:
        """Queue a job. Raises UserError at once for all that can be checked without a model, and QueueFull."""
        with collected() as notes:
            job = self._checked(job)
        ticket = Ticket(job, self._stop, self._position)
        ticket.notes = [*notes]
        with self._lock:
            if self._closing:
                raise QueueFull("the service is being closed: no more jobs are taken")
            waiting = self.waiting()
            if waiting >= self.max_waiting:
                raise QueueFull(f"{waiting} jobs are waiting, and no more are taken: ask again later")
            self._queue.append(ticket)
            self._wake.notify_all()
        return ticket

    @property
    def alive(self) -> bool:
        """Whether there is a thread to draw what is submitted."""
        return self._thread.is_alive() and not self._closing

    def current(self, owner: str | None = None) -> Ticket | None:
        """The first job that is being loaded or drawn, of one owner or of any."""
        with self._lock:
            active = (one for one in self._active if not one.finished)
            return next((one for one in active if owner in (None, one.job.owner)), None)

    def waiting(self, owner: str | None = None) -> int:
        """How many jobs wait, those being drawn not among them."""
        with self._lock:
            return sum(one not in self._active and owner in (None, one.job.owner) for one in self._queue)

    def stop(self, owner: str | None = None) -> None:
        """Stop what is being loaded or drawn, of one owner or of any; what waits is drawn next."""
        with self._lock:
            for ticket in [one for one in self._active if owner in (None, one.job.owner)]:
                self._stop(ticket)

    def skip(self, owner: str | None = None) -> None:
        """Leave out the images that are being drawn, of one owner or of any; their jobs go on with the next ones."""
        with self._lock:
            for ticket in (one for one in self._active if owner in (None, one.job.owner)):
                if ticket in self._planned:
                    self._planned[ticket].skipping = True

    def pictures(self, owner: str = "", limit: int = 100, before: str | None = None) -> list[Path]:
        """The images of an owner, newest first; `before`: the name of one, to go on behind it."""
        numbers = {path: number for path in self.folder(owner).glob("*.png") if (number := numbered(path.name))}
        end = None if before is None else numbered(before)
        found = [path for path, number in numbers.items() if end is None or number < end]
        return sorted(found, key=lambda path: (numbers[path], path.name), reverse=True)[:limit]

    def picture(self, name: str, owner: str = "") -> Path:
        """The file of an image of an owner. Raises UserError where there is none of that name."""
        path = self.folder(owner) / name if isinstance(name, str) and numbered(name) else None
        if path is None or not path.is_file() or path.is_symlink():
            raise UserError(f"no picture {short(str(name))!r}")
        return path

    def folder(self, owner: str = "") -> Path:
        """Where the images of an owner go. Raises UserError for what is no name of one."""
        if owner and not _OWNER.fullmatch(owner):
            raise UserError(f"owner {short(owner)!r}: expected letters, digits, - and _")
        return self.out / owner if owner else self.out

    def close(self) -> None:
        """Stop everything, and wait for the drawing thread."""
        with self._lock:
            self._closing = True
            for ticket in [*self._queue]:
                self._stop(ticket)
            self._wake.notify_all()
        self._thread.join()

    def _checked(self, job: Job) -> Job:
        parts = job.parts or self.parts
        if not job.requests:
            raise UserError("no prompts: give at least one")
        self.folder(job.owner)
        check(job.settings)
        check_sampler(job.settings.sampler)
        for request in job.requests:
            if not request.prompt.strip() and not request.english.strip():
                raise UserError("no prompt: say what to draw")
            if request.seed != ANY_SEED and not 0 <= request.seed < 2**32:
                raise UserError(f"seed {request.seed} is outside 0 .. 2**32 - 1 (-1 stands for any)")
            if job.settings.bare and (request.english or request.english_negative):
                raise UserError("a bare backbone draws the prompt itself, in English: leave out the English prompts")
            if request.mask is not None and request.image is None:
                raise UserError("a mask without an image: give the image that it is the mask of")
            images = {name: getattr(request, name) for name in ("image", "mask")}
            arrays = {name: array_image(one, name) for name, one in images.items() if isinstance(one, np.ndarray)}
            if len(arrays) == 2 and arrays["mask"].size != arrays["image"].size:
                sizes = (f"{one.width}x{one.height}" for one in (arrays["mask"], arrays["image"]))
                raise UserError("the mask has {} pixels, the image {}: they must be of one size".format(*sizes))
        check_texts(job.requests, job.settings)
        tags = shared_tags(job.requests, job.settings)
        named = [Spec(self.models.path("loras", tag.name), tag.strength, tag.text_strength) for tag in tags]
        parts = replace(parts, lora=(*parts.lora, *written(named)))
        parts.check()
        with collected():  # that seeds were chosen is no news: the ticket has them
            requests = with_seeds(job.requests, random.SystemRandom())
        return replace(job, requests=tuple(requests), parts=parts)

    def _position(self, ticket: Ticket) -> int:
        with self._lock:
            return self._queue.index(ticket) if ticket in self._queue else 0

    def _stop(self, ticket: Ticket) -> None:
        with self._lock:
            if not ticket.finished:
                self._finish(ticket, "stopped")

    def _finish(self, ticket: Ticket, state: str, error: str | None = None) -> None:
        """Its place in the queue is free at once; the numbers of an image that was stopped, when the drawing thread
        comes to it (`_work`).
        """
        with self._lock:
            if ticket.finished:
                return
            if ticket in self._queue:
                self._queue.remove(ticket)
            self.counts.jobs[state] = self.counts.jobs.get(state, 0) + 1
            ticket._update(
                state=state, error=error, preview=None, **({"done": ticket.total} if state == "done" else {})
            )

    def _work(self) -> None:
        while True:
            with self._lock:
                self._active = []
                for ticket in [one for one in self._planned if one.finished]:  # those that were stopped
                    self._release(ticket)
                while not self._queue and not self._closing:
                    self._wake.wait()
                if self._closing:
                    return
                first = self._queue[0]
                self._active = [first]
            try:
                self._next_batch(first)
            except Exception as error:  # whatever it is, the next job is drawn
                self._fail([first], error)

    def _next_batch(self, first: Ticket) -> None:
        job = first.job
        if first not in self._planned:
            first.times["started"] = time.monotonic()
            self._count("waiting", first.times["started"] - first.times["submitted"])
            first._update(state="loading")
        with self._timed("loading"), collected() as notes:
            system = self._systems.get(job.parts, job.settings.dtype)
            controls = system.controls(job.parts)
        first._note(notes)
        if not self._plan(first, system, controls) or first.finished:
            return
        chosen = [(first, index) for index in self._same_kind(first, self._planned[first])]
        with self._lock:
            others = [one for one in self._queue if one is not first and _alike(one.job, job)]
        for ticket in () if job.settings.reference else others:
            if len(chosen) >= self.batch_size:
                break
            if self._plan(ticket, system, controls) and not ticket.finished:
                kind = self._planned[first].kinds[chosen[0][1]]
                chosen += [(ticket, index) for index in self._same_kind(ticket, self._planned[ticket], kind)]
        chosen = chosen[: 1 if job.settings.reference else self.batch_size]
        tickets = list(dict.fromkeys(ticket for ticket, _ in chosen))
        with self._lock:
            self._active = [ticket for ticket in tickets if not ticket.finished]
            for ticket in self._active:
                if "started" not in ticket.times:
                    ticket.times["started"] = time.monotonic()
                    self._count("waiting", ticket.times["started"] - ticket.times["submitted"])
                ticket._update(state="drawing")
        try:
            self._draw(chosen, system, controls)
        except _Stopped:
            self._drop(chosen)
        except Exception as error:
            memory = out_of_memory(error) is not None and self._systems.keep_only_latest()
            if len(tickets) == 1 and not memory:
                self._fail(tickets, error)
                return
            for ticket in tickets:  # what one of them has done is not the others' fault: each by itself
                left = self._planned[ticket].left
                alone = [(one, index) for one, index in chosen if one is ticket and index in left and not one.finished]
                try:
                    if alone:
                        self._draw(alone, system, controls)
                except _Stopped:
                    self._drop(alone)
                except Exception as own:
                    self._fail([ticket], own)

    def _plan(self, ticket: Ticket, system: KeptSystem, controls: list[Control]) -> bool:
        """Names for its images, and what they go into one batch with; False where that fails, and it with it."""
        if ticket in self._planned:
            return True
        job, pipeline = ticket.job, system.pipeline
        try:
            with collected() as notes:
                folder = self.folder(job.owner)
                how = {"controls": controls, "parts": job.parts.names()}
                run = runs.plan(pipeline, job.requests, job.settings, folder, **how)
                try:
                    requests = [without_tags(request, job.settings) for request in job.requests]
                    if job.settings.bare or pipeline.branch is None:
                        pipeline, requests = pipeline.without_bridge(), [as_english(one) for one in requests]
                    settings = resolve(pipeline, job.settings)
                    maps = [control for control in controls if isinstance(control, Control)]
                    prepared = read_jobs(pipeline, settings, maps, requests, lambda request, size: [settings.steps])
                    name_unused(pipeline, prepared)
                except BaseException:
                    runs.release(run)
                    raise
            with self._lock:
                self._planned[ticket] = _Planned(run, [one.kind for one in prepared], [*range(len(requests))])
            ticket._note(notes)
        except Exception as error:  # whatever it is, of this job alone: see `_fail`
            self._fail([ticket], error)
            return False
        return True

    def _same_kind(self, ticket: Ticket, planned: _Planned, kind: tuple | None = None) -> list[int]:
        """The images of a ticket that are left and of one kind, by default that of the first of them."""
        kind = planned.kinds[planned.left[0]] if kind is None else kind
        return [index for index in planned.left if planned.kinds[index] == kind]

    def _draw(self, chosen: list[tuple[Ticket, int]], system: KeptSystem, controls: list[Control]) -> None:
        """One batch: drawn, kept, and counted."""
        job = chosen[0][0].job
        tickets = list(dict.fromkeys(ticket for ticket, _ in chosen))
        rows = {ticket: [row for row, (one, _) in enumerate(chosen) if one is ticket] for ticket in tickets}
        requests = [without_tags(ticket.job.requests[index], job.settings) for ticket, index in chosen]
        filled = min(1 << (len(requests) - 1).bit_length(), max(self.batch_size, len(requests)))
        requests += requests[-1:] * (filled - len(requests))
        planned = {ticket: self._planned[ticket] for ticket in tickets}

        def wanted(ticket: Ticket) -> bool:
            return not ticket.finished and not planned[ticket].skipping

        def progress(done: int, total: int) -> None:
            if not any(map(wanted, tickets)):
                raise _Stopped
            for ticket in filter(wanted, tickets):
                images, drawn = len(ticket.job.requests), len(ticket.pictures)
                ticket._update(total=total * images, done=total * drawn + done * len(rows[ticket]))

        def on_preview(done: int, predicted_x0: np.ndarray) -> None:
            for ticket in filter(wanted, tickets):
                ticket._update(preview=preview.side_by_side(system.colours, predicted_x0[rows[ticket]]))

        shown = {"on_preview": on_preview, "preview_every": self.preview_every} if self.preview_every else {}
        with self._timed("drawing"), collected() as notes:
            drawn = generate(
                system.pipeline,
                requests,
                job.settings,
                controls=controls,
                batch_size=filled,
                progress=progress,
                **shown,
            )
            images = list(itertools.islice(drawn, len(chosen)))
        for ticket in tickets if len(tickets) == 1 else ():
            ticket._note(notes)
        with self._timed("saving"):
            for (ticket, index), pixels in zip(chosen, images, strict=True):
                plan = planned[ticket]
                if wanted(ticket):
                    ticket._keep(index, runs.keep(plan.run, plan.run.images[index], pixels))
                    self.counts.pictures += 1
                plan.left.remove(index)
        self.counts.batches += 1
        self._end_of_batch(tickets)

    def _drop(self, chosen: list[tuple[Ticket, int]]) -> None:
        """Images that nobody wants any more."""
        for ticket, index in chosen:
            if index in self._planned[ticket].left:
                self._planned[ticket].left.remove(index)
        self._end_of_batch(list(dict.fromkeys(ticket for ticket, _ in chosen)))

    def _end_of_batch(self, tickets: list[Ticket]) -> None:
        for ticket in tickets:
            self._planned[ticket].skipping = False
            if not self._planned[ticket].left:
                self._release(ticket)
                self._finish(ticket, "done")
            elif not ticket.finished:
                ticket._update(preview=None)

    def _fail(self, tickets: list[Ticket], error: Exception) -> None:
        """Whatever went wrong with a job is that job's alone, and the thread goes on with the next; what is no user's
        error is logged with its traceback.
        """
        said = str(error) if isinstance(error, UserError) else out_of_memory(error)
        if said is None:
            _log.error("a job failed", exc_info=error)
            said = f"the job failed: {type(error).__name__}"
        for ticket in tickets:
            self._release(ticket)
            self._finish(ticket, "failed", " ".join(said.split()))

    def _release(self, ticket: Ticket) -> None:
        """The numbers of its images are free, before anybody hears that it is finished."""
        with self._lock:
            planned = self._planned.pop(ticket, None)
        if planned is not None:
            runs.release(planned.run)

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            self._count(stage, time.monotonic() - began)

    def _count(self, stage: str, seconds: float) -> None:
        self.counts.seconds[stage] += seconds
        self.counts.times[stage] += 1


def _alike(job: Job, other: Job) -> bool:
    """Whether their images may go into one batch, as far as that is known without a model."""
    return job.settings == other.settings and job.parts == other.parts
