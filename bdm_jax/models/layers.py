"""The building blocks of a Stable-Diffusion UNet and autoencoder (NHWC; diffusers' names and numerics).

Tensors keep their dtype (fp32 or bf16); norm statistics, softmax and the time embedding are computed in fp32.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

# On a CPU, self-attention is computed for this many queries at a time once there are more than twice as many: the
# scores of 4,096 x 4,096 tokens do not fit a cache, and chunks are seven times faster there than
# jax.nn.dot_product_attention.
CPU_QUERY_CHUNK = 512


def attention(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Softmax attention.

    query (B,T,N,K), key and value (B,S,N,K); mask (B,S) bool, False where a key must not be seen. Returns (B,T,N,K).
    """
    if jax.default_backend() == "cpu":
        tokens = query.shape[1]
        if tokens > 2 * CPU_QUERY_CHUNK and tokens % CPU_QUERY_CHUNK == 0:
            chunks = jnp.moveaxis(query.reshape(query.shape[0], -1, CPU_QUERY_CHUNK, *query.shape[2:]), 1, 0)
            out = jax.lax.map(lambda chunk: _plain_attention(chunk, key, value, mask), chunks)
            return jnp.moveaxis(out, 0, 1).reshape(query.shape)
        return _plain_attention(query, key, value, mask)
    mask_bnts = None if mask is None else mask[:, None, None, :]
    return jax.nn.dot_product_attention(query, key, value, mask=mask_bnts)


def _plain_attention(query, key, value, mask):
    scores = jnp.einsum("btnk,bsnk->bnts", query, key, preferred_element_type=jnp.float32) / math.sqrt(query.shape[-1])
    if mask is not None:
        scores = jnp.where(mask[:, None, None, :], scores, jnp.finfo(scores.dtype).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    return jnp.einsum("bnts,bsnk->btnk", weights, value)


def timestep_embedding(t: jax.Array, width: int) -> jax.Array:
    """Sinusoids [cos, sin] of the timesteps: (B,) -> (B, width), fp32 (diffusers: flip_sin_to_cos=True,
    freq_shift=0).
    """
    half = width // 2
    frequencies = jnp.exp(-math.log(10000.0) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = t.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def conv(inputs: int, outputs: int, rngs: nnx.Rngs, kernel: int = 3, stride: int = 1) -> nnx.Conv:
    """A convolution with PyTorch's padding."""
    pad = kernel // 2
    return nnx.Conv(inputs, outputs, (kernel, kernel), strides=stride, padding=((pad, pad), (pad, pad)), rngs=rngs)


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
        group = lambda y: jnp.mean(y.reshape(b, self.groups, c // self.groups), axis=-1, keepdims=True)  # noqa: E731
        spread = lambda y: jnp.broadcast_to(y, (b, self.groups, c // self.groups)).reshape(b, 1, c)  # noqa: E731
        mean, square = group(jnp.mean(pixels, axis=1)), group(jnp.mean(jnp.square(pixels), axis=1))
        inverse = jax.lax.rsqrt(jnp.maximum(square - jnp.square(mean), 0.0) + self.epsilon)
        gain = spread(inverse) * self.scale[...].astype(jnp.float32)
        shift = self.bias[...].astype(jnp.float32) - spread(mean) * gain
        return (pixels * gain + shift).astype(x.dtype).reshape(x.shape)


class TimeEmbedding(nnx.Module):
    """Two layers after the sinusoids: (B, width) -> (B, out)."""

    def __init__(self, width: int, out: int, rngs: nnx.Rngs):
        self.linear_1 = nnx.Linear(width, out, rngs=rngs)
        self.linear_2 = nnx.Linear(out, out, rngs=rngs)

    def __call__(self, x):
        return self.linear_2(jax.nn.silu(self.linear_1(x)))


class ResnetBlock(nnx.Module):
    """GroupNorm-SiLU-conv twice, the time embedding added in between (none in the autoencoder): (B,H,W,I) ->
    (B,H,W,O).
    """

    def __init__(self, inputs: int, outputs: int, groups: int, eps: float, rngs: nnx.Rngs, time_dim: int | None = None):
        self.norm1 = GroupNorm(inputs, groups, epsilon=eps)
        self.conv1 = conv(inputs, outputs, rngs)
        if time_dim is not None:
            self.time_emb_proj = nnx.Linear(time_dim, outputs, rngs=rngs)
        self.norm2 = GroupNorm(outputs, groups, epsilon=eps)
        self.conv2 = conv(outputs, outputs, rngs)
        if inputs != outputs:
            self.conv_shortcut = conv(inputs, outputs, rngs, kernel=1)

    def __call__(self, x, temb=None):
        hidden = self.conv1(jax.nn.silu(self.norm1(x)))
        if temb is not None:
            hidden += self.time_emb_proj(jax.nn.silu(temb))[:, None, None, :]
        hidden = self.conv2(jax.nn.silu(self.norm2(hidden)))
        return hidden + (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x)


class Downsample(nnx.Module):
    """3x3 convolution of stride 2; the autoencoder pads on the right and below only."""

    def __init__(self, channels: int, rngs: nnx.Rngs, symmetric: bool = True):
        pad = (1, 1) if symmetric else (0, 1)
        self.conv = nnx.Conv(channels, channels, (3, 3), strides=2, padding=(pad, pad), rngs=rngs)

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
    """Multi-head attention of x (B,T,C) to `context` (B,S,D), or to itself; projections without bias but the last."""

    def __init__(self, channels: int, heads: int, rngs: nnx.Rngs, context_dim: int | None = None):
        context_dim = context_dim or channels
        self.heads = heads
        self.to_q = nnx.Linear(channels, channels, use_bias=False, rngs=rngs)
        self.to_k = nnx.Linear(context_dim, channels, use_bias=False, rngs=rngs)
        self.to_v = nnx.Linear(context_dim, channels, use_bias=False, rngs=rngs)
        self.to_out = nnx.List([nnx.Linear(channels, channels, rngs=rngs)])

    def __call__(self, x, context=None, mask=None):
        context = x if context is None else context
        split = lambda y: y.reshape(*y.shape[:2], self.heads, -1)  # noqa: E731
        out = attention(split(self.to_q(x)), split(self.to_k(context)), split(self.to_v(context)), mask)
        return self.to_out[0](out.reshape(x.shape))


class GEGLU(nnx.Module):
    """One projection to value and gate: value * gelu(gate), gelu exact (erf)."""

    def __init__(self, channels: int, hidden: int, rngs: nnx.Rngs):
        self.proj = nnx.Linear(channels, 2 * hidden, rngs=rngs)

    def __call__(self, x):
        value, gate = jnp.split(self.proj(x), 2, axis=-1)
        return value * jax.nn.gelu(gate, approximate=False)


class FeedForward(nnx.Module):
    """GEGLU to four times the width and back. `net.1` is diffusers' dropout: it holds nothing."""

    def __init__(self, channels: int, rngs: nnx.Rngs):
        self.net = nnx.List([GEGLU(channels, 4 * channels, rngs), None, nnx.Linear(4 * channels, channels, rngs=rngs)])

    def __call__(self, x):
        return self.net[2](self.net[0](x))


class TransformerBlock(nnx.Module):
    """Self-attention, cross-attention to the text, feed-forward; each after its LayerNorm and added to its input."""

    def __init__(self, channels: int, heads: int, context_dim: int, rngs: nnx.Rngs):
        self.norm1 = nnx.LayerNorm(channels, epsilon=1e-5, rngs=rngs)
        self.attn1 = Attention(channels, heads, rngs)
        self.norm2 = nnx.LayerNorm(channels, epsilon=1e-5, rngs=rngs)
        self.attn2 = Attention(channels, heads, rngs, context_dim)
        self.norm3 = nnx.LayerNorm(channels, epsilon=1e-5, rngs=rngs)
        self.ff = FeedForward(channels, rngs)

    def __call__(self, x, cond):
        x += self.attn1(self.norm1(x))
        x += self.attn2(self.norm2(x), cond.tokens, cond.mask)
        return x + self.ff(self.norm3(x))


class Transformer2D(nnx.Module):
    """One transformer block over the pixels of a feature map, between 1x1 convolutions: (B,H,W,C) -> (B,H,W,C)."""

    def __init__(self, channels: int, heads: int, context_dim: int, groups: int, rngs: nnx.Rngs):
        self.norm = GroupNorm(channels, groups, epsilon=1e-6)
        self.proj_in = conv(channels, channels, rngs, kernel=1)
        self.transformer_blocks = nnx.List([TransformerBlock(channels, heads, context_dim, rngs)])
        self.proj_out = conv(channels, channels, rngs, kernel=1)

    def __call__(self, x, cond):
        b, h, w, c = x.shape
        hidden = self.proj_in(self.norm(x)).reshape(b, h * w, c)
        hidden = self.transformer_blocks[0](hidden, cond)
        return x + self.proj_out(hidden.reshape(b, h, w, c))
