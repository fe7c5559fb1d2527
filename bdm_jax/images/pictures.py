"""Image files: PNG with text chunks, safe file names, contact sheets and tables with captions."""

import hashlib
import io
import math
import re
import sys
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
_NO_GLYPH = "\U0010ffff"  # a code point that no font has: renders as the missing-glyph box


def write_png(
    path: str | Path, pixels: np.ndarray, text: Mapping[str, str] | None = None, palette: bool = False
) -> str:
    """Write (H,W,3) uint8 as PNG, atomically; returns the file's SHA-256.

    `text`: text chunks by keyword. `palette`: reduce to 256 colours, for smaller files. Raises FileError if the file
    cannot be written.
    """
    data = encode_png(pixels, text, palette)
    with atomic_file(path) as file:
        file.write(data)
    return hashlib.sha256(data).hexdigest()


def encode_png(pixels: np.ndarray, text: Mapping[str, str] | None = None, palette: bool = False) -> bytes:
    """The PNG that `write_png` writes."""
    info = PngInfo()
    for keyword, value in (text or {}).items():
        info.add_itxt(keyword, value)
    image, data = Image.fromarray(pixels), io.BytesIO()
    if palette:
        image = image.quantize(256, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    image.save(data, "png", pnginfo=info, optimize=palette)
    return data.getvalue()


def file_name(index: int, prompt: str, seed: int) -> str:
    """A file name that is valid on every file system: number, start of the prompt (word characters only), seed.

    Characters that the locale's names of files cannot have (a C locale, Chinese) are left out.
    """
    encoding = sys.getfilesystemencoding()
    words = "-".join(re.findall(r"\w+", prompt.encode(encoding, "ignore").decode(encoding))).strip("_")
    while len(words.encode("utf-8")) > 90:
        words = words[:-1]
    return "-".join(filter(None, [f"{index:04d}", words, f"seed{seed}"])) + ".png"


def next_index(folder: Path) -> int:
    """The number after the largest in a folder of numbered images; `app.claims` takes numbers for a run alone."""
    numbers = [int(found[1]) for path in folder.glob("*.png") if (found := re.match(r"(\d{4,9})-", path.name))]
    return max(numbers, default=0) + 1


def numbered(name: str) -> int | None:
    """The number in a file name that `file_name` made; None of any other, as of contact sheets."""
    found = re.fullmatch(r"(\d{4,9})-(?:[\w-]*-)?seed\d{1,10}\.png", name)
    return int(found[1]) if found else None


def contact_sheet(pictures: Iterable[np.ndarray], captions: Sequence[str], columns: int | None = None) -> np.ndarray:
    """Images (H,W,3) uint8 in a grid, each with its caption below -> (H',W',3) uint8.

    Captions may be Chinese; a character missing from the bundled font is shown as its code point, `[1F600]`.
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
    """Rows of images (H,W,3) uint8 with a heading above each column and beside each row -> (H',W',3) uint8."""
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
    """(H,W,3) uint8 at contact-sheet size: the longer side is at most 256 pixels."""
    image = Image.fromarray(picture)
    image.thumbnail((_MAX_CELL, _MAX_CELL), Image.Resampling.LANCZOS)
    return np.asarray(image)


def drawable(text: str) -> str:
    """The text with white space as single spaces and characters missing from the bundled font as code points."""
    return "".join(c if _has_glyph(c) else f"[{ord(c):X}]" for c in " ".join(text.split()))


def _lines(text: str, size: int, width: int) -> list[str]:
    """The text wrapped to lines of `width` pixels, at spaces if possible; text that does not fit is cut with …"""
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
    """(height, width) of a cell that fits every image."""
    return max(picture.shape[0] for picture in pictures), max(picture.shape[1] for picture in pictures)


def _text_size(width: int) -> int:
    """Font size in pixels for images of this width."""
    return max(12, min(16, width // 8))


@lru_cache(maxsize=8)
def font(size: int) -> ImageFont.FreeTypeFont:
    """The bundled font, Latin and Chinese, at a size in pixels."""
    return ImageFont.truetype(str(_FONT), size)


@cache
def _has_glyph(character: str) -> bool:
    return character == " " or bytes(font(16).getmask(character)) != bytes(font(16).getmask(_NO_GLYPH))
