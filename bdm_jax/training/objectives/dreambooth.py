"""DreamBooth (Ruiz et al., arXiv 2208.12242): a backbone that knows one subject by a rare word, and does not forget the
subject's class, of which it is shown its own pictures (prior preservation).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from bdm_jax.data.records import open_source
from bdm_jax.errors import UserError
from bdm_jax.latents.moments import record_moments
from bdm_jax.paths import atomic_file
from bdm_jax.runtime.processes import broadcast_from_first, is_first
from bdm_jax.sampling.batching import default_size
from bdm_jax.sampling.generate import generate
from bdm_jax.sampling.settings import Request, Sampling
from bdm_jax.training.objectives.finetune import FinetuneJob, FinetuneTask
from bdm_jax.training.objectives.plugin import LoadedSystem

_BATCH = 4


@dataclass(frozen=True)
class DreamBoothTask(FinetuneTask):
    """Train UNet, and with text_encoder the tower, on a subject's photographs.

    prompts: what they show, with a rare word. prior_weight: of the class's loss, 0 for none. class_prompt: the same
    without the rare word. class_images: a folder of pictures of the class; where None, class_count of them are drawn
    by the untouched model into the run's folder. Defaults as in diffusers' script (specs, section 5).
    """

    prompts: tuple[str, ...] = ("a photo of sks dog",)
    caption_dropout: float = 0.0
    prior_weight: float = 1.0
    class_prompt: str = "a photo of a dog"
    class_images: Path | None = None
    class_count: int = 200

    reads_pictures: ClassVar[bool] = True  # they must be as large as the class's

    def make(self, ready: LoadedSystem) -> "DreamBoothJob":
        if not 0.0 <= self.prior_weight < float("inf"):
            raise UserError(f"task.prior_weight={self.prior_weight}: must be a number from 0 on")
        prior = self._class_moments(ready) if self.prior_weight else np.zeros((0,))
        return DreamBoothJob(self, ready, {part: getattr(ready.system, part).params for part in self.trained}, prior)

    def _class_moments(self, ready: LoadedSystem) -> np.ndarray:
        """Of the class's pictures, (N,h,w,2C)."""
        folder = self.class_images
        if folder is None:
            folder = ready.run / "class-images"
            self._draw_class(ready, folder)
        source = open_source(folder)
        cache, size = ready.run / "class-latents.npz", default_size(ready.system)
        return record_moments(ready.system.vae, source, cache, size)

    def _draw_class(self, ready: LoadedSystem, folder: Path) -> None:
        """Those pictures that are not there yet; a picture is its seed's."""
        if self.class_count < 1:
            raise UserError(f"task.class_count={self.class_count}: must be at least 1")
        if is_first():
            folder.mkdir(parents=True, exist_ok=True)
            paths = [folder / f"{seed:05d}.png" for seed in range(self.class_count)]
            missing = [(seed, path) for seed, path in enumerate(paths) if not path.is_file()]
            requests = [Request("", english=self.class_prompt, seed=seed) for seed, _ in missing]
            pictures = generate(ready.system, requests, Sampling(), batch_size=_BATCH) if missing else ()
            for (_, path), picture in zip(missing, pictures, strict=True):
                with atomic_file(path) as file:
                    Image.fromarray(picture).save(file, "PNG")
        broadcast_from_first(0)  # the others read what the first has drawn


class DreamBoothJob(FinetuneJob):
    """`DreamBoothTask` made ready; `prior` are the class's moments (N,h,w,2C)."""

    def __init__(self, task, ready, params, prior: np.ndarray):
        super().__init__(task, ready, params)
        self.prior, self.class_ids = prior, self.ids(self.tokenizer.content([task.class_prompt])[0])

    def sample(self, record, rng):
        row = super().sample(record, rng)
        if not self.task.prior_weight:
            return row
        return {**row, "class_moments": self.prior[int(rng.integers(len(self.prior)))], "class_ids": self.class_ids}

    def loss(self, params, frozen, batch, key):
        """The subject's error plus `prior_weight` times the class's, both in one pass."""
        if not self.task.prior_weight:
            return super().loss(params, frozen, batch, key)
        prior = {"moments": batch["class_moments"], "place": batch["place"]}
        # a key beside the three that `noised` makes of its own
        both = zip(self.noised(batch, key), self.noised(prior, jax.random.fold_in(key, 3)), strict=True)
        x, t, target = (jnp.concatenate(pair) for pair in both)
        ids = jnp.concatenate([batch["ids"], batch["class_ids"]])
        predicted = self.predict(params, frozen, {"ids": ids}, x, t)
        parts = [jnp.split(array, 2) for array in (predicted, target, t)]
        subject, others = (self.error(*half) for half in zip(*parts, strict=True))
        return subject + self.task.prior_weight * others, {"subject": subject, "class": others}
