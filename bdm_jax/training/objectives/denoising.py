"""What every training of a denoiser has in common: captions to ids, latents to noisy ones, predictions to a loss."""

import jax
import jax.numpy as jnp
import numpy as np

from bdm_jax.data.captions import caption, name
from bdm_jax.data.loader import MixturePart
from bdm_jax.diffusion import losses
from bdm_jax.diffusion.schedule import Schedule
from bdm_jax.errors import BadRecord
from bdm_jax.latents.moments import record_key
from bdm_jax.sampling.generate import generate
from bdm_jax.sampling.settings import Request, Sampling
from bdm_jax.systems.components import Component
from bdm_jax.systems.pipeline import BridgePipeline
from bdm_jax.text.tokenizer import Tokenizer
from bdm_jax.text.windows import split
from bdm_jax.training.objectives.job import Batch, Trees, draw, timestep
from bdm_jax.training.objectives.weighting import min_snr


class CaptionJob:
    """Training on latents and captions: the records of `parts` hold `moments`."""

    def __init__(
        self, task, params: Trees, vae: Component, tokenizer: Tokenizer, schedule: Schedule, parts: list[MixturePart]
    ):
        self.task, self.params, self.vae, self.tokenizer = task, params, vae, tokenizer
        self.schedule, self.parts = schedule, parts

    def sample(self, record, rng):
        if self.task.language == "en" and record.get("zh_only"):
            raise BadRecord(record_key(record), "zh_only", "English training must not see it")
        longer, shorter = self.tokenizer.content(self.texts(record, rng))
        content = longer if len(longer) <= self.tokenizer.length - 2 else shorter
        if rng.random() < self.task.caption_dropout:
            content = []
        return {"moments": record["moments"], "ids": self.ids(content)}

    def texts(self, record: dict, rng: np.random.Generator) -> tuple[str, str]:
        """What a sample is called, and what it is called where that is too long."""
        language, style = self.task.language, self.task.style_in_caption
        return caption(record, language, rng, style), name(record, language, style)

    def name(self, record: dict) -> str:
        """The prompt for a record when progress is shown."""
        return name(record, self.task.language, self.task.style_in_caption)

    def ids(self, content: list[int]) -> np.ndarray:
        """Token ids as one window, (S,) int32; what it has no room for is cut off."""
        content, length = content[: self.tokenizer.length - 2], self.tokenizer.length
        return split([content], 1, length, self.tokenizer.start, self.tokenizer.end, self.tokenizer.pad)[0]


class DiffusionJob(CaptionJob):
    """Training of a denoiser. `pipeline(params)` is the system that the parameters make."""

    at_once = 16  # pictures drawn together when progress is shown

    def noised(self, batch: Batch, key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Batch -> noisy latents (B,h,w,C), timesteps (B,), targets (B,h,w,C); fp32."""
        mean, logvar = jnp.split(batch["moments"].astype(jnp.float32), 2, axis=-1)
        places, shape = batch["place"], mean.shape[1:]
        key_latent, key_noise, key_t = jax.random.split(key, 3)
        spread = draw(key_latent, places, lambda k: jax.random.normal(k, shape))
        latents = (mean + jnp.exp(0.5 * logvar) * spread) * self.vae.config.scaling_factor
        noise = draw(key_noise, places, lambda k: self._noise(k, shape))
        t = draw(key_t, places, lambda k: timestep(k, self.schedule.num_train_timesteps, self.task.timestep_bias))
        return self.schedule.add_noise(latents, noise, t), t, self.schedule.target(latents, noise, t)

    def error(self, prediction: jax.Array, target: jax.Array, t: jax.Array) -> jax.Array:
        """Predictions, targets (B,h,w,C) and timesteps (B,) -> the loss."""
        errors = losses.denoising(prediction, target)
        return jnp.mean(errors if self.task.min_snr is None else errors * min_snr(self.schedule, t, self.task.min_snr))

    def pipeline(self, params: Trees) -> BridgePipeline:
        """The system that these parameters make."""
        raise NotImplementedError

    def export(self, params, folder, metadata):
        """A whole pipeline folder."""
        self.pipeline(params).save_pretrained(folder, metadata=metadata)

    def pictures(self, params, records):
        requests = [self.request(self.name(record), seed) for seed, record in enumerate(records)]
        return list(generate(self.pipeline(params), requests, Sampling(steps=20), batch_size=self.at_once))

    def request(self, text: str, seed: int) -> Request:
        """To the branch in Chinese, to the backbone in English."""
        return Request(text, seed=seed) if self.task.language == "zh" else Request("", english=text, seed=seed)

    def _noise(self, key, shape):
        noise = jax.random.normal(key, shape)
        if self.task.offset_noise:  # of a key that no other draw of this sample has
            noise += self.task.offset_noise * jax.random.normal(jax.random.fold_in(key, 1), (1, 1, shape[-1]))
        return noise
