"""Long prompts in windows, by the rules of BDM's reference implementation.

A text encoder reads `length` tokens: a start token, length - 2 tokens of content, an end token. A longer prompt takes
up to five windows, encoded independently; the states are joined without the ends that came between them. Other
encoders have more tokens at the start, or none, none at the end, or their padding on the left (`WindowFormat`).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

MAX_WINDOWS = 5


@dataclass(frozen=True)
class WindowFormat:
    """What a window looks like: start, content, end, padding; or, with `left`, padding, start, content, end.

    Attributes:
      length: tokens in a window.
      start, end: ids around the content: (start,) and (end,) for CLIP and BERT, () and (1,) for T5, the prefix
        ([gMASK], sop) and () for ChatGLM.
      pad: id of what fills the window.
      left: the padding comes first. Such a prompt has one window: what precedes it is no neighbour of the content.
    """

    length: int
    start: tuple[int, ...]
    end: tuple[int, ...]
    pad: int
    left: bool = False

    @property
    def room(self) -> int:
        """Tokens of content that a window holds."""
        return self.length - len(self.start) - len(self.end)

    @property
    def most(self) -> int:
        """Windows that a prompt may take."""
        return 1 if self.left else MAX_WINDOWS

    def cut(self, parts: Iterable[Sequence]) -> list[Sequence]:
        """Contents of a prompt's parts -> contents of its windows, as many as they need.

        Every part begins a new window; one without content needs none.
        """
        size = self.room
        return [part[begin : begin + size] for part in parts for begin in range(0, len(part), size)]

    def fill(self, contents: Sequence[Sequence[int]], windows: int) -> np.ndarray:
        """Contents of windows -> ids (windows, length) int32, every window a well-formed text.

        A window beyond the contents is an empty text; contents beyond the last window are left out. The reference
        writes the Chinese windows so; for CLIP, whose padding is the end token, it is the same as its fill with end
        tokens.
        """
        return self._filled(contents, windows, self.start, self.end, self.pad, np.int32)

    def fill_weights(self, contents: Sequence[Sequence[float]], windows: int) -> np.ndarray:
        """Weights of the contents -> (windows, length) float32, 1 at all that is not content."""
        start, end = ((1.0,) * len(ids) for ids in (self.start, self.end))
        return self._filled(contents, windows, start, end, 1.0, np.float32)

    def content_mask(self, contents: Sequence[Sequence], windows: int) -> np.ndarray:
        """(windows, length) bool, False at the padding that surrounds start, content and end."""
        rows = [[True] * len(content) for content in contents]
        start, end = ((True,) * len(ids) for ids in (self.start, self.end))
        return self._filled(rows, windows, start, end, False, np.bool_)

    def _filled(self, contents, windows: int, start: tuple, end: tuple, pad, dtype) -> np.ndarray:
        rows = np.full((windows, self.length), pad, dtype)
        for row, content in zip(rows, [*contents, *[[]] * windows], strict=False):
            tokens = [*start, *content, *end]
            row[slice(self.length - len(tokens), None) if self.left else slice(len(tokens))] = tokens
        return rows


def windows_needed(counts: Iterable[int]) -> int:
    """Windows for prompts that would take these, the same for all: at least 1, at most 5."""
    return min(max(counts, default=1) or 1, MAX_WINDOWS)


def join(states: jax.Array, start: int = 1, end: int = 1) -> jax.Array:
    """States of windows (B, n, length, D) -> (B, n * room + start + end, D): the ends between windows are dropped.

    `start` and `end` tokens stand around the room = length - start - end tokens of content. They are dropped by
    position, as the reference does (no_boseos_middle): the end token of a window that is not full stays.
    """
    batch, windows, length, width = states.shape
    inner = states[:, :, start : length - end].reshape(batch, windows * (length - start - end), width)
    return jnp.concatenate([states[:, 0, :start], inner, states[:, -1, length - end :]], axis=1)
