"""Draw docs/cost-curves.png and print the tables of docs/performance.md from the measurements in docs/bench/.

python docs/cost_curves.py             (performance.md lists the `python -m bdm_jax.bench` commands that made them)
"""

import json
import math
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

DOCS = Path(__file__).resolve().parent
_COLOURS = ("#c0392b", "#2471a3", "#1e8449")
_WIDTH, _HEIGHT, _LEFT, _TOP, _RIGHT, _BOTTOM = 460, 380, 60, 50, 20, 50
_LINE = 15


def rows(name: str) -> list[dict[str, Any]]:
    """The measurements of one file in docs/bench/."""
    return json.loads((DOCS / "bench" / f"{name}.json").read_text())["rows"]


def curve(name: str, case: str, over: str) -> dict[float, tuple[float, float]]:
    """Size or batch -> seconds, measured and estimated: the FLOPs of the plain form at the highest speed measured."""
    found = [row for row in rows(name) if row["case"] == case]
    speed = max(row["tflops"] for row in found)
    return {row[over]: (row["seconds"], row["tflop"] / speed) for row in found}


def panel(title: str, unit: str, curves: dict[str, dict[float, tuple[float, float]]]) -> Image.Image:
    """A log-log chart; solid lines with dots are measured, dashed lines estimated."""
    image = Image.new("RGB", (_WIDTH, _HEIGHT), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(_LINE)
    xs = sorted({x for curve in curves.values() for x in curve})
    values = [y for curve in curves.values() for pair in curve.values() for y in pair]
    low, high = min(values) / 1.3, max(values) * 1.3

    def place(x: float, y: float) -> tuple[float, float]:
        width, height = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
        right, up = _log_fraction(x, xs[0], xs[-1]), _log_fraction(y, low, high)
        return _LEFT + right * width, _HEIGHT - _BOTTOM - up * height

    for tick in (factor * 10.0**power for power in range(-4, 5) for factor in (1, 2, 5)):
        if low <= tick <= high:
            pen.line([place(xs[0], tick), place(xs[-1], tick)], "#dddddd")
            pen.text((_LEFT - 8, place(xs[0], tick)[1]), f"{tick:g}", "black", font, anchor="rm")
    for x in xs:
        pen.text((place(x, low)[0], _HEIGHT - _BOTTOM + 8), f"{x:g}", "black", font, anchor="mt")
    pen.text((_LEFT, 8), title, "black", font)
    pen.text((_WIDTH - _RIGHT, _HEIGHT - 8), unit, "black", font, anchor="rb")
    for number, (name, curve) in enumerate(curves.items()):
        colour = _COLOURS[number]
        measured, estimated = ([place(x, pair[i]) for x, pair in curve.items()] for i in (0, 1))
        pen.line(measured, colour, 2)
        for x, y in measured:
            pen.ellipse((x - 4, y - 4, x + 4, y + 4), colour)
        for (x0, y0), (x1, y1) in zip(estimated, estimated[1:], strict=False):
            for k in range(0, 12, 2):
                ends = [(x0 + part / 12 * (x1 - x0), y0 + part / 12 * (y1 - y0)) for part in (k, k + 1)]
                pen.line(ends, colour, 1)
        pen.text((_LEFT + 8, _TOP - 18 + number * (_LINE + 3)), name, colour, font)
    return image


def table(name: str, case: str, over: str) -> list[str]:
    """A Markdown table with one row per measurement of a case."""
    lines = [f"| {over} | seconds | images/s | TFLOP | TFLOP/s | memory |", "|---|---|---|---|---|---|"]
    for row in (row for row in rows(name) if row["case"] == case):
        cells = [row[over], f"{row['seconds']:.2f}", f"{row['per_second']:.3f}", f"{row['tflop']:.2f}"]
        cells += [f"{row['tflops']:.2f}", f"{row['memory'] / 1e9:.1f} GB"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def main() -> None:
    """Write the chart, print the tables."""
    cases = {"one English prompt": "empty-english", "two English prompts": "two-prompts"}
    sizes = {name: curve("sizes", case, "size") for name, case in cases.items()}
    batches = {"one English prompt, 256 px": curve("batches", "empty-english", "batch")}
    panels = [
        panel("seconds per guided step", "image size (px)", sizes),
        panel("seconds per guided step", "batch size", batches),
    ]
    image = Image.new("RGB", (_WIDTH * len(panels), _HEIGHT), "white")
    for number, chart in enumerate(panels):
        image.paste(chart, (number * _WIDTH, 0))
    image.quantize(32).save(DOCS / "cost-curves.png", optimize=True)
    tables = ("sizes", "empty-english", "size"), ("batches", "empty-english", "batch"), ("train", "train", "batch")
    for arguments in tables:
        print("\n".join(table(*arguments)), end="\n\n")


def _log_fraction(value: float, first: float, last: float) -> float:
    """Position of a value between first (0) and last (1) on a logarithmic axis."""
    return math.log(value / first) / math.log(last / first)


if __name__ == "__main__":
    main()
