"""How much noise there is at each timestep, and what a network is asked to predict (Ho et al. 2020; Salimans & Ho
2022).

x_t = alpha_t x_0 + sigma_t noise, with alpha_t^2 = prod(1 - beta) and alpha_t^2 + sigma_t^2 = 1.
"""

from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")


@dataclass(frozen=True)
class Schedule:
    """Stable Diffusion's noise schedule; the fields carry the names of diffusers' scheduler_config.json."""

    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"
    prediction_type: str = "epsilon"
    steps_offset: int = 1
    set_alpha_to_one: bool = False
    rescale_betas_zero_snr: bool = False

    def __post_init__(self):
        if self.prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"prediction_type={self.prediction_type!r}: one of {', '.join(PREDICTION_TYPES)}")
        if self.beta_schedule not in ("scaled_linear", "linear"):
            raise ValueError(f"beta_schedule={self.beta_schedule!r}: one of scaled_linear, linear")

    @cached_property
    def alphas_cumprod(self) -> np.ndarray:
        """(num_train_timesteps,) float64: alpha_t^2."""
        if self.beta_schedule == "scaled_linear":
            betas = np.linspace(self.beta_start**0.5, self.beta_end**0.5, self.num_train_timesteps) ** 2
        else:
            betas = np.linspace(self.beta_start, self.beta_end, self.num_train_timesteps)
        squared = np.cumprod(1.0 - betas)
        if not self.rescale_betas_zero_snr:
            return squared
        alpha = np.sqrt(squared)  # Lin et al. 2305.08891, algorithm 1: the first stays, the last becomes 0
        return np.square((alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1]))

    def alpha_sigma(self, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Integer timesteps (B,) -> alpha and sigma, each (B,1,1,1) fp32."""
        squared = jnp.asarray(self.alphas_cumprod, jnp.float32)[t][:, None, None, None]
        return jnp.sqrt(squared), jnp.sqrt(1.0 - squared)

    def add_noise(self, x0: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
        """Clean latents and unit noise (B,H,W,C) -> noisy latents at integer timesteps t (B,)."""
        alpha, sigma = self.alpha_sigma(t)
        return alpha * x0 + sigma * noise

    def target(self, x0: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
        """What the network should predict: the noise, v = alpha noise - sigma x0, or x0."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return x0
        alpha, sigma = self.alpha_sigma(t)
        return alpha * noise - sigma * x0

    def to_x0(self, prediction: jax.Array, x: jax.Array, alpha: jax.Array, sigma: jax.Array) -> jax.Array:
        """The clean latents that a prediction at (alpha, sigma) implies."""
        if self.prediction_type == "epsilon":
            return (x - sigma * prediction) / alpha
        if self.prediction_type == "sample":
            return prediction
        return alpha * x - sigma * prediction


def to_json(schedule: Schedule) -> dict[str, Any]:
    """scheduler_config.json, readable by diffusers' DDIMScheduler and DPMSolverMultistepScheduler."""
    values = {f.name: getattr(schedule, f.name) for f in fields(schedule)}
    return {"_class_name": "DDIMScheduler", **values, "clip_sample": False, "timestep_spacing": "leading"}


def from_json(values: dict[str, Any]) -> Schedule:
    """The noise schedule in a scheduler_config.json of any sampler; what concerns only the sampler is not read.

    Raises:
        ValueError: betas or a prediction type that are not implemented (named).
    """
    if values.get("trained_betas") is not None:
        raise ValueError("scheduler_config.json: trained_betas is not implemented")
    known = {f.name for f in fields(Schedule)}
    return Schedule(**{key: value for key, value in values.items() if key in known})
