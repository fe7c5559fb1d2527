"""Fine-tuning a whole backbone on another set or style: out comes a backbone like any other, for any branch."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import jax.numpy as jnp

from bdm_jax.diffusion.schedule import Schedule
from bdm_jax.errors import unknown
from bdm_jax.models.functional import abstract, init
from bdm_jax.systems.families import FAMILIES
from bdm_jax.systems.pipeline import BridgePipeline
from bdm_jax.training.objectives.objective import Sizes, Training, Trees
from bdm_jax.training.objectives.plugin import (
    PREVIEWS,
    LoadedSystem,
    PluginTask,
    export_backbone,
    load_system,
    loaded_objective,
    plugin_captions,
    system_objective,
    trained_component,
)
from bdm_jax.training.objectives.preview import draw_records
from bdm_jax.training.objectives.sample import Sample, read_moments
from bdm_jax.training.objectives.system import BACKBONE, SystemObjective
from bdm_jax.training.sets import Sets


@dataclass(frozen=True)
class FinetuneTask(PluginTask):
    """Train the backbone's UNet on; text_encoder: its text encoders too. fresh: from fresh weights of their sizes.
    schedule: the family whose usual noise schedule it gets in place of the model's (Kolors' first phase: "sdxl").
    Other fields: see `PluginTask`.
    """

    text_encoder: bool = False
    fresh: bool = False
    schedule: str | None = None
    caption_dropout: float = 0.1

    def objective(self, sizes: Sizes) -> SystemObjective:
        """The loss."""
        return system_objective(self, sizes, {name: abstract(sizes[name]) for name in trained_names(self)})

    def start(self, sets: Sets, run: Path, seed: int, dtype: jnp.dtype) -> Training:
        """The model's weights; the others are loaded and frozen."""
        ready = load_system(self, sets, run, dtype)
        if self.schedule is not None:
            ready = replace(ready, system=ready.system.replace(schedule=self._schedule(ready)))
        params = {name: ready.system.networks[name].params for name in trained_names(self)}
        if self.fresh:
            params = {name: init(ready.sizes[name], seed + place) for place, name in enumerate(params)}
        texts = plugin_captions(self, ready)
        return Training(
            loaded_objective(self.objective(ready.sizes), ready),
            params,
            ready.without(params),
            ready.parts,
            Sample(read_moments, texts, self.source),
            partial(export_backbone, self.model, ready.sizes, schedule=self.schedule and ready.system.schedule),
            partial(draw_records, partial(tuned, ready, ready.drawing(params)), texts, batch_size=PREVIEWS),
            ready.inputs,
        )

    def _schedule(self, ready: LoadedSystem) -> Schedule:
        if self.schedule not in FAMILIES:
            raise unknown("task.schedule", self.schedule, FAMILIES)
        return FAMILIES[self.schedule].default_schedule(prediction_type=ready.system.schedule.prediction_type)


def trained_names(task: PluginTask) -> tuple[str, ...]:
    """The networks that are trained: the UNet, and where `task.text_encoder` says so its text encoders."""
    names = task.row.step_networks(BACKBONE)
    return names if task.text_encoder else names[:1]


def tuned(ready: LoadedSystem, system: BridgePipeline, params: Trees) -> BridgePipeline:
    """The system with the trained networks in their places."""
    return system.replace(**{name: trained_component(ready.sizes[name], params[name], ready.dtype) for name in params})
