"""What a use of a plug-in says. Knows no JAX: a command line is checked before it is loaded."""

from pathlib import Path
from typing import NamedTuple


class Spec(NamedTuple):
    """A plug-in as a user names it: `FILE[:STRENGTH[:TEXT_STRENGTH]]`. The path may be a link, as a text."""

    path: Path | str
    strength: float
    text_strength: float
