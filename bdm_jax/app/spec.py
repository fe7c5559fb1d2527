"""How plug-ins are named on the command line; read before JAX is loaded."""

import math
from pathlib import Path

from bdm_jax.errors import UserError, unknown
from bdm_jax.plugins.spec import Spec


def parse_spec(text: str) -> Spec:
    """`FILE`, `FILE:0.8` or `FILE:0.8:0.5`: strength in the UNet or branch, strength in its text encoder (the same).

    Numbers are read from the end, what is left is the path, colons included. Raises UserError.
    """
    strengths: list[float] = []
    path = text
    while len(strengths) < 2 and (number := _number(path.rpartition(":")[2])) is not None and ":" in path:
        strengths.insert(0, number)
        path = path.rpartition(":")[0]
    if not path or not all(map(math.isfinite, strengths)):
        raise UserError(f"{text!r}: write it as FILE, FILE:STRENGTH or FILE:STRENGTH:TEXT_STRENGTH, numbers finite")
    strength, text_strength = (strengths + strengths + [1.0, 1.0])[:2]
    return Spec(Path(path), strength, text_strength)


def parse_blend(text: str) -> tuple[Path, Path | None, float]:
    """`OTHER:0.3` or `OTHER,BASE:0.3` -> the models and the weight. Raises UserError."""
    paths, _, weight = text.rpartition(":")
    other, _, base = paths.partition(",")
    value = _number(weight)
    if not other or value is None or not math.isfinite(value):
        raise UserError(f"blend {text!r}: write it as MODEL:WEIGHT, or MODEL,BASE:WEIGHT to add a difference")
    return Path(other), Path(base) if base else None, value


def parse_embedding(text: str) -> tuple[Path, str | None]:
    """`FILE` or `FILE=TOKEN`, where the token is to be another than the file's own."""
    path, equals, token = text.partition("=")
    if not path or (equals and not token):
        raise UserError(f"embedding {text!r}: write it as FILE, or FILE=TOKEN")
    return Path(path), token or None


def parse_control(text: str) -> tuple[Path, Path, dict[str, str | float]]:
    """`NETWORK,MAP[,strength=0.8][,start=0][,end=0.6][,from=canny]` -> the two paths and what is set.

    A ControlNet and its map, or a T2I-Adapter. Raises UserError for what is no such setting, or no number where one is
    needed.
    """
    settings = {"strength": "1", "start": "0", "end": "1", "from": "canny"}
    (network, image), values = _parse("control", text, ("NETWORK", "MAP"), settings)
    return network, image, values


def parse_image_prompt(text: str) -> tuple[Path, Path, Path, dict[str, float]]:
    """`ADAPTER,VISION,PICTURE[,strength=0.7]` -> the three paths and what is set. Raises UserError likewise."""
    paths, values = _parse("image prompt", text, ("ADAPTER", "VISION", "PICTURE"), {"strength": "1"})
    return *paths, values


def _parse(
    what: str, text: str, names: tuple[str, ...], settings: dict[str, str]
) -> tuple[list[Path], dict[str, str | float]]:
    """Paths, of which the first may have = in its name, and settings; `settings` has an example of each."""
    first, *rest = text.split(",")
    paths = [first, *(part for part in rest if "=" not in part)]
    if len(paths) != len(names) or not all(paths):
        more = "".join(f"[,{key}={value}]" for key, value in settings.items())
        raise UserError(f"{what} {text!r}: write it as {','.join(names)}{more}")
    values: dict[str, str | float] = {}
    for key, _, value in (part.partition("=") for part in rest if "=" in part):
        if key not in settings:
            raise unknown(f"setting of {'an' if what[0] == 'i' else 'a'} {what}", key, settings)
        number = _number(value)
        if key != "from" and number is None:
            raise UserError(f"{what} {text!r}: {key}={value} is not a number")
        values[key] = value if key == "from" else number
    return [*map(Path, paths)], values


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
