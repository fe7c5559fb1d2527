"""Attributes as they are read off a picture, without a network: its ground, where a thing lies, its parts.

Each is measured on its own, and knows nothing of what was asked for.
"""

from collections import Counter

import cv2
import numpy as np

from bdm_jax.data.emoji.scenes import GROUNDS, SIZE

WHITE = "white"
_COLOURS = {WHITE: (255, 255, 255)} | {name: ground.rgb for name, ground in GROUNDS.items()}
_FRAME = 3  # pixels: how wide the border is that shows the ground
_FAR = 60.0  # of RGB, Euclidean: further from all grounds is none of them; two grounds are at least 64 apart
_SAME = 24  # of each channel: what differs less from the ground belongs to it
_ASIDE = 0.1  # of the side: how far from the middle a thing lies that is at a place


def ground(image: np.ndarray) -> str | None:
    """The ground that most pixels of the border show: "white" or a key of `GROUNDS`; None for another colour.

    image: (H,W,3) uint8.
    """
    colours = np.array(list(_COLOURS.values()), np.float32)
    distances = np.linalg.norm(_border(image)[:, None].astype(np.float32) - colours, axis=2)
    nearest = np.where(distances.min(axis=1) < _FAR, distances.argmin(axis=1), len(colours))
    return [*_COLOURS, None][Counter(nearest.tolist()).most_common(1)[0][0]]


def on_white(image: np.ndarray) -> np.ndarray:
    """(H,W,3) uint8 with white in place of its ground: of what is like the median of the border and reaches it."""
    colour = np.median(_border(image), axis=0)
    like = (np.abs(image.astype(np.float32) - colour) <= _SAME).all(axis=2)
    _, areas = cv2.connectedComponents(like.astype(np.uint8), connectivity=4)
    reached = np.unique(_border(areas[..., None]))
    found = image.copy()
    found[like & np.isin(areas, reached)] = 255
    return found


def place(image: np.ndarray) -> str | None:
    """Where the centroid of what differs from the ground lies: a key of `PLACES`; None in the middle.

    image: (H,W,3) uint8.
    """
    rows, columns = np.nonzero((on_white(image) < 255 - _SAME).any(axis=2))
    if not len(rows):
        return None
    height, width = image.shape[:2]
    across, down = (columns.mean() + 0.5) / width - 0.5, (rows.mean() + 0.5) / height - 0.5
    if max(abs(across), abs(down)) < _ASIDE:
        return None
    if abs(across) > abs(down):
        return "on the left" if across < 0 else "on the right"
    return "at the top" if down < 0 else "at the bottom"


def part(image: np.ndarray, x: int, y: int, side: int) -> np.ndarray:
    """A square of a picture, by its left and top edge and side in pixels of a scene of 128, as large as the picture."""
    scale = image.shape[0] / SIZE
    x, y, side = (round(value * scale) for value in (x, y, side))
    x, y = max(x, 0), max(y, 0)
    square = image[y : y + side, x : x + side]
    return cv2.resize(square, image.shape[1::-1], interpolation=cv2.INTER_CUBIC)


def _border(image: np.ndarray) -> np.ndarray:
    """(H,W,C) -> (N,C), the pixels along the edges."""
    inner = np.ones(image.shape[:2], bool)
    inner[_FRAME:-_FRAME, _FRAME:-_FRAME] = False
    return image[inner]
