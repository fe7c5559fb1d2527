"""The run from its first line to its last: data, state, steps, checkpoints, samples, the folder that comes out."""

import math
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from bdm_jax.data.source import Skips
from bdm_jax.errors import BadRecord, UserError
from bdm_jax.formats.files import write_json
from bdm_jax.latents.moments import record_key
from bdm_jax.runtime.costs import PEAKS, flops
from bdm_jax.runtime.locks import held
from bdm_jax.runtime.processes import all_agree, broadcast_from_first, gather, is_first
from bdm_jax.runtime.sharding import batch_ways, make_mesh, place, to_host
from bdm_jax.runtime.sharding import explain as placements
from bdm_jax.training.checkpoint import Checkpoints
from bdm_jax.training.config import TrainConfig, check, remember, remembered, settle
from bdm_jax.training.digests import leaves
from bdm_jax.training.feed import open_feed
from bdm_jax.training.inputs import Inputs, check_inputs
from bdm_jax.training.metrics import Clock, Metrics
from bdm_jax.training.objectives.objective import Batch, Training, Trees, without_remat
from bdm_jax.training.position import Position
from bdm_jax.training.profiling import Profiler, parse_steps
from bdm_jax.training.remote import RemoteRun, opened
from bdm_jax.training.sets import Sets
from bdm_jax.training.signals import stop_requests
from bdm_jax.training.state import (
    abstract_state,
    frozen_sharding,
    make_optimizer,
    make_state,
    make_step,
    state_sharding,
)
from bdm_jax.training.wandb import WandB

LOCK = "run.lock"
_PREVIEWS = 16


def train(config: TrainConfig) -> bool:
    """Run or resume a training; returns whether it is finished (False: a session ended, run it again to resume).

    Everything lies in `config.run`: config.json, checkpoints/, metrics.jsonl, tensorboard/, samples/, and at the end
    export/ (with `export_only` at once, from the newest checkpoint); it may be a folder in a bucket (see `remote`).
    SIGINT and SIGTERM end the session after the call that is being computed, of one step or several, with a checkpoint.
    With several processes, each calls this, on one file system or with one bucket. The first one holds run.lock in the
    folder meanwhile.

    Raises:
        UserError: another training writes to the folder (who is said), settings or files that do not fit, checkpoints
            of which none can be used or that cannot be written, a loss that is not finite (its step, samples and the
            last good checkpoint are named).
    """
    began = time.monotonic()
    with opened(config.run) as (folder, remote):
        config = settle(replace(config, run=folder))
        with _no_empty_folder(config.run):
            check(config)
            mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
            _check_batch(config, mesh)
            with _alone(config):
                return _train(config, mesh, began, remote)


def _train(config: TrainConfig, mesh: Mesh, began: float, remote: RemoteRun | None) -> bool:
    deadline = math.inf if config.minutes is None else began + 60 * config.minutes
    session = _Session(config, mesh, began, remote)
    try:
        if not config.export_only:
            session.run(deadline)
    finally:
        session.close()
    if session.at < config.steps and not config.export_only:
        return False
    if not session.at:
        raise UserError(f"{config.run / 'checkpoints'}: no checkpoint to export yet")
    averaged = session.averaged()
    if is_first():
        metadata = {"bdm_jax.step": str(session.at), "bdm_jax.config": config.digest()}
        session.training.export(averaged, config.run / "export", metadata)
    broadcast_from_first(0)  # nobody leaves before it is written
    return True


def explain(config: TrainConfig) -> Iterator[str]:
    """Lines that say where every array of the train state and every frozen one would lie on this machine's devices, and
    its bytes on each.

    Raises:
        UserError: as `train`, where it concerns the settings and the frozen networks' folders.
    """
    config = settle(config)
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    _check_batch(config, mesh)
    trained, frozen = config.task.objective(config.task.sizes()).shapes()
    state = abstract_state(trained, make_optimizer(config.optimizer, config.steps))
    sizes = " x ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    yield f"{mesh.size} {jax.devices()[0].device_kind} devices: {sizes}; bytes are those on each device"
    yield from placements(leaves(state), leaves(state_sharding(mesh, state)))
    if frozen:
        dtype = config.compute_dtype()
        arrays = {path: jax.ShapeDtypeStruct(leaf.shape, dtype) for path, leaf in leaves(frozen).items()}
        yield "frozen:"
        yield from placements(arrays, leaves(frozen_sharding(mesh, config.mesh, frozen)))


@contextmanager
def _no_empty_folder(run: Path) -> Iterator[None]:
    """Folders that the block makes on the way to the run's do not outlast it if nothing is in them."""
    new = [folder for folder in (run, *run.parents) if not folder.exists()]
    try:
        yield
    finally:
        if is_first():  # which makes them
            for folder in new:
                with suppress(OSError):  # not empty: it holds files, or another training's lock
                    folder.rmdir()


@contextmanager
def _alone(config: TrainConfig) -> Iterator[None]:
    """While no other training writes to the run's folder. Raises UserError in all processes where one does."""
    with ExitStack() as stack:
        busy = None
        if is_first():
            try:
                stack.enter_context(held(config.run / LOCK, "training this run", "choose another --run"))
            except UserError as error:
                busy = error
        if not all_agree(busy is None):
            raise busy or UserError(f"{config.run}: another process is training this run")
        yield


class _Session:
    """One process's part of a run between two stops: everything made ready, from scratch or from the newest good
    checkpoint. `began`: when it did (time.monotonic). `remote`: where the run is kept in a bucket.
    """

    def __init__(self, config: TrainConfig, mesh: Mesh, began: float, remote: RemoteRun | None = None):
        self.config, self.mesh = config, mesh
        task = config.task
        sets = Sets(config.data, task.language, getattr(task, "only", ()), captions=getattr(task, "captions", True))
        training: Training = config.task.start(sets, config.run, config.seed, config.compute_dtype())
        optimizer = make_optimizer(config.optimizer, config.steps)
        like = abstract_state(training.params, optimizer)
        self.skips = Skips(config.data.skip_rate, config.run / f"left_out-{jax.process_index()}.jsonl")
        self.checkpoints = Checkpoints(config.run / "checkpoints", config.keep, config.digest(), remote)
        found = self.checkpoints.restore(like, mesh)
        self.state = make_state(training.params, optimizer, mesh) if found is None else found[0]
        self.frozen = place(training.frozen, frozen_sharding(mesh, config.mesh, training.frozen))
        if config.export_only:
            config = replace(config, data=replace(config.data, on_device=False))
        self.feed = open_feed(config, training, mesh, self.skips)
        self.position = Position(self.feed.loader, training.parts)
        self.at, self.step_metrics = 0, []
        if found is not None:
            notes = found[1]
            self.at, self.step_metrics = self.position.restore(notes["data"]), notes["rows"]
        self.step, self.steps = (
            make_step(training.objective.loss, optimizer, config, mesh, like, training.frozen, stacked=stacked)
            for stacked in (False, True)
        )
        self.compiled: set[tuple] = set()  # shapes of the batches: each bucket has its own program
        self._check_inputs({**training.inputs, **sets.inputs()})
        self.numbers: dict[int, np.ndarray] = {}  # step -> part and record of this process's rows of its batch
        self.previewed = _previewed(training)
        self.metrics, steps = None, None
        if is_first() and not config.export_only:
            steps = None if config.profile_steps is None else parse_steps(config.profile_steps, config.steps)
            wandb = None if config.wandb is None else WandB(config.wandb, config.run, config.to_json())
            self.metrics = Metrics(config.run, self.at, config.steps, config.batch_size, wandb)
        self.profiler = Profiler(config.run / "profile", steps, self.at)
        self.clock = Clock(began)
        # the state and the step have these arrays now: a second copy would stay in memory
        self.training = replace(training, params={}, frozen={}, inputs={})

    def _check_inputs(self, inputs: Inputs) -> None:
        """What the run reads is what it read before. Raises UserError in all processes where it is not."""
        before, changed, now = {}, None, {}
        if is_first():
            before = remembered(self.config) if self.at else {}  # before the first checkpoint nothing is lost
            if not before and self.at:
                print(
                    f"note: {self.config.run} is of a version that kept no digests of networks and data: those here "
                    "are taken for those that it began with",
                    file=sys.stderr,
                )
            try:
                now = check_inputs(self.config.run, inputs, before)
            except UserError as error:
                changed = error
        if not all_agree(changed is None):
            raise changed or UserError(
                f"{self.config.run}: what the run reads has changed; the first process says what"
            )
        remember(self.config, now)

    def run(self, deadline: float) -> None:
        """Steps until the run's end, the deadline (time.monotonic) or a signal; the last thing done is a checkpoint."""
        config = self.config
        with stop_requests() as asked:
            while self.at < config.steps:
                self._step()
                done, ending = self.at == config.steps, asked(self.at)
                if self.at % config.log_every == 0 or done:
                    self._log()
                    ending = ending or bool(broadcast_from_first(int(time.monotonic() > deadline)))
                if self.at % config.sample_every == 0 or done:
                    with self.clock.of("samples"):
                        self._show()
                if self.at % config.checkpoint_every == 0 or done or ending:
                    with self.clock.of("checkpoint"):
                        self._save()
                if ending:
                    return

    def averaged(self) -> Trees:
        """The moving average of the parameters, on the host."""
        return to_host(self.mesh, self.state.ema)

    def close(self) -> None:
        """Wait for what is being written; say what was left out."""
        self.profiler.close(self.at)
        try:
            with self.clock.of("checkpoint"):
                self.checkpoints.close()
        finally:
            if self.metrics is not None:
                self.metrics.close(self.at, self.clock.take())
            if self.skips.total:
                print(f"records: {self.skips}; all of them in {self.skips.log}", file=sys.stderr, flush=True)

    def _step(self) -> None:
        """As many steps as one call takes, which ends where a line, samples or a checkpoint may be due."""
        count = min(self.feed.at_once - self.at % self.feed.at_once, self.config.steps - self.at)
        with self.clock.of("data"):
            batch, numbers = self.feed.take(count, self.position.places())
            self.numbers |= dict(enumerate(numbers, self.at + 1))
        shapes = tuple(value.shape for value in jax.tree.leaves(batch))
        first = shapes not in self.compiled
        if self.metrics is not None and not self.compiled:  # other buckets have about as many pixels
            self.metrics.work = self._work(batch, count)
        self.compiled.add(shapes)
        if first and self.metrics is not None:
            print("compiling the step", file=sys.stderr, flush=True)  # it can take minutes
        self.profiler.before(self.at, count)
        with jax.set_mesh(self.mesh), self.clock.of("compile") if first else nullcontext():
            call = self.step if count == 1 else self.steps
            self.state, values = call(self.state, self.frozen, batch)
        self.step_metrics.append(values)
        self.at += count
        self.profiler.after(self.at, values)

    def _work(self, batch: Batch, count: int) -> float | None:
        """Seconds that a sample would take on all devices at their stated peak; None where that is unknown. `batch`: of
        `count` steps.
        """
        if (peak := PEAKS.get(jax.devices()[0].device_kind)) is None:
            return None
        objective = without_remat(self.training.objective)  # what is computed twice is needed once

        def loss(params, frozen, batch):
            return objective.loss(params, frozen, batch, jax.random.key(0))[0]

        if count > 1:
            batch = jax.tree.map(lambda rows: jax.ShapeDtypeStruct(rows.shape[1:], rows.dtype), batch)
        needed = flops(jax.grad(loss), *jax.eval_shape(lambda *trees: trees, self.state.params, self.frozen, batch))
        return needed / self.config.batch_size / (peak * jax.device_count())

    def _log(self) -> None:
        self.checkpoints.check()
        self._fetch()
        means = {name: float(np.mean([row[name] for row in self.step_metrics])) for name in self.step_metrics[0]}
        self.step_metrics = []
        left_out = int(gather(np.array([self.skips.total], np.int32)).sum())
        if self.metrics is not None:
            self.metrics.log(self.at, means, self.clock.take(), left_out)

    def _save(self) -> None:
        self._fetch()
        notes = {"data": self.position.note(), "rows": list(self.step_metrics)}
        self.checkpoints.save(self.at, self.state, self.mesh, notes)
        self._pause()

    def _show(self) -> None:
        averaged = self.averaged()
        if is_first():
            images = self.training.preview(averaged, self.previewed)
            columns = math.ceil(math.sqrt(len(images)))
            images += [np.full_like(images[0], 255)] * (-len(images) % columns)
            rows = [np.concatenate(images[i : i + columns], axis=1) for i in range(0, len(images), columns)]
            grid = np.concatenate(rows)
            folder = self.config.run / "samples"
            folder.mkdir(exist_ok=True)
            Image.fromarray(grid).save(folder / f"{self.at:07d}.png")
            self.metrics.image("samples", self.at, grid)
        self._pause()

    def _pause(self) -> None:
        if self.metrics is not None:
            self.metrics.restart_clock(self.at)

    def _fetch(self) -> None:
        """Bring the metrics of the steps since the last line to the host; stop at the first that is not finite."""
        rows = []
        for values in jax.device_get(self.step_metrics):  # of one step, or of those of one call
            columns = {name: np.atleast_1d(value).tolist() for name, value in values.items()}
            rows += [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        self.step_metrics = rows
        for step, row in enumerate(rows, self.at - len(rows) + 1):
            if not (np.isfinite(row["loss"]) and np.isfinite(row["gradient_norm"])):
                self._not_finite(step, row)
        self.numbers = {}

    def _not_finite(self, step: int, row: dict[str, float]) -> None:
        self.checkpoints.wait()
        numbers = gather(self.numbers[step]).swapaxes(0, 1).reshape(-1, 2)  # the processes' rows are dealt out in turn
        names = [record_key(self.training.parts[part].source[int(number)]) for part, number in numbers]
        path, good = self.config.run / "not_finite.json", self.checkpoints.good
        if is_first():
            values = {name: str(value) for name, value in row.items()}
            write_json(path, {"step": step, "values": values, "samples": names, "checkpoint": good})
        shown = ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")
        last = "there is no checkpoint before it" if good is None else f"the last good checkpoint is of step {good}"
        raise UserError(
            f"step {step}: loss {row['loss']}, gradient norm {row['gradient_norm']}; {last}; its batch is {shown} (all "
            f"in {path}): lower --optimizer.learning-rate, or look at these samples"
        )


def _previewed(training: Training) -> list[dict]:
    """Records evenly over all parts, without those that cannot be used. Raises BadRecord where none of them can."""
    ends = np.cumsum([len(part.indices) for part in training.parts])
    shown, fault = [], None
    for at in range(0, int(ends[-1]), max(1, int(ends[-1]) // _PREVIEWS))[:_PREVIEWS]:
        number = int(np.searchsorted(ends, at, side="right"))
        part = training.parts[number]
        try:
            record = part.source[int(part.indices[at - int(ends[number])])]  # counted from its end
            training.sample(record, np.random.default_rng(0))
        except BadRecord as error:
            fault = error
        else:
            shown.append(record)
    if not shown:
        raise fault
    return shown


def _check_batch(config: TrainConfig, mesh: Mesh) -> None:
    parts, processes = batch_ways(mesh) * config.accumulate, jax.process_count()
    if config.batch_size % parts or config.batch_size % processes:
        raise UserError(
            f"batch_size={config.batch_size} is not a multiple of {parts} (devices along data and fsdp, times "
            f"accumulate) and of the {processes} processes"
        )
