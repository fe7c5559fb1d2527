"""IP-Adapter (Ye et al. 2023, arXiv 2308.06721; diffusers' names): a picture as a second context of cross-attention.

A CLIP vision tower reads the picture; `ImageProjection` (base) makes a few tokens of its pooled vector, `Resampler`
(Plus) of its last but one layer's states. Every cross-attention has keys and values of its own for them.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bdm_jax.models.attention import attention
from bdm_jax.models.unet.config import EncoderConfig, ImageProjectionConfig, ResamplerConfig

_LAYER = ".attn2"  # a cross-attention, in the block whose path `Conditioning.keys` has

_HEAD = 64  # channels of a Resampler's head in all published files


class ImageProjection(nnx.Module):
    """The pooled vector of a picture (B,I) -> tokens (B,T,D)."""

    def __init__(self, config: ImageProjectionConfig, rngs: nnx.Rngs):
        self.config = config
        width, tokens = config.cross_attention_dim, config.num_image_text_embeds
        self.image_embeds = nnx.Linear(config.image_embed_dim, tokens * width, rngs=rngs)
        self.norm = nnx.LayerNorm(width, epsilon=1e-5, rngs=rngs)

    def __call__(self, vectors: jax.Array) -> jax.Array:
        tokens = self.image_embeds(vectors)
        return self.norm(tokens.reshape(len(vectors), self.config.num_image_text_embeds, -1))


class ResamplerAttention(nnx.Module):
    """Attention of the queries (B,Q,C) to a context (B,S,C), without biases."""

    def __init__(self, config: ResamplerConfig, rngs: nnx.Rngs):
        width, inner = config.hidden_dims, config.heads * config.dim_head
        linear = partial(nnx.Linear, use_bias=False, rngs=rngs)
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
        self.proj = nnx.Linear(inputs, outputs, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return jax.nn.gelu(self.proj(x), approximate=False)


class ResamplerFeedForward(nnx.Module):
    """Two layers without bias. `net.1` is diffusers' dropout: it holds nothing."""

    def __init__(self, config: ResamplerConfig, rngs: nnx.Rngs):
        width, inner = config.hidden_dims, config.hidden_dims * config.ffn_ratio
        back = nnx.Linear(inner, width, use_bias=False, rngs=rngs)
        self.net = nnx.List([GELU(width, inner, rngs), None, back])

    def __call__(self, x):
        return self.net[2](self.net[0](x))


class ResamplerBlock(nnx.Module):
    """The queries attend to the picture's tokens and to themselves; then a feed-forward of two layers."""

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
    """States of a picture's tokens (B,S,E) -> tokens (B,Q,D)."""

    def __init__(self, config: ResamplerConfig, rngs: nnx.Rngs):
        self.latents = nnx.Param(jnp.zeros((1, config.num_queries, config.hidden_dims)))
        self.proj_in = nnx.Linear(config.embed_dims, config.hidden_dims, rngs=rngs)
        self.layers = nnx.List([ResamplerBlock(config, rngs) for _ in range(config.depth)])
        self.proj_out = nnx.Linear(config.hidden_dims, config.output_dims, rngs=rngs)
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
    """A picture's tokens (B,T,D) -> keys and values (B,T,N,K) by transformer, as `Conditioning.image_keys` has them.

    `layers` are those of `from_original`, in our layouts. Strength times the values is strength times the attention.
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


def from_original(
    tensors: Mapping[str, Any], unet: EncoderConfig
) -> tuple[ImageProjectionConfig | ResamplerConfig, dict[str, np.ndarray], dict[str, np.ndarray]]:
    """A file of IP-Adapter's authors, dotted names or nested dicts, in diffusers' names; PyTorch's layouts throughout.

    Returns the projection's config and tensors (for `tree_from_torch`), and the cross-attentions' `to_k_ip` and
    `to_v_ip` by `<attention>.processor.to_k_ip.0.weight`. Raises ValueError, in one line, for another variant and for
    layers that are missing, unknown or of another width than the backbone's.
    """
    nested = [(name, part) for name, part in tensors.items() if isinstance(part, Mapping)]
    tensors = {name: part for name, part in tensors.items() if not isinstance(part, Mapping)}
    tensors |= {f"{name}.{key}": array for name, part in nested for key, array in part.items()}
    projection = {key.removeprefix("image_proj."): a for key, a in tensors.items() if key.startswith("image_proj.")}
    layers = {key.removeprefix("ip_adapter."): a for key, a in tensors.items() if key.startswith("ip_adapter.")}
    if not projection or len(projection) + len(layers) < len(tensors):
        raise ValueError("not an IP-Adapter: expected image_proj.* and ip_adapter.*, nothing else")
    try:
        config, projection = _projection(projection)
    except (LookupError, TypeError, ZeroDivisionError, AttributeError) as error:
        raise ValueError(f"its image projection is damaged: {error}") from error
    names = {}
    for n, layer in enumerate(cross_attentions(unet)):
        names |= {f"{2 * n + 1}.to_{x}_ip.weight": f"{layer.path}.processor.to_{x}_ip.0.weight" for x in "kv"}
    if wrong := sorted(names.keys() ^ layers.keys()):
        raise ValueError(f"its cross-attentions are not this backbone's: ip_adapter.{wrong[0]} ({len(wrong)} in all)")
    width = config.cross_attention_dim if isinstance(config, ImageProjectionConfig) else config.output_dims
    if width != unet.cross_attention_dim:
        raise ValueError(
            f"made for another base model: its width is {width}, the backbone's {unet.cross_attention_dim}"
        )
    for n, (path, channels, _) in enumerate(cross_attentions(unet)):
        for key in (f"{2 * n + 1}.to_{x}_ip.weight" for x in "kv"):
            if np.shape(layers[key]) != (channels, width):
                found = f"ip_adapter.{key} has the shape {np.shape(layers[key])}"
                raise ValueError(f"made for another base model: {found}, {path} here takes {(channels, width)}")
    return config, projection, {names[key]: array for key, array in layers.items()}


def _projection(found: Mapping[str, np.ndarray]) -> tuple[Any, dict[str, np.ndarray]]:
    if "proj.weight" in found:
        (width,), (rows, inputs) = found["norm.weight"].shape, found["proj.weight"].shape
        config = ImageProjectionConfig(inputs, width, rows // width)
        return config, {key.replace("proj.", "image_embeds."): array for key, array in found.items()}
    if "latents" not in found:
        faces = "perceiver_resampler.proj_in.weight" in found or "proj.0.weight" in found
        kind = "a full-face or FaceID" if faces else "an unknown"
        raise ValueError(f"{kind} IP-Adapter; this library has the base one and Plus")
    hidden, inputs = found["proj_in.weight"].shape
    inner = found["layers.0.0.to_q.weight"].shape[0]
    config = ResamplerConfig(
        embed_dims=inputs,
        output_dims=found["proj_out.weight"].shape[0],
        hidden_dims=hidden,
        depth=len({key.split(".")[1] for key in found if key.startswith("layers.")}),
        dim_head=_HEAD,
        heads=inner // _HEAD,
        num_queries=found["latents"].shape[1],
        ffn_ratio=found["layers.0.1.1.weight"].shape[0] // hidden,
    )
    tensors = {}
    for key, array in found.items():
        for old, new in _RESAMPLER:
            key = key.replace(old, new)
        if ".attn.to_kv." in key:  # k above v
            tensors |= {key.replace("to_kv", f"to_{x}"): half for x, half in zip("kv", np.split(array, 2), strict=True)}
        else:
            tensors[key] = array
    return config, tensors


# Parts of names in a Resampler, the longer first.
_RESAMPLER = (
    (".0.norm1.", ".ln0."),
    (".0.norm2.", ".ln1."),
    (".0.to_out.", ".attn.to_out.0."),
    (".0.to_", ".attn.to_"),
    (".1.0.", ".ff.0."),
    (".1.1.weight", ".ff.1.net.0.proj.weight"),
    (".1.3.weight", ".ff.1.net.2.weight"),
)
