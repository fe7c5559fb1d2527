"""Prompts to `Conditioning`, through their grammar, a tokenizer and its text tower."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bdm_jax.models.config import CLIPTextConfig, RobertaConfig
from bdm_jax.models.functional import Params, bind
from bdm_jax.models.unet.conditioning import Conditioning
from bdm_jax.runtime.programs import program
from bdm_jax.text.grammar import parse
from bdm_jax.text.tokenizer import Tokenizer
from bdm_jax.text.windows import cut, join, split, windows_needed

NEAR_ZERO = 0.01  # a smaller part of the mean magnitude is what the mean of so many numbers is by chance


class Tokens(NamedTuple):
    """Prompts as a tower reads them.

    ids: (B, n, length) int32. weights: of the same shape, float32; 1 at start, end and padding. mask: of the same
    shape, bool, False at padding that must not be seen; None sees all.
    """

    ids: np.ndarray
    weights: np.ndarray
    mask: np.ndarray | None = None


def read(tokenizer: Tokenizer, prompts: Sequence[str], *, reference: bool = False, masked: bool = False) -> Tokens:
    """Prompts with weights (see `grammar`) -> tokens; all take the n <= 5 windows that the longest needs.

    Each segment of equal weight is tokenized on its own. Positive and negative prompts of one picture go in together,
    so that both have as many states. Warns with PromptWarning where a prompt exceeds five windows or has characters
    without a token.

    Args:
      reference: do as BDM's reference implementation: its smaller grammar, and weights in Chinese prompts (those of a
        BERT tokenizer) have no effect.
      masked: hide the padding (for a BERT tokenizer, whose padding is a token of its own).
    """
    parsed = [parse(prompt, reference=reference) for prompt in prompts]
    segments = [(prompt, s.text) for prompt, parts in zip(prompts, parsed, strict=True) for part in parts for s in part]
    found = iter(tokenizer.content([text for _, text in segments], [prompt for prompt, _ in segments]))
    weighted = tokenizer.byte_pairs or not reference
    contents: list[list[list[tuple[int, float]]]] = []
    for parts in parsed:
        tokens = [[(id_, s.weight if weighted else 1.0) for s in part for id_ in next(found)] for part in parts]
        contents.append(cut(tokens, tokenizer.length))
    n = windows_needed(map(len, contents))
    shape = (len(prompts), n, tokenizer.length)
    ids, weights = np.zeros(shape, np.int32), np.ones(shape, np.float32)
    for row, (prompt, content) in enumerate(zip(prompts, contents, strict=True)):
        ids[row] = tokenizer.fit(prompt, [[id_ for id_, _ in window] for window in content], n)
        factors = [[weight for _, weight in window] for window in content]
        weights[row] = split(factors, n, tokenizer.length, 1.0, 1.0, 1.0, np.float32)
    return Tokens(ids, weights, ids != tokenizer.pad if masked else None)


def tokenize(tokenizer: Tokenizer, prompts: Sequence[str], *, reference: bool = False) -> np.ndarray:
    """Prompts -> ids (B, n, length) int32 alone; see `read`."""
    return read(tokenizer, prompts, reference=reference).ids


@program
def encode_ids(
    config: CLIPTextConfig | RobertaConfig, params: Params, ids: jax.Array, mask: jax.Array | None = None
) -> Conditioning:
    """Ids (B, n, length) -> states (B, n * (length - 2) + 2, D), with a mask if one (B, n, length) is given.

    Without, padding is read like any token: the published weights live with that. Only a RoBERTa tower takes one.
    """
    batch, windows, length = ids.shape
    rows = ids.reshape(batch * windows, length)
    masks = () if mask is None else (mask.reshape(rows.shape),)
    dtype = next(iter(params.values())).dtype
    states = bind(config, params)(rows, *masks).astype(dtype)  # norms give fp32, which would spread to all that read it
    seen = None if mask is None else join(mask[..., None])[..., 0]
    return Conditioning(join(states.reshape(batch, windows, length, -1)), seen)


@partial(jax.jit, static_argnames="guarded")
def weigh(cond: Conditioning, weights: jax.Array, guarded: bool = True) -> Conditioning:
    """States (B, S, D) of windows times their tokens' weights (B, n, length), S = n * (length - 2) + 2.

    Each sample is then rescaled so that its mean over tokens and channels is what it was, as the reference does. It
    stays unscaled where that has no meaning: where the mean before or after is less than NEAR_ZERO of the mean
    magnitude, or changes its sign (not where `guarded` is False: the reference divides by whatever there is). A sample
    whose weights are all 1 stays as it is, bit for bit. Means are fp32.
    """
    factors = join(weights[..., None])
    states = cond.tokens.astype(jnp.float32)
    weighted = states * factors
    before, after = _mean(states), _mean(weighted)
    sound = (jnp.abs(before) > NEAR_ZERO * _mean(jnp.abs(states))) & (before * after > 0)
    sound &= jnp.abs(after) > NEAR_ZERO * _mean(jnp.abs(weighted))
    weighted *= jnp.where(sound, before / jnp.where(sound, after, 1.0), 1.0) if guarded else before / after
    plain = (factors == 1).all(axis=1, keepdims=True)
    return Conditioning(jnp.where(plain, cond.tokens, weighted.astype(cond.tokens.dtype)), cond.mask)


def encode_tokens(
    config: CLIPTextConfig | RobertaConfig,
    params: Params,
    tokens: Tokens,
    *,
    layer: int = 1,
    reference: bool = False,
) -> Conditioning:
    """Tokens -> weighted states (B, n * (length - 2) + 2, D).

    Two programs, so that the tower's is the same with and without weights, and unweighted prompts need only that.

    Args:
      layer: whose states to take, counted from the last (1); CLIP's final norm follows it ("clip skip" of web UIs).
      reference: rescale weighted states unguarded.
    """
    config = replace(config, num_hidden_layers=config.num_hidden_layers + 1 - layer)
    cond = encode_ids(config, params, tokens.ids, tokens.mask)
    if not (tokens.weights != 1).any():
        return cond
    return weigh(cond, tokens.weights, guarded=not reference)


def encode(
    tokenizer: Tokenizer,
    config: CLIPTextConfig | RobertaConfig,
    params: Params,
    prompts: Sequence[str],
    *,
    reference: bool = False,
) -> Conditioning:
    """Prompts -> weighted states (B, n * (length - 2) + 2, D); see `read`, `encode_ids` and `weigh`."""
    return encode_tokens(config, params, read(tokenizer, prompts, reference=reference))


def _mean(states: jax.Array) -> jax.Array:
    return states.mean(axis=(1, 2), keepdims=True)
