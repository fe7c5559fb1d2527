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
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from bdm_jax.data.loader import Loader, mix_loader
from bdm_jax.latents.moments import record_key
from bdm_jax.paths import TOKENIZERS
from bdm_jax.systems.components import load_component
from bdm_jax.text.tokenizer import Tokenizer
from bdm_jax.training import checkpoint, feed, loop
from bdm_jax.training.config import DataConfig, MeshConfig, OptimizerConfig, TrainConfig
from bdm_jax.training.inputs import of_part
from bdm_jax.training.objectives.captions import Captions
from bdm_jax.training.objectives.objective import Training, draw
from bdm_jax.training.objectives.sample import Sample

WIDTH = 512  # so that the matrix is large enough to be split, as the frozen one is
FROZEN_WIDTH = 128
SIZE = (64, 64)  # of images, where a set has several


@dataclass(frozen=True)
class ToyTask:
    """Learn a random linear map from noisy features of a record's name, or, with an autoencoder, of its latents."""

    vae: Path | None = None
    words: bool = False  # samples that can lie on the device: the name's features, an image, a caption's ids
    language: str = "zh"
    prediction_type: str = "epsilon"

    def start(self, sets, run, seed, dtype):
        vae = None if self.vae is None else load_component(self.vae, "float32")
        parts = sets.images() if vae is None else sets.latents(vae, run, common_size=SIZE)
        rng = np.random.default_rng(seed)
        net = {"wide.kernel": jnp.asarray(rng.normal(size=(256, WIDTH)) / 16, jnp.float32), "bias": jnp.zeros(WIDTH)}
        kernel = jnp.asarray(rng.normal(size=(WIDTH, FROZEN_WIDTH)) / 16, jnp.float32)
        frozen = {"net": {"kernel": kernel}}
        inputs = {} if vae is None else {"vae": of_part(vae, self.vae)}
        captions = Captions(Tokenizer.from_pretrained(TOKENIZERS / "chinese"), "zh", dropout=0.1)
        sample = Sample(_read, captions, "branch", mirrored=True) if self.words else _sample
        return Training(ToyObjective(), {"net": net}, frozen, parts, sample, _export, _preview, inputs)


@dataclass(frozen=True)
class ToyObjective:
    def loss(self, params, frozen, batch, key):
        x = jax.vmap(lambda one: jnp.resize(one.astype(jnp.float32), 256))(batch["x"])
        if "texts" in batch:
            x += jax.vmap(lambda ids: jnp.resize(jnp.sin(ids.astype(jnp.float32)), 256))(batch["texts"]["branch"])
            x += jax.vmap(lambda image: jnp.resize(image.astype(jnp.float32) / 255, 256))(batch["image"])
        hidden = jnp.tanh(x @ params["net"]["wide.kernel"] + params["net"]["bias"])
        target = draw(key, batch["place"], lambda k: jax.random.normal(k, (FROZEN_WIDTH,)))
        loss = jnp.mean(jnp.square(hidden @ frozen["net"]["kernel"] - target))
        return loss, {"hidden": jnp.mean(jnp.abs(hidden))}


def _sample(record, rng):
    if "moments" in record:
        return {"x": record["moments"] + 0.1 * rng.normal(size=record["moments"].shape).astype(np.float16)}
    own = np.random.default_rng(zlib.crc32(record_key(record).encode()))
    return {"x": (own.normal(size=256) + 0.1 * rng.normal(size=256)).astype(np.float32)}


def _read(record):
    own = np.random.default_rng(zlib.crc32(record_key(record).encode()))
    image = own.integers(0, 256, (8, 8, 3), np.uint8)
    return {"x": own.normal(size=256).astype(np.float32), "image": image}


def _preview(params, records):
    return [np.zeros((2, 2, 3), np.uint8)] * len(records)


def _export(params, folder, metadata):
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "params.npz", **params["net"], step=metadata["bdm_jax.step"])


def config(run: Path, steps: int = 10, **changes) -> TrainConfig:
    """Ten steps of batches of 16, a checkpoint after every second, a line after every third. In place of the bundled
    set, TOY_SETS names folders, joined by colons, and TOY_VAE the autoencoder of their latents. With TOY_ON_DEVICE,
    True or False, samples have words, and a checkpoint comes after every fiftieth step.
    """
    folders = [Path(name) for name in os.environ.get("TOY_SETS", "").split(":") if name]
    bundled = DataConfig(style="fluent", concepts=50)
    values = {
        "task": ToyTask(Path(os.environ["TOY_VAE"]) if folders else None),
        "run": run,
        "steps": steps,
        "batch_size": 16,
        "log_every": 3,
        "checkpoint_every": 2,
        "sample_every": 1000,
        "data": DataConfig(folders[0], tuple(folders[1:])) if folders else bundled,
        "optimizer": OptimizerConfig(learning_rate=1e-3, warmup_steps=2),
        "mesh": MeshConfig(fsdp=max(1, jax.device_count() // 2)),
    }
    if on_device := os.environ.get("TOY_ON_DEVICE"):
        values |= {"task": ToyTask(words=True), "data": replace(bundled, on_device=on_device == "True")}
        values |= {"log_every": 10, "checkpoint_every": 50}
    return TrainConfig(**{**values, **changes})


def watch(run: Path) -> None:
    """Write which records are in every batch that the loop takes: a line "step: part/record ..." each."""
    path = run / f"samples-seen{jax.process_index()}.txt"

    class Watched(Loader):
        def __next__(self):
            batch = super().__next__()
            with path.open("a") as file:
                file.write(f"{self.get_state()['step']}: {' '.join(f'{p}/{r}' for p, r in batch['number'])}\n")
            return batch

    def watched(*arguments, **options):
        loader = mix_loader(*arguments, **options)
        loader.__class__ = Watched
        return loader

    feed.mix_loader = watched


def seen(run: Path, process: int = 0) -> dict[int, str]:
    """Step -> the records that were last trained on in it."""
    lines = (run / f"samples-seen{process}.txt").read_text().splitlines()
    return dict(line.split(": ") for line in lines)


def kill_at(case: str) -> None:
    """Let this process die (SIGKILL), or be asked to end (SIGTERM), at a certain point of the sixth step's save."""

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    def before(owner, name, action, when=lambda *_: True):
        original = getattr(owner, name)

        def replaced(*arguments, **options):
            if when(*arguments):
                action()
            return original(*arguments, **options)

        setattr(owner, name, replaced)

    saves = checkpoint.Checkpoints

    def of_six(self, step, *_):
        return step == 6

    if case == "while Orbax writes":
        before(saves, "_finish", die, of_six)
    elif case == "before the sidecar":
        before(checkpoint.digests, "finish", die, lambda sums: die_now["six"])
    elif case == "before the folder has its name":
        before(saves, "_remove", die, lambda self, folder: folder.name == "6")
    elif case == "before the old one is removed":
        before(saves, "_remove", die, lambda self, folder: folder.name == "2" and folder.is_dir())
    elif case == "between saves":
        before(loop._Session, "_step", die, lambda session: session.at == 5 and session.checkpoints.wait() is None)
    elif case.startswith("after "):  # "after 60: SIGKILL"
        step, name = case.removeprefix("after ").split(": ")
        number = getattr(signal, name)
        before(loop._Session, "_step", lambda: os.kill(os.getpid(), number), lambda session: session.at == int(step))
    elif case.startswith("SIGTERM"):
        if case == "SIGTERM to one":  # JAX's service listens once per second
            before(loop._Session, "_step", lambda: time.sleep(1), lambda session: session.at >= 4)
        if case == "SIGTERM" or jax.process_index() == 1:
            before(
                loop._Session, "_step", lambda: os.kill(os.getpid(), signal.SIGTERM), lambda session: session.at == 4
            )
    else:
        raise ValueError(case)
    die_now = {"six": False}
    if case == "before the sidecar":
        before(saves, "_finish", lambda: die_now.update(six=True), of_six)


def main(run: str, steps: str, *case: str) -> int:
    """Train; 0 when finished, 3 at the end of a session."""
    from bdm_jax.errors import UserError
    from bdm_jax.runtime.processes import initialize

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


def session(*arguments: str) -> None:
    """`main`, as what a process is made for."""
    sys.exit(main(*arguments))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
