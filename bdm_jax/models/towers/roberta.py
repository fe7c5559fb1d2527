"""Chinese-CLIP's text tower: BERT's encoder with RoBERTa-wwm weights (transformers' ChineseCLIPTextModel without
pooler).
"""

import jax
import jax.numpy as jnp
from flax import nnx

from bdm_jax.models.attention import attention
from bdm_jax.models.linear import Linear
from bdm_jax.models.towers.clip import TextOutput
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
    """Token ids (B,S) int32 -> states (B,S,D), and where asked for the pooled text. `mask` None attends to padding too,
    as BDM1.0 does.
    """

    def __init__(self, config: RobertaConfig, rngs: nnx.Rngs):
        self.config = config
        self.embeddings = RobertaEmbeddings(config, rngs)
        self.encoder = RobertaStack(config, rngs)
        if config.projection_dim is not None:
            self.text_projection = Linear(config.hidden_size, config.projection_dim, use_bias=False, rngs=rngs)

    def __call__(self, ids: jax.Array, mask: jax.Array | None = None, layer: int = 1) -> jax.Array:
        """States of a layer counted from the last, 1; layers above it are not computed. Raises ValueError for a layer
        that is not there.
        """
        return self._layers(ids, mask, self._depth(layer))[-1]

    def outputs(self, ids: jax.Array, mask: jax.Array | None = None, layer: int = 1) -> TextOutput:
        """The states as above, and the pooled text: the last layer's state of the first token, [CLS], through the
        projection where the tower has one (transformers' `get_text_features`).
        """
        states = self._layers(ids, mask, self.config.num_hidden_layers)
        pooled = states[-1][:, 0]
        if hasattr(self, "text_projection"):
            pooled = self.text_projection(pooled)
        return TextOutput(states[self._depth(layer)], pooled)

    def _depth(self, layer: int) -> int:
        if not 1 <= layer <= (layers := self.config.num_hidden_layers) + 1:
            raise ValueError(f"layer {layer} from the last: this tower has {layers}, and its embeddings before them")
        return layers + 1 - layer

    def _layers(self, ids: jax.Array, mask: jax.Array | None, depth: int) -> list[jax.Array]:
        """The embeddings, and what each of the first `depth` layers returns."""
        states = [self.embeddings(ids)]
        for layer in list(self.encoder.layer)[:depth]:
            states.append(layer(states[-1], mask))
        return states
