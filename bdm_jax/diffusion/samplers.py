"""Samplers as tables of coefficients: every step is  x' = x_coef x + x0_coef x0 + previous_coef x0_previous.

DDIM (Song et al. 2021) and DPM-Solver++ 2M (Lu et al. 2022) are both of this form, x0 being the clean latents that the
network's prediction implies. A sampler only fills the table, in float64 on the host; `advance` is the pure step.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from bdm_jax.diffusion.schedule import Schedule


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Steps:
    """One row per step, each field (N,): the timestep given to the network, its alpha and sigma, and the
    coefficients.
    """

    t: jax.Array
    alpha: jax.Array
    sigma: jax.Array
    x: jax.Array
    x0: jax.Array
    previous: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SamplerState:
    """Latents (B,H,W,C) fp32 and the clean latents of the step before."""

    latents: jax.Array
    previous_x0: jax.Array


def start(noise: jax.Array) -> SamplerState:
    """Unit noise (B,H,W,C) -> the state before the first step."""
    return SamplerState(noise, jnp.zeros_like(noise))


def advance(state: SamplerState, prediction: jax.Array, step: Steps, schedule: Schedule) -> SamplerState:
    """One step: `prediction` is the network's output at `state.latents` and `step.t`; `step` is one row of the
    table.
    """
    x0 = schedule.to_x0(prediction.astype(jnp.float32), state.latents, step.alpha, step.sigma)
    latents = step.x * state.latents + step.x0 * x0 + step.previous * state.previous_x0
    return SamplerState(latents, x0)


def ddim(schedule: Schedule, count: int) -> Steps:
    """DDIM with eta 0, "leading" timesteps (diffusers' DDIMScheduler as Stable Diffusion configures it)."""
    stride = schedule.num_train_timesteps // count
    t = (np.arange(count) * stride)[::-1] + schedule.steps_offset
    final = 1.0 if schedule.set_alpha_to_one else schedule.alphas_cumprod[0]
    squared = schedule.alphas_cumprod[np.minimum(t, schedule.num_train_timesteps - 1)]
    before = np.where(t >= stride, schedule.alphas_cumprod[np.maximum(t - stride, 0)], final)
    alpha, sigma = np.sqrt(squared), np.sqrt(1 - squared)
    alpha_to, sigma_to = np.sqrt(before), np.sqrt(1 - before)
    ratio = sigma_to / sigma
    return _steps(t, alpha, sigma, ratio, alpha_to - ratio * alpha, np.zeros(count))


def dpmpp_2m(schedule: Schedule, count: int, final_sigma_zero: bool = True) -> Steps:
    """DPM-Solver++ 2M, midpoint, "linspace" timesteps (diffusers' DPMSolverMultistepScheduler).

    `final_sigma_zero=False` ends at the sigma of timestep 0 as diffusers 0.24 did, and with it BDM's reference.
    """
    t = np.linspace(0, schedule.num_train_timesteps - 1, count + 1).round()[::-1][:-1].astype(np.int64)
    squared = schedule.alphas_cumprod[t]
    last = 1.0 if final_sigma_zero else schedule.alphas_cumprod[0]
    alphas, sigmas = np.sqrt(np.append(squared, last)), np.sqrt(1 - np.append(squared, last))
    with np.errstate(divide="ignore"):
        log_snr = np.log(alphas) - np.log(sigmas)
    x, x0, previous = np.zeros(count), np.zeros(count), np.zeros(count)
    for i in range(count):
        step = log_snr[i + 1] - log_snr[i]
        gain = -alphas[i + 1] * np.expm1(-step)
        first_order = i == 0 or (i == count - 1 and (final_sigma_zero or count < 15))
        extra = 0.0 if first_order else step / (2 * (log_snr[i] - log_snr[i - 1]))
        x[i], x0[i], previous[i] = sigmas[i + 1] / sigmas[i], gain * (1 + extra), -gain * extra
    return _steps(t, alphas[:-1], sigmas[:-1], x, x0, previous)


def _steps(t, *columns) -> Steps:
    return Steps(np.asarray(t, np.int32), *(np.asarray(column, np.float32) for column in columns))


SAMPLERS: dict[str, Callable[[Schedule, int], Steps]] = {"ddim": ddim, "dpmpp-2m": dpmpp_2m}
