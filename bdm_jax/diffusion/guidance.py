"""Classifier-free guidance (Ho & Salimans 2021) and its rescaling (Lin et al. 2023)."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def guide(predictions: Sequence[jax.Array], scales: Sequence[jax.Array | float]) -> jax.Array:
    """Predictions for ever more of the text -> the guided one: p0 + s1 (p1 - p0) + s2 (p2 - p1).

    Of two, (negative, positive), that is classifier-free guidance. Of three, (both negative, English positive, both
    positive), each language has its own scale, and equal scales are guidance by both at once (as InstructPix2Pix has it
    for picture and text, 2211.09800, eq. 3). One prediction is itself.
    """
    guided = predictions[0]
    for before, after, scale in zip(predictions[:-1], predictions[1:], scales, strict=True):
        guided = guided + scale * (after - before)
    return guided


def rescale(guided: jax.Array, conditional: jax.Array, amount: jax.Array | float) -> jax.Array:
    """Takes the contrast that strong guidance adds away again: (B,H,W,C), `amount` 0 (nothing) to 1 (all of it).

    Each sample gets the standard deviation of its positive prediction, mixed by `amount` (2305.08891, eq. 15, 16).
    """
    axes = tuple(range(1, guided.ndim))
    ratio = jnp.std(conditional, axis=axes, keepdims=True) / jnp.std(guided, axis=axes, keepdims=True)
    return guided * (amount * ratio + (1.0 - amount))
