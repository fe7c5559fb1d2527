"""AutoencoderKL, the autoencoder of Stable Diffusion (Rombach et al. 2022; diffusers' names and numerics)."""

import jax
import jax.numpy as jnp
from flax import nnx

from bdm_jax.models.attention import attention
from bdm_jax.models.autoencoders.config import VAEConfig
from bdm_jax.models.linear import Linear
from bdm_jax.models.unet.layers import Downsample, GroupNorm, ResnetBlock, Upsample, conv

_EPS = 1e-6


class VAEAttention(nnx.Module):
    """Single-head self-attention over all pixels: (B,H,W,C) -> (B,H,W,C)."""

    def __init__(self, channels: int, groups: int, rngs: nnx.Rngs):
        self.group_norm = GroupNorm(channels, groups, epsilon=_EPS)
        self.to_q = Linear(channels, channels, rngs=rngs)
        self.to_k = Linear(channels, channels, rngs=rngs)
        self.to_v = Linear(channels, channels, rngs=rngs)
        self.to_out = nnx.List([Linear(channels, channels, rngs=rngs)])

    def __call__(self, x):
        b, h, w, c = x.shape
        tokens = self.group_norm(x).reshape(b, h * w, 1, c)
        query, key, value = (part(tokens).astype(part.kernel.dtype) for part in (self.to_q, self.to_k, self.to_v))
        out = attention(query, key, value)
        return x + self.to_out[0](out).reshape(x.shape)


class VAEMidBlock(nnx.Module):
    """Resnet, attention, resnet."""

    def __init__(self, channels: int, groups: int, rngs: nnx.Rngs):
        self.resnets = nnx.List([ResnetBlock(channels, channels, groups, _EPS, rngs) for _ in range(2)])
        self.attentions = nnx.List([VAEAttention(channels, groups, rngs)])

    def __call__(self, x):
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class VAEBlock(nnx.Module):
    """Resnets of one level."""

    def __init__(self, inputs: int, outputs: int, layers: int, groups: int, rngs: nnx.Rngs):
        self.resnets = nnx.List(
            [ResnetBlock(inputs if i == 0 else outputs, outputs, groups, _EPS, rngs) for i in range(layers)]
        )

    def __call__(self, x):
        for resnet in self.resnets:
            x = resnet(x)
        return x


class Encoder(nnx.Module):
    """Images (B,H,W,3) -> (B, H/factor, W/factor, 2 * latent channels)."""

    def __init__(self, config: VAEConfig, rngs: nnx.Rngs):
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = conv(config.in_channels, widths[0], rngs)
        self.down_blocks = nnx.List([])
        previous = widths[0]
        for level, width in enumerate(widths):
            block = VAEBlock(previous, width, config.layers_per_block, groups, rngs)
            if level < len(widths) - 1:
                block.downsamplers = nnx.List([Downsample(width, rngs, symmetric=False)])
            self.down_blocks.append(block)
            previous = width
        self.mid_block = VAEMidBlock(widths[-1], groups, rngs)
        self.conv_norm_out = GroupNorm(widths[-1], groups, epsilon=_EPS)
        self.conv_out = conv(widths[-1], 2 * config.latent_channels, rngs)

    def __call__(self, x):
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
            if hasattr(block, "downsamplers"):
                x = block.downsamplers[0](x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nnx.Module):
    """Latents (B,h,w,C) -> images (B, h*factor, w*factor, 3)."""

    def __init__(self, config: VAEConfig, rngs: nnx.Rngs):
        widths, groups = config.block_out_channels, config.norm_num_groups
        self.conv_in = conv(config.latent_channels, widths[-1], rngs)
        self.mid_block = VAEMidBlock(widths[-1], groups, rngs)
        self.up_blocks = nnx.List([])
        previous = widths[-1]
        for level, width in reversed(list(enumerate(widths))):
            block = VAEBlock(previous, width, config.layers_per_block + 1, groups, rngs)
            if level > 0:
                block.upsamplers = nnx.List([Upsample(width, rngs)])
            self.up_blocks.append(block)
            previous = width
        self.conv_norm_out = GroupNorm(widths[0], groups, epsilon=_EPS)
        self.conv_out = conv(widths[0], config.out_channels, rngs)

    def __call__(self, x):
        x = self.mid_block(self.conv_in(x))
        for block in self.up_blocks:
            x = block(x)
            if hasattr(block, "upsamplers"):
                x = block.upsamplers[0](x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))


class VAE(nnx.Module):
    """The whole autoencoder. Its latents are raw: times `config.scaling_factor` they are what diffusion works on."""

    def __init__(self, config: VAEConfig, rngs: nnx.Rngs):
        self.config = config
        self.encoder = Encoder(config, rngs)
        self.quant_conv = conv(2 * config.latent_channels, 2 * config.latent_channels, rngs, kernel=1)
        self.post_quant_conv = conv(config.latent_channels, config.latent_channels, rngs, kernel=1)
        self.decoder = Decoder(config, rngs)

    def encode(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Images (B,H,W,3) in [-1,1] -> mean and log-variance of the latents, each (B, H/factor, W/factor, C)."""
        mean, logvar = jnp.split(self.quant_conv(self.encoder(images)), 2, axis=-1)
        return mean, jnp.clip(logvar, -30.0, 20.0)

    def decode(self, latents: jax.Array) -> jax.Array:
        """Raw latents (B,h,w,C) -> images in about [-1,1]."""
        return self.decoder(self.post_quant_conv(latents))
