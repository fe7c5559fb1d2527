"""ChatGLM3 as a text encoder, which Kolors reads with (THUDM/chatglm3-6b-base; diffusers' ChatGLMModel): a causal
decoder with multi-query attention, positions by rotation, RMS norms and a gated feed-forward.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from bdm_jax.models.linear import Linear, activation_dtype
from bdm_jax.models.towers.clip import TextOutput
from bdm_jax.models.towers.config import ChatGLMConfig

_THETA = 10000.0


class RMSNorm(nnx.Module):
    """x / sqrt(mean(x^2) + epsilon) in fp32, times a scale: (...,D) -> (...,D) in fp32."""

    def __init__(self, config: ChatGLMConfig):
        self.epsilon = config.layernorm_epsilon
        self.scale = nnx.Param(jnp.ones(config.hidden_size))

    def __call__(self, x):
        x = x.astype(jnp.float32)
        return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.epsilon) * self.scale[...]


class MultiQueryAttention(nnx.Module):
    """Attention whose keys and values are shared by groups of heads. Of a head, the first half of its channels is
    rotated by the token's place, in pairs of neighbours (arXiv 2104.09864).
    """

    def __init__(self, config: ChatGLMConfig, rngs: nnx.Rngs):
        self.config = config
        width = config.num_attention_heads * config.kv_channels
        groups = config.multi_query_group_num * config.kv_channels
        self.query_key_value = Linear(config.hidden_size, width + 2 * groups, rngs=rngs)
        self.dense = Linear(width, config.hidden_size, use_bias=False, rngs=rngs)

    def __call__(self, x, positions, visible):
        """x (B,S,D), positions (B,S), visible (B,S,S) bool, from query to key -> (B,S,D)."""
        channels, groups = self.config.kv_channels, self.config.multi_query_group_num
        fused = self.query_key_value(x).reshape(*x.shape[:2], -1, channels)
        heads = self.config.num_attention_heads
        query, key, value = jnp.split(fused, (heads, heads + groups), axis=2)
        query, key = rotate(query, positions), rotate(key, positions)
        query = query.reshape(*query.shape[:2], groups, -1, channels)  # heads of a group
        scores = jnp.einsum("btgnk,bsgk->bgnts", query, key, preferred_element_type=jnp.float32) / math.sqrt(channels)
        scores = jnp.where(visible[:, None, None], scores, jnp.finfo(scores.dtype).min)
        weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
        mixed = jnp.einsum("bgnts,bsgk->btgnk", weights, value, preferred_element_type=jnp.float32)
        return self.dense(mixed.astype(value.dtype).reshape(*x.shape[:2], -1))


class GatedMLP(nnx.Module):
    """silu(a) b through a layer back, where [a|b] is one layer of the input."""

    def __init__(self, config: ChatGLMConfig, rngs: nnx.Rngs):
        self.dense_h_to_4h = Linear(config.hidden_size, 2 * config.intermediate_size, use_bias=False, rngs=rngs)
        self.dense_4h_to_h = Linear(config.intermediate_size, config.hidden_size, use_bias=False, rngs=rngs)

    def __call__(self, x):
        gate, value = jnp.split(self.dense_h_to_4h(x), 2, axis=-1)
        return self.dense_4h_to_h(jax.nn.silu(gate) * value)


class GLMBlock(nnx.Module):
    """Pre-norm transformer layer."""

    def __init__(self, config: ChatGLMConfig, rngs: nnx.Rngs):
        self.input_layernorm = RMSNorm(config)
        self.self_attention = MultiQueryAttention(config, rngs)
        self.post_attention_layernorm = RMSNorm(config)
        self.mlp = GatedMLP(config, rngs)

    def __call__(self, x, positions, visible):
        x = x + self.self_attention(self.input_layernorm(x).astype(x.dtype), positions, visible)
        return x + self.mlp(self.post_attention_layernorm(x).astype(x.dtype))


class WordEmbeddings(nnx.Module):
    """The table of words, under the name `embedding` that the files have."""

    def __init__(self, config: ChatGLMConfig, rngs: nnx.Rngs):
        self.word_embeddings = nnx.Embed(config.vocab_size, config.hidden_size, rngs=rngs)


class GLMStack(nnx.Module):
    """The layers, and the norm behind them that a text encoder does not use, under the name `encoder`."""

    def __init__(self, config: ChatGLMConfig, rngs: nnx.Rngs):
        self.layers = nnx.List([GLMBlock(config, rngs) for _ in range(config.num_hidden_layers)])
        self.final_layernorm = RMSNorm(config)


class ChatGLM(nnx.Module):
    """Token ids (B,S) int32 with their padding first -> states (B,S,D), and where asked for the pooled text; no norm
    follows the layers.

    mask: (B,S) bool, False at padding; positions: (B,S) int32, 0 at padding; without them all is content. A token sees
    the content up to itself; padding sees everything, and its states, which Kolors' UNet reads too, are of that.
    """

    def __init__(self, config: ChatGLMConfig, rngs: nnx.Rngs):
        self.config = config
        self.embedding = WordEmbeddings(config, rngs)
        self.encoder = GLMStack(config, rngs)

    def __call__(
        self, ids: jax.Array, mask: jax.Array | None = None, positions: jax.Array | None = None, layer: int = 1
    ) -> jax.Array:
        """States of a layer counted from the last, 1; layers above it are not computed.

        Raises:
            ValueError: there is no such layer.
        """
        return self._layers(ids, mask, positions, self._depth(layer))[-1]

    def outputs(
        self, ids: jax.Array, mask: jax.Array | None = None, positions: jax.Array | None = None, layer: int = 1
    ) -> TextOutput:
        """The states as above, and the pooled text: the last layer's state at the last place."""
        states = self._layers(ids, mask, positions, self.config.num_hidden_layers)
        return TextOutput(states[self._depth(layer)], states[-1][:, -1])

    def _depth(self, layer: int) -> int:
        if not 1 <= layer <= (layers := self.config.num_hidden_layers) + 1:
            raise ValueError(f"layer {layer} from the last: this tower has {layers}, and its embeddings before them")
        return layers + 1 - layer

    def _layers(self, ids, mask, positions, depth) -> list[jax.Array]:
        """The embeddings, and what each of the first `depth` layers returns."""
        length = ids.shape[1]
        mask = jnp.ones(ids.shape, bool) if mask is None else mask
        positions = jnp.broadcast_to(jnp.arange(length), ids.shape) if positions is None else positions
        visible = jnp.tri(length, dtype=bool) & mask[:, None, :] | ~mask[:, :, None]
        words = self.embedding.word_embeddings(ids)
        states = [words.astype(activation_dtype(words.dtype))]
        for layer in list(self.encoder.layers)[:depth]:
            states.append(layer(states[-1], positions, visible))
        return states


def rotate(x: jax.Array, positions: jax.Array) -> jax.Array:
    """The first half of the channels of x (B,S,N,K) turned, as pairs of neighbours, by angles position * theta_i."""
    half = x.shape[-1] // 2
    theta = _THETA ** -(jnp.arange(0, half, 2, dtype=jnp.float32) / half)
    angles = positions[:, :, None, None].astype(jnp.float32) * theta
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    even, odd = x[..., :half:2].astype(jnp.float32), x[..., 1:half:2].astype(jnp.float32)
    turned = jnp.stack([even * cos - odd * sin, odd * cos + even * sin], axis=-1).reshape(*x.shape[:-1], half)
    return jnp.concatenate([turned.astype(x.dtype), x[..., half:]], axis=-1)
