"""A run small enough to be killed many times: the whole loop on real records, around a network of two matrices.

As a program: python tests/training/toy.py RUN STEPS [CASE] trains it in a process of its own and writes what the loop
took from the loader to RUN/samples-seen.txt; CASE says where the process kills itself.
"""

import json
import os
import signal
import sys
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from bdm_jax.training import checkpoint, loop
from bdm_jax.training.config import DataConfig, MeshConfig, OptimizerConfig, TrainConfig
from bdm_jax.training.job import draw

WIDTH = 512  # so that the matrix is large enough to be split


@dataclass(frozen=True)
class ToyTask:
    """Learn a random linear map from noisy features of a record's name."""

    explode_at: int | None = None
    language: str = "zh"
    prediction_type: str = "epsilon"

    def start(self, source, indices, run, seed, dtype):
        return ToyJob(self, seed)


class ToyJob:
    def __init__(self, task, seed):
        rng = np.random.default_rng(seed)
        self.task = task
        self.params = {"net": {"wide.kernel": jnp.asarray(rng.normal(size=(256, WIDTH)) / 16, jnp.float32)}}
        self.params["net"]["bias"] = jnp.zeros(WIDTH)
        self.frozen = {"net": {"kernel": jnp.asarray(rng.normal(size=(WIDTH, 4)) / 16, jnp.float32)}}

    def sample(self, record, rng):
        own = np.random.default_rng(zlib.crc32(f"{record['style']}/{record['id']}".encode()))
        return {"x": (own.normal(size=256) + 0.1 * rng.normal(size=256)).astype(np.float32)}

    def loss(self, params, frozen, batch, key):
        hidden = jnp.tanh(batch["x"] @ params["net"]["wide.kernel"] + params["net"]["bias"])
        target = draw(key, batch["place"], lambda k: jax.random.normal(k, (4,)))
        loss = jnp.mean(jnp.square(hidden @ frozen["net"]["kernel"] - target))
        return loss, {"hidden": jnp.mean(jnp.abs(hidden))}

    def pictures(self, params, records):
        return [np.zeros((2, 2, 3), np.uint8)] * len(records)

    def export(self, params, folder, source, indices, metadata):
        folder.mkdir(parents=True, exist_ok=True)
        np.savez(folder / "params.npz", **params["net"], step=metadata["bdm_jax.step"])


def config(run: Path, steps: int = 10, **changes) -> TrainConfig:
    """Ten steps of batches of 16, a checkpoint after every second, a line after every third."""
    values = {
        "task": ToyTask(),
        "run": run,
        "steps": steps,
        "batch_size": 16,
        "log_every": 3,
        "checkpoint_every": 2,
        "sample_every": 1000,
        "data": DataConfig(style="fluent", concepts=50),
        "optimizer": OptimizerConfig(learning_rate=1e-3, warmup_steps=2),
        "mesh": MeshConfig(fsdp=max(1, jax.device_count() // 2)),
    }
    return TrainConfig(**{**values, **changes})


def watch(run: Path) -> None:
    """Write the numbers of the records of every batch that the loop takes: a line "step: numbers" each."""
    make_loader = loop.make_loader

    def watched(*arguments, start_step, **options):
        path = run / f"samples-seen{jax.process_index()}.txt"
        for step, batch in enumerate(make_loader(*arguments, start_step=start_step, **options), start_step + 1):
            with path.open("a") as file:
                file.write(f"{step}: {' '.join(map(str, batch['number']))}\n")
            yield batch

    loop.make_loader = watched


def seen(run: Path, process: int = 0) -> dict[int, str]:
    """Step -> numbers of the records that were last trained on in it."""
    lines = (run / f"samples-seen{process}.txt").read_text().splitlines()
    return dict(line.split(": ") for line in lines)


def kill_at(case: str) -> None:
    """Let this process die (SIGKILL), or be asked to end (SIGTERM), at a certain point of the sixth step's save."""
    die = lambda: os.kill(os.getpid(), signal.SIGKILL)  # noqa: E731

    def before(owner, name, action, when=lambda *_: True):
        original = getattr(owner, name)

        def replaced(*arguments, **options):
            if when(*arguments):
                action()
            return original(*arguments, **options)

        setattr(owner, name, replaced)

    saves = checkpoint.Checkpoints
    of_six = lambda self, step, *_: step == 6  # noqa: E731
    if case == "while Orbax writes":
        before(saves, "_finish", die, of_six)
    elif case == "before the sidecar":
        before(checkpoint.digests, "finish", die, lambda sums: die_now["six"])
    elif case == "before the folder has its name":
        before(saves, "_remove", die, lambda self, folder: folder.name == "6")
    elif case == "before the old one is removed":
        before(saves, "_remove", die, lambda self, folder: folder.name == "2" and folder.is_dir())
    elif case == "between saves":
        before(loop._Leg, "_step", die, lambda leg: leg.at == 5 and leg.checkpoints.wait() is None)
    elif case.startswith("SIGTERM"):
        if case == "SIGTERM to one":  # JAX's service listens once per second
            before(loop._Leg, "_step", lambda: time.sleep(1), lambda leg: leg.at >= 4)
        if case == "SIGTERM" or jax.process_index() == 1:
            before(loop._Leg, "_step", lambda: os.kill(os.getpid(), signal.SIGTERM), lambda leg: leg.at == 4)
    else:
        raise ValueError(case)
    die_now = {"six": False}
    if case == "before the sidecar":
        before(saves, "_finish", lambda: die_now.update(six=True), of_six)


def main(run: str, steps: str, *case: str) -> int:
    """Train; 0 when finished, 3 at the end of a leg."""
    from bdm_jax.distributed import initialize
    from bdm_jax.errors import UserError

    initialize()
    folder = Path(run)
    folder.mkdir(parents=True, exist_ok=True)
    watch(folder)
    if case:
        kill_at(*case)
    try:
        finished = loop.train(config(folder, int(steps)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(json.dumps({"devices": jax.device_count(), "processes": jax.process_count()}))
    return 0 if finished else 3


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
