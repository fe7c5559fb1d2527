"""Classifier-free guidance (Ho & Salimans 2021)."""

import jax


def classifier_free(unconditional: jax.Array, conditional: jax.Array, scale: jax.Array | float) -> jax.Array:
    """Away from the prediction for the negative prompts, towards that for the positive: u + scale (c - u)."""
    return unconditional + scale * (conditional - unconditional)
