"""What a prompt becomes before a network reads it."""

from dataclasses import dataclass, replace

import jax


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Conditioning:
    """Text as a network reads it; absent parts are None.

    tokens: (B, S, D) states of a text tower.
    mask:   (B, S) bool, False at padding that must not be attended; None attends to all (what the published weights
    live with).
    keys:   for each cross-attention, by its path, the keys and values (B, S, N, K) that it makes of the tokens
            (`UNetEncoder.with_keys`): made once for all steps, for this network only. `at` leaves one pair.
    image_keys: keys and values likewise that IP-Adapters make of pictures (`ip_adapter.image_keys`), for each
            cross-attention a list of pairs; read beside the text's.
    """

    tokens: jax.Array
    mask: jax.Array | None = None
    keys: dict[str, tuple[jax.Array, jax.Array]] | tuple[jax.Array, jax.Array] | None = None
    image_keys: dict[str, list[tuple[jax.Array, jax.Array]]] | list[tuple[jax.Array, jax.Array]] | None = None

    def at(self, path: str) -> "Conditioning":
        """What the transformer at this path reads."""
        parts = {name: part for name in ("keys", "image_keys") if (part := getattr(self, name)) is not None}
        return replace(self, **{name: part[path] for name, part in parts.items()})
