"""A look at latents without decoding them: one small matrix from channels to colours.

Neighbouring pixels of a latent are independent enough that its colour is close to a linear function of its channels.
Which function differs from one autoencoder to the next, so it is fitted to the one at hand.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from bdm_jax.images.pictures import write_png
from bdm_jax.latents.autoencoder import decode
from bdm_jax.systems.components import Component

_SAMPLES, _SIDE = 16, 16  # random latents to fit the matrix to, and how large
_HEIGHT = 256  # at least so high is a preview


def latent_colours(vae: Component | None, seed: int = 0) -> np.ndarray:
    """The matrix (C+1,3) that takes a latent and a 1 to the mean colour, 0 to 255, of the pixels it stands for.

    Least squares over a few smooth random latents, which the decoder turns into images once; of pixels, without one.
    """
    channels, factor = (3, 1) if vae is None else (vae.config.latent_channels, vae.config.factor)
    rng = np.random.default_rng(seed)
    latents = np.stack([_smooth(rng, channels, 2 ** (1 + sample % 3)) for sample in range(_SAMPLES)])
    pixels, _ = decode(vae, latents)
    colours = pixels.reshape(_SAMPLES, _SIDE, factor, _SIDE, factor, 3).mean(axis=(2, 4))
    return np.linalg.lstsq(_with_one(latents).reshape(-1, channels + 1), colours.reshape(-1, 3), rcond=None)[0]


def colours(matrix: np.ndarray, latents: np.ndarray) -> np.ndarray:
    """Latents (...,h,w,C) -> (...,h,w,3) uint8, a pixel for each."""
    return np.clip(np.round(_with_one(latents) @ matrix), 0, 255).astype(np.uint8)


def writer(vae: Component | None, path: Path) -> Callable[[int, np.ndarray], None]:
    """An `on_preview` for `generate` that keeps the predicted images of the batch, side by side, in a PNG."""
    matrix = latent_colours(vae)

    def on_preview(done: int, predicted_x0: np.ndarray) -> None:
        write_png(path, side_by_side(matrix, predicted_x0))

    return on_preview


def side_by_side(matrix: np.ndarray, predicted_x0: np.ndarray) -> np.ndarray:
    """Latents (B,h,w,C) that the networks predict -> one image (H,W,3) uint8 of them all, enlarged to be seen."""
    small = np.concatenate(list(colours(matrix, np.nan_to_num(predicted_x0))), axis=1)
    times = max(1, -(-_HEIGHT // len(small)))
    size = small.shape[1] * times, small.shape[0] * times
    return np.asarray(Image.fromarray(small).resize(size, Image.Resampling.BICUBIC))


def _smooth(rng: np.random.Generator, channels: int, cells: int) -> np.ndarray:
    """Unit noise of `cells` x `cells`, enlarged: (_SIDE,_SIDE,C) fp32."""
    noise = rng.standard_normal((cells, cells, channels)).astype(np.float32)
    planes = (Image.fromarray(noise[..., channel]) for channel in range(channels))
    return np.stack([np.asarray(plane.resize((_SIDE, _SIDE), Image.Resampling.BILINEAR)) for plane in planes], axis=-1)


def _with_one(latents: np.ndarray) -> np.ndarray:
    return np.concatenate([latents, np.ones((*latents.shape[:-1], 1), latents.dtype)], axis=-1)
