"""The whole demo from nothing: pictures, autoencoder, backbone, branch, and the folder that `sample.py` opens.

python -m configs.demo                   for a GPU; on two CPU cores it takes days
python -m configs.demo --budget 30       in about half an hour, whatever the machine: fewer steps, or more
python -m configs.demo --minutes 60      one session; run it again until it exits with 0 (3: more are needed)
"""

import json
import math
import os
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax

from bdm_jax import command_line
from bdm_jax.data.emoji.render_emoji import main as render_emoji
from bdm_jax.data.records import open_source
from bdm_jax.errors import UserError
from bdm_jax.formats.files import read_json
from bdm_jax.paths import DEMO, EMOJI, new_folder
from bdm_jax.training.budget import steps_within
from bdm_jax.training.config import TrainConfig, check
from bdm_jax.training.loop import train
from bdm_jax.training.sets import select

from . import emoji_vae, load

MORE_SESSIONS = 3
RECORD = "training.json"
_STAGES = ("vae", "backbone", "text", "branch")


@dataclass(frozen=True)
class DemoArgs:
    """Make the demo model again."""

    minutes: float | None = None
    """length of this session; to the end where None"""
    budget: float | None = None
    """minutes that all of it may take: each stage gets the steps, and the cosine of its rate, that fit into its share;
    None for the recipe's steps"""
    runs: Path = Path("runs")
    """folder of the training runs"""
    out: Path = Path("runs/demo")
    """folder of the finished model"""


def main(args: Sequence[str] | None = None) -> int:
    """Exit status: 0 when the demo's folder is complete, 3 when more sessions are needed, 2 after bad input."""
    return command_line.run(lambda: make(command_line.parse(DemoArgs, args, prog="python -m configs.demo")))


def make(settings: DemoArgs) -> int:
    """Do what is not done yet; 0 when the folder is complete, 3 when more sessions are needed.

    Raises:
        UserError: minutes or a budget that are not positive, a budget that is too short, an `out` that holds something
            else than a model made here, and what the trainings raise.
    """
    for name, value in (("minutes", settings.minutes), ("budget", settings.budget)):
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"--{name} {value}: must be a positive number")
    if settings.out.exists() and not (settings.out / RECORD).is_file():
        raise UserError(f"--out {settings.out}: is there already and holds no model made here; choose another name")
    deadline = None if settings.minutes is None else time.monotonic() + 60 * settings.minutes
    if not (EMOJI / "dataset_info.json").is_file() and render_emoji([]):
        return 2
    runs = stages(settings.runs)
    for number, share in enumerate(_shares()):
        config = runs[number]
        if settings.budget is not None:
            config = runs[number] = _within(config, 60 * share * settings.budget)
        check(config)
        if (config.run / "export" / "done").is_file():
            continue
        left = None if deadline is None else (deadline - time.monotonic()) / 60
        print(f"{config.run.name}: {config.steps} steps", flush=True)
        if (left is not None and left <= 0) or not train(replace(config, minutes=left)):
            print("the session is over: run the same command again to resume")
            return MORE_SESSIONS
        (config.run / "export" / "done").touch()
    assemble(runs, settings.out)
    print(f"finished: {settings.out}")
    return 0


def stages(runs: Path) -> list[TrainConfig]:
    """The four runs, each reading what those before left in `runs`."""
    names = [f"emoji-{name}" for name in _STAGES]
    vae, backbone, text, branch = (replace(load(name), run=runs / name) for name in names)
    backbone, text = (replace(run, task=replace(run.task, vae=vae.run / "export" / "vae")) for run in (backbone, text))
    towers = {part: text.run / "export" / f"branch_{part}" for part in ("text_encoder", "tokenizer")}
    branch = replace(branch, task=replace(branch.task, backbone=backbone.run / "export", **towers))
    return [vae, backbone, text, branch]


def _shares() -> list[float]:
    """Of the whole time, for each stage: as the bundled demo was trained."""
    stages = json.loads((DEMO / RECORD).read_text("utf-8"))["stages"]
    seconds = [stages[name]["seconds"] + stages[name].get("compile_s", 0.0) for name in _STAGES]
    return [one / sum(seconds) for one in seconds]


def _within(config: TrainConfig, seconds: float) -> TrainConfig:
    """The run with as many steps as fit, or with those that it has begun with."""
    begun = config.run / "config.json"
    if begun.is_file():
        return replace(config, steps=read_json(begun)["steps"])
    print(f"{config.run.name}: how many steps fit into {seconds / 60:.1f} minutes is measured first", flush=True)
    return replace(config, steps=steps_within(config, seconds))


def assemble(runs: list[TrainConfig], out: Path) -> None:
    """Copy the last run's folder to `out`, with training.json: hardware, concepts trained on, and of each stage steps,
    seconds, final figures and the curve of its losses.

    Raises:
        UserError: a frozen component is not byte for byte what it was before the branch was trained.
    """
    backbone, branch = runs[1].run / "export", runs[-1].run / "export"
    for name in ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"):
        file = f"{name}.safetensors"
        if (backbone / file).read_bytes() != (branch / file).read_bytes():
            raise UserError(f"{branch / file} differs from the frozen {backbone / file}")
    source = open_source(EMOJI)
    indices = select(source, runs[-1].data, "zh")
    record = {
        "hardware": f"{jax.device_count()} x {jax.devices()[0].device_kind}, {os.cpu_count()} CPU cores",
        "jax": jax.__version__,
        "stages": {name: _stage(config) for name, config in zip(_STAGES, runs, strict=True)},
        "style": runs[-1].data.style or emoji_vae.STYLE,
        "style_in_caption": False,
        "scenes": runs[-1].data.scenes,
        "concepts": sorted({source[int(i)]["id"] for i in indices}),
    }
    with new_folder(out.with_name(f"{out.name}.new")) as folder:
        shutil.copytree(branch, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("done"))
        (folder / RECORD).write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", "utf-8")
    if out.exists():
        shutil.rmtree(out)
    out.with_name(f"{out.name}.new").rename(out)


def _stage(config: TrainConfig) -> dict[str, Any]:
    """What a run took, the means over the last tenth of its metrics, and about a dozen points of its curve."""
    lines = [json.loads(line) for line in (config.run / "metrics.jsonl").read_text("utf-8").splitlines()]
    seconds, before, elapsed = 0.0, 0, []
    for line in lines:
        rate = line.pop("images_per_second")
        seconds += (line["step"] - before) * config.batch_size / rate
        before = line["step"]
        elapsed.append(round(seconds, 1))
    tail = lines[-max(1, len(lines) // 10) :]
    means = {name: sum(line[name] for line in tail) / len(tail) for name in tail[0] if name != "step"}
    return {
        "steps": config.steps,
        "batch": config.batch_size,
        "seconds": round(seconds, 1),
        "samples_per_second": round(config.steps * config.batch_size / seconds, 1),
        "final": {name: round(value, 5) for name, value in means.items()},
        "curve": [
            {"step": line["step"], "seconds": at, "loss": round(line["loss"], 5)}
            for line, at in list(zip(lines, elapsed, strict=True))[:: max(1, len(lines) // 12)]
        ],
    }


if __name__ == "__main__":
    sys.exit(main())
