"""Classifier-free guidance (Ho & Salimans 2021) and its rescaling (Lin et al. 2023)."""

import jax
import jax.numpy as jnp


def classifier_free(unconditional: jax.Array, conditional: jax.Array, scale: jax.Array | float) -> jax.Array:
    """Away from the prediction for the negative prompts, towards that for the positive: u + scale (c - u)."""
    return unconditional + scale * (conditional - unconditional)


def rescale(guided: jax.Array, conditional: jax.Array, amount: jax.Array | float) -> jax.Array:
    """Takes the contrast that strong guidance adds away again: (B,H,W,C), `amount` 0 (nothing) to 1 (all of it).

    Each sample gets the standard deviation of its positive prediction, mixed by `amount` (2305.08891, eq. 15, 16).
    """
    axes = tuple(range(1, guided.ndim))
    ratio = jnp.std(conditional, axis=axes, keepdims=True) / jnp.std(guided, axis=axes, keepdims=True)
    return guided * (amount * ratio + (1.0 - amount))
