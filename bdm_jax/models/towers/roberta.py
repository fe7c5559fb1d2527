"""Chinese-CLIP's text tower: BERT's encoder with RoBERTa-wwm weights (transformers' ChineseCLIPTextModel without
pooler).
"""

import jax
import jax.numpy as jnp
from flax import nnx

from bdm_jax.models.attention import attention
from bdm_jax.models.linear import Linear
from bdm_jax.models.towers.config import RobertaConfig


def _norm(config: RobertaConfig, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(config.hidden_size, epsilon=config.layer_norm_eps, rngs=rngs)


class RobertaEmbeddings(nnx.Module):
    """Word, position and type embeddings, summed and normalised; all type ids are 0."""

    def __init__(self, config: RobertaConfig, rngs: nnx.Rngs):
        width = config.hidden_size
        self.word_embeddings = nnx.Embed(config.vocab_size, width, rngs=rngs)
        self.position_embeddings = nnx.Embed(config.max_position_embeddings, width, rngs=rngs)
        self.token_type_embeddings = nnx.Embed(config.type_vocab_size, width, rngs=rngs)
        self.LayerNorm = _norm(config, rngs)

    def __call__(self, ids):
        position = self.position_embeddings(jnp.arange(ids.shape[1]))
        kind = self.token_type_embeddings(jnp.zeros_like(ids))
        return self.LayerNorm(self.word_embeddings(ids) + kind + position)


class Projections(nnx.Module):
    """BERT's `attention.self`: query, key and value."""

    def __init__(self, config: RobertaConfig, rngs: nnx.Rngs):
        width = config.hidden_size
        self.query = Linear(width, width, rngs=rngs)
        self.key = Linear(width, width, rngs=rngs)
        self.value = Linear(width, width, rngs=rngs)


class Output(nnx.Module):
    """BERT's `output`: a layer, added to the input, normalised after (post-norm)."""

    def __init__(self, width: int, config: RobertaConfig, rngs: nnx.Rngs):
        self.dense = Linear(width, config.hidden_size, rngs=rngs)
        self.LayerNorm = _norm(config, rngs)

    def __call__(self, x, residual):
        return self.LayerNorm(self.dense(x) + residual)


class BertSelfAttention(nnx.Module):
    """Multi-head self-attention over all tokens, or over those that `mask` (B,S) leaves visible."""

    def __init__(self, config: RobertaConfig, rngs: nnx.Rngs):
        self.heads = config.num_attention_heads
        self.self = Projections(config, rngs)
        self.output = Output(config.hidden_size, config, rngs)

    def __call__(self, x, mask):
        projections = self.self.query, self.self.key, self.self.value
        out = attention(*(project(x).reshape(*x.shape[:2], self.heads, -1) for project in projections), mask)
        return self.output(out.reshape(x.shape), x)


class Intermediate(nnx.Module):
    """BERT's `intermediate`: the wide layer with an exact GELU."""

    def __init__(self, config: RobertaConfig, rngs: nnx.Rngs):
        self.dense = Linear(config.hidden_size, config.intermediate_size, rngs=rngs)

    def __call__(self, x):
        return jax.nn.gelu(self.dense(x), approximate=False)


class RobertaLayer(nnx.Module):
    """Post-norm transformer layer."""

    def __init__(self, config: RobertaConfig, rngs: nnx.Rngs):
        self.attention = BertSelfAttention(config, rngs)
        self.intermediate = Intermediate(config, rngs)
        self.output = Output(config.intermediate_size, config, rngs)

    def __call__(self, x, mask):
        x = self.attention(x, mask)
        return self.output(self.intermediate(x), x)


class RobertaStack(nnx.Module):
    """The layers, under transformers' name `encoder`."""

    def __init__(self, config: RobertaConfig, rngs: nnx.Rngs):
        self.layer = nnx.List([RobertaLayer(config, rngs) for _ in range(config.num_hidden_layers)])


class Roberta(nnx.Module):
    """Token ids (B,S) int32 -> states (B,S,D), the last layer's output. `mask` None attends to padding too, as BDM1.0
    does.
    """

    def __init__(self, config: RobertaConfig, rngs: nnx.Rngs):
        self.config = config
        self.embeddings = RobertaEmbeddings(config, rngs)
        self.encoder = RobertaStack(config, rngs)

    def __call__(self, ids: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        x = self.embeddings(ids)
        for layer in self.encoder.layer:
            x = layer(x, mask)
        return x
