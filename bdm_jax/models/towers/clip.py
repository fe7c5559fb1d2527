"""CLIP's text tower, which Stable Diffusion 1.5 and SDXL (with OpenCLIP's beside it) read English with, and its vision
tower, which IP-Adapters look at images with (Radford et al. 2021; transformers' CLIPTextModel, with and without
projection, and CLIPVisionModelWithProjection).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image

from bdm_jax.models.attention import attention, plain_attention
from bdm_jax.models.linear import Linear
from bdm_jax.models.towers.config import CLIPTextConfig, CLIPVisionConfig

_MEAN, _DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_FIRST_END_TOKEN = 2  # what configs written before transformers 4.30 say, whatever the vocabulary's end token is


def _quick_gelu(x):
    return x * jax.nn.sigmoid(1.702 * x)


def _gelu(x):
    return jax.nn.gelu(x, approximate=False)


_ACTIVATIONS = {"quick_gelu": _quick_gelu, "gelu": _gelu}


class TextOutput(NamedTuple):
    """What a text tower makes of token ids: states (B,S,D) and one pooled vector each (B,P)."""

    states: jax.Array
    pooled: jax.Array


class SelfAttention(nnx.Module):
    """Multi-head self-attention; a causal one's token attends to itself and to what stands before it."""

    def __init__(self, config: CLIPTextConfig | CLIPVisionConfig, rngs: nnx.Rngs):
        width = config.hidden_size
        self.heads, self.causal = config.num_attention_heads, isinstance(config, CLIPTextConfig)
        self.q_proj = Linear(width, width, rngs=rngs)
        self.k_proj = Linear(width, width, rngs=rngs)
        self.v_proj = Linear(width, width, rngs=rngs)
        self.out_proj = Linear(width, width, rngs=rngs)

    def __call__(self, x):
        query, key, value = (
            project(x).reshape(*x.shape[:2], self.heads, -1) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = plain_attention(query, key, value, causal=True) if self.causal else attention(query, key, value)
        return self.out_proj(out.reshape(x.shape))


class MLP(nnx.Module):
    """Two layers with CLIP's activation."""

    def __init__(self, config: CLIPTextConfig | CLIPVisionConfig, rngs: nnx.Rngs):
        self.activation = config.hidden_act
        self.fc1 = Linear(config.hidden_size, config.intermediate_size, rngs=rngs)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size, rngs=rngs)

    def __call__(self, x):
        return self.fc2(_ACTIVATIONS[self.activation](self.fc1(x)))


class CLIPLayer(nnx.Module):
    """Pre-norm transformer layer."""

    def __init__(self, config: CLIPTextConfig | CLIPVisionConfig, rngs: nnx.Rngs):
        self.layer_norm1 = nnx.LayerNorm(config.hidden_size, epsilon=config.layer_norm_eps, rngs=rngs)
        self.self_attn = SelfAttention(config, rngs)
        self.layer_norm2 = nnx.LayerNorm(config.hidden_size, epsilon=config.layer_norm_eps, rngs=rngs)
        self.mlp = MLP(config, rngs)

    def __call__(self, x):
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class CLIPEmbeddings(nnx.Module):
    """Token plus position embeddings."""

    def __init__(self, config: CLIPTextConfig, rngs: nnx.Rngs):
        self.token_embedding = nnx.Embed(config.vocab_size, config.hidden_size, rngs=rngs)
        self.position_embedding = nnx.Embed(config.max_position_embeddings, config.hidden_size, rngs=rngs)

    def __call__(self, ids):
        return self.token_embedding(ids) + self.position_embedding(jnp.arange(ids.shape[1]))


class CLIPStack(nnx.Module):
    """The layers, under transformers' name `encoder`."""

    def __init__(self, config: CLIPTextConfig | CLIPVisionConfig, rngs: nnx.Rngs):
        self.layers = nnx.List([CLIPLayer(config, rngs) for _ in range(config.num_hidden_layers)])


class CLIPTextTransformer(nnx.Module):
    """Everything, under transformers' name `text_model`."""

    def __init__(self, config: CLIPTextConfig, rngs: nnx.Rngs):
        self.embeddings = CLIPEmbeddings(config, rngs)
        self.encoder = CLIPStack(config, rngs)
        self.final_layer_norm = nnx.LayerNorm(config.hidden_size, epsilon=config.layer_norm_eps, rngs=rngs)


class CLIPText(nnx.Module):
    """Token ids (B,S) int32 -> states (B,S,D), and where asked for the pooled text."""

    def __init__(self, config: CLIPTextConfig, rngs: nnx.Rngs):
        self.config = config
        self.text_model = CLIPTextTransformer(config, rngs)
        if config.projection_dim is not None:
            self.text_projection = Linear(config.hidden_size, config.projection_dim, use_bias=False, rngs=rngs)

    def __call__(self, ids: jax.Array, layer: int = 1, final_norm: bool = True) -> jax.Array:
        """States of a layer counted from the last, 1 (`config.num_hidden_layers` + 1 is the embeddings), after the
        final norm or before it; layers above it are not computed. SDXL reads the penultimate layer, 2, before it.

        Raises:
            ValueError: there is no such layer.
        """
        states = self._layers(ids, self._depth(layer))[-1]
        return self.text_model.final_layer_norm(states) if final_norm else states

    def outputs(self, ids: jax.Array, layer: int = 1, final_norm: bool = True) -> TextOutput:
        """The states as above, and the pooled text: the last layer's state, normed, at the first end token, through
        the projection where the tower has one.
        """
        states = self._layers(ids, self.config.num_hidden_layers)
        chosen, last = states[self._depth(layer)], self.text_model.final_layer_norm(states[-1])
        if self.config.eos_token_id == _FIRST_END_TOKEN:  # transformers takes the largest id then
            end = jnp.argmax(ids, axis=1)
        else:
            end = jnp.argmax(ids == self.config.eos_token_id, axis=1)
        pooled = last[jnp.arange(len(ids)), end]
        if hasattr(self, "text_projection"):
            pooled = self.text_projection(pooled)
        if final_norm:
            chosen = last if layer == 1 else self.text_model.final_layer_norm(chosen)
        return TextOutput(chosen, pooled)

    def _depth(self, layer: int) -> int:
        if not 1 <= layer <= (layers := self.config.num_hidden_layers) + 1:
            raise ValueError(f"layer {layer} from the last: this tower has {layers}, and its embeddings before them")
        return self.config.num_hidden_layers + 1 - layer

    def _layers(self, ids: jax.Array, depth: int) -> list[jax.Array]:
        """The embeddings, and what each of the first `depth` layers returns."""
        states = [self.text_model.embeddings(ids)]
        for layer in list(self.text_model.encoder.layers)[:depth]:
            states.append(layer(states[-1]))
        return states


class PatchEmbeddings(nnx.Module):
    """Images in squares, each a token, behind one token for the whole; plus position embeddings."""

    def __init__(self, config: CLIPVisionConfig, rngs: nnx.Rngs):
        width, patch = config.hidden_size, (config.patch_size, config.patch_size)
        self.class_embedding = nnx.Param(jnp.zeros(width))
        self.patch_embedding = nnx.Conv(3, width, patch, strides=patch, padding="VALID", use_bias=False, rngs=rngs)
        self.position_embedding = nnx.Embed((config.image_size // config.patch_size) ** 2 + 1, width, rngs=rngs)

    def __call__(self, images):
        patches = self.patch_embedding(images)
        patches = patches.reshape(len(images), -1, patches.shape[-1])
        whole = jnp.broadcast_to(self.class_embedding[...], (len(images), 1, patches.shape[-1])).astype(patches.dtype)
        tokens = jnp.concatenate([whole, patches], axis=1)
        return tokens + self.position_embedding(jnp.arange(tokens.shape[1]))


class CLIPVisionTransformer(nnx.Module):
    """Everything but the projection, under transformers' name `vision_model` (the spelling of pre_layrnorm is its)."""

    def __init__(self, config: CLIPVisionConfig, rngs: nnx.Rngs):
        self.embeddings = PatchEmbeddings(config, rngs)
        self.pre_layrnorm = nnx.LayerNorm(config.hidden_size, epsilon=config.layer_norm_eps, rngs=rngs)
        self.post_layernorm = nnx.LayerNorm(config.hidden_size, epsilon=config.layer_norm_eps, rngs=rngs)
        self.encoder = CLIPStack(config, rngs)


class CLIPVision(nnx.Module):
    """Images (B,S,S,3), normalised as `normalised` does -> the projected vector of the whole (B,P), and the states of
    the penultimate layer (B, 1 + patches, D).
    """

    def __init__(self, config: CLIPVisionConfig, rngs: nnx.Rngs):
        self.config = config
        self.vision_model = CLIPVisionTransformer(config, rngs)
        self.visual_projection = Linear(config.hidden_size, config.projection_dim, use_bias=False, rngs=rngs)

    def __call__(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        model = self.vision_model
        x = before = model.pre_layrnorm(model.embeddings(images))
        for layer in model.encoder.layers:
            before, x = x, layer(x)
        return self.visual_projection(model.post_layernorm(x[:, 0])), before


def normalised(pixels: np.ndarray, side: int) -> np.ndarray:
    """An image (H,W,3) uint8 -> (side,side,3) fp32 as CLIP's image processor has it: the shorter side to size by
    bicubic interpolation, the middle of the longer, channels at zero mean and unit variance over CLIP's set.
    """
    height, width = pixels.shape[:2]
    scale = side / min(height, width)
    size = (side, int(scale * height)) if width <= height else (int(scale * width), side)
    image = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
    left, top = ((edge - side) // 2 for edge in size)
    pixels = np.asarray(image.crop((left, top, left + side, top + side)), np.float32) / 255
    return (pixels - np.array(_MEAN, np.float32)) / np.array(_DEVIATION, np.float32)
