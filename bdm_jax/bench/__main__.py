"""How fast is it, and how fast are others on the same machine? `python -m bdm_jax.bench --against diffusers openvino`.

Random weights of the published sizes, of one type on all sides. They run in turn within one process and `ratio` is
that of the medians, ours / theirs; PyTorch runs in its faster memory format, with as many threads as there are cores;
on a GPU compiled with max-autotune. What is counted as work (TFLOP/s, share of the peak) is the plain form's, whatever
is saved. Memory is what our compiled program asks for: weights, inputs, outputs and everything in between; of others,
what the process has grown by after their first call.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import jax
from PIL import Image

from bdm_jax import command_line
from bdm_jax.bench.cases import SD15, TEXT_CASES, USUAL, Case, Other, Sizes, make
from bdm_jax.bench.timing import matmul_peak, processor, timed
from bdm_jax.errors import UserError
from bdm_jax.formats.files import write_json
from bdm_jax.images.chart import bars
from bdm_jax.paths import atomic_file, check_output
from bdm_jax.runtime import compile_cache
from bdm_jax.systems.components import default_dtype


@dataclass(frozen=True)
class BenchArgs:
    """Measure sampling steps (with guidance), text encoders, the autoencoder's decoder and training steps."""

    cases: tuple[Case, ...] = USUAL
    size: tuple[int, ...] = (512, 256)
    """pixels a side"""
    batch: tuple[int, ...] = (1,)
    """images at a time; a guided step computes two predictions of each"""
    against: tuple[Other, ...] = ()
    """diffusers (PyTorch) and OpenVINO (`pip install -e ".[bench]"`), which is for CPUs"""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """of weights and computation on all sides; what `sample.py` takes on this machine where None"""
    repeats: int = 5
    json: Path | None = None
    """write all figures here"""
    chart: Path | None = None
    """write a chart of all seconds here (PNG)"""


def bench(settings: BenchArgs, sizes: Sizes = SD15) -> dict[str, Any]:
    """All figures. Raises UserError for settings that are not valid."""
    factor = sizes.vae.factor
    for name in ("cases", "size", "batch"):
        if not getattr(settings, name):
            raise UserError(f"--{name} names nothing to measure: give one, or leave the flag out")
    if min(settings.repeats, *settings.batch) < 1 or any(size < factor or size % factor for size in settings.size):
        raise UserError(f"repeats and batch must be positive, sizes multiples of {factor}")
    sizes = replace(sizes, dtype=settings.dtype or default_dtype())
    peak = matmul_peak(sizes.dtype)
    rows = []
    for case in settings.cases:
        for size in settings.size[:1] if case in TEXT_CASES else settings.size:
            for batch in settings.batch:
                # Held by no name here: one problem's weights are gone before the next one's are made.
                build = partial(make, case, sizes, size // factor, batch, settings.against)
                row = {"case": case, "size": size, "batch": batch}
                rows.append(row | timed(build, batch, settings.repeats, peak))
                print(_line(rows[-1]), flush=True)
    settings = replace(settings, dtype=sizes.dtype)
    values = {key: value for key, value in asdict(settings).items() if key not in ("json", "chart")}
    machine = {"device": jax.devices()[0].device_kind, "processor": processor(), "cores": os.cpu_count()}
    packages = {"diffusers": ("torch", "diffusers"), "openvino": ("openvino",)}
    machine |= {name: version(name) for name in ("jax", *(p for other in settings.against for p in packages[other]))}
    return {"settings": values, "machine": machine, "peak_tflops": peak / 1e12, "rows": rows}


def main(args: Sequence[str] | None = None) -> int:
    """Print a line for each measurement, write what was asked for; 2 for bad input."""

    def command() -> None:
        settings = command_line.parse(BenchArgs, args, prog="python -m bdm_jax.bench")
        check_output("--json", settings.json)
        check_output("--chart", settings.chart)
        compile_cache.enable()
        report = bench(settings)
        if settings.json:
            write_json(settings.json, report)
        if settings.chart:
            with atomic_file(settings.chart) as file:
                Image.fromarray(bars(_bars(report["rows"]), "s")).save(file, "PNG")

    return command_line.run(command)


def _bars(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """What is measured -> side -> seconds."""
    found = {}
    for row in rows:
        name = f"{row['case']}, {row['size']} px x {row['batch']}"
        others = {other: figures["seconds"] for other, figures in row["others"].items()}
        found[name] = {"bdm_jax": row["seconds"]} | others
    return found


def _line(row: dict[str, Any]) -> str:
    others = (
        f"  {name} {figures['seconds']:8.3f} s  ratio {figures['ratio']:.2f}" for name, figures in row["others"].items()
    )
    return (
        f"{row['case']:14} {row['size']:4} px x {row['batch']}  {row['seconds']:8.3f} s  {row['per_second']:7.2f}/s  "
        f"{row['tflops']:6.2f} TFLOP/s ({row['share_of_peak']:.0%} of the peak)  "
        f"{row['memory'] / 1e9:.2f} GB{''.join(others)}"
    )


if __name__ == "__main__":
    sys.exit(main())
