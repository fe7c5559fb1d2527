"""python -m convert inspect FILE | to-jax SRC DST | to-torch SRC DST"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from bdm_jax import command_line
from bdm_jax.formats.open import contents_of

from .conversion import to_jax, to_torch
from .inspection import describe, is_whole, show

Where = Annotated[Path, tyro.conf.Positional]
_MARKS = (tyro.conf.FlagCreatePairsOff, tyro.conf.OmitSubcommandPrefixes)


@dataclass(frozen=True)
class Inspect:
    """Say what a weight file or component folder holds."""

    path: Where
    """file or folder"""
    json: bool = False
    """one JSON object for programs"""
    variant: str | None = None
    """which of a folder's weight files (fp16)"""
    allow: tuple[str, ...] = ()
    """patterns of keys that may be missing, unknown or misshaped"""


@dataclass(frozen=True)
class ToJax:
    """Write a file or folder in this library's names and layouts (HWIO, in x out); a pipeline folder part by part."""

    src: Where
    """a weight file, a component folder or a pipeline folder"""
    dst: Where
    """what to write, of the same kind"""


@dataclass(frozen=True)
class ToTorch:
    """Write a file or folder as PyTorch libraries read it."""

    src: Where
    """a weight file, a component folder or a pipeline folder, of any layout"""
    dst: Where
    """what to write: a folder for diffusers, a .safetensors file for ldm, else the same kind as SRC"""
    layout: Literal["same", "diffusers", "ldm"] = "same"
    """names to write"""
    dtype: Literal["same", "float32", "float16", "bfloat16"] = "same"
    """type to write"""


def main(args: Sequence[str] | None = None) -> int:
    """0; 2 for bad input, and when `inspect` finds keys that are unknown, missing, misshaped, or values not finite."""

    def command() -> int:
        name = command_line.called("python -m convert")
        asked = command_line.parse(Inspect | ToJax | ToTorch, args, prog=name, config=_MARKS)
        if isinstance(asked, Inspect):
            return _inspect(asked)
        if isinstance(asked, ToJax):
            written = to_jax(asked.src, asked.dst)
        else:
            written = to_torch(asked.src, asked.dst, asked.layout, asked.dtype)
        print(*written, sep="\n")
        return 0

    return command_line.run(command)


def _inspect(asked: Inspect) -> int:
    report = describe(*contents_of(asked.path, asked.variant), asked.allow)
    if asked.json:
        print(json.dumps(report, indent=2, ensure_ascii=False))
    else:
        show(report)
    return 0 if is_whole(report) else 2


if __name__ == "__main__":
    sys.exit(main())
