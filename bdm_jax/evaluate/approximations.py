"""What do approximations cost and gain? `python -m bdm_jax.evaluate.approximations --count 96`

Draws Chinese prompts of the bundled set as `bdm_jax.evaluate` does, exactly and with each of the settings, and
prints for each: how many images are right, how far they are from the exact ones (mean absolute difference of values
of 0 to 255), seconds per image (the fastest batch's).
"""

import itertools
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from bdm_jax import command_line
from bdm_jax.errors import UserError
from bdm_jax.evaluate.features import Features
from bdm_jax.evaluate.gallery import choose, open_gallery, request
from bdm_jax.formats.files import write_json
from bdm_jax.paths import DEMO, check_output
from bdm_jax.runtime import compile_cache
from bdm_jax.sampling.generate import generate
from bdm_jax.sampling.settings import Request, Sampling, any_seed, check
from bdm_jax.systems.fetch import local
from bdm_jax.systems.pipeline import BridgePipeline

_INT8 = "text-weights=int8"  # changes the model, not how it draws
_COMPARED = (
    *(f"branch-every={every}" for every in (2, 3, 5)),
    *(f"cache-every={every}" for every in (2, 3, 5)),
    *(f"merge-tokens={ratio}" for ratio in (0.25, 0.5)),
    *("guidance-end=0.5", "guidance-start=0.2,guidance-end=0.8"),
    *("steps=13", "steps=8", "sampler=lcm,steps=8", "sampler=lcm,steps=4"),
    _INT8,
)


@dataclass(frozen=True)
class ApproximationArgs:
    """Measure settings against the exact image."""

    compared: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="NAME=VALUE[,...]")] = _COMPARED
    """Settings of sample.py, each a row of the table."""
    model: command_line.ModelPath = DEMO
    """Pipeline folder with training.json beside its components."""
    count: int = 96
    """Random concepts of those trained on."""
    seed: int = 0
    """Of the choice of concepts and of the noise."""
    batch_size: int = 8
    """Images drawn at a time."""
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Write the figures here."""
    settings: Sampling = field(default_factory=Sampling)
    """What the exact image is drawn with."""


def compare(asked: ApproximationArgs, features: Features | None = None) -> list[dict[str, Any]]:
    """A row for the exact images and one for each of `asked.compared`; printed as they come.

    Raises UserError or FileError, before anything is drawn, for what cannot be.
    """
    if asked.count < 1:
        raise UserError(f"count {asked.count} is less than 1")
    asked = replace(asked, model=local(asked.model), seed=any_seed(asked.seed))
    variants = {"exact": asked.settings} | {text: _settings(text, asked.settings) for text in asked.compared}
    int8 = {name for name in variants if _INT8 in name.split(",")}
    pipeline = BridgePipeline.from_pretrained(asked.model)
    gallery, known, _, phrased = open_gallery(asked.model, features=features)
    wanted = choose(known, asked.count, asked.seed)
    requests = [request(gallery.rows[i], "zh", phrased, asked.seed + i) for i in wanted]
    models = {name: pipeline.with_int8_text() if name in int8 else pipeline for name in variants}
    draw = partial(generate, requests=requests, batch_size=asked.batch_size)
    drawings = {name: draw(models[name], settings=settings) for name, settings in variants.items()}
    rows, exact = [], None
    for name, drawing in drawings.items():
        images, seconds = _timed(drawing, requests, asked.batch_size)
        exact = images if exact is None else exact
        difference = np.mean([np.abs(a.astype(int) - b).mean() for a, b in zip(images, exact, strict=True)])
        right = gallery.search(wanted, images).right
        rows.append({"settings": name, "right": float(right.mean()), "difference": float(difference)})
        rows[-1] |= {"seconds": seconds, "count": len(right)}
        print(f"{name:36} {right.mean():6.1%} right   {difference:5.2f} of 255 away   {seconds:6.3f} s", flush=True)
    return rows


def main(args: Sequence[str] | None = None) -> int:
    """Exit status: 0, 2 after bad input (one line on stderr)."""

    def command() -> None:
        asked = command_line.parse(ApproximationArgs, args, prog="python -m bdm_jax.evaluate.approximations")
        check_output("--json", asked.json)
        compile_cache.enable()
        rows = compare(asked)
        if asked.json:
            write_json(asked.json, {"rows": rows})

    return command_line.run(command)


def _settings(text: str, exact: Sampling) -> Sampling:
    found = command_line.parse(Sampling, [f"--{one.strip()}" for one in text.split(",") if one != _INT8], default=exact)
    check(found)
    return found


def _timed(drawing, requests: list[Request], batch_size: int) -> tuple[list[np.ndarray], float]:
    """Images, and the seconds that each took."""
    images, marks = [], [time.perf_counter()]
    for image in drawing:
        if len(images) % batch_size == 0:
            marks.append(time.perf_counter())
        images.append(image)
    fastest = min(after - before for before, after in itertools.pairwise(marks))
    return images, fastest / min(batch_size, len(requests))


if __name__ == "__main__":
    sys.exit(main())
