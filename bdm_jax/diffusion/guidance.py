"""Guidance as weights of predictions (Ho & Salimans 2021), and its rescaling (Lin et al. 2023).

A row of weights w sums to 1, and the guided prediction is sum_p w_p prediction_p. Classifier-free guidance of scale s
is (1 - s, s) of (negative, positive). Of (both negative, backbone positive, both positive), (1 - e, e - s, s) gives
each language a scale of its own (as InstructPix2Pix has it for image and text, 2211.09800, eq. 3).
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np


def scales(weights: np.ndarray) -> np.ndarray:
    """Weights (N,P), on the host -> scales (N,P-1) of `guide`, float64: s_p = w_p + w_{p+1} + ... for p >= 1.

    Raises ValueError for a row that does not sum to 1.
    """
    weights = np.asarray(weights, np.float64)
    rounding = 1e-6 * np.maximum(1.0, np.abs(weights).max(axis=1))
    if (off := np.abs(weights.sum(axis=1) - 1.0) > rounding).any():
        raise ValueError(f"weights of guidance that do not sum to 1: {weights[off]}")
    return np.cumsum(weights[:, :0:-1], axis=1)[:, ::-1]


def guide(predictions: Sequence[jax.Array], scales: Sequence[jax.Array | float]) -> jax.Array:
    """The P predictions (B,H,W,C) weighed, as p_0 + s_1 (p_1 - p_0) + s_2 (p_2 - p_1) + ...; one is itself."""
    guided = predictions[0]
    for before, after, scale in zip(predictions[:-1], predictions[1:], scales, strict=True):
        guided = guided + scale * (after - before)
    return guided


def rescale(guided: jax.Array, conditional: jax.Array, amount: jax.Array | float) -> jax.Array:
    """Removes the contrast that strong guidance adds: (B,H,W,C), `amount` 0 (nothing) to 1 (all of it).

    Each sample gets the standard deviation of its conditional prediction, mixed by `amount` (2305.08891, eq. 15, 16).
    """
    axes = tuple(range(1, guided.ndim))
    ratio = jnp.std(conditional, axis=axes, keepdims=True) / jnp.std(guided, axis=axes, keepdims=True)
    return guided * (amount * ratio + (1.0 - amount))
