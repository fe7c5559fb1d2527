"""How much noise there is at each time, and what a network is asked to predict (Ho et al. 2020; Salimans & Ho 2022).

x_t = alpha_t x_0 + sigma_t noise, with alpha_t^2 + sigma_t^2 = 1 and clean latents x_0 of unit variance. `Schedule` is
what samplers and training ask of any schedule; `DiscreteSchedule` has N timesteps, alpha_t^2 = prod(1 - beta), and
`edm.EDMSchedule` a continuous time.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from bdm_jax.errors import UserError

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
SPACINGS = ("leading", "linspace", "trailing")
NEARLY_ZERO = 2.0**-24  # alpha^2 of diffusers' zero terminal SNR where a sampler or an epsilon divides by alpha

TimestepBias = Literal["none", "later"]


class Schedule(Protocol):
    """A noise schedule. Frozen and hashable: programs are compiled for it.

    Samplers, on the host in float64, use the noise level k = sigma / alpha: the standard deviation of the noise in
    x / alpha. Training, in compiled programs, uses t, the network's time input.
    """

    prediction_type: str  # epsilon (the noise), v_prediction (alpha noise - sigma x0), sample (x0), edm (-v)

    @property
    def data_scale(self) -> float:
        """What clean latents are multiplied with to be data: scaled latents of an autoencoder, or pixels in [-1,1]."""
        return 1.0

    @property
    def span(self) -> tuple[float, float]:
        """The lowest and the highest noise level that the network was trained at."""
        raise NotImplementedError

    def levels(
        self, count: int, spacing: str | Sequence[float] | None = None, solver: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """The times and noise levels (count,) at which a sampler of `count` steps asks the network, the noisiest first.

        Args:
          spacing: how steps are laid out over discrete timesteps, one of `SPACINGS`, or the timesteps themselves; None
            is the schedule's own way.
          solver: as diffusers lays them out for DPM-Solver and UniPC.

        Raises UserError for more steps than there are times, or a spacing that the schedule does not have.
        """
        raise NotImplementedError

    def time(self, k: np.ndarray, whole: Callable[[np.ndarray], np.ndarray] | None = None) -> np.ndarray:
        """The network's time input at noise level k. `whole` (a rounding) makes discrete timesteps whole."""
        raise NotImplementedError

    def alpha_sigma(self, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Times (B,) -> alpha and sigma, each (B,1,1,1) fp32."""
        raise NotImplementedError

    def draw(self, key: jax.Array, bias: TimestepBias = "none") -> jax.Array:
        """A time () to train one sample at. With the bias "later", noisier ones are likelier: the quantile of the
        noise level has density 2 q, so that the noisier half, where the text decides what the image shows, gets three
        quarters of the training.
        """
        raise NotImplementedError

    def add_noise(self, x0: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
        """Clean latents and unit noise (B,H,W,C) -> noisy latents at the times t (B,)."""
        alpha, sigma = self.alpha_sigma(t)
        return alpha * x0 + sigma * noise

    def target(self, x0: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
        """What the network should predict at the times t (B,), (B,H,W,C)."""
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return x0
        alpha, sigma = self.alpha_sigma(t)
        v = alpha * noise - sigma * x0
        return -v if self.prediction_type == "edm" else v

    def to_x0(self, prediction: jax.Array, x: jax.Array, alpha: jax.Array, sigma: jax.Array) -> jax.Array:
        """The clean latents that a prediction at (alpha, sigma) implies."""
        if self.prediction_type == "epsilon":
            return (x - sigma * prediction) / alpha
        if self.prediction_type == "sample":
            return prediction
        return alpha * x - sigma * (-prediction if self.prediction_type == "edm" else prediction)


@dataclass(frozen=True)
class DiscreteSchedule(Schedule):
    """Stable Diffusion's noise schedule: times are integers 0 .. num_train_timesteps - 1. The fields carry the names of
    diffusers' scheduler_config.json.

    The defaults are SD1.5's and SDXL's; Kolors has 1100 timesteps and a `beta_end` of 0.014. `timestep_spacing` is how
    the system's own sampler lays out its steps; samplers that a user names have a spacing of their own. The last five
    are for models of pixels: see `clipped`.
    """

    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"
    prediction_type: str = "epsilon"
    steps_offset: int = 1
    set_alpha_to_one: bool = False
    rescale_betas_zero_snr: bool = False
    timestep_spacing: str = "leading"
    clip_sample: bool = False
    clip_sample_range: float = 1.0
    thresholding: bool = False
    dynamic_thresholding_ratio: float = 0.995
    sample_max_value: float = 1.0

    def __post_init__(self):
        _check_one_of("prediction_type", self.prediction_type, PREDICTION_TYPES)
        _check_one_of("beta_schedule", self.beta_schedule, ("scaled_linear", "linear"))
        _check_one_of("timestep_spacing", self.timestep_spacing, SPACINGS)

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

    @cached_property
    def noise_levels(self) -> np.ndarray:
        """(num_train_timesteps,) float64, rising: k at each timestep, finite also where the schedule ends in noise."""
        squared = np.maximum(self.alphas_cumprod, NEARLY_ZERO)
        return np.sqrt((1 - squared) / squared)

    @property
    def span(self):
        return self.noise_levels[0], self.noise_levels[-1]

    def levels(self, count, spacing=None, solver=False):
        t = self.timesteps(count, spacing or "linspace", solver)
        t = t.round() if solver else t
        return t, np.interp(t, np.arange(self.num_train_timesteps), self.noise_levels)

    def timesteps(self, count: int, spacing: str | Sequence[float], solver: bool = False) -> np.ndarray:
        """(count,) float64, falling; `spacing` may be the timesteps themselves. One step of "leading" or of "linspace"
        is at the least noise, as in diffusers; the solvers divide as if there were one step more, and leave out its
        end.
        """
        total, points = self.num_train_timesteps, count + solver
        if not isinstance(spacing, str):
            if spacing[0] >= total:
                raise UserError(f"timestep {spacing[0]} is outside 0 .. {total - 1}, those that the model knows")
            return np.array(spacing, np.float64)
        if count > total:
            raise UserError(f"steps {count} is outside 1 .. {total}, the timesteps that the model knows")
        if spacing == "leading":
            return (np.arange(points) * (total // points))[::-1][:count] + float(self.steps_offset)
        if spacing == "linspace":
            return np.linspace(0, total - 1, points)[::-1][:count]
        if spacing == "trailing":
            return (total - np.arange(count) * (total / count)).round() - 1
        raise ValueError(f"timestep spacing {spacing!r}: one of {', '.join(SPACINGS)}")

    def time(self, k, whole=None):
        """Between the trained timesteps, linear in log k."""
        t = np.interp(np.log(k), np.log(self.noise_levels), np.arange(self.num_train_timesteps))
        return t if whole is None else whole(t)

    def alpha_sigma(self, t):
        squared = jnp.asarray(self.alphas_cumprod, jnp.float32)[t][:, None, None, None]
        return jnp.sqrt(squared), jnp.sqrt(1.0 - squared)

    def clipped(self, x0: jax.Array) -> jax.Array:
        """The clean latents (B,H,W,C) that samplers go on with: with `thresholding`, those beyond the quantile
        `dynamic_thresholding_ratio` of a sample, at least 1 and at most `sample_max_value`, are cut and all divided by
        it (Saharia et al. 2022); with `clip_sample`, those beyond `clip_sample_range` are cut.
        """
        if self.thresholding:
            each = jnp.abs(x0).reshape(len(x0), -1)
            most = jnp.quantile(each, self.dynamic_thresholding_ratio, axis=1).clip(1.0, self.sample_max_value)
            most = most[:, None, None, None]
            return x0.clip(-most, most) / most
        return x0.clip(-self.clip_sample_range, self.clip_sample_range)

    def draw(self, key, bias="none"):
        count = self.num_train_timesteps
        if bias == "none":
            return jax.random.randint(key, (), 0, count)
        return jnp.minimum(jnp.int32(count * jnp.sqrt(jax.random.uniform(key))), count - 1)


def _check_one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name}={value!r}: one of {', '.join(known)}")
