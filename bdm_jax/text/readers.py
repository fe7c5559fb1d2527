"""A system's texts: read by one text encoder or by several, whose states are joined (see `towers` for how)."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bdm_jax.errors import UserError, short
from bdm_jax.models.config import TextStatesConfig
from bdm_jax.models.unet.conditioning import Conditioning
from bdm_jax.text import encode as one
from bdm_jax.text.encode import Tokens
from bdm_jax.text.tokenizer import Tokenizer
from bdm_jax.text.towers import SETTING, Reader, Tower

Parts = Mapping[str, Any]  # a system's parts by name: networks as (config, params), and tokenizers

__all__ = ["Parts", "Reader", "Tokens", "Tower", "check", "encode", "read"]


def read(
    reader: Reader, parts: Parts, prompts: Sequence[str], *, reference: bool = False, masked: bool = False
) -> tuple[Tokens, ...]:
    """Prompts -> tokens of each of the reader's towers; see `text.encode.read` for the arguments.

    `masked` hides the padding of those whose padding is a token of its own. Where states are joined on width, a tower
    that needs fewer windows than another gets as many, of empty texts.
    """

    def tokens_of(tokenizer: Tokenizer, windows: int = 1) -> Tokens:
        hidden = masked and tokenizer.pad != tokenizer.end  # CLIP's padding, its end token, is read
        return one.read(tokenizer, prompts, reference=reference, masked=hidden, windows=windows)

    tokens = {name: tokens_of(parts[name]) for name in reader.tokenizers}
    most = max(own.ids.shape[1] for own in tokens.values())
    if reader.join == "width" and len({own.ids.shape[1] for own in tokens.values()}) > 1:
        tokens = {name: tokens_of(parts[name], most) for name in tokens}
    for tower in reader.towers:
        _check_kept(tower, parts, prompts, tokens[tower.tokenizer])
    return tuple(tokens[tower.tokenizer] for tower in reader.towers)


def encode(
    reader: Reader, parts: Parts, tokens: Sequence[Tokens], *, clip_skip: int = 1, reference: bool = False
) -> Conditioning:
    """Tokens of each tower -> the reader's text: states (B, S, D), pooled (B, P) where a tower gives it.

    Args:
      clip_skip: whose states to take: 1 the layer that the reader names, 2 the one before it, and so on.
      reference: rescale weighted states unguarded (see `text.encode.weigh`).
    """
    conds = []
    for tower, own in zip(reader.towers, tokens, strict=True):
        window, (config, params) = parts[tower.tokenizer].format, parts[tower.encoder]
        cond = one.encode_tokens(
            as_pooled(tower, config),
            params,
            own,
            layer=tower.layer + clip_skip - 1,
            final_norm=tower.final_norm,
            pooled=bool(tower.pooled),
            start=len(window.start),
            end=len(window.end),
            reference=reference,
        )
        conds.append(_without_empty(cond, own, parts[tower.tokenizer]) if reader.zero_empty else cond)
    return conds[0] if len(conds) == 1 else joined(conds, reader.join)


def check(reader: Reader, parts: Parts) -> None:
    """Raises UserError for parts that cannot be read, or joined, as the reader says."""
    for tower in reader.towers:
        config = parts[tower.encoder].config
        if tower.pooled == "projected" and not has_projection(config):
            raise UserError(
                f"{tower.encoder} has no projection (text_projection), which the pooled text goes through: give the "
                f'whole CLIP that it is of, or have {SETTING} say "pooled": "raw"'
            )
        if tower.layer > config.num_hidden_layers + 1:
            layers = config.num_hidden_layers
            raise UserError(f"{tower.encoder} has {layers} layers: there is no layer {tower.layer} from the last")
    if reader.join == "width":
        what, sizes = "tokens in a window", {t.tokenizer: parts[t.tokenizer].format.room for t in reader.towers}
    else:
        what, sizes = "text width", {t.encoder: parts[t.encoder].config.hidden_size for t in reader.towers}
    (first, size), *others = sizes.items()
    for name, other in others:
        if other != size:
            raise UserError(f"{first} and {name} cannot be joined on {reader.join}: {what} {size} and {other}")


def as_pooled(tower: Tower, config: Any) -> Any:
    """A text encoder's config for the pooled text that is taken of it: without its projection where that is "raw".
    Texts that were read before have what was taken.
    """
    read = isinstance(config, TextStatesConfig)
    unprojected = tower.pooled == "raw" and has_projection(config) and not read
    return replace(config, projection_dim=None) if unprojected else config


def has_projection(config: Any) -> bool:
    """Whether a text encoder has a projection into a joint space of texts and images."""
    return getattr(config, "projection_dim", None) is not None


def width(reader: Reader, parts: Parts) -> int:
    """Channels of the states that the reader gives."""
    widths = [parts[tower.encoder].config.hidden_size for tower in reader.towers]
    return sum(widths) if reader.join == "width" else widths[0]


def pooled_width(reader: Reader, parts: Parts) -> int:
    """Channels of the pooled vector that the reader gives; 0 without."""
    configs = [as_pooled(tower, parts[tower.encoder].config) for tower in reader.towers if tower.pooled]
    return sum(getattr(config, "projection_dim", None) or config.hidden_size for config in configs)


def layers(reader: Reader, parts: Parts) -> int:
    """How many layers the states may be taken from: the most that `clip_skip` may be."""
    return min(parts[tower.encoder].config.num_hidden_layers + 1 - tower.layer for tower in reader.towers)


def with_zeros(cond: Conditioning, empty: jax.Array) -> Conditioning:
    """Zeros in place of states and pooled text of those texts that are empty, (B,) bool."""
    cond = replace(cond, tokens=jnp.where(empty[:, None, None], 0, cond.tokens))
    return cond if cond.pooled is None else replace(cond, pooled=jnp.where(empty[:, None], 0, cond.pooled))


def _check_kept(tower: Tower, parts: Parts, prompts: Sequence[str], tokens: Tokens) -> None:
    """Raises UserError for a prompt that is not among the texts that were read before, where these are all there is."""
    component = parts.get(tower.encoder)
    if component is None or not isinstance(component.config, TextStatesConfig):
        return
    kept = {row.tobytes() for row in np.asarray(component.params["texts"])}
    for prompt, windows in zip(prompts, tokens.ids, strict=True):
        if any(window.tobytes() not in kept for window in windows):
            raise UserError(
                f"{tower.encoder}: {short(prompt)!r} is not among its {component.config.texts} texts; add it with "
                "python -m convert text-states"
            )


def joined(conds: Sequence[Conditioning], join: str) -> Conditioning:
    """States of several text encoders side by side ("width") or one after the other ("tokens"); a token is hidden where
    no encoder has content. The pooled vectors are laid side by side.
    """
    tokens = jnp.concatenate([cond.tokens for cond in conds], axis=-1 if join == "width" else 1)
    mask = None
    if any(cond.mask is not None for cond in conds):
        masks = [jnp.ones(cond.tokens.shape[:2], bool) if cond.mask is None else cond.mask for cond in conds]
        mask = jnp.stack(masks).any(axis=0) if join == "width" else jnp.concatenate(masks, axis=1)
    pooled = [cond.pooled for cond in conds if cond.pooled is not None]
    return Conditioning(tokens, mask, **({"pooled": jnp.concatenate(pooled, axis=-1)} if pooled else {}))


def _without_empty(cond: Conditioning, tokens: Tokens, tokenizer: Tokenizer) -> Conditioning:
    """Zeros in place of the states of texts without content."""
    blank = tokenizer.format.fill([], tokens.ids.shape[1])
    empty = (np.asarray(tokens.ids) == blank).all(axis=(1, 2))
    if not empty.any():
        return cond
    return with_zeros(cond, jnp.asarray(empty))
