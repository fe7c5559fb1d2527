"""The autoencoder against diffusers' AutoencoderKL."""

import numpy as np
import pytest

from bdm_jax.models.config import VAEConfig

CASES = {
    "four-levels": (VAEConfig(block_out_channels=(8, 16, 24, 24), norm_num_groups=8), (2, 32, 48)),
    "three-levels": (
        VAEConfig(block_out_channels=(12, 12, 20), layers_per_block=1, latent_channels=3, norm_num_groups=4),
        (1, 28, 20),
    ),
}


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


def test_encode_and_decode_equal_diffusers(case, twin, torch_params, apply, assert_parity, nhwc, nchw, rng):
    config, (batch, height, width) = case
    reference = twin(config)
    params = torch_params(reference, config)
    images = rng.uniform(-1, 1, (batch, height, width, 3)).astype(np.float32)
    mean, logvar = apply(config, params, images, method="encode")
    expected = reference.encode(nchw(images)).latent_dist
    assert_parity(mean, nhwc(expected.mean))
    assert_parity(logvar, nhwc(expected.logvar))

    latents = rng.standard_normal((batch, height // config.factor, width // config.factor, config.latent_channels))
    latents = latents.astype(np.float32)
    assert mean.shape == latents.shape
    assert_parity(apply(config, params, latents, method="decode"), nhwc(reference.decode(nchw(latents)).sample))


def test_log_variance_is_bounded_as_in_diffusers(twin, torch_params, apply, rng, nchw, nhwc):
    config, (batch, height, width) = CASES["three-levels"]
    reference = twin(config)
    reference.quant_conv.weight *= 1000
    images = rng.uniform(-1, 1, (batch, height, width, 3)).astype(np.float32)
    _, logvar = apply(config, torch_params(reference, config), images, method="encode")
    assert logvar.min() == -30 and logvar.max() == 20
    bounded = np.isin(nhwc(reference.encode(nchw(images)).latent_dist.logvar), (-30, 20))
    assert np.mean(np.isin(np.asarray(logvar), (-30, 20)) == bounded) > 0.99
