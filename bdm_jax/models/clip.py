"""CLIP's text tower, the one Stable Diffusion 1.5 reads English with (Radford et al. 2021; transformers'
CLIPTextModel).
"""

import jax
import jax.numpy as jnp
from flax import nnx

from bdm_jax.models.config import CLIPTextConfig

_ACTIVATIONS = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
}


class CausalAttention(nnx.Module):
    """Multi-head self-attention in which a token sees itself and what stands before it."""

    def __init__(self, config: CLIPTextConfig, rngs: nnx.Rngs):
        width = config.hidden_size
        self.heads = config.num_attention_heads
        self.q_proj = nnx.Linear(width, width, rngs=rngs)
        self.k_proj = nnx.Linear(width, width, rngs=rngs)
        self.v_proj = nnx.Linear(width, width, rngs=rngs)
        self.out_proj = nnx.Linear(width, width, rngs=rngs)

    def __call__(self, x):
        split = lambda y: y.reshape(*y.shape[:2], self.heads, -1)  # noqa: E731
        query, key, value = split(self.q_proj(x)), split(self.k_proj(x)), split(self.v_proj(x))
        out = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        return self.out_proj(out.reshape(x.shape))


class MLP(nnx.Module):
    """Two layers with CLIP's activation."""

    def __init__(self, config: CLIPTextConfig, rngs: nnx.Rngs):
        self.activation = config.hidden_act
        self.fc1 = nnx.Linear(config.hidden_size, config.intermediate_size, rngs=rngs)
        self.fc2 = nnx.Linear(config.intermediate_size, config.hidden_size, rngs=rngs)

    def __call__(self, x):
        return self.fc2(_ACTIVATIONS[self.activation](self.fc1(x)))


class CLIPLayer(nnx.Module):
    """Pre-norm transformer layer."""

    def __init__(self, config: CLIPTextConfig, rngs: nnx.Rngs):
        self.layer_norm1 = nnx.LayerNorm(config.hidden_size, epsilon=config.layer_norm_eps, rngs=rngs)
        self.self_attn = CausalAttention(config, rngs)
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

    def __init__(self, config: CLIPTextConfig, rngs: nnx.Rngs):
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
