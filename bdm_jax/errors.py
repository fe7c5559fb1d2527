"""The one exception that is written for the person at the keyboard."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Bad input: one clear line that names the file, key or value and says how to mend it.

    Scripts print `error: <message>` and exit with status 2; a traceback would add nothing.
    """


def unknown(what: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a name that is not among `known`, offering the nearest one."""
    known = sorted(known)
    near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return UserError(f"unknown {what} {name!r}: {hint}known are {', '.join(known)}")
