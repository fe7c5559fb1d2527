"""Previews: a matrix fitted to the decoder at hand, near enough to its pictures to be recognised."""

import numpy as np
import pytest
from PIL import Image

from bdm_jax.app.preview import colours, latent_colours, writer
from bdm_jax.latents.autoencoder import encode
from bdm_jax.paths import DEMO
from bdm_jax.systems.pipeline import BridgePipeline


def test_one_pixel_for_each_latent(tiny, tmp_path):
    matrix = latent_colours(tiny.vae)
    assert matrix.shape == (5, 3) and np.isfinite(matrix).all()
    np.testing.assert_array_equal(matrix, latent_colours(tiny.vae))
    assert colours(matrix, np.zeros((2, 4, 6, 4), np.float32)).shape == (2, 4, 6, 3)
    watch = writer(tiny.vae, tmp_path / "preview.png")
    watch(5, np.full((2, 4, 6, 4), np.nan, np.float32))
    with Image.open(tmp_path / "preview.png") as image:
        assert image.size == (2 * 6 * 64, 4 * 64)
    assert [path.name for path in tmp_path.iterdir()] == ["preview.png"]


def test_it_resembles_the_picture():
    """Of the demo's autoencoder, which sees a drawing: the colours of its cells correlate with their means (0.9)."""
    vae = BridgePipeline.from_pretrained(DEMO).vae
    factor = vae.config.factor
    drawing = np.full((128, 128, 3), 255, np.uint8)
    drawing[32:96, 16:80] = (220, 40, 20)
    drawing[64:112, 64:112] = (30, 60, 160)
    latents = np.asarray(encode(vae, drawing[None]))[0]
    cells = drawing.reshape(128 // factor, factor, 128 // factor, factor, 3).mean((1, 3))
    seen = colours(latent_colours(vae), latents)
    assert np.corrcoef(seen.ravel(), cells.ravel())[0, 1] > 0.75
    assert pytest.approx(cells.mean(), abs=40) == seen.mean()
