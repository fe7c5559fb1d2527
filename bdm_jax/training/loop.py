"""The run from its first line to its last: data, state, steps, checkpoints, samples, the folder that comes out."""

import copy
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace

import jax
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from bdm_jax.costs import PEAKS, flops
from bdm_jax.data.captions import concepts
from bdm_jax.data.records import Source, make_loader, open_source
from bdm_jax.distributed import first_says, gather, is_first
from bdm_jax.errors import UserError, unknown
from bdm_jax.sharding import batch_ways, make_mesh, place, place_batch, replicated, to_host
from bdm_jax.sharding import explain as placements
from bdm_jax.training.checkpoint import Checkpoints
from bdm_jax.training.config import DataConfig, TrainConfig, check, remember
from bdm_jax.training.digests import leaves
from bdm_jax.training.job import Job, Trees
from bdm_jax.training.latents import record_key
from bdm_jax.training.metrics import Clock, Metrics
from bdm_jax.training.position import NUMBER, Numbered, Position
from bdm_jax.training.signals import stop_requests
from bdm_jax.training.state import abstract_state, make_optimizer, make_state, make_step, state_sharding
from convert.files import write_json

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
    leg = _Leg(config, mesh)
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
        leg.job.export(averaged, config.run / "export", leg.source, leg.indices, told)
    first_says(0)  # nobody leaves before it is written
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


def select(source: Source, data: DataConfig, language: str, only: Sequence[str] = ()) -> np.ndarray:
    """Indices of the records that a run in this language trains on; English never sees zh_only.

    With `data.concepts` the same concepts are taken for every language and style, all zh_only ones among them. `only`:
    ids of concepts, or names of other sets' records; () takes all.

    Raises:
        UserError: of `only` there is none, or the records have no styles or concepts to choose by.
    """
    indices = _of_language(source, data, language)
    if not only:
        return indices
    name = lambda record: record["id"] if "style" in record else record["key"]  # noqa: E731
    names = [name(source[int(i)]) for i in indices]
    if missing := [one for one in only if one not in names]:
        raise unknown("record", missing[0], names)
    return indices[[one in only for one in names]]


def _of_language(source: Source, data: DataConfig, language: str) -> np.ndarray:
    if len(source) and "style" not in source[0]:
        if data.style is not None or data.concepts is not None:
            raise UserError(
                f"{data.folder}: its records have no styles and concepts; leave data.style and concepts out"
            )
        return np.arange(len(source), dtype=np.int64)
    indices = concepts(source, data.style, language=language)
    if data.concepts is None:
        return indices
    everything = [source[int(i)] for i in concepts(source, data.style, language="zh")]
    chinese = sorted({record["id"] for record in everything if record["zh_only"]})
    others = sorted({record["id"] for record in everything} - set(chinese))
    room = max(0, data.concepts - len(chinese))
    chosen = {*chinese, *np.random.default_rng(data.seed).permutation(others)[:room].tolist()}
    return np.asarray([i for i in indices if source[int(i)]["id"] in chosen], np.int64)


class _Leg:
    """One process's part of a run: everything made ready, from scratch or from the newest good checkpoint."""

    def __init__(self, config: TrainConfig, mesh: Mesh):
        self.config, self.mesh = config, mesh
        self.source = open_source(config.data.folder)
        self.indices = select(self.source, config.data, config.task.language, getattr(config.task, "only", ()))
        if not len(self.indices):
            raise UserError(f"data.concepts={config.data.concepts}: leaves no records to train on in this language")
        self.job: Job = config.task.start(self.source, self.indices, config.run, config.seed, config.compute_dtype())
        optimizer = make_optimizer(config.optimizer, config.steps)
        like = abstract_state(self.job.params, optimizer)
        self.position = Position(config.batch_size, config.seed, self.indices, jax.process_count())
        self.checkpoints = Checkpoints(config.run / "checkpoints", config.keep, config.digest())
        if (found := self.checkpoints.restore(like, mesh)) is None:
            self.at, self.rows, self.state = 0, [], make_state(self.job.params, optimizer, mesh)
        else:
            self.state, notes = found
            self.at, self.rows = self.position.check(notes["data"]), notes["rows"]
        self.job.params = {}  # the state has them now: a second copy would stay in memory
        self.frozen = place(self.job.frozen, replicated(mesh))
        self.step, self.compiled = make_step(self.job.loss, optimizer, config, mesh, like), False
        remember(config)
        self.numbers: dict[int, np.ndarray] = {}  # step -> records of this process's part of its batch
        self.loader = make_loader(
            Numbered(self.source),
            self.indices,
            lambda record, rng: {**self.job.sample(record, rng), NUMBER: np.int64(record[NUMBER])},
            config.batch_size,
            config.seed,
            start_step=self.at,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        self.clock, self.metrics = Clock(), None
        if is_first():
            self.metrics = Metrics(config.run, self.at, config.steps, config.batch_size)
        stride = max(1, len(self.indices) // _PICTURES)
        self.shown = [self.source[int(i)] for i in self.indices[::stride][:_PICTURES]]

    def run(self, deadline: float) -> None:
        """Steps until the run's end, the deadline (time.monotonic) or a signal; the last thing done is a checkpoint."""
        config = self.config
        with stop_requests() as asked:
            while self.at < config.steps:
                self._step()
                done, ending = self.at == config.steps, asked(self.at)
                if self.at % config.log_every == 0 or done:
                    self._log()
                    ending = ending or bool(first_says(int(time.monotonic() > deadline)))
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
        """Wait for what is being written."""
        if self.metrics is not None:
            self.metrics.close()
        self.checkpoints.close()

    def _step(self) -> None:
        with self.clock.of("data"):
            batch = next(self.loader)
            self.numbers[self.at + 1] = batch.pop(NUMBER)
            batch["place"] = self.position.places()
            batch = place_batch(self.mesh, batch)
        first, self.compiled = not self.compiled, True
        if first and self.metrics is not None:
            self.metrics.work = self._work(batch)
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
        if self.metrics is not None:
            self.metrics.log(self.at, means, self.clock.take())

    def _save(self) -> None:
        self._fetch()
        notes = {"data": self.position.note(self.at), "rows": list(self.rows)}
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
        numbers = gather(self.numbers[step]).T.reshape(-1)  # the processes' rows are dealt out in turn
        names = [record_key(self.source[int(number)]) for number in numbers]
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


def _check_batch(config: TrainConfig, mesh: Mesh) -> None:
    parts, processes = batch_ways(mesh) * config.accumulate, jax.process_count()
    if config.batch_size % parts or config.batch_size % processes:
        raise UserError(
            f"batch_size={config.batch_size} is not a multiple of {parts} (devices along data and fsdp, times "
            f"accumulate) and of the {processes} processes"
        )
