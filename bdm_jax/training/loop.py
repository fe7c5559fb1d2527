"""The run from its first line to its last: data, state, steps, checkpoints, samples, the folder that comes out."""

import contextlib
import math
import signal
import time
from collections.abc import Iterator

import jax
import numpy as np
from jax.sharding import Mesh
from PIL import Image

from bdm_jax.data.captions import concepts
from bdm_jax.data.records import Source, make_loader, open_source
from bdm_jax.errors import UserError
from bdm_jax.sharding import make_mesh, place_batch, replicated
from bdm_jax.training.checkpoint import Checkpoints
from bdm_jax.training.config import DataConfig, TrainConfig, check, remember
from bdm_jax.training.metrics import Metrics
from bdm_jax.training.state import make_optimizer, make_state, make_step
from bdm_jax.training.tasks import Job, Trees

_PICTURES = 16


def train(config: TrainConfig) -> bool:
    """Run, or go on with, a training; returns whether it is finished (False: a leg ended, run it again to go on).

    Everything lies in `config.run`: config.json, checkpoints/, metrics.jsonl, tensorboard/, samples/, and at the end
    export/ (with `export_only` at once, from the newest checkpoint). SIGINT and SIGTERM end the leg at the next logged
    step, with a checkpoint.

    Raises:
        UserError: settings or files that do not fit, or a loss that is not finite (the steps are named).
    """
    deadline = math.inf if config.minutes is None else time.monotonic() + 60 * config.minutes
    check(config)
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp)
    if jax.process_count() > 1:
        raise UserError(f"{jax.process_count()} processes: training runs in one process, on all of its devices")
    if config.batch_size % mesh.size:
        raise UserError(f"batch_size={config.batch_size} is not a multiple of the {mesh.size} devices")
    with jax.set_mesh(mesh):
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
        told = {"bdm_jax.step": str(leg.at), "bdm_jax.config": config.digest()}
        leg.job.export(leg.averaged(), config.run / "export", leg.source, leg.indices, told)
    return True


def select(source: Source, data: DataConfig, language: str) -> np.ndarray:
    """Indices of the records that a run in this language trains on; English never sees zh_only.

    With `data.concepts` the same concepts are taken for every language and style, all zh_only ones among them.
    """
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
    """One process's part of a run: everything made ready, from scratch or from the newest checkpoint."""

    def __init__(self, config: TrainConfig, mesh: Mesh):
        self.config, self.mesh = config, mesh
        self.source = open_source(config.data.folder)
        self.indices = select(self.source, config.data, config.task.language)
        if not len(self.indices):
            raise UserError(f"data.concepts={config.data.concepts}: leaves no records to train on in this language")
        self.job: Job = config.task.start(self.source, self.indices, config.run, config.seed)
        optimizer = make_optimizer(config.optimizer, config.steps)
        self.state = make_state(self.job.params, optimizer, mesh)
        self.checkpoints = Checkpoints(config.run / "checkpoints", config.keep)
        if self.checkpoints.newest() is not None:
            self.state = self.checkpoints.restore(self.state, mesh)
        self.at = int(self.state.step)
        self.frozen = jax.device_put(self.job.frozen, replicated(mesh))
        self.step = make_step(self.job.loss, optimizer, config.optimizer.ema_decay, config.seed, mesh, self.state)
        remember(config)
        self.loader = make_loader(
            self.source, self.indices, self.job.sample, config.batch_size, config.seed, start_step=self.at
        )
        self.metrics = Metrics(config.run, self.at, config.steps, config.batch_size)
        stride = max(1, len(self.indices) // _PICTURES)
        self.shown = [self.source[int(i)] for i in self.indices[::stride][:_PICTURES]]

    def run(self, deadline: float) -> None:
        """Steps until the run's end, the deadline (time.monotonic) or a signal; the last thing done is a checkpoint."""
        config, pending = self.config, []
        with _stop_requests() as stop:
            while self.at < config.steps:
                self.state, values = self.step(self.state, self.frozen, place_batch(self.mesh, next(self.loader)))
                pending.append(values)
                self.at += 1
                done = self.at == config.steps
                if logged := self.at % config.log_every == 0 or done:
                    self.metrics.log(self.at, _mean(pending, self.at))
                    pending = []
                if self.at % config.sample_every == 0 or done:
                    self._show()
                ending = logged and (stop or time.monotonic() > deadline)
                if self.at % config.checkpoint_every == 0 or done or ending:
                    self.checkpoints.save(self.state)
                    self.metrics.restart_clock(self.at)
                if ending:
                    return

    def averaged(self) -> Trees:
        """The moving average of the parameters, on the host."""
        return jax.device_get(self.state.ema)

    def close(self) -> None:
        """Wait for what is being written."""
        self.metrics.close()
        self.checkpoints.close()

    def _show(self) -> None:
        pictures = self.job.pictures(self.averaged(), self.shown)
        columns = math.ceil(math.sqrt(len(pictures)))
        pictures += [np.full_like(pictures[0], 255)] * (-len(pictures) % columns)
        rows = [np.concatenate(pictures[i : i + columns], axis=1) for i in range(0, len(pictures), columns)]
        grid = np.concatenate(rows)
        folder = self.config.run / "samples"
        folder.mkdir(exist_ok=True)
        Image.fromarray(grid).save(folder / f"{self.at:07d}.png")
        self.metrics.image("samples", self.at, grid)
        self.metrics.restart_clock(self.at)


def _mean(pending: list[dict[str, jax.Array]], at: int) -> dict[str, float]:
    rows = jax.device_get(pending)
    means = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
    if not np.isfinite(means["loss"]):
        raise UserError(
            f"the loss is not finite in steps {at - len(rows) + 1}..{at}: lower --optimizer.learning-rate; "
            "the last checkpoint is good"
        )
    return means


@contextlib.contextmanager
def _stop_requests() -> Iterator[list]:
    """A list that becomes non-empty when SIGINT or SIGTERM asks the run to end."""
    stop: list = []
    before = {number: signal.signal(number, lambda *_: stop.append(True)) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
