"""Pictures through a tiny autoencoder: whatever the batches, each as if it were alone."""

import hashlib
import io

import numpy as np
import pytest
from PIL import Image

from bdm_jax.data.records import open_source
from bdm_jax.errors import UserError
from bdm_jax.images.decode import decode_image
from bdm_jax.latents import moments
from bdm_jax.latents.moments import record_key, record_moments, round_trip
from bdm_jax.models.config import VAEConfig
from bdm_jax.models.functional import bind, init
from bdm_jax.paths import EMOJI
from bdm_jax.systems.components import Component


@pytest.fixture(scope="module")
def vae():
    config = VAEConfig(block_out_channels=(4, 4, 4, 4, 8), layers_per_block=1, norm_num_groups=2, sample_size=128)
    return Component(config, init(config, 0))


def test_there_and_back_in_batches_is_one_by_one(vae, rng):
    pictures = list(rng.integers(0, 256, (17, 32, 32, 3), np.uint8))
    network = bind(*vae)
    for picture, back in zip(pictures, round_trip(vae, pictures), strict=True):
        decoded = np.asarray(network.decode(network.encode(picture[None] / np.float32(127.5) - 1)[0]))[0]
        expected = np.clip(decoded, -1, 1) * 127.5 + 127.5
        assert back.dtype == np.uint8 and np.abs(back - expected).max() <= 0.51


def test_moments_are_kept_and_made_again_for_other_weights(vae, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(moments, "_SILENCE", 0.0)
    every = open_source(EMOJI)
    source = [every[i] for i in range(3)]
    first = record_moments(vae, source, tmp_path / "latents.npz")
    told = capsys.readouterr().err.splitlines()
    assert told[0] == "encoding 3 images into latents" and told[-1] == "encoded 3 of 3 images, 0 min left"
    image = decode_image(source[2]["image"])[None] / np.float32(127.5) - 1
    mean, logvar = bind(*vae).encode(image)
    expected = np.concatenate([mean, logvar], axis=-1)[0]
    np.testing.assert_allclose(first[2], expected, rtol=1e-4, atol=1e-4)
    sha = hashlib.sha256(f"{moments.digest(vae)}\nNone\nNone\n".encode())
    for row in source:
        sha.update(hashlib.sha256(record_key(row).encode() + b"\n" + row["image"]).digest())
    assert np.load(tmp_path / "latents.npz")["digest"] == sha.hexdigest(), "what earlier versions wrote is found"
    stored = (tmp_path / "latents.npz").read_bytes()
    again = record_moments(vae, source, tmp_path / "latents.npz")
    assert (tmp_path / "latents.npz").read_bytes() == stored
    assert np.array_equal(first, again) and not capsys.readouterr().err
    other = vae._replace(params={**vae.params, "quant_conv.bias": vae.params["quant_conv.bias"] + 1})
    changed = record_moments(other, source, tmp_path / "latents.npz")
    assert not np.array_equal(first[2], changed[2])


def test_pictures_of_several_sizes_are_refused_by_name(vae):
    source = open_source(EMOJI)
    small = io.BytesIO()
    Image.new("RGB", (64, 96)).save(small, "PNG")
    records = [source[0], {**source[1], "image": small.getvalue()}]
    with pytest.raises(UserError, match=rf"{record_key(source[1])}: 64 x 96 pixels, those before it 128 x 128"):
        record_moments(vae, records)
