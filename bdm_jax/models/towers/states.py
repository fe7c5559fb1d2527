"""Texts that were read before, in their text encoder's place: a tower of 12 GB need not be there to draw pictures."""

import jax
import jax.numpy as jnp
from flax import nnx

from bdm_jax.models.towers.clip import TextOutput
from bdm_jax.models.towers.config import TextStatesConfig


class TextStates(nnx.Module):
    """Token ids (B,S) int32 -> the states (B,S,D) and the pooled text (B,P) that were kept of them; NaN for ids that
    are not among the texts. Mask, positions, layer and norm are those that the texts were read with.
    """

    def __init__(self, config: TextStatesConfig, rngs: nnx.Rngs):
        shape = config.texts, config.length
        self.texts = nnx.Param(jnp.zeros(shape, jnp.int32))
        self.states = nnx.Param(jnp.zeros((*shape, config.hidden_size)))
        if config.projection_dim is not None:
            self.pooled = nnx.Param(jnp.zeros((config.texts, config.projection_dim)))

    def __call__(self, ids: jax.Array, *_: jax.Array, **how) -> jax.Array:
        return self._kept(ids, self.states[...])

    def outputs(self, ids: jax.Array, *_: jax.Array, **how) -> TextOutput:
        """States and pooled text."""
        return TextOutput(self._kept(ids, self.states[...]), self._kept(ids, self.pooled[...]))

    def _kept(self, ids, values):
        same = (ids[:, None] == self.texts[...]).all(axis=-1)
        known = same.any(axis=1).reshape(-1, *(1,) * (values.ndim - 1))
        return jnp.where(known, values[jnp.argmax(same, axis=1)], jnp.nan)
