"""Bar charts of measurements, in the font of the contact sheets."""

from collections.abc import Mapping

import numpy as np
from PIL import Image, ImageDraw

from bdm_jax.images.pictures import font

_COLOURS = ("#c0392b", "#8d99a6", "#2471a3", "#1e8449")
_BAR, _GAP, _LENGTH, _SIZE = 16, 12, 520, 14


def bars(groups: Mapping[str, Mapping[str, float]], unit: str) -> np.ndarray:
    """Group -> series -> value, as horizontal bars with their values -> (H,W,3) uint8.

    Each series has one colour, in order of first appearance.
    """
    letters = font(_SIZE)
    series = list(dict.fromkeys(name for values in groups.values() for name in values))
    largest = max(value for values in groups.values() for value in values.values())
    left = 2 * _GAP + max(round(letters.getlength(name)) for name in groups)
    heights = [len(values) * _BAR + _GAP for values in groups.values()]
    top = _SIZE + 2 * _GAP
    sheet = Image.new("RGB", (left + _LENGTH + 100, top + sum(heights)), "white")
    pen, x, y = ImageDraw.Draw(sheet), left, top
    for name, colour in zip(series, _COLOURS, strict=False):
        pen.rectangle((x, _GAP, x + _SIZE, _GAP + _SIZE), colour)
        pen.text((x + _SIZE + 6, _GAP + _SIZE // 2), name, "black", letters, anchor="lm")
        x += _SIZE + 30 + round(letters.getlength(name))
    for (name, values), height in zip(groups.items(), heights, strict=True):
        pen.text((left - _GAP, y + (height - _GAP) // 2), name, "black", letters, anchor="rm")
        for number, (series_name, value) in enumerate(values.items()):
            bar_top, bar_end = y + number * _BAR, left + round(value / largest * _LENGTH)
            colour = _COLOURS[series.index(series_name) % len(_COLOURS)]
            pen.rectangle((left, bar_top + 1, bar_end, bar_top + _BAR - 2), colour)
            pen.text((bar_end + 6, bar_top + _BAR // 2), f"{value:.3g} {unit}", "black", letters, anchor="lm")
        y += height
    return np.asarray(sheet)
