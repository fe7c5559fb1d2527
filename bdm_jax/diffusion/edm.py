"""The noise schedule of EDM (Karras et al. 2022, arXiv 2206.00364) and eDiff-I (Balaji et al. 2022, arXiv 2211.01324).

EDM adds noise of standard deviation sigma to data of standard deviation sd = `sigma_data`, and with
st = sqrt(sigma^2 + sd^2) denoises by D(x) = (sd/st)^2 x + (sigma sd/st) F(x/st), where F is the network. In this
library's terms that is k = sigma/sd, alpha = sd/st = 1/sqrt(1 + k^2) and noise of deviation k alpha = sigma/st: the
network's input x/st is what is called latents here, and D/sd = alpha (x/st) + (k alpha) F, so F = -v. Clean latents
are the data divided by sd (`data_scale`), so every sampler applies as it is.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from bdm_jax.diffusion.schedule import Schedule
from bdm_jax.errors import UserError

_MARGIN = 2.0**-23  # probability left out at either end of a distribution whose tails are infinite


@dataclass(frozen=True)
class EDMSchedule(Schedule):
    """A continuous schedule: the network's time input is t = time_scale * ln sigma.

    Training: ln sigma ~ N(p_mean, p_std^2); the squared error of `target`, all times with weight 1, is the paper's loss
    lambda(sigma) |D - x0|^2 with lambda = (st / (sigma sd))^2. Sampling: sigma from sigma_max to sigma_min along the
    paper's curve (eq. 5) of exponent `rho`. The defaults are the paper's, `time_scale` 1 is eDiff-I's and 0.25 EDM's.
    """

    sigma_data: float = 0.5
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    p_mean: float = -1.2
    p_std: float = 1.2
    time_scale: float = 1.0
    prediction_type: str = "edm"  # F; or v_prediction, -F

    def __post_init__(self):
        if self.prediction_type not in ("edm", "v_prediction"):
            raise ValueError(f"prediction_type={self.prediction_type!r}: one of edm, v_prediction")
        if not 0 < self.sigma_min < self.sigma_max:
            raise ValueError(f"sigma_min={self.sigma_min} is not between 0 and sigma_max={self.sigma_max}")

    @property
    def data_scale(self):
        return self.sigma_data

    @property
    def span(self):
        return self.sigma_min / self.sigma_data, self.sigma_max / self.sigma_data

    def levels(self, count, spacing=None, solver=False):
        if spacing is not None:
            raise UserError(f"timestep spacing {spacing!r}: the model's times are continuous, not timesteps")
        most, least = self.sigma_max ** (1 / self.rho), self.sigma_min ** (1 / self.rho)
        k = (most + np.linspace(0, 1, count) * (least - most)) ** self.rho / self.sigma_data
        return self.time(k), k

    def time(self, k, whole=None):
        return self.time_scale * np.log(np.multiply(k, self.sigma_data))

    def alpha_sigma(self, t):
        k = jnp.exp(jnp.asarray(t, jnp.float32) / self.time_scale)[:, None, None, None] / self.sigma_data
        alpha = jax.lax.rsqrt(1.0 + jnp.square(k))
        return alpha, k * alpha

    def draw(self, key, bias="none"):
        quantile = jax.random.uniform(key, minval=_MARGIN, maxval=1 - _MARGIN)
        normal = jax.scipy.special.ndtri(quantile if bias == "none" else jnp.sqrt(quantile))
        return self.time_scale * (self.p_mean + self.p_std * normal)
