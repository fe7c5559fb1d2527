"""Long prompts in windows, by the rules of BDM's reference implementation.

A text tower reads `length` tokens: a start token, length - 2 tokens of content, an end token. A longer prompt takes up
to five windows, encoded independently; the states are laid end to end without the ends that came between them.
"""

from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

MAX_WINDOWS = 5


def windows_needed(lengths: Iterable[int], length: int) -> int:
    """Windows that hold contents of these lengths, all rows alike: at least 1, at most 5."""
    return min(max(1, -(-max(lengths, default=0) // (length - 2))), MAX_WINDOWS)


def split(content: Sequence[int], windows: int, length: int, start: int, end: int, pad: int) -> np.ndarray:
    """Content ids -> (windows, length) int32, every window a well-formed text: start, content, end, padding.

    A window beyond the content is an empty text. What exceeds the last window is left out. The reference writes the
    Chinese windows so; for CLIP, whose padding is the end token, it is the same as its fill with end tokens.
    """
    size = length - 2
    rows = np.full((windows, length), pad, np.int32)
    for index, row in enumerate(rows):
        part = content[index * size : (index + 1) * size]
        row[: len(part) + 2] = [start, *part, end]
    return rows


def join(states: jax.Array) -> jax.Array:
    """States of windows (B, n, length, D) -> (B, n * (length - 2) + 2, D): the ends between windows are dropped.

    They are dropped by position, as the reference does (no_boseos_middle): the end token of a window that is not full
    stays.
    """
    batch, windows, length, width = states.shape
    inner = states[:, :, 1:-1].reshape(batch, windows * (length - 2), width)
    return jnp.concatenate([states[:, 0, :1], inner, states[:, -1, -1:]], axis=1)
