"""How a plug-in is named on the command line; read before JAX is loaded."""

import math
from pathlib import Path
from typing import NamedTuple

from bdm_jax.errors import UserError


class Spec(NamedTuple):
    """A plug-in as a user names it: `FILE[:STRENGTH[:TEXT_STRENGTH]]`."""

    path: Path
    strength: float
    text_strength: float


def parse_spec(text: str) -> Spec:
    """`FILE`, `FILE:0.8` or `FILE:0.8:0.5`: strength in the UNet or branch, strength in its text tower (the same).

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


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
