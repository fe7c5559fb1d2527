"""One prompt over the values of one or two settings, as a table of images (the X/Y plot of web UIs).

  python -m bdm_jax.app.compare "红灯笼" --x sampler=ddim,euler-a,dpmpp-2m --y guidance=2,5,8 --out table.png

An axis is any setting of sample.py, or prompt, negative, english, english-negative, seed, image or mask. Its values are
separated by commas, or by | where one of them holds a comma; within brackets both are part of a value.
"""

import dataclasses
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro
from rich.progress import track

from bdm_jax import command_line
from bdm_jax.app.metadata import describe, text_chunks
from bdm_jax.app.parts import Parts
from bdm_jax.app.tags import shared_tags, without_tags
from bdm_jax.errors import UserError, unknown
from bdm_jax.paths import check_output
from bdm_jax.sampling.settings import ANY_SEED, Request, Sampling, any_seed, check

_MAX_CELLS = 400
_REQUEST = tuple(field.name for field in dataclasses.fields(Request))
_SETTINGS = tuple(field.name for field in dataclasses.fields(Sampling))
_SIGNS = re.compile(r"\\[()（）\[\]［］<>＜＞|]|[()（）\[\]［］<>＜＞|,]")
_OPEN, _CLOSED = "(（[［<＜", ")）]］>＞"


@dataclass(frozen=True)
class Comparison:
    """Draw a prompt over the values of one or two settings, as a table of images."""

    prompt: Annotated[str, tyro.conf.Positional] = ""
    """What to draw, in the branch's language."""
    x: Annotated[str, tyro.conf.arg(metavar="NAME=A,B,C")] = ""
    """The columns: a setting and its values."""
    y: Annotated[str, tyro.conf.arg(metavar="NAME=A,B,C")] = ""
    """The rows, likewise."""
    negative: str = ""
    """Negative prompt, in the branch's language."""
    english: str = ""
    """English prompt for the backbone."""
    english_negative: str = ""
    """Negative prompt for the backbone, in English."""
    seed: int = 0
    """Seed of every picture; -1 for any, the same for all."""
    image: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Initial image (img2img)."""
    mask: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Mask for inpainting: white where the image is repainted; of the image's size."""
    out: Path = Path("out/compare.png")
    """File of the table (PNG)."""
    palette: bool = False
    """At most 256 colours: a small file, for a web page."""
    batch_size: int = 8
    """Images per batch."""
    settings: Sampling = Sampling()
    parts: Parts = Parts()

    @property
    def request(self) -> Request:
        return Request(**{name: getattr(self, name) for name in _REQUEST})


def compare(asked: Comparison) -> None:
    """Draw the table. Raises UserError or FileError, before anything is drawn, for what cannot be."""
    asked = replace(asked, seed=any_seed(asked.seed))
    columns, rows = _axis(asked.x), _axis(asked.y)
    if columns is None:
        raise UserError("--x is missing: name a setting and its values, as in --x guidance=2,5,8")
    check_output("--out", asked.out)
    if asked.out.suffix.lower() != ".png":
        raise UserError(f"--out {asked.out}: the table is a PNG file, name it {asked.out.with_suffix('.png')}")
    if (count := len(_values(columns)) * len(_values(rows))) > _MAX_CELLS:
        raise UserError(f"{count} images are more than fit in a table; take {_MAX_CELLS} at most")
    cells = [[_with(_with(asked, rows, row), columns, column) for column in _values(columns)] for row in _values(rows)]
    flat = [cell for row in cells for cell in row]
    for cell in flat:
        if not (cell.prompt or cell.english):
            raise UserError('no prompt, as in: python -m bdm_jax.app.compare "红灯笼" --x guidance=2,5,8')
        check(cell.settings)
    asked.parts.check()
    tags = {shared_tags([flat[0].request, cell.request], cell.settings) for cell in flat}
    if len(tags) > 1:
        raise UserError("in the reference mode LoRAs in prompts are text: leave out reference, or the LoRAs")
    parts = asked.parts.with_tags(tags.pop())

    from bdm_jax.diffusion.samplers import check_sampler
    from bdm_jax.images.pictures import table, write_png
    from bdm_jax.runtime import compile_cache
    from bdm_jax.sampling.generate import generate, resolve

    for cell in flat:
        check_sampler(cell.settings.sampler)
    compile_cache.enable()
    pipeline, controls = parts.load(), parts.load_controls()
    groups: dict[Sampling, list[int]] = {}
    for index, cell in enumerate(flat):
        groups.setdefault(cell.settings, []).append(index)
    how = {"batch_size": asked.batch_size, "controls": controls}
    drawings = [
        (indices, generate(pipeline, [without_tags(flat[i].request, settings) for i in indices], settings, **how))
        for settings, indices in groups.items()
    ]
    pictures: dict[int, np.ndarray] = {}
    drawn = (pair for indices, drawing in drawings for pair in zip(indices, drawing, strict=True))
    for index, picture in track(drawn, "drawing", total=len(flat), console=command_line.progress_console()):
        pictures[index] = picture
    grid = [[pictures[row * len(cells[0]) + column] for column in range(len(cells[0]))] for row in range(len(cells))]
    axes = {"x": asked.x, "y": asked.y}
    used = replace(asked.settings, sampler=resolve(pipeline, asked.settings).sampler)
    settings = {"compare": axes, "settings": describe(asked.request, used, parts.names())}
    labels = [[_label(axis, value) for value in _values(axis)] for axis in (columns, rows)]
    write_png(asked.out, table(grid, *labels), text_chunks(settings), palette=asked.palette)


_Axis = tuple[str, list[str]]  # a field's name, its values as they were written


def _axis(text: str) -> _Axis | None:
    if not text:
        return None
    name, equals, values = text.partition("=")
    name = name.strip().replace("-", "_")
    if name not in (*_REQUEST, *_SETTINGS):
        raise unknown("setting", name, (*_REQUEST, *_SETTINGS))
    written = [value.strip() for value in _split(values)]
    if not equals or not all(written):
        raise UserError(f"{text}: write an axis as NAME=A,B,C, for example guidance=2,5,8")
    if name == "seed":
        written = [str(any_seed(ANY_SEED)) if value == str(ANY_SEED) else value for value in written]
    return name, written


def _split(values: str) -> list[str]:
    """At each | outside of brackets, or at each comma where there is none. What is not closed is no bracket."""
    found: list[tuple[str, int]] = []
    opened: list[tuple[int, int]] = []  # which kind of bracket, and how many signs were found before it
    for match in _SIGNS.finditer(values):
        sign = match[0]
        if sign in ",|":
            found.append((sign, match.start()))
        elif sign in _OPEN:
            opened.append((_OPEN.index(sign) // 2, len(found)))
        elif sign in _CLOSED:
            kind = _CLOSED.index(sign) // 2
            if place := next((i for i in range(len(opened), 0, -1) if opened[i - 1][0] == kind), 0):
                del found[opened[place - 1][1] :], opened[place - 1 :]
    separator = "|" if any(sign == "|" for sign, _ in found) else ","
    ends = [place for sign, place in found if sign == separator]
    return [values[begin:end] for begin, end in zip([0, *(end + 1 for end in ends)], [*ends, None], strict=True)]


def _values(axis: _Axis | None) -> list[str]:
    return [""] if axis is None else axis[1]


def _with(asked: Comparison, axis: _Axis | None, value: str) -> Comparison:
    """The comparison with one value of an axis in the place of its own."""
    if axis is None:
        return asked
    name = axis[0]
    if name == "prompt":
        return replace(asked, prompt=value)
    flag = f"--{name.replace('_', '-')}"
    default: Any = getattr(Sampling, name, None)
    if isinstance(default, bool):
        if value.lower() not in ("true", "false"):
            raise UserError(f"{flag} {value}: it is true or false")
        return replace(asked, settings=replace(asked.settings, **{name: value.lower() == "true"}))
    given = [flag, *value.split()] if isinstance(default, tuple) else [f"{flag}={value}"]
    return command_line.parse(Comparison, given, default=asked)


def _label(axis: _Axis | None, value: str) -> str:
    if axis is None or axis[0] == "prompt":
        return value
    return f"{axis[0].replace('_', ' ')} {value}"


def main(args: Sequence[str] | None = None) -> int:
    """Exit status: 0, 2 after bad input (one line on stderr), 130 after Ctrl-C."""

    def command() -> None:
        asked = command_line.parse(Comparison, args, prog="python -m bdm_jax.app.compare")
        compare(asked)
        print(asked.out)

    return command_line.run(command)


if __name__ == "__main__":
    sys.exit(main())
