"""python -m convert inspect FILE | to-jax SRC DST | to-torch SRC DST | text-states MODEL DST PROMPT ..."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from bdm_jax import command_line

from .conversion import to_jax, to_torch
from .inspection import describe, show, status
from .text_states import ReadTexts, Subcommand, text_states

Source = Annotated[command_line.ModelPath, tyro.conf.Positional]
Target = Annotated[Path, tyro.conf.Positional]
_MARKS = (tyro.conf.FlagCreatePairsOff, tyro.conf.OmitSubcommandPrefixes)


@dataclass(frozen=True)
class Inspect:
    """Say what a weight file, component folder or pipeline folder holds. The exit status is 0 where all of it is
    understood, 1 where something in it would be left out, 2 where it would be refused.
    """

    path: Source
    """file or folder; by a name on a hub or a link, of which the headers are read by ranges"""
    json: bool = False
    """one JSON object for programs"""
    variant: str | None = None
    """which of a folder's weight files (fp16)"""
    allow: tuple[str, ...] = ()
    """patterns of keys that may be missing, unknown or misshaped"""


@dataclass(frozen=True)
class ToJax:
    """Write a file or folder in this library's names and layouts (HWIO, in x out); a pipeline folder part by part."""

    src: Source
    """a weight file, a component folder or a pipeline folder"""
    dst: Target
    """what to write, of the same kind"""


@dataclass(frozen=True)
class ToTorch:
    """Write a file or folder as PyTorch libraries read it."""

    src: Source
    """a weight file, a component folder or a pipeline folder, of any layout"""
    dst: Target
    """what to write: a folder for diffusers, a .safetensors file for ldm, else the same kind as SRC"""
    layout: Literal["same", "diffusers", "ldm"] = "same"
    """names to write"""
    dtype: Literal["same", "float32", "float16", "bfloat16"] = "same"
    """type to write"""


def main(args: Sequence[str] | None = None) -> int:
    """0; 2 for bad input, and when `inspect` finds keys that are unknown, missing, misshaped, or values not finite; 1
    when it finds something that is in no network and not understood.
    """

    def command() -> int:
        name = command_line.called("python -m convert")
        asked = command_line.parse(Inspect | ToJax | ToTorch | Subcommand, args, prog=name, config=_MARKS)
        if isinstance(asked, Inspect):
            return _inspect(asked)
        if isinstance(asked, ToJax):
            written = to_jax(asked.src, asked.dst)
        elif isinstance(asked, ReadTexts):
            written = text_states(**vars(asked))
        else:
            written = to_torch(asked.src, asked.dst, asked.layout, asked.dtype)
        print(*written, sep="\n")
        return 0

    return command_line.run(command)


def _inspect(asked: Inspect) -> int:
    report = describe(asked.path, asked.variant, asked.allow)
    if asked.json:
        print(json.dumps(report, indent=2, ensure_ascii=False))
    else:
        show(report)
    return status(report)


if __name__ == "__main__":
    sys.exit(main())
