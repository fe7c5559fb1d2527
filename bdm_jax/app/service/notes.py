"""Warnings as notes of the job that they are about, whatever other threads do meanwhile."""

import contextlib
import threading
import warnings
from collections.abc import Iterator

_own = threading.local()


@contextlib.contextmanager
def collected() -> Iterator[list[str]]:
    """Warnings of this thread within the block, in one line each and each once; those of other threads go their way.

    `warnings.catch_warnings` would take those of all threads.
    """
    _listen()
    earlier, _own.notes = getattr(_own, "notes", None), []
    try:
        yield _own.notes
    finally:
        _own.notes = earlier


def _listen() -> None:
    show = warnings.showwarning
    if getattr(show, "of_this_thread", False):
        return

    def showwarning(message, category, *where, **more):
        if (notes := getattr(_own, "notes", None)) is None or not issubclass(category, UserWarning):
            show(message, category, *where, **more)
        elif (note := " ".join(str(message).split())) not in notes:
            notes.append(note)

    showwarning.of_this_thread = True
    warnings.showwarning = showwarning
    warnings.filterwarnings("always", category=UserWarning, module=r"bdm_jax\.")  # of every job, not of the first
