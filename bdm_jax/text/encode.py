"""Texts to `Conditioning`, through a tokenizer and its text tower."""

from collections.abc import Sequence
from functools import partial

import jax
import numpy as np

from bdm_jax.models.conditioning import Conditioning
from bdm_jax.models.config import CLIPTextConfig, RobertaConfig
from bdm_jax.models.functional import Params, bind
from bdm_jax.text.tokenizer import Tokenizer
from bdm_jax.text.windows import join, windows_needed


def tokenize(tokenizer: Tokenizer, texts: Sequence[str]) -> np.ndarray:
    """Texts -> ids (B, n, length) int32; all take the n <= 5 windows that the longest needs.

    Positive and negative prompts of one picture go in together, so that both have as many states. Warns with
    PromptWarning where a text exceeds five windows or has characters without a token.
    """
    contents = tokenizer.content(texts)
    windows = windows_needed(map(len, contents), tokenizer.length)
    return np.stack([tokenizer.fit(text, ids, windows) for text, ids in zip(texts, contents, strict=True)])


@partial(jax.jit, static_argnums=0)
def encode_ids(config: CLIPTextConfig | RobertaConfig, params: Params, ids: jax.Array) -> Conditioning:
    """Ids (B, n, length) -> states (B, n * (length - 2) + 2, D).

    Padding is read like any token (no mask): the published weights live with that.
    """
    batch, windows, length = ids.shape
    states = bind(config, params)(ids.reshape(batch * windows, length))
    return Conditioning(join(states.reshape(batch, windows, length, -1)))


def encode(
    tokenizer: Tokenizer, config: CLIPTextConfig | RobertaConfig, params: Params, texts: Sequence[str]
) -> Conditioning:
    """Texts -> states (B, n * (length - 2) + 2, D); see `tokenize` and `encode_ids`."""
    return encode_ids(config, params, tokenize(tokenizer, texts))
