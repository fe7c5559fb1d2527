"""Prompts through their grammar, a tokenizer and one text encoder: weighted states (`readers` joins several)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bdm_jax.models.functional import Params, bind, input_dtype
from bdm_jax.models.unet.conditioning import Conditioning
from bdm_jax.runtime.programs import program
from bdm_jax.text.grammar import parse
from bdm_jax.text.tokenizer import Tokenizer
from bdm_jax.text.windows import join, windows_needed

NEAR_ZERO = 0.01  # a smaller part of the mean magnitude is what the mean of N numbers is by chance


class Tokens(NamedTuple):
    """Prompts as a text encoder reads them.

    ids: (B, n, length) int32. weights: of the same shape, float32; 1 at start, end and padding. mask: of the same
    shape, bool, False at padding that must not be attended to; None attends to all. positions: of the same shape,
    int32, for encoders whose padding comes first: each token's place in its text, -1 at padding; else None.
    """

    ids: np.ndarray
    weights: np.ndarray
    mask: np.ndarray | None = None
    positions: np.ndarray | None = None


def read(
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    reference: bool = False,
    masked: bool = False,
    windows: int = 1,
) -> Tokens:
    """Prompts with weights (see `grammar`) -> tokens; all take the n <= 5 windows that the longest needs.

    Each segment of equal weight is tokenized on its own. Positive and negative prompts of one image go in together,
    so that both have as many states. Warns with PromptWarning where a prompt exceeds five windows or has characters
    without a token.

    Args:
      reference: do as BDM's reference implementation: its smaller grammar, weights in Chinese prompts (those of a
        BERT tokenizer) have no effect, and English texts are mended (see `Tokenizer.content`).
      masked: hide the padding (for a BERT tokenizer, whose padding is a token of its own).
      windows: at least that many.
    """
    parsed = [parse(prompt, reference=reference) for prompt in prompts]
    segments = [(prompt, s.text) for prompt, parts in zip(prompts, parsed, strict=True) for part in parts for s in part]
    names, texts = [prompt for prompt, _ in segments], [text for _, text in segments]
    found = iter(tokenizer.content(texts, names, mended=reference))
    weighted = tokenizer.byte_pairs or not reference
    contents: list[list[list[tuple[int, float]]]] = []
    for parts in parsed:
        tokens = [[(id_, s.weight if weighted else 1.0) for s in part for id_ in next(found)] for part in parts]
        contents.append(tokenizer.format.cut(tokens))
    window = tokenizer.format
    n = min(max(windows_needed(map(len, contents)), windows), window.most)
    ids, weights, mask = [], [], []
    for prompt, content in zip(prompts, contents, strict=True):
        ids.append(tokenizer.fit(prompt, [[id_ for id_, _ in part] for part in content], n))
        weights.append(window.fill_weights([[weight for _, weight in part] for part in content], n))
        mask.append(window.content_mask(content, n))
    shape = (len(prompts), n, tokenizer.length)
    ids, weights, mask = (np.asarray(rows).reshape(shape) for rows in (ids, weights, mask))
    ids, weights = ids.astype(np.int32), weights.astype(np.float32)
    positions = np.where(mask, np.cumsum(mask, axis=2, dtype=np.int32) - 1, -1) if window.left else None
    return Tokens(ids, weights, mask.astype(bool) if masked else None, positions)


def tokenize(tokenizer: Tokenizer, prompts: Sequence[str], *, reference: bool = False) -> np.ndarray:
    """Prompts -> ids (B, n, length) int32 alone; see `read`."""
    return read(tokenizer, prompts, reference=reference).ids


@dataclass(frozen=True)
class EncoderCall:
    """What an encoding program is compiled for.

    Attributes:
      config: sizes of the text encoder.
      layer: whose states are taken, counted from the last (1).
      final_norm: whether CLIP's last norm follows them.
      pooled: whether the text's one vector is taken too.
      start, end: tokens before and after a window's content.
    """

    config: Any
    layer: int = 1
    final_norm: bool = True
    pooled: bool = False
    start: int = 1
    end: int = 1


@program
def encode_windows(
    call: EncoderCall,
    params: Params,
    ids: jax.Array,
    mask: jax.Array | None = None,
    positions: jax.Array | None = None,
) -> Conditioning:
    """Ids (B, n, length) -> states (B, n * room + start + end, D), with a mask if one (B, n, length) is given.

    Without, padding is read like any token: the published weights live with that. Of the encoders only RoBERTa takes a
    mask, and only those whose padding comes first take `positions` (see `Tokens`): they are called with
    (ids, mask, positions), padding at position 0, whatever `mask` is. The pooled vector (B, P) is the first window's.
    """
    batch, windows, length = ids.shape
    rows = ids.reshape(batch * windows, length)
    more = () if mask is None else (mask.reshape(rows.shape),)
    if positions is not None:
        places = positions.reshape(rows.shape)
        more = places >= 0, jnp.maximum(places, 0)
    how = {} if call.final_norm else {"final_norm": False}
    dtype = input_dtype(params)
    network, pooled = bind(call.config, params), None
    if call.pooled:
        states, pooled = network.outputs(rows, *more, layer=call.layer, **how)
        pooled = pooled.astype(dtype).reshape(batch, windows, -1)[:, 0]
    elif call.layer > 1:
        states = network(rows, *more, layer=call.layer, **how)
    else:
        states = network(rows, *more, **how)
    states = states.astype(dtype)  # norms give fp32, which would spread to all that read it
    joined = partial(join, start=call.start, end=call.end)
    seen = None if mask is None else joined(mask[..., None])[..., 0]
    cond = Conditioning(joined(states.reshape(batch, windows, length, -1)), seen)
    return cond if pooled is None else replace(cond, pooled=pooled)


def encode_ids(config: Any, params: Params, ids: jax.Array, mask: jax.Array | None = None) -> Conditioning:
    """Ids (B, n, length) -> the last layer's states (B, n * (length - 2) + 2, D); see `encode_windows`."""
    return encode_windows(EncoderCall(config), params, ids, mask)


@partial(jax.jit, static_argnames=("guarded", "start", "end"))
def weigh(cond: Conditioning, weights: jax.Array, guarded: bool = True, start: int = 1, end: int = 1) -> Conditioning:
    """States (B, S, D) of windows times their tokens' weights (B, n, length), S = n * room + start + end.

    Each sample is then rescaled so that its mean over tokens and channels is what it was, as the reference does. It
    stays unscaled where that has no meaning: where the mean before or after is less than NEAR_ZERO of the mean
    magnitude, or changes its sign (not where `guarded` is False: the reference divides by whatever there is). A sample
    whose weights are all 1 stays as it is, bit for bit; so does the pooled vector. Means are fp32.
    """
    factors = join(weights[..., None], start, end)
    states = cond.tokens.astype(jnp.float32)
    weighted = states * factors
    before, after = _mean(states), _mean(weighted)
    sound = (jnp.abs(before) > NEAR_ZERO * _mean(jnp.abs(states))) & (before * after > 0)
    sound &= jnp.abs(after) > NEAR_ZERO * _mean(jnp.abs(weighted))
    weighted *= jnp.where(sound, before / jnp.where(sound, after, 1.0), 1.0) if guarded else before / after
    plain = (factors == 1).all(axis=1, keepdims=True)
    return replace(cond, tokens=jnp.where(plain, cond.tokens, weighted.astype(cond.tokens.dtype)))


def encode_tokens(
    config: Any,
    params: Params,
    tokens: Tokens,
    *,
    layer: int = 1,
    final_norm: bool = True,
    pooled: bool = False,
    start: int = 1,
    end: int = 1,
    reference: bool = False,
) -> Conditioning:
    """Tokens -> weighted states (B, n * room + start + end, D).

    Two programs, so that the encoder's is the same with and without weights, and unweighted prompts need only that.

    Args:
      layer: whose states to take, counted from the last (1); with `final_norm`, CLIP's final norm follows it ("clip
        skip" of web UIs).
      pooled: give the text's one vector (B, P) too.
      start, end: tokens around a window's content.
      reference: rescale weighted states unguarded.
    """
    if not pooled:  # the layers beyond are no part of the program
        config, layer = replace(config, num_hidden_layers=config.num_hidden_layers + 1 - layer), 1
    call = EncoderCall(config, layer, final_norm, pooled, start, end)
    cond = encode_windows(call, params, tokens.ids, tokens.mask, tokens.positions)
    if not (tokens.weights != 1).any():
        return cond
    return weigh(cond, tokens.weights, guarded=not reference, start=start, end=end)


def encode(
    tokenizer: Tokenizer,
    config: Any,
    params: Params,
    prompts: Sequence[str],
    *,
    reference: bool = False,
) -> Conditioning:
    """Prompts -> weighted states (B, n * room + start + end, D); see `read`, `encode_windows` and `weigh`."""
    ends = {"start": len(tokenizer.format.start), "end": len(tokenizer.format.end)}
    return encode_tokens(config, params, read(tokenizer, prompts, reference=reference), **ends)


def _mean(states: jax.Array) -> jax.Array:
    return states.mean(axis=(1, 2), keepdims=True)
