"""The whole demo from nothing: pictures, autoencoder, backbone, branch, and the folder that `sample.py` opens.

python -m configs.demo                   on a GPU minutes, on two CPU cores some hours
python -m configs.demo --minutes 9       one session; run it again until it exits with 0 (3: more are needed)
"""

import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import jax

from bdm_jax import command_line
from bdm_jax.data.emoji.render_emoji import main as render_emoji
from bdm_jax.data.records import open_source
from bdm_jax.errors import UserError
from bdm_jax.paths import DEMO, EMOJI, new_folder
from bdm_jax.training.config import TrainConfig, check
from bdm_jax.training.loop import train
from bdm_jax.training.sets import select

from . import load

MORE_SESSIONS = 3


@dataclass(frozen=True)
class DemoArgs:
    """Make the demo model again."""

    minutes: float | None = None
    """length of this session; to the end where None"""
    runs: Path = Path("runs")
    """folder of the training runs"""
    out: Path = DEMO
    """folder of the finished model"""


def main(args: Sequence[str] | None = None) -> int:
    """Exit status: 0 when the demo's folder is complete, 3 when more sessions are needed, 2 after bad input."""
    return command_line.run(lambda: make(command_line.parse(DemoArgs, args, prog="python -m configs.demo")))


def make(settings: DemoArgs) -> int:
    """Do what is not done yet; 0 when the folder is complete, 3 when more sessions are needed."""
    deadline = time.monotonic() + 60 * settings.minutes if settings.minutes else None
    if not (EMOJI / "dataset_info.json").is_file() and render_emoji([]):
        return 2
    runs = stages(settings.runs)
    for config in runs:
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
    names = ("emoji-vae", "emoji-backbone", "emoji-text", "emoji-branch")
    vae, backbone, text, branch = (replace(load(name), run=runs / name) for name in names)
    backbone, text = (replace(run, task=replace(run.task, vae=vae.run / "export" / "vae")) for run in (backbone, text))
    towers = {part: text.run / "export" / f"branch_{part}" for part in ("text_encoder", "tokenizer")}
    branch = replace(branch, task=replace(branch.task, backbone=backbone.run / "export", **towers))
    return [vae, backbone, text, branch]


def assemble(runs: list[TrainConfig], out: Path) -> None:
    """Copy the last run's folder to `out`, with training.json: configs, final figures, hardware, concepts trained on.

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
        "style": runs[-1].data.style,
        "style_in_caption": runs[-1].task.style_in_caption,
        "hardware": f"{jax.device_count()} x {jax.devices()[0].device_kind}, {os.cpu_count()} CPU cores",
        "versions": {"python": platform.python_version(), "jax": jax.__version__},
        "runs": [{**config.to_json(), "run": config.run.name, "final": _final(config)} for config in runs],
        "concepts": sorted({source[int(i)]["id"] for i in indices}),
    }
    for run in record["runs"]:  # folders of the machine that trained say nothing to others
        run["data"].pop("folder")
        run["task"] = {name: value for name, value in run["task"].items() if name not in _folders(run["task"])}
    with new_folder(out.with_name(f"{out.name}.new")) as folder:
        shutil.copytree(branch, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("done"))
        (folder / "training.json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    if out.exists():
        shutil.rmtree(out)
    out.with_name(f"{out.name}.new").rename(out)


def _folders(task: dict[str, object]) -> list[str]:
    return [name for name in ("vae", "backbone", "text_encoder", "tokenizer") if isinstance(task.get(name), str)]


def _final(config: TrainConfig) -> dict[str, float]:
    """Means over the last tenth of the run's metrics, and its seconds of training."""
    lines = [json.loads(line) for line in (config.run / "metrics.jsonl").read_text().splitlines()]
    tail = lines[-max(1, len(lines) // 10) :]
    names = [name for name in tail[0] if name != "step"]
    final = {name: round(sum(line[name] for line in tail) / len(tail), 5) for name in names}
    steps = [line["step"] for line in lines]
    taken = [b - a for a, b in zip([0, *steps], steps, strict=False)]
    seconds = sum(n * config.batch_size / line["images_per_second"] for n, line in zip(taken, lines, strict=True))
    return {**final, "minutes": round(seconds / 60, 1)}


if __name__ == "__main__":
    sys.exit(main())
