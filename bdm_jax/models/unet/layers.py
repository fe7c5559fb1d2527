"""The building blocks of a Stable-Diffusion UNet and autoencoder (NHWC; diffusers' names and numerics).

Tensors keep their dtype (fp32 or bf16); norm statistics, softmax and the time embedding are computed in fp32.
"""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import nnx

from bdm_jax.models.attention import decoupled_attention
from bdm_jax.models.convolution import Conv
from bdm_jax.models.linear import Linear
from bdm_jax.models.unet.merging import Merging, match

# Tokens that a feed-forward takes at once on a CPU.
_CPU_TOKENS = 1024


def timestep_embedding(t: jax.Array, width: int) -> jax.Array:
    """Sinusoids [cos, sin] of the timesteps: (B,) -> (B, width), fp32 (diffusers: flip_sin_to_cos=True,
    freq_shift=0).
    """
    half = width // 2
    frequencies = jnp.exp(-math.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = t.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def conv(inputs: int, outputs: int, rngs: nnx.Rngs, kernel: int = 3, stride: int = 1) -> Conv:
    """A convolution with PyTorch's padding."""
    return Conv(inputs, outputs, rngs, kernel, stride)


def repeat(x: jax.Array, batch: int) -> jax.Array:
    """Every row of x (B,...) repeated, one after the other, to `batch` rows."""
    return x if len(x) == batch else jnp.repeat(x, batch // len(x), axis=0)


class GroupNorm(nnx.Module):
    """Group normalisation over (H,W,C/groups), statistics in fp32: (B,H,W,C) -> (B,H,W,C).

    The pixels are reduced per channel before the channels are grouped: on a CPU six to ten times faster than
    nnx.GroupNorm at 128 x 128 pixels, the same numbers.
    """

    def __init__(self, channels: int, groups: int, epsilon: float):
        self.groups, self.epsilon = groups, epsilon
        self.scale = nnx.Param(jnp.ones(channels))
        self.bias = nnx.Param(jnp.zeros(channels))

    def __call__(self, x):
        b, h, w, c = x.shape
        pixels = x.reshape(b, h * w, c).astype(jnp.float32)

        def group(y):
            return jnp.mean(y.reshape(b, self.groups, c // self.groups), axis=-1, keepdims=True)

        def spread(y):
            return jnp.broadcast_to(y, (b, self.groups, c // self.groups)).reshape(b, 1, c)

        mean, square = group(jnp.mean(pixels, axis=1)), group(jnp.mean(jnp.square(pixels), axis=1))
        inverse = jax.lax.rsqrt(jnp.maximum(square - jnp.square(mean), 0.0) + self.epsilon)
        gain = spread(inverse) * self.scale[...].astype(jnp.float32)
        shift = self.bias[...].astype(jnp.float32) - spread(mean) * gain
        return (pixels * gain + shift).astype(x.dtype).reshape(x.shape)


class TimeEmbedding(nnx.Module):
    """Two layers after the sinusoids: (B, width) -> (B, out)."""

    def __init__(self, width: int, out: int, rngs: nnx.Rngs):
        self.linear_1 = Linear(width, out, rngs=rngs)
        self.linear_2 = Linear(out, out, rngs=rngs)

    def __call__(self, x):
        return self.linear_2(jax.nn.silu(self.linear_1(x)))


class ResnetBlock(nnx.Module):
    """GroupNorm-SiLU-conv twice, a shift (B', O) made of the time embedding added in between (none in the
    autoencoder): (B,H,W,I) -> (max(B, B'),H,W,O), each row of the fewer for several of the others.
    """

    def __init__(self, inputs: int, outputs: int, groups: int, eps: float, rngs: nnx.Rngs, time_dim: int | None = None):
        self.norm1 = GroupNorm(inputs, groups, epsilon=eps)
        self.conv1 = conv(inputs, outputs, rngs)
        if time_dim is not None:
            self.time_emb_proj = Linear(time_dim, outputs, rngs=rngs)
        self.norm2 = GroupNorm(outputs, groups, epsilon=eps)
        self.conv2 = conv(outputs, outputs, rngs)
        if inputs != outputs:
            self.conv_shortcut = conv(inputs, outputs, rngs, kernel=1)

    def __call__(self, x, shift=None):
        hidden = self.conv1(jax.nn.silu(self.norm1(x)))
        if shift is not None:
            batch = max(len(x), len(shift))
            hidden = repeat(hidden, batch) + repeat(shift, batch)[:, None, None, :]
        hidden = self.conv2(jax.nn.silu(self.norm2(hidden)))
        return hidden + repeat(self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x, len(hidden))


class Downsample(nnx.Module):
    """3x3 convolution of stride 2; the autoencoder pads on the right and below only."""

    def __init__(self, channels: int, rngs: nnx.Rngs, symmetric: bool = True):
        pad = (1, 1) if symmetric else (0, 1)
        self.conv = Conv(channels, channels, rngs, stride=2, padding=pad)

    def __call__(self, x):
        return self.conv(x)


class Upsample(nnx.Module):
    """Nearest-neighbour enlargement to twice the size, or to `size` (H, W) at most one smaller, then a 3x3
    convolution.
    """

    def __init__(self, channels: int, rngs: nnx.Rngs):
        self.conv = conv(channels, channels, rngs)

    def __call__(self, x, size: tuple[int, int] | None = None):
        b, h, w, c = x.shape
        x = jnp.broadcast_to(x[:, :, None, :, None, :], (b, h, 2, w, 2, c)).reshape(b, 2 * h, 2 * w, c)
        return self.conv(x if size is None else x[:, : size[0], : size[1]])


class Attention(nnx.Module):
    """Multi-head attention of x (B,T,C) to a context, or to itself; projections without bias but the last."""

    def __init__(self, channels: int, heads: int, rngs: nnx.Rngs, context_dim: int | None = None):
        context_dim = context_dim or channels
        self.heads = heads
        self.to_q = Linear(channels, channels, use_bias=False, rngs=rngs)
        self.to_k = Linear(context_dim, channels, use_bias=False, rngs=rngs)
        self.to_v = Linear(context_dim, channels, use_bias=False, rngs=rngs)
        self.to_out = nnx.List([Linear(channels, channels, rngs=rngs)])

    def keys(self, context: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Context (B,S,D) -> keys and values, each (B,S,N,K)."""
        return self._split(self.to_k(context)), self._split(self.to_v(context))

    def __call__(self, x, keys=None, mask=None, images=(), bias=None):
        """`keys` as from `keys`, of x itself where None; `mask` (B,S) bool; `images`: images' keys and values; `bias`
        (B,T,S) as in `decoupled_attention`.
        """
        keys = self.keys(x) if keys is None else keys
        out = decoupled_attention(self._split(self.to_q(x)), keys, images, mask, bias)
        return self.to_out[0](out.reshape(x.shape))

    def _split(self, x):
        return x.reshape(*x.shape[:2], self.heads, -1).astype(self.to_q.kernel.dtype)


class GEGLU(nnx.Module):
    """One projection to value and gate: value * gelu(gate), gelu exact (erf)."""

    def __init__(self, channels: int, hidden: int, rngs: nnx.Rngs):
        self.proj = Linear(channels, 2 * hidden, rngs=rngs)

    def __call__(self, x):
        value, gate = jnp.split(self.proj(x), 2, axis=-1)
        return value * jax.nn.gelu(gate, approximate=False)


class FeedForward(nnx.Module):
    """GEGLU to four times the width and back, x (B,T,C); on a CPU in chunks small enough that what is in between
    stays in the cache. `net.1` is diffusers' dropout: it holds nothing.
    """

    def __init__(self, channels: int, rngs: nnx.Rngs):
        self.net = nnx.List([GEGLU(channels, 4 * channels, rngs), None, Linear(4 * channels, channels, rngs=rngs)])

    def __call__(self, x):
        batch, tokens, channels = x.shape
        count = -(-batch * tokens // _CPU_TOKENS)
        if jax.default_backend() != "cpu" or count == 1 or tokens % count:
            return self._tokens(x)
        # The batch stays whole, so that it may be sharded.
        chunks = x.reshape(batch, count, -1, channels).swapaxes(0, 1)
        return jax.lax.map(self._tokens, chunks).swapaxes(0, 1).reshape(x.shape)

    def _tokens(self, x):
        flat = x.reshape(-1, x.shape[-1])  # so XLA on a CPU does not compute the norm before it in the product's loops
        return self.net[2](self.net[0](flat)).reshape(x.shape)


class TransformerBlock(nnx.Module):
    """Self-attention, cross-attention to the text, feed-forward; each after its LayerNorm and added to its input.

    x (B,T,C), `cond` of B rows or a multiple: up to the text, each row of x stands for as many. The text may also have
    fewer rows, each for as many of x. Returns as many as the larger has. With a `merging`, self-attention is over fewer
    tokens.
    """

    def __init__(self, channels: int, heads: int, context_dim: int, rngs: nnx.Rngs):
        self.norm1 = nnx.LayerNorm(channels, epsilon=1e-5, rngs=rngs)
        self.attn1 = Attention(channels, heads, rngs)
        self.norm2 = nnx.LayerNorm(channels, epsilon=1e-5, rngs=rngs)
        self.attn2 = Attention(channels, heads, rngs, context_dim)
        self.norm3 = nnx.LayerNorm(channels, epsilon=1e-5, rngs=rngs)
        self.ff = FeedForward(channels, rngs)

    def __call__(self, x, cond, merging: Merging | None = None):
        tokens = self.norm1(x)
        x += self.attn1(tokens) if merging is None else merging.restore(self.attn1(merging.mean(tokens)))
        queries, keys = self.norm2(x), cond.keys or self.attn2.keys(cond.tokens)
        batch = max(len(x), len(cond.tokens))
        x, queries, *keys = (repeat(part, batch) for part in (x, queries, *keys))
        images = [tuple(repeat(part, batch) for part in pair) for pair in cond.image_keys or ()]
        mask, bias = (None if part is None else repeat(part, batch) for part in (cond.mask, cond.bias))
        x += self.attn2(queries, keys, mask, images, bias)
        return x + self.ff(self.norm3(x))


class Transformer2D(nnx.Module):
    """Transformer blocks over the pixels of a feature map, between projections: (B,H,W,C) -> (B,H,W,C).

    The projections are 1x1 convolutions or, where `linear`, dense layers: the same numbers. Rows of text and map as in
    `TransformerBlock`; the share `merge` of the tokens is merged for self-attention. `cond` has keys by block.
    """

    def __init__(
        self, channels: int, layers: int, heads: int, context_dim: int, groups: int, linear: bool, rngs: nnx.Rngs
    ):
        self.norm = GroupNorm(channels, groups, epsilon=1e-6)
        self.proj_in = _projection(channels, linear, rngs)
        blocks = [TransformerBlock(channels, heads, context_dim, rngs) for _ in range(layers)]
        self.transformer_blocks = nnx.List(blocks)
        self.proj_out = _projection(channels, linear, rngs)

    def __call__(self, x, cond, merge: float = 0.0):
        b, h, w, c = x.shape
        hidden = self.proj_in(self.norm(x)).reshape(b, h * w, c)
        if cond.bias is not None:
            cond = replace(cond, bias=_shrunk(cond.bias, (h, w)).reshape(len(cond.bias), h * w, -1))
        for index, block in enumerate(self.transformer_blocks):
            merging = match(hidden, (h, w), merge) if merge else None
            hidden = block(hidden, cond.at(f"transformer_blocks.{index}"), merging)
        return repeat(x, len(hidden)) + self.proj_out(hidden.reshape(-1, h, w, c))


def _projection(channels: int, linear: bool, rngs: nnx.Rngs) -> nnx.Module:
    return Linear(channels, channels, rngs=rngs) if linear else conv(channels, channels, rngs, kernel=1)


def _shrunk(maps: jax.Array, size: tuple[int, int]) -> jax.Array:
    """Maps (B,H,W,S) halved, rounding up, until they are of `size`: each pixel the mean of those that went into it."""
    while maps.shape[1:3] != size:
        if maps.shape[1] <= size[0] or maps.shape[2] <= size[1]:
            raise ValueError(f"a bias of {maps.shape[1:3]} pixels does not halve to a layer of {size}")
        edges = tuple((0, side % 2) for side in maps.shape[1:3])
        maps = nnx.avg_pool(maps, (2, 2), strides=(2, 2), padding=edges, count_include_pad=False)
    return maps
