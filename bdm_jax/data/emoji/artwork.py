"""Emoji artwork joined with its Chinese and English names: npm packages on disk -> records with PNG bytes.

Artwork: the icon sets of iconify (`icons.json` + `chars.json`). Names: Unicode CLDR's annotations, base and derived.
They are joined on code points, without U+FE0F and without skin tones. The output is byte-for-byte reproducible with the
same packages and the same versions of resvg-py and Pillow.
"""

import io
import json
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from bdm_jax.data.emoji.palette import psnr, reduce_colours
from bdm_jax.errors import UserError

STYLES = {
    "fluent": "@iconify-json/fluent-emoji-flat",
    "noto": "@iconify-json/noto",
}
ANNOTATIONS = ("cldr-annotations-derived-full", "cldr-annotations-full")
VERSIONS = {
    "@iconify-json/fluent-emoji-flat": "1.2.6",
    "@iconify-json/noto": "1.2.9",
    "cldr-annotations-derived-full": "48.2.0",
    "cldr-annotations-full": "48.2.0",
}
SIZE = 128
ZH_ONLY_FILE = Path(__file__).with_name("zh_only.txt")
_SKIN_TONES = frozenset(map(chr, range(0x1F3FB, 0x1F400)))
_VISUALLY_LOSSLESS = 48.0  # PSNR in dB
_COMMON_FORMS = str.maketrans("“”龇", '""呲')
_RARE = frozenset("唵噘恹嗮搋犟")  # not in Chinese-CLIP's vocabulary: keywords that contain them are dropped


def records(packages: Path, styles: tuple[str, ...] = tuple(STYLES), size: int = SIZE) -> Iterator[dict]:
    """All records of the set, sorted by (style, id).

    Args:
        packages: folder with the unpacked npm packages of `VERSIONS`, laid out as npm's `node_modules`.
        styles: keys of `STYLES`.
        size: side of the square images in pixels.

    Yields:
        dict with `image` (PNG bytes, with transparency), `id` (hex code points joined by "-"), `character`, `style`,
        `zh`, `en` (names), `zh_keywords`, `en_keywords` (list of str, without the name), `zh_only` (bool).

    Raises:
        UserError: a package is missing, or an icon is not square.
    """
    zh, en = annotations(packages, "zh"), annotations(packages, "en")
    zh_only = {character for character, _, _ in zh_only_concepts()}
    for style in sorted(styles):
        icons = _icons(packages, STYLES[style])
        concepts = sorted((concept_id(c), c) for c in icons if c in zh and c in en and not _SKIN_TONES & set(c))
        for id_, character in concepts:
            (zh_name, zh_keywords), (en_name, en_keywords) = zh[character], en[character]
            yield {
                "image": encode_png(rasterise(icons[character], size)),
                "id": id_,
                "character": character,
                "style": style,
                "zh": zh_name,
                "en": en_name,
                "zh_keywords": zh_keywords,
                "en_keywords": en_keywords,
                "zh_only": character in zh_only,
            }


def zh_only_concepts() -> list[tuple[str, str, str]]:
    """The (character, Chinese name, English name) rows of zh_only.txt."""
    lines = ZH_ONLY_FILE.read_text(encoding="utf-8").splitlines()
    return [tuple(line.split("\t")) for line in lines if line and not line.startswith("#")]


def concept_id(character: str) -> str:
    """Hex code points joined by "-", without U+FE0F: "🏮" -> "1f3ee"."""
    return "-".join(f"{ord(c):x}" for c in character if c != "\ufe0f")


def annotations(packages: Path, language: str) -> dict[str, tuple[str, list[str]]]:
    """Character (without U+FE0F) -> (name, keywords without the name) from both CLDR packages."""
    names = {}
    for package, key in zip(ANNOTATIONS, ("annotationsDerived", "annotations"), strict=True):
        table = _read_json(packages, package, f"{key}/{language}/annotations.json")[key]["annotations"]
        for character, entry in table.items():
            if "tts" in entry:
                name = _clean(entry["tts"][0])
                keywords = dict.fromkeys(map(_clean, entry.get("default", [])))
                kept = [keyword for keyword in keywords if keyword != name and not _RARE & set(keyword)]
                names[character.replace("\ufe0f", "")] = (name, kept)
    return names


def rasterise(svg: str, size: int) -> np.ndarray:
    """SVG text -> uint8 (size, size, 4): RGB, not multiplied by alpha, and alpha."""
    try:
        import resvg_py
    except ImportError as error:
        raise UserError("rendering needs the package resvg-py: pip install resvg-py") from error
    png = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, skip_system_fonts=True)
    pixels = np.asarray(Image.open(io.BytesIO(bytes(png))).convert("RGBA"))
    if pixels.shape != (size, size, 4):
        raise UserError(f"resvg rendered {pixels.shape} instead of {(size, size, 4)}; the icon is not square")
    return pixels


def encode_png(pixels: np.ndarray) -> bytes:
    """uint8 (H, W, 4) -> small PNG bytes: a palette of 256 colours with alpha if that is visually lossless, else RGBA.

    Visually lossless is a PSNR of at least 48 dB over white and over black. What is clear is stored as white.
    """
    palette, index = reduce_colours(pixels)
    lossless = psnr(pixels, palette[index]) >= _VISUALLY_LOSSLESS
    options, out = {}, io.BytesIO()
    if lossless:
        image = Image.fromarray(index)
        image.putpalette(palette[:, :3].tobytes())
        clear = max(1, int(np.sum(palette[:, 3] < 255)))  # at least one entry, so that an opaque icon is a cut-out too
        options = {"transparency": palette[:clear, 3].tobytes()}
    else:
        image = Image.fromarray(np.where(pixels[..., 3:] == 0, np.uint8([255, 255, 255, 0]), pixels))
    image.save(out, "PNG", optimize=True, **options)
    return out.getvalue()


def _icons(packages: Path, package: str) -> dict[str, str]:
    """Character (without U+FE0F) -> SVG text."""
    collection = _read_json(packages, package, "icons.json")
    icons = {}
    for code, name in sorted(_read_json(packages, package, "chars.json").items()):
        icon = collection["icons"].get(name)
        character = "".join(chr(int(c, 16)) for c in code.split("-") if c != "fe0f")
        if icon is not None:
            width, height = (icon.get(side, collection.get(side, 16)) for side in ("width", "height"))
            side = max(width, height)
            view = f"{(width - side) / 2:g} {(height - side) / 2:g} {side} {side}"
            icons[character] = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{view}">{icon["body"]}</svg>'
    return icons


def _read_json(packages: Path, package: str, name: str) -> dict:
    path = packages / package / name
    if not path.is_file():
        wanted = f"{package}@{VERSIONS[package]}"
        raise UserError(f"{path} is missing: run `npm install {wanted}` there, or omit --packages")
    return json.loads(path.read_text(encoding="utf-8"))


def _clean(text: str) -> str:
    """NFC, straight quotation marks (as in Chinese-CLIP's training), common forms of rare characters."""
    return unicodedata.normalize("NFC", text).translate(_COMMON_FORMS).strip()
