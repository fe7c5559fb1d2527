"""Maps for ControlNets, made from a image without a model (OpenCV); each as the communities' tools make it."""

from collections.abc import Callable

import cv2
import numpy as np


def canny(image: np.ndarray) -> np.ndarray:
    """Edges, white on black, by Canny's method at the thresholds 100 and 200 (lllyasviel/sd-controlnet-canny)."""
    return _grey(cv2.Canny(np.ascontiguousarray(image), 100, 200))


def line(image: np.ndarray) -> np.ndarray:
    """Outlines like pen strokes, white on black: differences of Gaussians (the web UI's scribble_xdog)."""
    pixels = image.astype(np.float32)
    fine, coarse = (cv2.GaussianBlur(pixels, (0, 0), sigma) for sigma in (0.5, 5.0))
    darker = (coarse - fine).min(axis=2).clip(0, 255)
    return _grey(np.where(2 * darker > 32, 255, 0).astype(np.uint8))


def tile(image: np.ndarray) -> np.ndarray:
    """The image with an eighth of its detail, for networks that add it anew."""
    height, width = image.shape[:2]
    small = cv2.resize(image, (max(1, width // 8), max(1, height // 8)), interpolation=cv2.INTER_AREA)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)


def blur(image: np.ndarray) -> np.ndarray:
    """A Gaussian of nine pixels over the image (the web UI's blur_gaussian)."""
    return cv2.GaussianBlur(image, (0, 0), 9)


def luminance(image: np.ndarray) -> np.ndarray:
    """Lightness without colour, the L of CIELAB (the web UI's recolor_luminance)."""
    return _grey(cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2LAB)[..., 0])


HINTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "canny": canny,
    "line": line,
    "tile": tile,
    "blur": blur,
    "luminance": luminance,
}
"""Name -> (H,W,3) uint8 -> (H,W,3) uint8."""


def _grey(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[..., None], 3, axis=2)
