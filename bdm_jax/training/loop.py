"""The run from its first line to its last: data, state, steps, checkpoints, samples, the folder that comes out."""

import math
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace

import jax
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from bdm_jax.data.loader import mix_loader
from bdm_jax.data.source import Skips
from bdm_jax.errors import BadRecord, UserError
from bdm_jax.formats.files import write_json
from bdm_jax.latents.moments import record_key
from bdm_jax.runtime.costs import PEAKS, flops
from bdm_jax.runtime.processes import broadcast_from_first, gather, is_first
from bdm_jax.runtime.sharding import batch_ways, make_mesh, place, place_batch, to_host
from bdm_jax.runtime.sharding import explain as placements
from bdm_jax.training.checkpoint import Checkpoints
from bdm_jax.training.config import TrainConfig, check, remember
from bdm_jax.training.digests import leaves
from bdm_jax.training.metrics import Clock, Metrics
from bdm_jax.training.objectives.objective import Batch, Training, Trees, without_remat
from bdm_jax.training.position import NUMBER, Position, numbered
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

_PREVIEWS = 16


def train(config: TrainConfig) -> bool:
    """Run or resume a training; returns whether it is finished (False: a session ended, run it again to resume).

    Everything lies in `config.run`: config.json, checkpoints/, metrics.jsonl, tensorboard/, samples/, and at the end
    export/ (with `export_only` at once, from the newest checkpoint). SIGINT and SIGTERM end the session after the step
    that is being computed, with a checkpoint. With several processes, each calls this, on one file system.

    Raises:
        UserError: settings or files that do not fit, checkpoints of which none can be used or that cannot be written,
            a loss that is not finite (its step, samples and the last good checkpoint are named).
    """
    deadline = math.inf if config.minutes is None else time.monotonic() + 60 * config.minutes
    check(config)
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    _check_batch(config, mesh)
    session = _Session(config, mesh)
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


class _Session:
    """One process's part of a run between two stops: everything made ready, from scratch or from the newest good
    checkpoint.
    """

    def __init__(self, config: TrainConfig, mesh: Mesh):
        self.config, self.mesh = config, mesh
        sets = Sets(config.data, config.task.language, getattr(config.task, "only", ()))
        training: Training = config.task.start(sets, config.run, config.seed, config.compute_dtype())
        optimizer = make_optimizer(config.optimizer, config.steps)
        like = abstract_state(training.params, optimizer)
        self.skips = Skips(config.data.skip_rate, config.run / f"left_out-{jax.process_index()}.jsonl")
        sample = training.sample
        self.loader = mix_loader(
            numbered(training.parts),
            lambda record, rng: {**sample(record, rng), NUMBER: record[NUMBER]},
            config.batch_size,
            config.seed,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            skips=self.skips,
        )
        self.position = Position(self.loader, training.parts)
        self.checkpoints = Checkpoints(config.run / "checkpoints", config.keep, config.digest())
        if (found := self.checkpoints.restore(like, mesh)) is None:
            self.at, self.step_metrics, self.state = 0, [], make_state(training.params, optimizer, mesh)
        else:
            self.state, notes = found
            self.at, self.step_metrics = self.position.restore(notes["data"]), notes["rows"]
        self.frozen = place(training.frozen, frozen_sharding(mesh, config.mesh, training.frozen))
        self.step = make_step(training.objective.loss, optimizer, config, mesh, like, training.frozen)
        self.compiled: set[tuple] = set()  # shapes of the batches: each bucket has its own program
        remember(config)
        self.numbers: dict[int, np.ndarray] = {}  # step -> part and record of this process's rows of its batch
        self.clock, self.metrics = Clock(), None
        if is_first():
            self.metrics = Metrics(config.run, self.at, config.steps, config.batch_size)
        self.previewed = _previewed(training)
        # the state and the step have these arrays now: a second copy would stay in memory
        self.training = replace(training, params={}, frozen={})

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
        if self.metrics is not None:
            self.metrics.close()
        if self.skips.total:
            print(f"records: {self.skips}; all of them in {self.skips.log}", file=sys.stderr, flush=True)
        self.checkpoints.close()

    def _step(self) -> None:
        with self.clock.of("data"):
            batch = next(self.loader)
            self.numbers[self.at + 1] = batch.pop(NUMBER)
            batch["place"] = self.position.places()
            batch = place_batch(self.mesh, batch)
        shapes = tuple(value.shape for value in jax.tree.leaves(batch))
        first = shapes not in self.compiled
        if self.metrics is not None and not self.compiled:  # other buckets have about as many pixels
            self.metrics.work = self._work(batch)
        self.compiled.add(shapes)
        with jax.set_mesh(self.mesh), self.clock.of("compile") if first else nullcontext():
            self.state, values = self.step(self.state, self.frozen, batch)
        self.step_metrics.append(values)
        self.at += 1

    def _work(self, batch: Batch) -> float | None:
        """Seconds that a sample would take on all devices at their stated peak; None where that is unknown."""
        if (peak := PEAKS.get(jax.devices()[0].device_kind)) is None:
            return None
        objective = without_remat(self.training.objective)  # what is computed twice is needed once

        def loss(params, frozen, batch):
            return objective.loss(params, frozen, batch, jax.random.key(0))[0]

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
        rows = [{name: float(value) for name, value in row.items()} for row in jax.device_get(self.step_metrics)]
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
