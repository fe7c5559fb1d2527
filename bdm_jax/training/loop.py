"""The run from its first line to its last: data, state, steps, checkpoints, samples, the folder that comes out."""

import contextlib
import signal
import time
from collections.abc import Iterator

import jax
import numpy as np
from PIL import Image

from bdm_jax.data.captions import concepts
from bdm_jax.data.records import Source, make_loader, open_source
from bdm_jax.errors import UserError
from bdm_jax.sharding import make_mesh, place_batch, replicated
from bdm_jax.training.checkpoint import Checkpoints
from bdm_jax.training.config import DataConfig, TrainConfig, remember
from bdm_jax.training.metrics import Metrics
from bdm_jax.training.state import TrainState, make_optimizer, make_state, make_step
from bdm_jax.training.tasks import Job

_PICTURES = 16


def train(config: TrainConfig) -> bool:
    """Run, or go on with, a training; returns whether it is finished (False: a leg ended, run it again to go on).

    Everything lies in `config.run`: config.json, checkpoints/, metrics.jsonl, tensorboard/, samples/, and at the end export/.
    SIGINT and SIGTERM end the leg at the next step, with a checkpoint.

    Raises:
        UserError: settings or files that do not fit, or a loss that is not finite (the step is named).
    """
    deadline = time.monotonic() + 60 * config.minutes if config.minutes else float("inf")
    remember(config)
    source = open_source(config.data.folder)
    indices = select(source, config.data, config.task.language)
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp)
    with jax.set_mesh(mesh):
        job = config.task.start(source, indices, config.run, config.seed)
        optimizer = make_optimizer(config.optimizer, config.steps)
        state = make_state(job.params, optimizer, mesh)
        checkpoints = Checkpoints(config.run / "checkpoints", config.keep)
        if checkpoints.newest() is not None:
            state = checkpoints.restore(state, mesh)
        frozen = jax.device_put(job.frozen, replicated(mesh))
        step = make_step(job.loss, optimizer, config.optimizer.ema_decay, config.seed, mesh, state)
        first = int(state.step)
        loader = make_loader(source, indices, job.sample, config.batch_size, config.seed, first)
        metrics = Metrics(config.run, first, config.steps, config.batch_size)
        shown = [source[int(i)] for i in indices[:: max(1, len(indices) // _PICTURES)][:_PICTURES]]
        try:
            state = _run(config, job, state, frozen, step, loader, mesh, metrics, checkpoints, shown, deadline)
        finally:
            metrics.close()
            checkpoints.close()
        if int(state.step) < config.steps:
            return False
        job.export(jax.device_get(state.ema), config.run / "export", source, indices)
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


def _run(config, job, state, frozen, step, loader, mesh, metrics, checkpoints, shown, deadline) -> TrainState:
    pending = []
    at = int(state.step)
    with _stop_requests() as stop:
        while at < config.steps:
            state, values = step(state, frozen, place_batch(mesh, next(loader)))
            pending.append(values)
            at += 1
            if at % config.log_every == 0 or at == config.steps:
                metrics.log(at, _mean(pending, at))
                pending = []
            if at % config.sample_every == 0 or at == config.steps:
                _show(config, job, state, metrics, shown, at)
            ending = stop or time.monotonic() > deadline
            if at % config.checkpoint_every == 0 or at == config.steps or (ending and at % config.log_every == 0):
                checkpoints.save(state)
                metrics.restart_clock()
                if ending:
                    break
    return state


def _mean(pending: list[dict[str, jax.Array]], at: int) -> dict[str, float]:
    rows = jax.device_get(pending)
    means = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
    if not np.isfinite(means["loss"]):
        raise UserError(
            f"the loss is not finite in steps {at - len(rows) + 1}..{at}: lower --optimizer.learning-rate; "
            "the last checkpoint is good"
        )
    return means


def _show(config: TrainConfig, job: Job, state: TrainState, metrics: Metrics, shown: list[dict], at: int) -> None:
    pictures = job.pictures(jax.device_get(state.ema), shown)
    columns = int(np.ceil(np.sqrt(len(pictures))))
    blank = [np.full_like(pictures[0], 255)] * (-len(pictures) % columns)
    rows = [np.concatenate((pictures + blank)[i : i + columns], axis=1) for i in range(0, len(pictures), columns)]
    grid = np.concatenate(rows)
    folder = config.run / "samples"
    folder.mkdir(exist_ok=True)
    Image.fromarray(grid).save(folder / f"{at:07d}.png")
    metrics.image("samples", at, grid)
    metrics.restart_clock()


@contextlib.contextmanager
def _stop_requests() -> Iterator[list]:
    """A list that becomes non-empty when SIGINT or SIGTERM asks the run to end at the next step."""
    stop: list = []
    before = {number: signal.signal(number, lambda *_: stop.append(True)) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
