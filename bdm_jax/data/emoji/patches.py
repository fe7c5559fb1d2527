"""Cut-outs at the side that scenes need, premultiplied and kept in a bounded memory."""

import threading
from collections import OrderedDict

import numpy as np
from PIL import Image

from bdm_jax.images.decode import decode_cutout


class Patches:
    """Things at a side. At most `limit` bytes are kept, the least recently used are forgotten; safe between threads."""

    def __init__(self, limit: int):
        self._limit, self._bytes, self._lock = limit, 0, threading.Lock()
        self._found: OrderedDict[tuple[bytes, int], np.ndarray] = OrderedDict()

    def get(self, image: bytes, side: int, name: str) -> np.ndarray:
        """An encoded image -> uint8 (side, side, 4), RGB times alpha / 255, and alpha; see `scenes.compose`.

        Raises BadRecord as `decode_cutout` does.
        """
        key = (image, side)
        with self._lock:
            if key in self._found:
                self._found.move_to_end(key)
                return self._found[key]
        patch = _patch(decode_cutout(image, name), side)
        with self._lock:
            self._bytes += 0 if key in self._found else patch.nbytes + len(image)
            self._found[key] = patch
            while self._bytes > self._limit and len(self._found) > 1:
                (old, _), gone = self._found.popitem(last=False)
                self._bytes -= gone.nbytes + len(old)
        return patch


def _patch(pixels: np.ndarray, side: int) -> np.ndarray:
    """uint8 (H, W, 4) -> uint8 (side, side, 4), premultiplied, averaged over areas; centred on transparency if not
    square.
    """
    image = Image.fromarray(pixels).convert("RGBa")
    image = image.reduce(max(1, max(image.size) // (4 * side)))  # large photos, before anything is made of floats
    width, height = image.size
    if width != height:
        square = Image.new("RGBa", (max(width, height),) * 2)
        square.paste(image, ((square.width - width) // 2, (square.width - height) // 2))
        image = square
    values = np.asarray(image)
    if image.width == side:
        return values
    return np.rint(_averaged(_averaged(values, side, 0), side, 1)).astype(np.uint8)


def _averaged(values: np.ndarray, side: int, axis: int) -> np.ndarray:
    """`side` means over equal lengths of the axis, with parts of pixels where a border goes through them."""
    values = np.moveaxis(values, axis, 0)
    sums = np.concatenate([np.zeros_like(values[:1], np.float64), np.cumsum(values, axis=0, dtype=np.float64)])
    borders = np.arange(side + 1) * (len(values) / side)
    low = np.minimum(borders.astype(int), len(values) - 1)
    part = (borders - low)[:, None, None]
    integral = sums[low] * (1 - part) + sums[low + 1] * part
    return np.moveaxis(np.diff(integral, axis=0) * (side / len(values)), 0, axis)
