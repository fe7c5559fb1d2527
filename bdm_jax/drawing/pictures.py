"""Pictures as files: PNG with its settings inside, safe names, contact sheets with captions."""

import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from bdm_jax.diffusion.samplers import canonical
from bdm_jax.paths import ASSETS
from convert.files import atomic_file

_FONT = ASSETS / "fonts" / "NotoSansSC-subset.ttf"
_MAX_CELL = 256
_CAPTION_LINES = 2
_NO_GLYPH = "\U0010ffff"  # a code point that no font draws: it shows what a missing glyph looks like
_WEB_UI_SAMPLERS = {
    "ddim": "DDIM",
    "ddpm": "DDPM",
    "pndm": "PLMS",
    "lcm": "LCM",
    "euler-a": "Euler a",
    "lms": "LMS",
    "euler": "Euler",
    "heun": "Heun",
    "dpmpp-2m": "DPM++ 2M",
    "dpmpp-2m-sde": "DPM++ 2M SDE",
    "dpmpp-sde": "DPM++ SDE",
    "unipc": "UniPC",
}


def write_png(path: str | Path, pixels: np.ndarray, settings: Mapping[str, Any] | None = None) -> None:
    """Write (H,W,3) uint8 as PNG, whole or not at all.

    `settings` go into text chunks: `bdm_jax` as JSON and, where they are those of a generated picture, `parameters` in
    the form that Stable-Diffusion web UIs read. Raises convert.files.FileError when the file cannot be written.
    """
    info = PngInfo()
    if settings is not None:
        info.add_itxt("parameters", web_ui_parameters(settings))
        info.add_itxt("bdm_jax", json.dumps(settings, ensure_ascii=False))
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "png", pnginfo=info)
    with atomic_file(path) as file:
        file.write(data.getvalue())


def web_ui_parameters(settings: Mapping[str, Any]) -> str:
    """The settings of a picture as web UIs write them: prompt, negative prompt, one line of named values."""
    names = {
        "Steps": settings["steps"],
        "Sampler": _web_ui_sampler(settings["sampler"]),
        "CFG scale": settings["guidance"],
        "Seed": settings["seed"],
        "Size": f"{settings['width']}x{settings['height']}",
        "Model": settings["model"],
        "English prompt": settings["english"],
        "English negative prompt": settings["english_negative"],
    }
    lines = [settings["prompt"], f"Negative prompt: {settings['negative']}" if settings["negative"] else ""]
    values = [f"{name}: {_quoted(str(value))}" for name, value in names.items() if value != ""]
    return "\n".join(filter(None, [*lines, ", ".join(values)]))


def _web_ui_sampler(name: str) -> str:
    """`dpmpp-2m-karras` -> `DPM++ 2M Karras`; a name that web UIs do not know stays as it is."""
    ours = canonical(name)
    for end, suffix in {"": "", "-karras": " Karras", "-exponential": " Exponential"}.items():
        if ours.endswith(end) and ours.removesuffix(end) in _WEB_UI_SAMPLERS:
            return _WEB_UI_SAMPLERS[ours.removesuffix(end)] + suffix
    return name


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


def contact_sheet(pictures: Sequence[np.ndarray], captions: Sequence[str], columns: int | None = None) -> np.ndarray:
    """Pictures (H,W,3) uint8 of one size in a grid, each over its caption -> (H',W',3) uint8.

    Captions may be Chinese; a character that the bundled font lacks is written as its code point, `[1F600]`.
    """
    columns = min(columns or math.ceil(math.sqrt(len(pictures))), len(pictures))
    rows = math.ceil(len(pictures) / columns)
    pictures = [thumbnail(picture) for picture in pictures]
    height, width = pictures[0].shape[:2]
    size = max(12, min(16, width // 8))
    gap, line = size // 2, round(size * 1.4)
    cell_width, cell_height = width + gap, height + gap // 2 + _CAPTION_LINES * line
    sheet = Image.new("RGB", (columns * cell_width + gap, rows * cell_height + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for index, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        x, y = gap + index % columns * cell_width, gap + index // columns * cell_height
        sheet.paste(Image.fromarray(picture), (x, y))
        for number, text in enumerate(_lines(caption, size, width)):
            draw.text((x, y + height + number * line), text, fill="black", font=_font(size))
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
    font, rest, lines = _font(size), drawable(text), []
    while rest and len(lines) < _CAPTION_LINES:
        fit = len(rest)
        while fit > 1 and font.getlength(rest[:fit]) > width:
            fit -= 1
        blank = rest.rfind(" ", 1, fit + 1)
        if fit < len(rest) and blank > 0:
            fit = blank
        lines.append(rest[:fit].strip())
        rest = rest[fit:].strip()
    if rest:
        last = lines[-1]
        while last and font.getlength(last + "…") > width:
            last = last[:-1]
        lines[-1] = last + "…"
    return lines


@lru_cache(maxsize=8)
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(_FONT), size)


@cache
def _has_glyph(character: str) -> bool:
    return character == " " or bytes(_font(16).getmask(character)) != bytes(_font(16).getmask(_NO_GLYPH))


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False) if re.search(r"[,\n:\"]", text) else text
