"""Draw the two figures of docs/architecture.md: architecture-rooms.svg and architecture-prompt.svg.

python docs/drawings.py
"""

from html import escape
from pathlib import Path

DOCS = Path(__file__).resolve().parent
# Floor -> rooms (title, what it holds), from the top.
FLOORS = {
    "9": [("sample.py, train.py, convert", "commands: parse arguments, call the library, report")],
    "8": [("evaluate", "quality"), ("bench", "speed"), ("plan", "TPU slices")],
    "7": [("app", "flags, prompt files, output folders, PNG settings"), ("configs", "one file per training run")],
    "6": [("training", "one engine; objectives/: one file per trainable thing")],
    "5": [("sampling", "requests to images: batching, compiled loop, guidance per step")],
    "4": [
        ("plugins", "LoRA, ControlNet, textual inversion, ..."),
        ("latents", "autoencoder, tiles, precomputed latents"),
    ],
    "3": [("systems", "families.py: one row per model family; pipelines, folders, int8")],
    "2": [("text", "prompts to Conditioning"), ("data", "records, filters, buckets, loader")],
    "1": [
        ("models", "networks"),
        ("diffusion", "schedules, samplers"),
        ("formats", "community files"),
        ("images", "PNG, JPEG"),
        ("runtime", "sharding, programs"),
    ],
    "0": [("errors, paths, command_line", "the only modules at the top of the package")],
}
_COLOURS = ("#eef2f7", "#dbe7f3", "#c9dcf0")
_STYLE = 'font-family="Helvetica, Arial, sans-serif"'
_WIDTH, _ROW, _GAP, _LEFT = 960, 58, 10, 60


def rooms() -> str:
    """The rooms by floor; imports point downward."""
    parts, height = [], len(FLOORS) * (_ROW + _GAP) + _GAP
    for row, (floor, boxes) in enumerate(FLOORS.items()):
        y = _GAP + row * (_ROW + _GAP)
        parts.append(text(_LEFT - 16, y + _ROW / 2 + 5, floor, 14, anchor="end", colour="#667788"))
        width = (_WIDTH - _LEFT - _GAP * len(boxes)) / len(boxes)
        for column, (title, content) in enumerate(boxes):
            parts.append(box(_LEFT + column * (width + _GAP), y, width, _ROW, title, content, _COLOURS[row % 2]))
    parts.append(arrow(18, _GAP + 10, 18, height - _GAP - 10))
    parts.append(text(0, 0, "imports", 12, turn=(12, height / 2), colour="#667788"))
    return svg(_WIDTH, height, parts)


def prompt() -> str:
    """The way of a prompt."""
    frame = 'fill="none" stroke="#667788" stroke-dasharray="6 4"'
    parts = [
        box(20, 20, 150, 58, "prompts", "Chinese, English"),
        box(210, 20, 220, 58, "text: tokens", "weights, windows"),
        box(470, 20, 220, 58, "text: readers", "run the text encoders"),
        box(730, 20, 210, 58, "Conditioning", "one per source", _COLOURS[2]),
        *(arrow(x, 49, x + 38, 49) for x in (171, 431, 691)),
        f'<rect x="20" y="118" width="920" height="262" rx="8" {frame}/>',
        text(36, 142, "sampling: one compiled loop over the rows of the sampler's table", 13, anchor="start"),
        arrow(835, 79, 835, 116),
        text(822, 142, "the networks read it", 12, colour="#667788"),
        box(40, 230, 130, 58, "latents", "noise at first", _COLOURS[2]),
        box(225, 165, 200, 58, "backbone.encode", "reads the English text"),
        box(225, 295, 200, 58, "branch, ControlNets", "read Chinese, English"),
        box(490, 230, 190, 58, "backbone.decode", "skips, middle + residuals"),
        box(740, 165, 180, 58, "guidance", "a table of weights"),
        box(740, 295, 180, 58, "sampler step", "one matrix per row"),
        arrow(171, 250, 223, 205),
        arrow(171, 268, 223, 313),
        arrow(426, 205, 488, 248),
        arrow(426, 313, 488, 270),
        arrow(681, 248, 738, 205),
        arrow(830, 224, 830, 293),
        path("M790 354 V367 H105 V290"),
        path("M830 354 V398 H605 V418"),
        box(500, 420, 210, 58, "latents: autoencoder", "pixels"),
        box(750, 420, 190, 58, "app", "PNG with its settings"),
        arrow(711, 449, 748, 449),
    ]
    return svg(_WIDTH, 498, parts)


def box(x: float, y: float, width: float, height: float, title: str, content: str, colour: str = _COLOURS[0]) -> str:
    """A rounded box with a title and a line about its content."""
    middle = x + width / 2
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="6" fill="{colour}" stroke="#8899aa"/>'
        + text(middle, y + height / 2 - 5, title, 15, bold=True)
        + text(middle, y + height / 2 + 15, content, 12, colour="#334455")
    )


def text(
    x: float,
    y: float,
    words: str,
    size: int,
    *,
    anchor: str = "middle",
    colour: str = "#112233",
    bold: bool = False,
    turn: tuple[float, float] | None = None,
) -> str:
    """A line of text; `turn` places it vertically instead, reading upward."""
    weight = ' font-weight="bold"' if bold else ""
    where = f'transform="translate({turn[0]:g} {turn[1]:g}) rotate(-90)"' if turn else f'x="{x:g}" y="{y:g}"'
    return f'<text {where} font-size="{size}" text-anchor="{anchor}" fill="{colour}"{weight}>{escape(words)}</text>'


def arrow(x: float, y: float, x_to: float, y_to: float) -> str:
    """A straight arrow."""
    line = f'<line x1="{x:g}" y1="{y:g}" x2="{x_to:g}" y2="{y_to:g}"'
    return f'{line} stroke="#334455" stroke-width="1.5" marker-end="url(#head)"/>'


def path(points: str) -> str:
    """An arrow along an SVG path."""
    return f'<path d="{points}" fill="none" stroke="#334455" stroke-width="1.5" marker-end="url(#head)"/>'


def svg(width: float, height: float, parts: list[str]) -> str:
    """A whole file, on white so that it can be read in GitHub's dark theme."""
    head = (
        '<defs><marker id="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0L10 5L0 10z" fill="#334455"/></marker></defs>'
    )
    size = f'width="{width:g}" height="{height:g}" viewBox="0 0 {width:g} {height:g}"'
    frame = f'<rect width="{width:g}" height="{height:g}" fill="white"/>'
    return "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" {size} {_STYLE}>', head, frame, *parts, "</svg>", ""])


if __name__ == "__main__":
    (DOCS / "architecture-rooms.svg").write_text(rooms(), encoding="utf-8")
    (DOCS / "architecture-prompt.svg").write_text(prompt(), encoding="utf-8")
