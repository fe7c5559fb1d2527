"""What a prompt becomes before a network reads it."""

from dataclasses import dataclass, replace

import jax


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Conditioning:
    """Text as a network reads it; absent parts are None.

    tokens: (B, S, D) states of a text encoder.
    mask:   (B, S) bool, False at padding that must not be attended to; None attends to all (what the published weights
            live with).
    pooled: (B, P) one vector of the whole text, added to the time embedding where a network does that (SDXL).
    time_ids: (B, 6) fp32, original size, crop and target size of the image, (height, width) or (top, left) each; with
            `pooled`.
    bias:   (B, H, W, S) fp32 over the latents' pixels: by how much a pixel's score for a token is raised, in units of
            the largest score of its sample and layer (paint-with-words, arXiv 2211.01324: w' log(1 + sigma) A).
    keys:   for each cross-attention, by its block's path, the keys and values (B, S, N, K) that it makes of the tokens
            (`UNetEncoder.with_keys`): made once for all steps, for this network only. `at` leaves one pair.
    image_keys: keys and values likewise that IP-Adapters make of images (`ip_adapter.image_keys`), for each
            cross-attention a list of pairs; read beside the text's.
    """

    tokens: jax.Array
    mask: jax.Array | None = None
    pooled: jax.Array | None = None
    time_ids: jax.Array | None = None
    bias: jax.Array | None = None
    keys: dict[str, tuple[jax.Array, jax.Array]] | tuple[jax.Array, jax.Array] | None = None
    image_keys: dict[str, list[tuple[jax.Array, jax.Array]]] | list[tuple[jax.Array, jax.Array]] | None = None

    def below(self, path: str) -> "Conditioning":
        """What the modules below this path read, by the rest of their paths."""
        at = f"{path}."
        return self._with(lambda part: {key.removeprefix(at): part[key] for key in part if key.startswith(at)})

    def at(self, path: str) -> "Conditioning":
        """What the transformer block at this path reads."""
        return self._with(lambda part: part[path])

    def need(self, part: str, reader: str) -> jax.Array:
        """The part of this name. Raises ValueError, naming it and its reader, where it is absent."""
        if (value := getattr(self, part)) is None:
            raise ValueError(f"{reader} reads the conditioning's {part}, which is absent")
        return value

    def _with(self, choose) -> "Conditioning":
        parts = {name: part for name in ("keys", "image_keys") if (part := getattr(self, name)) is not None}
        return replace(self, **{name: choose(part) for name, part in parts.items()})
