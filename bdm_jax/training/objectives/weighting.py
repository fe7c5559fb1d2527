"""How much a sample's loss counts at its noise level."""

import jax
import jax.numpy as jnp

from bdm_jax.diffusion.schedule import Schedule


def min_snr(schedule: Schedule, t: jax.Array, gamma: float) -> jax.Array:
    """Timesteps (B,) -> weights (B,) of the squared error: min(SNR, gamma) for x0, and what that is for noise and v
    (Hang et al., arXiv 2303.09556, section 3.4). Where the SNR is zero, v has weight 0, as in diffusers.
    """
    alpha, sigma = (x.reshape(-1) for x in schedule.alpha_sigma(t))
    snr = jnp.square(alpha) / jnp.square(sigma)
    clipped = jnp.minimum(snr, gamma)
    if schedule.prediction_type == "sample":
        return clipped
    if schedule.prediction_type in ("v_prediction", "edm"):  # edm is -v: errors are as large
        return clipped / (snr + 1)
    return jnp.where(snr > gamma, clipped / snr, 1.0)
