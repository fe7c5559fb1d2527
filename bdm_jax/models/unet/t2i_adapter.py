"""T2I-Adapter (Mou et al. 2023, arXiv 2302.08453; diffusers' T2IAdapter): one pass over an image gives features that
are added inside the backbone's encoder.

Feature i goes to level i of the encoder: it is added to what the level's last layer returns, or, where the level reads
no text, its downsampler; in the skip too, which is the same tensor. One feature more (SDXL's) goes to the middle.
"""

import jax
from flax import nnx

from bdm_jax.models.unet.config import T2IAdapterConfig
from bdm_jax.models.unet.layers import conv


class AdapterResnetBlock(nnx.Module):
    """x + conv(relu(conv3x3(x))); the second convolution is 1x1, in a light adapter 3x3."""

    def __init__(self, channels: int, light: bool, rngs: nnx.Rngs):
        self.block1 = conv(channels, channels, rngs)
        self.block2 = conv(channels, channels, rngs, kernel=3 if light else 1)

    def __call__(self, x):
        return x + self.block2(jax.nn.relu(self.block1(x)))


class AdapterBlock(nnx.Module):
    """One level: (B,H,W,I) -> (B,ceil(H/2),ceil(W/2),O), or of the same size where it is not `down`.

    A light one works at a quarter of the width, between 1x1 convolutions.
    """

    def __init__(self, inputs: int, outputs: int, config: T2IAdapterConfig, down: bool, rngs: nnx.Rngs):
        light = config.adapter_type == "light_adapter"
        inner = outputs // 4 if light else outputs
        self.down = down
        if light or inputs != outputs:
            self.in_conv = conv(inputs, inner, rngs, kernel=1)
        self.resnets = nnx.List([AdapterResnetBlock(inner, light, rngs) for _ in range(config.num_res_blocks)])
        if light:
            self.out_conv = conv(inner, outputs, rngs, kernel=1)

    def __call__(self, x):
        if self.down:
            edges = ((0, x.shape[1] % 2), (0, x.shape[2] % 2))
            x = nnx.avg_pool(x, (2, 2), strides=(2, 2), padding=edges, count_include_pad=False)
        x = self.in_conv(x) if hasattr(self, "in_conv") else x
        for resnet in self.resnets:
            x = resnet(x)
        return self.out_conv(x) if hasattr(self, "out_conv") else x


class AdapterLevels(nnx.Module):
    """Everything, under diffusers' name `adapter`."""

    def __init__(self, config: T2IAdapterConfig, rngs: nnx.Rngs):
        inputs = config.in_channels * config.downscale_factor**2
        if config.adapter_type != "light_adapter":
            self.conv_in = conv(inputs, config.channels[0], rngs)
            inputs = config.channels[0]
        self.body = nnx.List([])
        for width, down in zip(config.widths, config.halved, strict=True):
            self.body.append(AdapterBlock(inputs, width, config, down, rngs))
            inputs = width


class T2IAdapter(nnx.Module):
    """An image (B,H,W,C) in [0, 1] -> one feature per level of the UNet's encoder, (B,h,w,width of the level), and for
    SDXL one for its middle.

    H and W are multiples of `downscale_factor`; `config.strides` of their pixels become one of each feature's.
    """

    def __init__(self, config: T2IAdapterConfig, rngs: nnx.Rngs):
        self.config = config
        self.adapter = AdapterLevels(config, rngs)

    def __call__(self, image: jax.Array) -> tuple[jax.Array, ...]:
        x = unshuffle(image, self.config.downscale_factor)
        x = self.adapter.conv_in(x) if hasattr(self.adapter, "conv_in") else x
        features = []
        for block in self.adapter.body:
            x = block(x)
            features.append(x)
        return tuple(features)


def unshuffle(x: jax.Array, factor: int) -> jax.Array:
    """Squares of pixels into channels, in PyTorch's order: (B,H,W,C) -> (B, H/f, W/f, C f f)."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // factor, factor, w // factor, factor, c)
    return x.transpose(0, 1, 3, 5, 2, 4).reshape(b, h // factor, w // factor, c * factor**2)
