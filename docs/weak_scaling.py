"""Draw docs/weak-scaling.png and print the table of docs/scaling.md from the plans in docs/plans/.

python docs/weak_scaling.py            (plans are made by python -m bdm_jax.plan CONFIG --topology ... --json FILE)
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from bdm_jax import configs
from bdm_jax.plan.estimate import Plan, estimate, from_json
from bdm_jax.plan.shapes import step_shapes
from bdm_jax.plan.topology import parse_topology

DOCS = Path(__file__).resolve().parent
PAIRS = 1e9
SLICES = {
    "v5e": ["v5e:4x4", "v5e:4x8", "v5e:8x8", "v5e:8x16", "v5e:16x16"],
    "v5p": ["v5p:2x2x4", "v5p:2x4x4", "v5p:4x4x4", "v5p:4x4x8", "v5p:4x8x8"],
    "v6e": ["v6e:4x4", "v6e:4x8", "v6e:8x8", "v6e:8x16", "v6e:16x16"],
}
# Chip -> config, fsdp axis, images per chip.
_RUNS = {"v5e": ("bdm-sd15-v5e", 8, 12), "v5p": ("bdm-sd15-v5p", 1, 24), "v6e": ("bdm-sd15-v5e", 8, 12)}
_COLOURS = {"v5e": "#c0392b", "v5p": "#2471a3", "v6e": "#1e8449"}
_WIDTH, _HEIGHT, _LEFT, _TOP, _RIGHT, _BOTTOM = 900, 480, 70, 30, 170, 60


def curves() -> dict[str, tuple[list[Plan], list[Plan]]]:
    """Chip -> plans by slice size, with the images per chip of `_RUNS` and with one per chip: compiled plans where they
    exist, otherwise extrapolated from the largest compiled one.
    """
    found = {}
    for chip, (name, fsdp, batch) in _RUNS.items():
        config, slices = configs.load(name), [parse_topology(text) for text in SLICES[chip]]
        shapes = step_shapes(config.task, config.compute_dtype())
        known = {where.name: plan for where in slices if (plan := compiled(where.name))}
        largest = list(known.values())[-1]
        many = [known.get(where.name) or estimate(config, largest, where, fsdp, batch, shapes) for where in slices]
        whole = replace(config, accumulate=1)
        one = [estimate(whole, largest, where, fsdp, 1, shapes) for where in slices]
        found[chip] = many, one
    return found


def compiled(topology: str) -> Plan | None:
    """The plan written by `python -m bdm_jax.plan ... --json docs/plans/v5e-16x16.json`, if any."""
    path = DOCS / "plans" / f"{topology.replace(':', '-')}.json"
    return from_json(json.loads(path.read_text())) if path.is_file() else None


def draw(found: dict[str, tuple[list[Plan], list[Plan]]]) -> Image.Image:
    """MFU over the number of chips; solid lines for the plans, dashed lines for one image per chip."""
    image = Image.new("RGB", (_WIDTH, _HEIGHT), "white")
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(15)
    right, bottom, chips = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM, [16, 32, 64, 128, 256]

    def place(i: int, share: float) -> tuple[float, float]:
        return _LEFT + i * (right - _LEFT) / (len(chips) - 1), bottom - share / 0.5 * (bottom - _TOP)

    for share in (0, 0.1, 0.2, 0.3, 0.4, 0.5):
        pen.line([place(0, share), place(len(chips) - 1, share)], "#dddddd")
        pen.text((_LEFT - 10, place(0, share)[1]), f"{share:.0%}", "black", font, anchor="rm")
    for i, count in enumerate(chips):
        pen.text((place(i, 0)[0], bottom + 8), str(count), "black", font, anchor="mt")
    pen.text(((_LEFT + right) / 2, _HEIGHT - 8), "chips", "black", font, anchor="mb")
    pen.text((_LEFT, 6), "MFU (planned)", "black", font)
    labels: list[tuple[float, str, str]] = []
    for name, rows in found.items():
        for plans, dash in zip(rows, (1, 2), strict=True):
            points = [place(i, _share(plan)) for i, plan in enumerate(plans)]
            for (x0, y0), (x1, y1) in zip(points, points[1:], strict=False):
                for k in range(0, 20, dash):
                    a, b = k / 20, (k + 1) / 20
                    start, end = (x0 + a * (x1 - x0), y0 + a * (y1 - y0)), (x0 + b * (x1 - x0), y0 + b * (y1 - y0))
                    pen.line([start, end], _COLOURS[name], 2)
            label = f"{name}, {plans[-1].batch_per_chip:g} per chip"
            labels.append((points[-1][1], label, _COLOURS[name]))
    lowest = 0.0
    for y, label, colour in sorted(labels):  # keep labels apart where lines coincide
        lowest = max(y, lowest + 17)
        pen.text((right + 10, lowest), label, colour, font, anchor="lm")
    return image


def table(found: dict[str, tuple[list[Plan], list[Plan]]]) -> list[str]:
    """The Markdown table."""
    names = ["slice", "chips", "fsdp", "images per chip", "memory", "sent per chip", "step", "images/s"]
    names += ["days for 10^9 images", "chip-hours"]
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    for many, _ in found.values():
        for plan in many:
            speed = plan.images_per_second()
            hours = PAIRS / speed / 3600
            cells = [
                plan.where.name + ("" if compiled(plan.where.name) else " *"),
                plan.where.chips,
                plan.mesh["fsdp"],
                f"{plan.batch_per_chip:g}",
            ]
            sent = sum(collective.sent for collective in plan.program.collectives)
            cells += [
                f"{plan.program.total / 1e9:.1f} GB",
                f"{sent / 1e9:.2f} GB",
                f"{plan.time.planned * 1e3:.0f} ms",
                f"{speed:,.0f}",
            ]
            cells += [f"{hours / 24:.1f}", f"{hours * plan.where.chips:,.0f}"]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def main(arguments: Sequence[str]) -> int:
    """Write the chart, print the table."""
    found = curves()
    image = draw(found).quantize(32)
    image.save(DOCS / "weak-scaling.png", optimize=True)
    print("\n".join(table(found)))
    return 0


def _share(plan: Plan) -> float:
    """Fraction of the chip's peak (MFU), by the FLOPs required."""
    return plan.counted * plan.batch_per_chip / plan.time.planned / plan.where.chip.flops


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
