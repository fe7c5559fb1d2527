"""IP-Adapter (Ye et al. 2023, arXiv 2308.06721; diffusers' names): an image as a second context of cross-attention.

A CLIP vision tower reads the image; `ImageProjection` (base) makes a few tokens of its pooled vector, `Resampler`
(Plus) of its penultimate layer's states. Every cross-attention has keys and values of its own for them.
"""

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from bdm_jax.models.attention import attention
from bdm_jax.models.linear import Linear
from bdm_jax.models.unet.config import EncoderConfig, ImageProjectionConfig, ResamplerConfig

_LAYER = ".attn2"  # a cross-attention, in the block whose path `Conditioning.keys` has


class ImageProjection(nnx.Module):
    """The pooled vector of an image (B,I) -> tokens (B,T,D)."""

    def __init__(self, config: ImageProjectionConfig, rngs: nnx.Rngs):
        self.config = config
        width, tokens = config.cross_attention_dim, config.num_image_text_embeds
        self.image_embeds = Linear(config.image_embed_dim, tokens * width, rngs=rngs)
        self.norm = nnx.LayerNorm(width, epsilon=1e-5, rngs=rngs)

    def __call__(self, vectors: jax.Array) -> jax.Array:
        tokens = self.image_embeds(vectors)
        return self.norm(tokens.reshape(len(vectors), self.config.num_image_text_embeds, -1))


class ResamplerAttention(nnx.Module):
    """Attention of the queries (B,Q,C) to a context (B,S,C), without biases."""

    def __init__(self, config: ResamplerConfig, rngs: nnx.Rngs):
        width, inner = config.hidden_dims, config.heads * config.dim_head
        linear = partial(Linear, use_bias=False, rngs=rngs)
        self.heads = config.heads
        self.to_q, self.to_k, self.to_v = linear(width, inner), linear(width, inner), linear(width, inner)
        self.to_out = nnx.List([linear(inner, width)])

    def __call__(self, x, context):
        split = (self.to_q(x), self.to_k(context), self.to_v(context))
        out = attention(*(part.reshape(*part.shape[:2], self.heads, -1) for part in split))
        return self.to_out[0](out.reshape(*x.shape[:2], -1))


class GELU(nnx.Module):
    """A projection without bias, then the exact GELU."""

    def __init__(self, inputs: int, outputs: int, rngs: nnx.Rngs):
        self.proj = Linear(inputs, outputs, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return jax.nn.gelu(self.proj(x), approximate=False)


class ResamplerFeedForward(nnx.Module):
    """Two layers without bias. `net.1` is diffusers' dropout: it holds nothing."""

    def __init__(self, config: ResamplerConfig, rngs: nnx.Rngs):
        width, inner = config.hidden_dims, config.hidden_dims * config.ffn_ratio
        back = Linear(inner, width, use_bias=False, rngs=rngs)
        self.net = nnx.List([GELU(width, inner, rngs), None, back])

    def __call__(self, x):
        return self.net[2](self.net[0](x))


class ResamplerBlock(nnx.Module):
    """The queries attend to the image's tokens and to themselves; then a feed-forward of two layers."""

    def __init__(self, config: ResamplerConfig, rngs: nnx.Rngs):
        norm = partial(nnx.LayerNorm, config.hidden_dims, epsilon=1e-5, rngs=rngs)
        self.ln0, self.ln1 = norm(), norm()
        self.attn = ResamplerAttention(config, rngs)
        self.ff = nnx.List([norm(), ResamplerFeedForward(config, rngs)])

    def __call__(self, x, latents):
        queries = self.ln1(latents)
        latents += self.attn(queries, jnp.concatenate([self.ln0(x), queries], axis=1))
        return latents + self.ff[1](self.ff[0](latents))


class Resampler(nnx.Module):
    """States of an image's tokens (B,S,E) -> tokens (B,Q,D)."""

    def __init__(self, config: ResamplerConfig, rngs: nnx.Rngs):
        self.latents = nnx.Param(jnp.zeros((1, config.num_queries, config.hidden_dims)))
        self.proj_in = Linear(config.embed_dims, config.hidden_dims, rngs=rngs)
        self.layers = nnx.List([ResamplerBlock(config, rngs) for _ in range(config.depth)])
        self.proj_out = Linear(config.hidden_dims, config.output_dims, rngs=rngs)
        self.norm_out = nnx.LayerNorm(config.output_dims, epsilon=1e-5, rngs=rngs)

    def __call__(self, states: jax.Array) -> jax.Array:
        x = self.proj_in(states)
        latents = jnp.broadcast_to(self.latents[...], (len(x), *self.latents.shape[1:]))
        for layer in self.layers:
            latents = layer(x, latents)
        return self.norm_out(self.proj_out(latents))


def image_keys(
    config: EncoderConfig, layers: Mapping[str, jax.Array], tokens: jax.Array
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """An image's tokens (B,T,D) -> keys and values (B,T,N,K) by transformer block, as in `Conditioning.image_keys`.

    `layers` are `<attention>.processor.to_k_ip.0.kernel` and `to_v_ip` of each cross-attention. Strength times the
    values is strength times the attention.
    """

    def project(layer: "CrossAttention", part: str) -> jax.Array:
        x = tokens @ layers[f"{layer.path}.processor.to_{part}_ip.0.kernel"]
        return x.reshape(*x.shape[:2], layer.heads, -1)

    found = cross_attentions(config)
    return {layer.path.removesuffix(_LAYER): (project(layer, "k"), project(layer, "v")) for layer in found}


class CrossAttention(NamedTuple):
    """One cross-attention of a UNet: its path, its channels and its heads."""

    path: str
    channels: int
    heads: int


def cross_attentions(config: EncoderConfig) -> list[CrossAttention]:
    """A UNet's cross-attentions in the order of IP-Adapter files: down, up, middle."""
    levels, layers = range(config.levels), config.layers_per_block
    places = [
        (f"down_blocks.{i}.attentions.{j}", i, config.transformer_layers[i]) for i in levels for j in range(layers)
    ]
    up = ((number, config.levels - 1 - number) for number in levels)
    places += [
        (f"up_blocks.{number}.attentions.{j}", i, config.transformer_layers[i])
        for number, i in up
        for j in range(layers + 1)
    ]
    places.append(("mid_block.attentions.0", config.levels - 1, config.mid_layers))
    return [
        CrossAttention(f"{at}.transformer_blocks.{n}{_LAYER}", config.block_out_channels[i], config.heads[i])
        for at, i, blocks in places
        for n in range(blocks)
    ]
