"""Training losses of diffusion models and of their autoencoder."""

import jax
import jax.numpy as jnp


def denoising(prediction: jax.Array, target: jax.Array) -> jax.Array:
    """Mean squared error per sample: (B,H,W,C) -> (B,), fp32."""
    return jnp.mean(jnp.square(prediction.astype(jnp.float32) - target.astype(jnp.float32)), axis=(1, 2, 3))


def reconstruction(images: jax.Array, decoded: jax.Array) -> jax.Array:
    """Squared and absolute error of pixels, and absolute error of their differences, per sample: (B,H,W,3) -> (B,).

    The squared error finds the colours early, the absolute one has no blur, the differences to the right and below
    keep edges sharp, which is most of what a drawing is.
    """
    error = decoded - images
    across, down = jnp.diff(error, axis=2), jnp.diff(error, axis=1)
    absolute = sum(jnp.mean(jnp.abs(e), axis=(1, 2, 3)) for e in (error, across, down))
    return absolute + 2.0 * jnp.mean(jnp.square(error), axis=(1, 2, 3))


def kl_to_unit_normal(mean: jax.Array, logvar: jax.Array) -> jax.Array:
    """KL(N(mean, exp(logvar)) || N(0, 1)) per latent number, averaged per sample: (B,h,w,C) -> (B,)."""
    return 0.5 * jnp.mean(jnp.square(mean) + jnp.exp(logvar) - 1.0 - logvar, axis=(1, 2, 3))
