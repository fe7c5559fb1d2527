"""Charts of measurements, drawn with the letters that contact sheets have."""

from collections.abc import Mapping

import numpy as np
from PIL import Image, ImageDraw

from bdm_jax.images.pictures import font

_COLOURS = ("#c0392b", "#8d99a6", "#2471a3", "#1e8449")
_BAR, _GAP, _LENGTH, _SIZE = 16, 12, 520, 14


def bars(groups: Mapping[str, Mapping[str, float]], unit: str) -> np.ndarray:
    """Group -> series -> value, as horizontal bars from zero with their values -> (H,W,3) uint8.

    Series have one colour each, in the order in which they first come.
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
        for number, (which, value) in enumerate(values.items()):
            begin, end = y + number * _BAR, left + round(value / largest * _LENGTH)
            pen.rectangle((left, begin + 1, end, begin + _BAR - 2), _COLOURS[series.index(which) % len(_COLOURS)])
            pen.text((end + 6, begin + _BAR // 2), f"{value:.3g} {unit}", "black", letters, anchor="lm")
        y += height
    return np.asarray(sheet)
