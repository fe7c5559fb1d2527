"""The errors that are written for the person at the keyboard: one family, one line each."""

import difflib
import re
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input: one clear line that names the file, key or value and says how to mend it.

    Scripts print `error: <message>` and exit with status 2; a traceback would add nothing.
    """


class FileError(UserError):
    """A file that cannot be used, in one line: which file, what is wrong with it, what would be right."""


class BadRecord(UserError):
    """One record that cannot be used, by no fault of the run: it is left out and counted under `cause`."""

    def __init__(self, name: str, cause: str, message: str):
        super().__init__(f"{name}: {' '.join(message.split())}")
        self.name, self.cause = name, cause

    def __reduce__(self):
        return type(self), (self.name, self.cause, str(self).removeprefix(f"{self.name}: "))


class Filtered(BadRecord):
    """A sound record that is not wanted; never counted as a fault."""


def out_of_memory(error: BaseException) -> str | None:
    """What an error of NumPy, Python or XLA says of memory that is not there, in one line; None for any other."""
    said = " ".join(str(error).split())
    if isinstance(error, MemoryError):
        return f"out of memory{': ' + said if said else ''}"
    if type(error).__name__ not in ("JaxRuntimeError", "XlaRuntimeError") or "RESOURCE_EXHAUSTED" not in said:
        return None
    if match := re.search(r"[Aa]llocat\w* (\d+) bytes", said):
        return f"out of memory: {int(match[1]) / 1e9:,.2f} GB more were needed at once"
    return f"out of memory: {said.partition('RESOURCE_EXHAUSTED: ')[2][:200]}"


def short(text: str, limit: int = 60) -> str:
    """A text of a user's, fit for one line with others."""
    return text if len(text) <= limit else text[: limit - 1] + "…"


def unknown(what: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a name that is not among `known`, offering the nearest one."""
    known = sorted(known)
    near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return UserError(f"unknown {what} {name!r}: {hint}known are {', '.join(known)}")
