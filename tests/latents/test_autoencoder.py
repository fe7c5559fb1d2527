"""Large pictures through the autoencoder in tiles, as diffusers does it; batches in slices, which changes nothing."""

from dataclasses import replace

import numpy as np
import pytest
from diffusers import AutoencoderKL

from bdm_jax.errors import UserError
from bdm_jax.latents import autoencoder
from bdm_jax.latents.autoencoder import decode, encode
from bdm_jax.latents.tiles import slices, tiled
from bdm_jax.models.config import VAEConfig, to_json
from bdm_jax.sampling.generate import generate
from bdm_jax.sampling.settings import Request, Sampling
from bdm_jax.systems.components import Component

TILE = 32
CONFIG = VAEConfig(block_out_channels=(8, 12, 16), layers_per_block=1, norm_num_groups=4, sample_size=TILE)
SIZES = [(72, 56), (24, 36)]  # pixels; the tiles at the edges are of several sizes


@pytest.fixture
def pair(randomised, torch_params):
    """A small random autoencoder, ours and diffusers' with tiles of the same size."""
    theirs = randomised(AutoencoderKL.from_config(to_json(CONFIG)))
    theirs.enable_tiling()
    assert (theirs.tile_sample_min_size, theirs.tile_latent_min_size) == (TILE, TILE // CONFIG.factor)
    return Component(CONFIG, torch_params(theirs, CONFIG)), theirs


@pytest.mark.parametrize("size", SIZES)
def test_tiles_equal_diffusers(pair, assert_parity, nchw, nhwc, rng, size):
    (config, params), theirs = pair
    pictures = rng.integers(0, 256, (2, *size, 3), np.uint8)
    expected = theirs.encode(nchw(pictures.astype(np.float32) / 127.5 - 1)).latent_dist.mean * config.scaling_factor
    assert_parity(encode(pair[0], pictures, TILE), nhwc(expected))
    latents = rng.standard_normal((2, *(side // 4 for side in size), 4)).astype(np.float32)
    images = nhwc(theirs.decode(nchw(latents)).sample)
    latents *= config.scaling_factor

    def one(y, x, h, w):
        return autoencoder._images(config, params, latents[:, y : y + h, x : x + w])

    assert_parity(tiled(one, latents.shape[1:3], TILE // 4, 4), images)
    ours, finite = decode(pair[0], latents, TILE)
    levels = np.clip(images, -1, 1) * 127.5 + 127.5
    assert finite.all() and np.abs(ours - levels).max() < 0.6  # rounded to whole levels


def test_one_tile_is_the_whole(pair, rng):
    vae, _ = pair
    pictures = rng.integers(0, 256, (2, TILE, 24, 3), np.uint8)
    latents = encode(vae, pictures)
    np.testing.assert_array_equal(encode(vae, pictures, TILE), latents)
    np.testing.assert_array_equal(decode(vae, latents, TILE)[0], decode(vae, latents)[0])
    larger = encode(vae, np.concatenate([pictures, pictures], axis=1), TILE)
    assert np.abs(larger - encode(vae, np.concatenate([pictures, pictures], axis=1))).max() > 1e-3


def test_slices_change_nothing(pair, rng, monkeypatch):
    vae, _ = pair
    pictures = rng.integers(0, 256, (6, 24, 40, 3), np.uint8)
    whole = encode(vae, pictures)
    drawn, _ = decode(vae, whole)
    seen = []
    original = autoencoder._decode
    monkeypatch.setattr(autoencoder, "_decode", lambda c, p, x: seen.append(len(x)) or original(c, p, x))
    monkeypatch.setattr(autoencoder, "_PIXELS", 3 * 24 * 40)
    np.testing.assert_allclose(encode(vae, pictures), whole, atol=1e-5)
    sliced, finite = decode(vae, whole)
    assert seen == [3, 3] and finite.shape == (6,)
    assert np.abs(sliced.astype(int) - drawn).max() <= 1
    whole[4] = np.nan
    assert decode(vae, whole)[1].tolist() == [True, True, True, True, False, True]


def test_slices():
    """Equal, strided, with no more than so many rows of each device where that can be."""
    assert slices(8, 1, 8) == [slice(0, None, 1)]
    assert slices(8, 1, 3) == [slice(number, None, 4) for number in range(4)]
    assert slices(7, 1, 3) == [slice(number, None, 7) for number in range(7)]
    assert slices(8, 4, 1) == [slice(0, None, 2), slice(1, None, 2)]
    assert slices(2, 4, 1) == [slice(0, None, 1)]


def test_a_picture_in_tiles(tiny):
    request, large = Request("红灯笼", seed=5), dict(steps=2, size=(96, 64))
    (whole,), (tiles,) = (list(generate(tiny, [request], Sampling(**large, vae_tile=tile))) for tile in (0, 64))
    assert tiles.shape == whole.shape and 0 < np.abs(tiles.astype(int) - whole).mean() < 60
    (begun,) = generate(tiny, [replace(request, image=whole)], Sampling(steps=2, strength=0.5, vae_tile=64))
    assert begun.shape == whole.shape
    for tile, message in ((-1, "VAE tile -1 is less than 0"), (40, "VAE tile 40 is no multiple of 32 pixels; try 32")):
        with pytest.raises(UserError, match=message):
            generate(tiny, [request], Sampling(vae_tile=tile))


def test_without_an_autoencoder_pixels_are_the_latents(rng):
    pixels = rng.integers(0, 256, (2, 6, 4, 3), np.uint8)
    latents = encode(None, pixels)
    assert latents.dtype == np.float32 and latents.min() >= -1 and latents.max() <= 1
    images, finite = decode(None, latents)
    np.testing.assert_array_equal(images, pixels)
    assert finite.all()
    latents[1, 0, 0, 0] = np.nan
    assert decode(None, latents)[1].tolist() == [True, False]
