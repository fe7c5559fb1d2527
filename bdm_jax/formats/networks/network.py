"""What the finders of all networks share."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from bdm_jax.formats.tables import KeyTable

T = TypeVar("T")
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class NetworkInFile:
    """One network in a file.

    Attributes:
      kind: unet, vae, text_encoder, text_encoder_2, branch, controlnet, branch_text_encoder, t2i_adapter,
        image_encoder.
      layout: whose names it has: diffusers, ldm, original, transformers, openclip, cn_clip.
      family: SD1.x, SD1.x inpainting, SD2.x, SDXL, ...
      prefix: what its keys begin with in the file; what follows is what `table` renames.
      table: the file's names and ours.
      config: the values of its config.json.
      prediction: epsilon or v_prediction where it can be known, else None.
    """

    kind: str
    layout: str
    family: str
    prefix: str
    table: KeyTable
    config: dict[str, Any]
    prediction: str | None = None

    def of(self, file: Mapping[str, T]) -> dict[str, T]:
        """What of a file (tensors or shapes by name) lies under its prefix, by the name without it."""
        return below(self.prefix, file)


def below(prefix: str, file: Mapping[str, T]) -> dict[str, T]:
    """What of a file begins with a prefix, by the rest of its name."""
    return {key.removeprefix(prefix): value for key, value in file.items() if key.startswith(prefix)}


def in_our_names(shapes: Shapes, prefix: str, table: KeyTable) -> dict[str, tuple[int, ...]]:
    """The shapes of a network's tensors, still in PyTorch's order, by our names."""
    found = {}
    for key, shape in below(prefix, shapes).items():
        names = table.to_ours(key)
        part = (shape[0] // len(names), *shape[1:]) if len(names) > 1 and shape else shape
        found |= dict.fromkeys(names, part)
    return found


def count(shapes: Shapes, pattern: str) -> int:
    """How many numbers fit the pattern's group."""
    compiled = re.compile(pattern)
    return len({found[1] for key in shapes if (found := compiled.fullmatch(key))})


def recorded(metadata: Mapping[str, str], kind: str) -> dict[str, Any]:
    """The config.json that this library keeps in the metadata of a file it wrote."""
    try:
        values = json.loads(metadata.get(f"bdm_jax.{kind}", "{}"))
    except (ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}
