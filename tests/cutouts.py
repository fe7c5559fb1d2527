"""Things made of cells of colour, and features that are those cells' means: small stand-ins for artwork and network."""

import io

import numpy as np
from PIL import Image


def cells(pictures):
    """(N, 9, 12): the mean colours of four parts of each of 3 x 3 regions, less almost white."""
    small = [np.asarray(Image.fromarray(p).resize((6, 6), Image.Resampling.BOX), np.float32) for p in pictures]
    return np.stack(small).reshape(-1, 3, 2, 3, 2, 3).transpose(0, 1, 3, 2, 4, 5).reshape(-1, 9, 12) - 250


def concept(number, style="fluent", **more):
    """A record with a cut-out of 4 x 4 cells of colour within a transparent margin."""
    rng = np.random.default_rng([number, len(style)])
    art = np.zeros((128, 128, 4), np.uint8)
    art[12:116, 12:116, :3] = rng.integers(0, 200, (4, 4, 3)).repeat(26, 0).repeat(26, 1)
    art[12:116, 12:116, 3] = 255
    data = io.BytesIO()
    Image.fromarray(art).save(data, "PNG")
    own = {"id": f"{number:x}", "zh": f"物{number}", "en": f"thing {number}", "zh_only": False, "style": style}
    return {**own, "zh_keywords": [], "en_keywords": [], "image": data.getvalue(), **more}
