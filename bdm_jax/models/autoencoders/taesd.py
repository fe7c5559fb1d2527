"""TAESD, the tiny autoencoder of Stable Diffusion's latents (O. Bohan 2023; diffusers' AutoencoderTiny, its names and
numerics).

Plain 3x3 convolutions and ReLUs, 2.4 million parameters in place of AutoencoderKL's 84: images good enough to judge
a prompt by.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from bdm_jax.models.autoencoders.config import TinyVAEConfig
from bdm_jax.models.unet.layers import conv

_LATENT_BOUND = 3.0
_LEAST_LOGVAR = -30.0


class TinyBlock(nnx.Module):
    """Three convolutions around their input: (B,H,W,C) -> (B,H,W,C)."""

    def __init__(self, channels: int, rngs: nnx.Rngs):
        first, second, third = (conv(channels, channels, rngs) for _ in range(3))
        self.conv = nnx.List([first, jax.nn.relu, second, jax.nn.relu, third])

    def __call__(self, x):
        hidden = x
        for layer in self.conv:
            hidden = layer(hidden)
        return jax.nn.relu(x + hidden)


class TinyVAE(nnx.Module):
    """The whole autoencoder, in the place of a VAE. Its latents are in the space where diffusion happens already."""

    def __init__(self, config: TinyVAEConfig, rngs: nnx.Rngs):
        self.config = config
        self.encoder = _encoder(config, rngs)
        self.decoder = _decoder(config, rngs)

    def encode(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Images (B,H,W,3) in [-1,1] -> mean and log-variance of the latents, each (B, H/factor, W/factor, C).

        The network has no variance: it comes as the least that a VAE gives, where a sample is the mean.
        """
        mean = self.encoder((images + 1) / 2)
        return mean, jnp.full_like(mean, _LEAST_LOGVAR)

    def decode(self, latents: jax.Array) -> jax.Array:
        """Latents (B,h,w,C), softly held within [-3,3] -> images in about [-1,1]."""
        return 2 * self.decoder(jnp.tanh(latents / _LATENT_BOUND) * _LATENT_BOUND) - 1


def _encoder(config: TinyVAEConfig, rngs: nnx.Rngs) -> nnx.Sequential:
    """Images in [0,1] -> latents."""
    layers = []
    for level, (width, blocks) in enumerate(
        zip(config.encoder_block_out_channels, config.num_encoder_blocks, strict=True)
    ):
        layers.append(_plain_conv(width, rngs, stride=2) if level else conv(config.in_channels, width, rngs))
        layers += [TinyBlock(width, rngs) for _ in range(blocks)]
    return nnx.Sequential(*layers, conv(width, config.latent_channels, rngs))


def _decoder(config: TinyVAEConfig, rngs: nnx.Rngs) -> nnx.Sequential:
    """Latents -> images in [0,1]. ReLU and enlargement count as layers in the keys, as in diffusers."""
    layers = [conv(config.latent_channels, config.decoder_block_out_channels[0], rngs), jax.nn.relu]
    for level, (width, blocks) in enumerate(
        zip(config.decoder_block_out_channels, config.num_decoder_blocks, strict=True)
    ):
        layers += [_twice_the_size, _plain_conv(width, rngs)] if level else []
        layers += [TinyBlock(width, rngs) for _ in range(blocks)]
    return nnx.Sequential(*layers, conv(width, config.out_channels, rngs))


def _plain_conv(channels: int, rngs: nnx.Rngs, stride: int = 1) -> nnx.Conv:
    """A 3x3 convolution without bias, with PyTorch's padding."""
    return nnx.Conv(channels, channels, (3, 3), strides=stride, padding=((1, 1), (1, 1)), use_bias=False, rngs=rngs)


def _twice_the_size(x: jax.Array) -> jax.Array:
    """Nearest-neighbour enlargement: (B,H,W,C) -> (B,2H,2W,C)."""
    b, h, w, c = x.shape
    return jnp.broadcast_to(x[:, :, None, :, None, :], (b, h, 2, w, 2, c)).reshape(b, 2 * h, 2 * w, c)
