"""What all commands share: flags from dataclasses, bad input as one line, an exit status."""

import contextlib
import io
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tyro

from bdm_jax.errors import UserError

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # its tokenizers do without PyTorch


def parse(kind: Any, args: Sequence[str] | None, **options: Any) -> Any:
    """`tyro.cli`, with flags named by their own field alone. `options` are tyro's.

    Args:
      kind: a dataclass, or a union of those of subcommands.
      args: the command line; that of the process where None.

    Raises UserError, one line, for what is no such flag or value; SystemExit after --help.
    """
    options = {"config": (tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes), **options}
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            return tyro.cli(kind, args=args if args is None else list(args), **options)
    except SystemExit as error:
        if not error.code:
            raise
        raise UserError(_one_line(printed.getvalue())) from None


def run(command: Callable[[], int | None]) -> int:
    """Run a command; its exit status, 0 where it returns none.

    Any error of ours ends as one line on stderr and status 2; warnings are notes of one line.
    """
    warnings.formatwarning = lambda message, *_, **__: f"note: {message}\n"
    try:
        return command() or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def called(script: str) -> str:
    """What the running command is called: as a console command (bdm-...) by its own name, else `script`."""
    own = Path(sys.argv[0]).stem
    return own if own.startswith("bdm-") else script


def _one_line(box: str) -> str:
    """tyro's frame around an error -> its message."""
    lines = [line.strip("│ ") for line in box.splitlines() if not line.startswith(("╭", "╰"))]
    message: list[str] = []
    for line in lines:
        if line.startswith(("Argument helptext", "For full helptext")):
            break
        if line.strip("─"):
            message.append(line)
    return " ".join(message).replace("Error parsing ", "", 1) or " ".join(lines)
