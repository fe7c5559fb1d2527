"""Long prompts in windows, by the rules of BDM's reference implementation.

A text tower reads `length` tokens: a start token, length - 2 tokens of content, an end token. A longer prompt takes up
to five windows, encoded independently; the states are laid end to end without the ends that came between them.
"""

from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

MAX_WINDOWS = 5


def cut(parts: Iterable[Sequence], length: int) -> list[Sequence]:
    """Contents of a prompt's parts -> contents of its windows, as many as they take.

    Every part begins a new window; one without content takes none.
    """
    size = length - 2
    return [part[begin : begin + size] for part in parts for begin in range(0, len(part), size)]


def windows_needed(counts: Iterable[int]) -> int:
    """Windows for prompts of which each would take so many, all rows alike: at least 1, at most 5."""
    return min(max(counts, default=1) or 1, MAX_WINDOWS)


def split(
    contents: Sequence[Sequence], windows: int, length: int, start: float, end: float, pad: float, dtype=np.int32
) -> np.ndarray:
    """Contents of windows -> (windows, length), every window a well-formed text: start, content, end, padding.

    A window beyond the contents is an empty text; contents beyond the last window are left out. The reference writes
    the Chinese windows so; for CLIP, whose padding is the end token, it is the same as its fill with end tokens.
    """
    rows = np.full((windows, length), pad, dtype)
    rows[:, :2] = start, end
    for row, content in zip(rows, contents, strict=False):
        row[: len(content) + 2] = [start, *content, end]
    return rows


def join(states: jax.Array) -> jax.Array:
    """States of windows (B, n, length, D) -> (B, n * (length - 2) + 2, D): the ends between windows are dropped.

    They are dropped by position, as the reference does (no_boseos_middle): the end token of a window that is not full
    stays.
    """
    batch, windows, length, width = states.shape
    inner = states[:, :, 1:-1].reshape(batch, windows * (length - 2), width)
    return jnp.concatenate([states[:, 0, :1], inner, states[:, -1, -1:]], axis=1)
