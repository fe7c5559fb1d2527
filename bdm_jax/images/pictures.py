"""Pictures as files: PNG with its settings inside, safe names, contact sheets with captions."""

import hashlib
import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from bdm_jax.paths import ASSETS, atomic_file

_FONT = ASSETS / "fonts" / "NotoSansSC-subset.ttf"
_MAX_CELL = 256
_CAPTION_LINES = 2
_NO_GLYPH = "\U0010ffff"  # a code point that no font draws: it shows what a missing glyph looks like


def write_png(
    path: str | Path, pixels: np.ndarray, text: Mapping[str, str] | None = None, palette: bool = False
) -> str:
    """Write (H,W,3) uint8 as PNG, whole or not at all; returns the file's SHA-256.

    `text` are the file's text chunks by keyword. `palette` keeps 256 colours only, for smaller files. Raises FileError
    when the file cannot be written.
    """
    info = PngInfo()
    for keyword, value in (text or {}).items():
        info.add_itxt(keyword, value)
    image, data = Image.fromarray(pixels), io.BytesIO()
    if palette:
        image = image.quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    image.save(data, "png", pnginfo=info, optimize=palette)
    with atomic_file(path) as file:
        file.write(data.getvalue())
    return hashlib.sha256(data.getvalue()).hexdigest()


def file_name(index: int, prompt: str, seed: int) -> str:
    """A name that every file system takes: number, the prompt's beginning without anything but letters, seed."""
    words = "-".join(re.findall(r"\w+", prompt)).strip("_")
    while len(words.encode("utf-8")) > 90:
        words = words[:-1]
    return "-".join(filter(None, [f"{index:04d}", words, f"seed{seed}"])) + ".png"


def next_index(folder: Path) -> int:
    """The first number after those of the pictures that the folder holds: no run overwrites an earlier one's."""
    numbers = [int(found[1]) for path in folder.glob("*.png") if (found := re.match(r"(\d{4,9})-", path.name))]
    return max(numbers, default=0) + 1


def contact_sheet(pictures: Iterable[np.ndarray], captions: Sequence[str], columns: int | None = None) -> np.ndarray:
    """Pictures (H,W,3) uint8 in a grid, each over its caption -> (H',W',3) uint8.

    Captions may be Chinese; a character that the bundled font lacks is written as its code point, `[1F600]`.
    """
    columns = min(columns or math.ceil(math.sqrt(len(captions))), len(captions))
    small = [thumbnail(picture) for picture in pictures]
    height, width = _largest(small)
    size = _text_size(width)
    gap, line = size // 2, round(size * 1.4)
    cell_width, cell_height = width + gap, height + gap // 2 + _CAPTION_LINES * line
    rows = math.ceil(len(captions) / columns)
    sheet = Image.new("RGB", (columns * cell_width + gap, rows * cell_height + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (picture, caption) in enumerate(zip(small, captions, strict=True)):
        x, y = gap + index % columns * cell_width, gap + index // columns * cell_height
        sheet.paste(Image.fromarray(picture), (x, y))
        for number, text in enumerate(_lines(caption, size, width)):
            draw.text((x, y + height + number * line), text, fill="black", font=font(size))
    return np.asarray(sheet)


def table(pictures: Sequence[Sequence[np.ndarray]], columns: Sequence[str], rows: Sequence[str]) -> np.ndarray:
    """Rows of pictures (H,W,3) uint8 with a heading over each column and before each row -> (H',W',3) uint8."""
    small = [[thumbnail(picture) for picture in row] for row in pictures]
    height, width = _largest([picture for row in small for picture in row])
    size = _text_size(width)
    gap, line = size // 2, round(size * 1.4)
    widths = [math.ceil(font(size).getlength(text)) for row in rows for text in _lines(row, size, width)]
    left = gap + max(widths, default=-gap)
    top = gap + line * max(len(_lines(text, size, width)) for text in columns)
    shape = left + gap + len(columns) * (width + gap), top + gap + len(rows) * (height + gap)
    sheet = Image.new("RGB", shape, "white")
    draw = ImageDraw.Draw(sheet)

    def write(text: str, x: int, y: int) -> None:
        for number, part in enumerate(_lines(text, size, width)):
            draw.text((x, y + number * line), part, fill="black", font=font(size))

    for column, text in enumerate(columns):
        write(text, left + gap + column * (width + gap), gap // 2)
    for row, text in enumerate(rows):
        y = top + gap + row * (height + gap)
        write(text, gap, y + (height - line * len(_lines(text, size, width))) // 2)
        for column, picture in enumerate(small[row]):
            sheet.paste(Image.fromarray(picture), (left + gap + column * (width + gap), y))
    return np.asarray(sheet)


def thumbnail(picture: np.ndarray) -> np.ndarray:
    """(H,W,3) uint8 as large as a contact sheet shows it: the longer side 256 pixels at most."""
    image = Image.fromarray(picture)
    image.thumbnail((_MAX_CELL, _MAX_CELL), Image.Resampling.LANCZOS)
    return np.asarray(image)


def drawable(text: str) -> str:
    """The text with white space as blanks, and characters that the bundled font lacks as code points."""
    return "".join(c if _has_glyph(c) else f"[{ord(c):X}]" for c in " ".join(text.split()))


def _lines(text: str, size: int, width: int) -> list[str]:
    """The text broken (between words where it has any) into lines of `width` pixels; what is over ends in …"""
    letters, rest, lines = font(size), drawable(text), []
    while rest and len(lines) < _CAPTION_LINES:
        fit = len(rest)
        while fit > 1 and letters.getlength(rest[:fit]) > width:
            fit -= 1
        blank = rest.rfind(" ", 1, fit + 1)
        if fit < len(rest) and blank > 0:
            fit = blank
        lines.append(rest[:fit].strip())
        rest = rest[fit:].strip()
    if rest:
        last = lines[-1]
        while last and letters.getlength(last + "…") > width:
            last = last[:-1]
        lines[-1] = last + "…"
    return lines


def _largest(pictures: Sequence[np.ndarray]) -> tuple[int, int]:
    """(height, width) of a cell that each of them fits into."""
    return max(picture.shape[0] for picture in pictures), max(picture.shape[1] for picture in pictures)


def _text_size(width: int) -> int:
    """Pixels of the letters beside pictures of this width."""
    return max(12, min(16, width // 8))


@lru_cache(maxsize=8)
def font(size: int) -> ImageFont.FreeTypeFont:
    """The bundled letters, Latin and Chinese, of a size in pixels."""
    return ImageFont.truetype(str(_FONT), size)


@cache
def _has_glyph(character: str) -> bool:
    return character == " " or bytes(font(16).getmask(character)) != bytes(font(16).getmask(_NO_GLYPH))
