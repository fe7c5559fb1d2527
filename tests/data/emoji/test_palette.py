"""Palettes with transparency: how much they keep, and that nothing but the pixels decides them."""

import numpy as np
import pytest
from PIL import Image

from bdm_jax.data.emoji.palette import psnr, reduce_colours


def gradient():
    """A disc with a soft edge, of two gradients."""
    y, x = np.mgrid[:96, :96] / 95
    alpha = np.clip(8 * (0.5 - np.hypot(x - 0.5, y - 0.5)), 0, 1)
    return np.stack([255 * x, 255 * y, 128 + 0 * x, 255 * alpha], axis=-1).round().astype(np.uint8)


def over(pixels, ground):
    alpha = pixels[..., 3:].astype(float) / 255
    return pixels[..., :3] * alpha + ground * (1 - alpha)


def test_psnr_is_that_of_the_worse_ground():
    a, b = gradient(), gradient()
    b[..., 3] = np.minimum(b[..., 3], 200)
    by_hand = [10 * np.log10(255**2 / np.mean((over(a, ground) - over(b, ground)) ** 2)) for ground in (0.0, 255.0)]
    assert psnr(a, b) == pytest.approx(min(by_hand), abs=1e-9) and psnr(a, a) == np.inf
    for ground in (60.0, 128.0, 200.0):
        assert 10 * np.log10(255**2 / np.mean((over(a, ground) - over(b, ground)) ** 2)) >= psnr(a, b)


def test_many_colours_are_kept_better_than_by_pil():
    pixels = gradient()
    palette, index = reduce_colours(pixels)
    assert 250 < len(palette) <= 256 and index.shape == (96, 96) and palette.dtype == index.dtype == np.uint8
    assert (np.diff(palette[:, 3].astype(int)) >= 0).all() and tuple(palette[0]) == (255, 255, 255, 0)
    theirs = Image.fromarray(pixels).quantize(256, method=Image.Quantize.FASTOCTREE, dither=0).convert("RGBA")
    ours = psnr(pixels, palette[index])
    assert ours > 35 and ours > psnr(pixels, np.asarray(theirs)) + 1


def test_few_colours_are_exact_and_clear_ones_are_one():
    pixels = np.zeros((16, 16, 4), np.uint8)
    pixels[..., 0], pixels[..., 3] = np.arange(16) * 10, np.arange(16)[:, None] * 17
    palette, index = reduce_colours(pixels)
    assert len(palette) == 15 * 16 + 1
    np.testing.assert_array_equal(palette[index][1:], pixels[1:])
    assert (palette[index][0] == [255, 255, 255, 0]).all()


def test_where_pixels_lie_does_not_change_the_palette():
    pixels = gradient()
    shuffled = np.random.default_rng(0).permutation(pixels.reshape(-1, 4)).reshape(pixels.shape)
    np.testing.assert_array_equal(reduce_colours(pixels)[0], reduce_colours(shuffled)[0])
