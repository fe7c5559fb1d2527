"""What all commands share: flags from dataclasses, bad input as one line, output anywhere, an exit status."""

import ast
import contextlib
import io
import os
import re
import select
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import tyro

from bdm_jax.errors import UserError, out_of_memory

if TYPE_CHECKING:
    from rich.console import Console

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # its tokenizers do without PyTorch


_NEEDS_LESS = (
    "less is needed with smaller pictures or batches; when drawing also with --vae-tile 512 or --text-weights int8, in "
    "training with --accumulate, --mesh.fsdp or --task.remat (docs/performance.md, docs/scaling.md)"
)

_KINDS = {"INT": "a whole number", "FLOAT": "a number"}  # by what tyro's help calls them


def _model_path(text: str) -> str | Path:
    """A link stays as it is written: a path would lose one of its slashes."""
    return text if re.match(r"https?://", text, re.IGNORECASE) else Path(text)


def _of_models(optional: bool) -> tyro.constructors.PrimitiveConstructorSpec:
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="{None}|PATH|NAME" if optional else "PATH|NAME",
        instance_from_str=lambda texts: None if optional and texts[0] == "None" else _model_path(texts[0]),
        is_instance=lambda value: isinstance(value, str | Path) or (optional and value is None),
        str_from_instance=lambda value: [str(value)],
    )


# Of a flag that names a model or plug-in: a file or folder, a name on a hub, or a link (docs/using.md).
ModelPath = Annotated[str | Path, _of_models(optional=False)]
OptionalModelPath = Annotated[str | Path | None, _of_models(optional=True)]


def progress_console() -> "Console":
    """Where progress is told: stderr, as bars only where it is a terminal. FORCE_COLOR, which notebooks and CI set,
    makes none of a pipe: each frame of a bar would be a line there.
    """
    from rich.console import Console  # not for --help

    return Console(stderr=True, force_terminal=sys.stderr.isatty())


def parse(kind: Any, args: Sequence[str] | None, **options: Any) -> Any:
    """`tyro.cli`, with flags named by their own field alone. `options` are tyro's.

    Args:
      kind: a dataclass, or a union of those of subcommands.
      args: the command line; that of the process where None.

    Raises UserError, one line, for what is no such flag or value; SystemExit after --help.
    """
    options = {"config": (tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes), **options}
    given = sys.argv[1:] if args is None else list(args)
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            return tyro.cli(kind, args=given, **options)
    except SystemExit as error:
        if not error.code:
            raise
    message = _one_line(printed.getvalue())
    if message.startswith("Missing value") and (flag := _unknown_flag(kind, given, options)):
        message = f"Unrecognized options: {flag}"
    raise UserError(_plain(message))


def run(command: Callable[[], int | None], stopped: str = "stopped") -> int:
    """Run a command; its exit status, 0 where it returns none.

    Any error of ours, and memory that is not there, ends as one line on stderr and status 2; Ctrl-C as the line
    `stopped` and status 130, as a shell has it; warnings are notes of one line. Characters that a stream cannot encode
    are written as escapes. Where the reader of a pipe is gone (`| head`), the command ends without a word, with the
    status that a shell gives such an end: 141.
    """
    warnings.formatwarning = lambda message, *_, **__: f"note: {message}\n"
    for stream in (sys.stdout, sys.stderr):
        _take_any_text(stream)
    try:
        try:
            return command() or 0
        except Exception as error:
            said = str(error) if isinstance(error, UserError) else out_of_memory(error)
            if said is None:
                raise
            less = "" if isinstance(error, UserError) else f"; {_NEEDS_LESS}"
            print(f"error: {said}{less}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print(stopped, file=sys.stderr)
            return 130
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except SystemExit as error:
        if not isinstance(error.__context__, BrokenPipeError):  # which rich makes this of
            raise
        return 141
    except BrokenPipeError:
        if not any([_without_reader(sys.stdout), _without_reader(sys.stderr)]):
            raise  # another pipe
        return 141


def called(script: str) -> str:
    """What the running command is called: as a console command (bdm-...) by its own name, else `script`."""
    own = Path(sys.argv[0]).stem
    return own if own.startswith("bdm-") else script


def _take_any_text(stream: TextIO | None) -> None:
    """Chinese on a console that has none (a C locale, Windows) must not stop a command after its work."""
    if isinstance(stream, io.TextIOWrapper) and (stream.errors == "strict" or "utf" not in stream.encoding.lower()):
        stream.reconfigure(errors="backslashreplace")


def _without_reader(stream: TextIO | None) -> bool:
    """Whether nobody reads the pipe that a stream writes to; if so, what it still holds goes nowhere."""
    try:
        number = stream.fileno()
    except (AttributeError, OSError, ValueError):
        return False
    if hasattr(select, "poll"):  # elsewhere it is taken to be the one
        pipe = select.poll()
        pipe.register(number, 0)
        if not pipe.poll(0):
            return False
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, number)
    os.close(nowhere)
    return True


def _unknown_flag(kind: Any, given: Sequence[str], options: dict[str, Any]) -> str | None:
    """The first flag that the help does not have: tyro tells of a missing value before it looks at flags."""
    flags = [arg.partition("=")[0] for arg in given if re.match(r"--\w", arg)]
    words = given[: given.index(next(arg for arg in given if arg.startswith("-")))] if flags else []
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        tyro.cli(kind, args=[*words, "--help"], **options)
    known = re.findall(r"--[\w.-]+", shown.getvalue())
    return next((flag for flag in flags if flag.replace("_", "-") not in known), None)


def _plain(message: str) -> str:
    """tyro's words for a value of the wrong kind -> what was expected, in the user's terms; others as they are."""
    if told := re.match(
        r"(-\S+): no type matching (.+?) could be instantiated from (\[.*?\])\s*\.\s+Got errors", message
    ):
        flag, kinds, values = told.groups()
        with contextlib.suppress(ValueError, SyntaxError):
            given = " ".join(ast.literal_eval(values))
            *others, last = (_KINDS.get(kind, kind.strip("{}")) for kind in reversed(kinds.split("|")))  # None is first
            return f"{flag} {given}: expected {', '.join(others)}, or {last}"
    if told := re.match(
        r"(-\S+): (invalid literal for int\(\)|could not convert string to float).*?: '(.*)'$", message
    ):
        flag, kind, given = told.groups()
        return f"{flag} {given}: expected {_KINDS['INT' if 'int' in kind else 'FLOAT']}"
    if told := re.match(r"invalid choice '(.*)' for argument '(-\S+)'\s*\. Expected one of \((.*?),?\)\s*\.$", message):
        given, flag, choices = told.groups()
        known = sorted(
            (choice.strip("'") for choice in choices.split(", ")), key=lambda choice: (choice == "None", choice)
        )
        return f"{flag} {given}: expected one of {', '.join(known)}"
    return message


def _one_line(box: str) -> str:
    """tyro's frame around an error -> its message. Where stdout is not UTF-8 it draws a title, and a rule of dashes."""
    lines = [line.strip("│ ") for line in box.splitlines() if not line.startswith(("╭", "╰"))]
    if "╭" not in box and len(lines) > 1 and not lines[1].strip("-"):
        del lines[:2]
    message: list[str] = []
    for line in lines:
        if line.startswith(("Argument helptext", "For full helptext")):
            break
        if line.strip("─-"):
            message.append(line)
    return " ".join(message).replace("Error parsing ", "", 1) or " ".join(lines)
