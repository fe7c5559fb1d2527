"""Large maps in overlapping tiles whose edges are blended (as diffusers' `enable_tiling`), batches in slices."""

from collections.abc import Callable

import numpy as np

_OVERLAP = 4  # tiles overlap by a quarter of their side


def tiled(function: Callable[..., np.ndarray], size: tuple[int, int], tile: int, scale: float) -> np.ndarray:
    """A map of `size` (H,W) in tiles of tile x tile, those at the right and lower edges perhaps smaller.

    `function(top, left, height, width)` gives the result (B, height scale, width scale, C) for one of them; they blend
    linearly where they overlap, over a quarter of a side. Returns (B, H scale, W scale, C). `tile` and `tile * scale`
    are multiples of 4.
    """
    height, width = size
    stride, side = tile - tile // _OVERLAP, round(tile * scale)
    blended = side // _OVERLAP
    strips, above = [], []
    for top in range(0, height, stride):
        row = []
        for left in range(0, width, stride):
            out = np.asarray(function(top, left, min(tile, height - top), min(tile, width - left)))
            if above:
                out = _blend(above[len(row)], out, blended, axis=1)
            if row:
                out = _blend(row[-1], out, blended, axis=2)
            row.append(out)
        strips.append(np.concatenate([out[:, : side - blended, : side - blended] for out in row], axis=2))
        above = row
    return np.concatenate(strips, axis=1)


def slices(count: int, devices: int, most: int) -> list[slice]:
    """Equal parts of a batch that is split over devices, each with at most `most` rows of every device, if that can be.

    They are strided, so that every device has its share of each.
    """
    own = max(1, count // devices)
    parts = next(parts for parts in range(1, own + 1) if own % parts == 0 and (own // parts <= most or parts == own))
    return [slice(number, None, parts) for number in range(parts)]


def _blend(before: np.ndarray, after: np.ndarray, extent: int, axis: int) -> np.ndarray:
    """`after`, its first `extent` rows (or columns) fading in over the last ones of `before`."""
    extent = min(before.shape[axis], after.shape[axis], extent)
    ramp = np.arange(extent, dtype=after.dtype) / extent
    ramp = ramp.reshape(-1, *[1] * (after.ndim - 1 - axis))
    old = np.take(before, range(before.shape[axis] - extent, before.shape[axis]), axis)
    first, rest = np.split(after, [extent], axis)
    return np.concatenate([old * (1 - ramp) + first * ramp, rest], axis)
