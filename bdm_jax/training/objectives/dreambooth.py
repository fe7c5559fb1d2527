"""DreamBooth (Ruiz et al., arXiv 2208.12242): a backbone that knows one subject by a rare word, and does not forget the
subject's class, of which it is shown its own images (prior preservation).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from bdm_jax.data.records import open_source
from bdm_jax.errors import UserError
from bdm_jax.latents.moments import record_moments
from bdm_jax.models.functional import abstract
from bdm_jax.paths import atomic_file
from bdm_jax.runtime.processes import broadcast_from_first, is_first
from bdm_jax.sampling.batching import default_size
from bdm_jax.sampling.generate import generate
from bdm_jax.sampling.settings import Request, Sampling
from bdm_jax.training.inputs import Input
from bdm_jax.training.objectives.finetune import trained_names, tuned
from bdm_jax.training.objectives.objective import Batch, Row, Shapes, Sizes, Training, Trees
from bdm_jax.training.objectives.plugin import (
    PREVIEWS,
    LoadedSystem,
    PluginTask,
    export_backbone,
    load_system,
    loaded_objective,
    plugin_captions,
    system_objective,
)
from bdm_jax.training.objectives.preview import draw_records
from bdm_jax.training.objectives.sample import Sample, read_moments
from bdm_jax.training.objectives.system import SystemObjective
from bdm_jax.training.sets import Sets, check_faults

_BATCH = 4


@dataclass(frozen=True)
class DreamBoothTask(PluginTask):
    """Train UNet, and with text_encoder the text encoder, on a subject's photographs.

    prompts: what they show, with a rare word. prior_weight: of the class's loss, 0 for none. class_prompt: the same
    without the rare word. class_images: a folder of images of the class; where None, class_count of them are drawn
    by the unchanged model into the run's folder. Defaults as in diffusers' script (specs, section 5).
    """

    text_encoder: bool = False
    prompts: tuple[str, ...] = ("a photo of sks dog",)
    caption_dropout: float = 0.0
    prior_weight: float = 1.0
    class_prompt: str = "a photo of a dog"
    class_images: Path | None = None
    class_count: int = 200

    reads_images: ClassVar[bool] = True  # they must be as large as the class's

    def objective(self, sizes: Sizes) -> "SystemObjective | PriorObjective":
        """The loss."""
        trained = {name: abstract(sizes[name]) for name in trained_names(self)}
        system = system_objective(self, sizes, trained)
        return PriorObjective(system, self.prior_weight) if self.prior_weight else system

    def start(self, sets: Sets, run: Path, seed: int, dtype: jnp.dtype) -> Training:
        """The model's weights; the others are loaded and frozen, the class's images drawn where they are missing."""
        ready = load_system(self, sets, run, dtype)
        if not 0.0 <= self.prior_weight < float("inf"):
            raise UserError(f"task.prior_weight={self.prior_weight}: must be a number from 0 on")
        params = {name: ready.system.networks[name].params for name in trained_names(self)}
        texts = plugin_captions(self, ready)
        make_sample = Sample(read_moments, texts, self.source)
        system = loaded_objective(
            system_objective(self, ready.sizes, {name: abstract(ready.sizes[name]) for name in params}), ready
        )
        objective: Any = system
        if self.prior_weight:
            class_ids = texts.of_text(self.class_prompt)
            make_sample = partial(_with_class, make_sample, class_moments(self, ready, run, sets.skip_rate), class_ids)
            objective = PriorObjective(system, self.prior_weight)
        return Training(
            objective,
            params,
            ready.without(params),
            ready.parts,
            make_sample,
            partial(export_backbone, self.model, ready.sizes),
            partial(draw_records, partial(tuned, ready, ready.drawing(params)), texts, batch_size=PREVIEWS),
            {**ready.inputs, **self._class_inputs()},
        )

    def _class_inputs(self) -> dict[str, Input]:
        """The folder of the class's images; those that are drawn are the model's."""
        if not self.prior_weight or self.class_images is None:
            return {}
        source = open_source(self.class_images)
        return {"class_images": Input(str(self.class_images), source.contents)}


@dataclass(frozen=True)
class PriorObjective:
    """The subject's error plus `prior_weight` times the class's, both in one pass."""

    system: SystemObjective
    prior_weight: float

    def loss(self, params: Trees, frozen: dict, batch: Batch, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """See `Objective`; batch: also `class_moments` (B,h,w,2C) and `class_ids` (B,S)."""
        system = self.system
        prior = {"moments": batch["class_moments"], "place": batch["place"]}
        # a key beside the three that `noised` makes of its own
        noised = system.denoising.noised
        both = zip(noised(batch, key), noised(prior, jax.random.fold_in(key, 3)), strict=True)
        x, t, target = (jnp.concatenate(pair) for pair in both)
        ids = jnp.concatenate([batch["texts"][system.source], batch["class_ids"]])
        predicted = system.predict(params, frozen, ids, x, t)
        parts = [jnp.split(array, 2) for array in (predicted, target, t)]
        subject, others = (system.denoising.error(*half) for half in zip(*parts, strict=True))
        return subject + self.prior_weight * others, {"subject": subject, "class": others}

    def shapes(self) -> Shapes:
        """See `Objective`."""
        return self.system.shapes()

    def row(self, size: int) -> Row:
        """See `Objective`."""
        row = self.system.row(size)
        return {**row, "class_moments": row["moments"], "class_ids": row["texts"][self.system.source]}


def class_moments(task: DreamBoothTask, ready: LoadedSystem, run: Path, skip_rate: float) -> np.ndarray:
    """Of the class's images that can be used, (N,h,w,2C), each as often as it counts. Raises UserError for too many
    that cannot.
    """
    folder = task.class_images
    if folder is None:
        folder = run / "class-images"
        _draw_class(task, ready, folder)
    cache, size = run / "class-latents.npz", default_size(ready.system)
    source, faults = open_source(folder), {}
    moments = record_moments(ready.system.vae, source, cache, size, None, faults)
    check_faults(folder, faults.values(), len(source), skip_rate)
    counts = np.array(getattr(source, "repeats", np.ones(len(source), np.int64)))
    counts[[*faults]] = 0
    return np.repeat(moments, counts, axis=0)


def _draw_class(task: DreamBoothTask, ready: LoadedSystem, folder: Path) -> None:
    """Those images that are not there yet; an image is its seed's."""
    if task.class_count < 1:
        raise UserError(f"task.class_count={task.class_count}: must be at least 1")
    if is_first():
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / f"{seed:05d}.png" for seed in range(task.class_count)]
        missing = [(seed, path) for seed, path in enumerate(paths) if not path.is_file()]
        requests = [Request("", english=task.class_prompt, seed=seed) for seed, _ in missing]
        images = generate(ready.system, requests, Sampling(), batch_size=_BATCH) if missing else ()
        for (_, path), image in zip(missing, images, strict=True):
            with atomic_file(path) as file:
                Image.fromarray(image).save(file, "PNG")
    broadcast_from_first(0)  # the others read what the first has drawn


def _with_class(
    make_sample: Callable, prior: np.ndarray, class_ids: np.ndarray, record: dict, rng: np.random.Generator
) -> Row:
    row = make_sample(record, rng)
    return {**row, "class_moments": prior[int(rng.integers(len(prior)))], "class_ids": class_ids}
