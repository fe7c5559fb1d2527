"""What a prompt becomes before a network reads it."""

from dataclasses import dataclass

import jax


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Conditioning:
    """Text as the networks read it; absent parts are None.

    tokens: (B, S, D) states of a text tower.
    mask:   (B, S) bool, False at padding that must not be attended; None attends to all (what the published weights
    live with).
    """

    tokens: jax.Array
    mask: jax.Array | None = None
