"""CLIP's text tower, the one Stable Diffusion 1.5 reads English with, and its vision tower, which IP-Adapters look at
pictures with (Radford et al. 2021; transformers' CLIPTextModel and CLIPVisionModelWithProjection).
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image

from bdm_jax.models.attention import attention, plain_attention
from bdm_jax.models.config import CLIPTextConfig, CLIPVisionConfig

_MEAN, _DEVIATION = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_ACTIVATIONS = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
}


class SelfAttention(nnx.Module):
    """Multi-head self-attention; a causal one's token sees itself and what stands before it."""

    def __init__(self, config: CLIPTextConfig | CLIPVisionConfig, rngs: nnx.Rngs):
        width = config.hidden_size
        self.heads, self.causal = config.num_attention_heads, isinstance(config, CLIPTextConfig)
        self.q_proj = nnx.Linear(width, width, rngs=rngs)
        self.k_proj = nnx.Linear(width, width, rngs=rngs)
        self.v_proj = nnx.Linear(width, width, rngs=rngs)
        self.out_proj = nnx.Linear(width, width, rngs=rngs)

    def __call__(self, x):
        split = lambda y: y.reshape(*y.shape[:2], self.heads, -1)  # noqa: E731
        query, key, value = split(self.q_proj(x)), split(self.k_proj(x)), split(self.v_proj(x))
        out = plain_attention(query, key, value, causal=True) if self.causal else attention(query, key, value)
        return self.out_proj(out.reshape(x.shape))


class MLP(nnx.Module):
    """Two layers with CLIP's activation."""

    def __init__(self, config: CLIPTextConfig | CLIPVisionConfig, rngs: nnx.Rngs):
        self.activation = config.hidden_act
        self.fc1 = nnx.Linear(config.hidden_size, config.intermediate_size, rngs=rngs)
        self.fc2 = nnx.Linear(config.intermediate_size, config.hidden_size, rngs=rngs)

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
    """Token ids (B,S) int32 -> states (B,S,D): the last layer's output after the final norm."""

    def __init__(self, config: CLIPTextConfig, rngs: nnx.Rngs):
        self.config = config
        self.text_model = CLIPTextTransformer(config, rngs)

    def __call__(self, ids: jax.Array) -> jax.Array:
        x = self.text_model.embeddings(ids)
        for layer in self.text_model.encoder.layers:
            x = layer(x)
        return self.text_model.final_layer_norm(x)


class PatchEmbeddings(nnx.Module):
    """Pictures in squares, each a token, behind one token for the whole; plus position embeddings."""

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
        norm = lambda: nnx.LayerNorm(config.hidden_size, epsilon=config.layer_norm_eps, rngs=rngs)  # noqa: E731
        self.embeddings = PatchEmbeddings(config, rngs)
        self.pre_layrnorm, self.post_layernorm = norm(), norm()
        self.encoder = CLIPStack(config, rngs)


class CLIPVision(nnx.Module):
    """Pictures (B,S,S,3), normalised as `normalised` does -> the projected vector of the whole (B,P), and the states of
    the last layer but one (B, 1 + patches, D).
    """

    def __init__(self, config: CLIPVisionConfig, rngs: nnx.Rngs):
        self.config = config
        self.vision_model = CLIPVisionTransformer(config, rngs)
        self.visual_projection = nnx.Linear(config.hidden_size, config.projection_dim, use_bias=False, rngs=rngs)

    def __call__(self, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        model = self.vision_model
        x = before = model.pre_layrnorm(model.embeddings(images))
        for layer in model.encoder.layers:
            before, x = x, layer(x)
        return self.visual_projection(model.post_layernorm(x[:, 0])), before


def normalised(picture: np.ndarray, side: int) -> np.ndarray:
    """A picture (H,W,3) uint8 -> (side,side,3) fp32 as CLIP's image processor has it: the shorter side to size by
    bicubic interpolation, the middle of the longer, channels at zero mean and unit variance over CLIP's set.
    """
    height, width = picture.shape[:2]
    scale = side / min(height, width)
    size = (side, int(scale * height)) if width <= height else (int(scale * width), side)
    image = Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC)
    left, top = ((edge - side) // 2 for edge in size)
    pixels = np.asarray(image.crop((left, top, left + side, top + side)), np.float32) / 255
    return (pixels - np.array(_MEAN, np.float32)) / np.array(_DEVIATION, np.float32)
