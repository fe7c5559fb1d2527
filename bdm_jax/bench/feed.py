"""How many samples a second has a run, through the loader and from tables on the device?

    python -m bdm_jax.bench.feed emoji-vae
    python -m bdm_jax.bench.feed emoji-vae --minutes 1

Takes what `train.py` takes. With --minutes it also trains in both ways, so long each (start and compilation included),
in a folder that it removes.
"""

import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import tyro

from bdm_jax import command_line, configs
from bdm_jax.data.source import Skips
from bdm_jax.errors import UserError
from bdm_jax.runtime import compile_cache
from bdm_jax.runtime.sharding import make_mesh
from bdm_jax.training.config import TrainConfig, check
from bdm_jax.training.feed import open_feed
from bdm_jax.training.loop import train
from bdm_jax.training.position import Position
from bdm_jax.training.sets import Sets

_SECONDS = 4.0
_RARELY = 10**6  # times as rare as lines: samples and checkpoints are no part of what is measured


def samples_per_second(config: TrainConfig, seconds: float = _SECONDS) -> dict[str, dict[str, float]]:
    """ "loader" and "device" -> "host": samples that the host makes, or whose numbers it deals out; "batches": those
    that are on the device; with `config.minutes`, "trained": whole steps, the median of all lines but the first.

    Raises:
        UserError: as `train`; the run's sets cannot lie on the device.
    """
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        config = replace(config, run=Path(folder) / "run", export_only=False)
        check(config)
        task = config.task
        sets = Sets(config.data, task.language, getattr(task, "only", ()), captions=getattr(task, "captions", True))
        training = config.task.start(sets, config.run, config.seed, config.compute_dtype())
        mesh = make_mesh(config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
        for name in ("loader", "device"):
            here = replace(config, data=replace(config.data, on_device=name == "device"))
            feed = open_feed(here, training, mesh, Skips(config.data.skip_rate))
            places, count = Position(feed.loader, training.parts).places(), feed.at_once

            def take(feed=feed, count=count, places=places) -> None:
                jax.block_until_ready(feed.take(count, places)[0])

            made, placed = _rate(partial(next, feed.loader), seconds), count * _rate(take, seconds)
            found[name] = {"host": config.batch_size * made, "batches": config.batch_size * placed}
            if config.minutes is not None:
                rarely = config.log_every * _RARELY
                long = {"steps": rarely, "sample_every": rarely, "checkpoint_every": rarely}
                shutil.copytree(config.run, Path(folder) / name)  # the latents are made once
                train(replace(here, run=Path(folder) / name, **long))
                lines = (Path(folder) / name / "speed.jsonl").read_text("utf-8").splitlines()[1:]
                if not lines:
                    raise UserError(f"minutes={config.minutes}: no two lines of {config.log_every} steps in that time")
                found[name]["trained"] = statistics.median(json.loads(line)["images_per_second"] for line in lines)
    return found


def main(args: Sequence[str] | None = None) -> int:
    """Print a line for each way; 2 for bad input."""

    def command() -> None:
        given = list(sys.argv[1:] if args is None else args)
        if given[:1] in (["-h"], ["--help"]):
            print(f"{__doc__}\nConfigs: {', '.join(configs.names())}. CONFIG --help lists its settings.")
            return
        if not given or given[0].startswith("-"):
            raise UserError(f"give a config first: {', '.join(configs.names())}")
        default, marks = configs.load(given[0]), (tyro.conf.AvoidSubcommands, tyro.conf.FlagCreatePairsOff)
        prog = f"python -m bdm_jax.bench.feed {given[0]}"
        config = command_line.parse(type(default), given[1:], default=default, prog=prog, config=marks)
        compile_cache.enable()
        for name, rates in samples_per_second(config).items():
            print(f"{name:8}", *(f"{rate:12,.0f} {what}/s" for what, rate in rates.items()), flush=True)

    return command_line.run(command)


def _rate(call: Callable[[], object], seconds: float) -> float:
    """Calls per second, after one."""
    call()
    count, began = 0, time.perf_counter()
    while (spent := time.perf_counter() - began) < seconds:
        call()
        count += 1
    return count / spent


if __name__ == "__main__":
    sys.exit(main())
