"""Token merging (Bolya and Hoffman 2023, arXiv 2303.17604): self-attention over fewer tokens, an approximation.

One token of every 2x2 cell stays, always the one on the top left, so that an image does not depend on chance; of the
others, those that are most like one that stays are merged into it. Attention reads and answers the means; every token
that went into one takes its answer. (The paper's code picks the token that stays at random.)
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True)
class Merging:
    """Which of the `count` merged tokens each of T tokens goes into: `place` (B,T) int32."""

    place: jax.Array
    count: int

    def mean(self, x: jax.Array) -> jax.Array:
        """Tokens (B,T,C) -> merged ones (B,count,C), each the mean of what went into it (summed in fp32)."""
        total = jax.vmap(lambda rows, place: jax.ops.segment_sum(rows, place, self.count))
        sizes = total(jnp.ones((*self.place.shape, 1), jnp.float32), self.place)
        return (total(x.astype(jnp.float32), self.place) / sizes).astype(x.dtype)

    def restore(self, y: jax.Array) -> jax.Array:
        """Merged tokens (B,count,C) -> (B,T,C), each token with what it went into."""
        return jnp.take_along_axis(y, self.place[..., None], axis=1)


def match(x: jax.Array, size: tuple[int, int], ratio: float) -> Merging:
    """The tokens x (B,T,C) of a map of `size` (H,W), T = H W, so merged that the share `ratio` of them is gone.

    At most three quarters can go (all but those that stay); likeness is the cosine.
    """
    stays = np.zeros(size, bool)
    stays[::2, ::2] = True
    stays = stays.reshape(-1)
    kept, others = np.flatnonzero(stays), np.flatnonzero(~stays)
    gone = min(int(ratio * stays.size), len(others))
    x = x.astype(jnp.float32)
    unit = x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-12)
    likeness = jnp.einsum("bsc,bdc->bsd", unit[:, others], unit[:, kept])
    rank = jnp.argsort(jnp.argsort(-jnp.max(likeness, axis=-1), axis=-1), axis=-1)  # the most alike first
    own = len(kept) + rank - gone  # where the tokens that are not merged go
    place = jnp.zeros((len(x), stays.size), jnp.int32).at[:, kept].set(np.arange(len(kept)))
    place = place.at[:, others].set(jnp.where(rank < gone, jnp.argmax(likeness, axis=-1), own))
    return Merging(place, stays.size - gone)
