"""The run from its first line to its last: data, state, steps, checkpoints, samples, the folder that comes out."""

import copy
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
from bdm_jax.runtime.sharding import batch_ways, make_mesh, place, place_batch, replicated, to_host
from bdm_jax.runtime.sharding import explain as placements
from bdm_jax.training.checkpoint import Checkpoints
from bdm_jax.training.config import TrainConfig, check, remember
from bdm_jax.training.digests import leaves
from bdm_jax.training.metrics import Clock, Metrics
from bdm_jax.training.objectives.job import Objective, Trees
from bdm_jax.training.position import NUMBER, Position, numbered
from bdm_jax.training.sets import Sets
from bdm_jax.training.signals import stop_requests
from bdm_jax.training.state import abstract_state, make_optimizer, make_state, make_step, state_sharding

_PICTURES = 16


def train(config: TrainConfig) -> bool:
    """Run, or go on with, a training; returns whether it is finished (False: a leg ended, run it again to go on).

    Everything lies in `config.run`: config.json, checkpoints/, metrics.jsonl, tensorboard/, samples/, and at the end
    export/ (with `export_only` at once, from the newest checkpoint). SIGINT and SIGTERM end the leg after the step that
    is being computed, with a checkpoint. With several processes, each calls this, on one file system.

    Raises:
        UserError: settings or files that do not fit, checkpoints of which none can be used or that cannot be written,
            a loss that is not finite (its step, samples and the last good checkpoint are named).
    """
    deadline = math.inf if config.minutes is None else time.monotonic() + 60 * config.minutes
    check(config)
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    _check_batch(config, mesh)
    leg = _Session(config, mesh)
    try:
        if not config.export_only:
            leg.run(deadline)
    finally:
        leg.close()
    if leg.at < config.steps and not config.export_only:
        return False
    if not leg.at:
        raise UserError(f"{config.run / 'checkpoints'}: no checkpoint to export yet")
    averaged = leg.averaged()
    if is_first():
        told = {"bdm_jax.step": str(leg.at), "bdm_jax.config": config.digest()}
        leg.job.export(averaged, config.run / "export", told)
    broadcast_from_first(0)  # nobody leaves before it is written
    return True


def explain(config: TrainConfig) -> Iterator[str]:
    """Lines that say where every array of the train state would lie on this machine's devices, and its bytes on each.

    Raises:
        UserError: as `train`, where it concerns the settings and the frozen networks' folders.
    """
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    _check_batch(config, mesh)
    trained, frozen = config.task.shapes()
    state = abstract_state(trained, make_optimizer(config.optimizer, config.steps))
    sizes = " x ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    yield f"{mesh.size} {jax.devices()[0].device_kind} devices: {sizes}; bytes are those on each device"
    yield from placements(leaves(state), leaves(state_sharding(mesh, state)))
    held = sum(leaf.size for leaf in jax.tree.leaves(frozen)) * config.compute_dtype().itemsize
    yield f"frozen networks, whole on every device, in {config.compute_dtype()}: {held:,}"


class _Session:
    """One process's part of a run: everything made ready, from scratch or from the newest good checkpoint."""

    def __init__(self, config: TrainConfig, mesh: Mesh):
        self.config, self.mesh = config, mesh
        sets = Sets(config.data, config.task.language, getattr(config.task, "only", ()))
        self.job: Objective = config.task.start(sets, config.run, config.seed, config.compute_dtype())
        optimizer = make_optimizer(config.optimizer, config.steps)
        like = abstract_state(self.job.params, optimizer)
        self.skips = Skips(config.data.skip_rate, config.run / f"left_out-{jax.process_index()}.jsonl")
        self.loader = mix_loader(
            numbered(self.job.parts),
            lambda record, rng: {**self.job.sample(record, rng), NUMBER: record[NUMBER]},
            config.batch_size,
            config.seed,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            skips=self.skips,
        )
        self.position = Position(self.loader, self.job.parts)
        self.checkpoints = Checkpoints(config.run / "checkpoints", config.keep, config.digest())
        if (found := self.checkpoints.restore(like, mesh)) is None:
            self.at, self.rows, self.state = 0, [], make_state(self.job.params, optimizer, mesh)
        else:
            self.state, notes = found
            self.at, self.rows = self.position.restore(notes["data"]), notes["rows"]
        self.job.params = {}  # the state has them now: a second copy would stay in memory
        self.frozen = place(self.job.frozen, replicated(mesh))
        self.step = make_step(self.job.loss, optimizer, config, mesh, like)
        self.compiled: set[tuple] = set()  # shapes of the batches: each bucket has its own program
        remember(config)
        self.numbers: dict[int, np.ndarray] = {}  # step -> part and record of this process's rows of its batch
        self.clock, self.metrics = Clock(), None
        if is_first():
            self.metrics = Metrics(config.run, self.at, config.steps, config.batch_size)
        self.shown = _shown(self.job)

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
        shapes = tuple(value.shape for value in batch.values())
        first = shapes not in self.compiled
        if self.metrics is not None and not self.compiled:  # other buckets have about as many pixels
            self.metrics.work = self._work(batch)
        self.compiled.add(shapes)
        with jax.set_mesh(self.mesh), self.clock.of("compile") if first else nullcontext():
            self.state, values = self.step(self.state, self.frozen, batch)
        self.rows.append(values)
        self.at += 1

    def _work(self, batch: dict[str, jax.Array]) -> float | None:
        """Seconds that a sample would take on all devices at their stated peak; None where that is unknown."""
        if (peak := PEAKS.get(jax.devices()[0].device_kind)) is None:
            return None
        job = copy.copy(self.job)
        if getattr(job.task, "remat", "none") != "none":  # what is computed twice is needed once
            job.task = replace(job.task, remat="none")
        loss = lambda p, f, b: job.loss(p, f, b, jax.random.key(0))[0]  # noqa: E731
        needed = flops(jax.grad(loss), *jax.eval_shape(lambda *trees: trees, self.state.params, self.frozen, batch))
        return needed / self.config.batch_size / (peak * jax.device_count())

    def _log(self) -> None:
        self.checkpoints.check()
        self._fetch()
        means = {name: float(np.mean([row[name] for row in self.rows])) for name in self.rows[0]}
        self.rows = []
        left_out = int(gather(np.array([self.skips.total], np.int32)).sum())
        if self.metrics is not None:
            self.metrics.log(self.at, means, self.clock.take(), left_out)

    def _save(self) -> None:
        self._fetch()
        notes = {"data": self.position.note(), "rows": list(self.rows)}
        self.checkpoints.save(self.at, self.state, self.mesh, notes)
        self._pause()

    def _show(self) -> None:
        averaged = self.averaged()
        if is_first():
            pictures = self.job.pictures(averaged, self.shown)
            columns = math.ceil(math.sqrt(len(pictures)))
            pictures += [np.full_like(pictures[0], 255)] * (-len(pictures) % columns)
            rows = [np.concatenate(pictures[i : i + columns], axis=1) for i in range(0, len(pictures), columns)]
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
        self.rows = [{name: float(value) for name, value in row.items()} for row in jax.device_get(self.rows)]
        for step, row in enumerate(self.rows, self.at - len(self.rows) + 1):
            if not (np.isfinite(row["loss"]) and np.isfinite(row["gradient_norm"])):
                self._not_finite(step, row)
        self.numbers = {}

    def _not_finite(self, step: int, row: dict[str, float]) -> None:
        self.checkpoints.wait()
        numbers = gather(self.numbers[step]).swapaxes(0, 1).reshape(-1, 2)  # the processes' rows are dealt out in turn
        names = [record_key(self.job.parts[part].source[int(number)]) for part, number in numbers]
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


def _shown(job: Objective) -> list[dict]:
    """Records evenly over all parts, without those that cannot be used. Raises BadRecord where none of them can."""
    ends = np.cumsum([len(part.indices) for part in job.parts])
    shown, fault = [], None
    for at in range(0, int(ends[-1]), max(1, int(ends[-1]) // _PICTURES))[:_PICTURES]:
        number = int(np.searchsorted(ends, at, side="right"))
        part = job.parts[number]
        try:
            record = part.source[int(part.indices[at - int(ends[number])])]  # counted from its end
            job.sample(record, np.random.default_rng(0))
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
