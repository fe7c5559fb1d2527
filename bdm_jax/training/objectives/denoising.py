"""What every training of a denoiser has in common: clean images to noisy ones, predictions to a loss."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from bdm_jax.diffusion import losses
from bdm_jax.diffusion.schedule import Schedule, TimestepBias
from bdm_jax.models.config import VAEConfig
from bdm_jax.training.objectives.objective import Batch, Row, draw
from bdm_jax.training.objectives.weighting import min_snr


@dataclass(frozen=True)
class Denoising:
    """Noise levels, targets and weights, of latents or, where `vae` is None, of pixels.

    timestep_bias: see `Schedule.draw`. offset_noise: how much of the noise is one number per sample and channel.
    min_snr: weight the loss by min(SNR, min_snr) in terms of x0 (arXiv 2303.09556); None for no weights.
    """

    schedule: Schedule
    vae: VAEConfig | None
    timestep_bias: TimestepBias = "none"
    offset_noise: float = 0.0
    min_snr: float | None = None

    def noised(self, batch: Batch, key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """A batch of `moments` (B,h,w,2C), or of `image` (B,H,W,3) uint8 -> noisy latents, or pixels in [-1,1] with
        noise, (B,h,w,C); times (B,); targets (B,h,w,C); fp32.
        """
        places = batch["place"]
        key_latent, key_noise, key_t = jax.random.split(key, 3)
        clean = self._clean(batch, key_latent)
        if (scale := self.schedule.data_scale) != 1:
            clean = clean / scale
        noise = draw(key_noise, places, lambda k: self._noise(k, clean.shape[1:]))
        t = draw(key_t, places, lambda k: self.schedule.draw(k, self.timestep_bias))
        return self.schedule.add_noise(clean, noise, t), t, self.schedule.target(clean, noise, t)

    def error(self, prediction: jax.Array, target: jax.Array, t: jax.Array) -> jax.Array:
        """Predictions, targets (B,h,w,C) and times (B,) -> the loss."""
        errors = losses.denoising(prediction, target)
        return jnp.mean(errors if self.min_snr is None else errors * min_snr(self.schedule, t, self.min_snr))

    def row(self, size: int) -> Row:
        """Shapes of one sample of `size` pixels, without its texts."""
        place = jax.ShapeDtypeStruct((), jnp.int32)
        if self.vae is None:
            return {"image": jax.ShapeDtypeStruct((size, size, 3), jnp.uint8), "place": place}
        side = size // self.vae.factor
        shape = (side, side, 2 * self.vae.latent_channels)
        return {"moments": jax.ShapeDtypeStruct(shape, jnp.float32), "place": place}

    def _clean(self, batch: Batch, key: jax.Array) -> jax.Array:
        if self.vae is None:
            return batch["image"].astype(jnp.float32) / 127.5 - 1.0
        mean, logvar = jnp.split(batch["moments"].astype(jnp.float32), 2, axis=-1)
        sampled = draw(key, batch["place"], lambda k: jax.random.normal(k, mean.shape[1:]))
        return (mean + jnp.exp(0.5 * logvar) * sampled) * self.vae.scaling_factor

    def _noise(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        noise = jax.random.normal(key, shape)
        if self.offset_noise:  # of a key that no other draw of this sample has
            noise += self.offset_noise * jax.random.normal(jax.random.fold_in(key, 1), (1, 1, shape[-1]))
        return noise
