"""What all makers of plug-ins share: the fields of their tasks, a ready system, prompts for images of any size."""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from bdm_jax.command_line import ModelPath
from bdm_jax.data.loader import MixturePart
from bdm_jax.diffusion.schedule import DiscreteSchedule, Schedule, TimestepBias
from bdm_jax.errors import UserError
from bdm_jax.models.config import Config
from bdm_jax.models.functional import cast
from bdm_jax.sampling.batching import default_size
from bdm_jax.systems.components import Component, config_of, find_part
from bdm_jax.systems.families import Family
from bdm_jax.systems.pipeline import BridgePipeline
from bdm_jax.text.tokenizer import Tokenizer
from bdm_jax.training.inputs import Inputs, of_pipeline
from bdm_jax.training.objectives.captions import Captions
from bdm_jax.training.objectives.denoising import Denoising
from bdm_jax.training.objectives.frozen import as_dtype, empty_prompt, on_host
from bdm_jax.training.objectives.objective import ReadSizes, Sizes, Trees
from bdm_jax.training.objectives.reading import of_tokenizers, reading_of
from bdm_jax.training.objectives.remat import Remat
from bdm_jax.training.objectives.starting import family_of
from bdm_jax.training.objectives.system import (
    BACKBONE,
    BRANCH,
    Binding,
    SystemObjective,
    WholeNetworks,
    empty_text,
)
from bdm_jax.training.sets import Sets

PREVIEWS = 4  # images drawn together


@dataclass(frozen=True)
class PluginTask:
    """Fields of every plug-in's task.

    model: a pipeline folder or single file; what is not trained of it stays as it is. prompts: one at random for each
    sample, {} in it standing for the record's caption. only: ids of concepts or file names, () takes all records.
    family: of the model (`bdm_jax.systems.families`) where it is not here to tell. captions: their language; None for
    Chinese in the branch and English in the backbone. The others as in `BackboneTask`.
    """

    model: ModelPath = Path("stable-diffusion-v1-5/stable-diffusion-v1-5")
    prompts: tuple[str, ...] = ("{}",)
    only: tuple[str, ...] = ()
    timestep_bias: TimestepBias = "none"
    min_snr: float | None = None
    offset_noise: float = 0.0
    remat: Remat = "none"
    caption_dropout: float = 0.0
    family: str = "sd15"
    captions: Literal["en", "zh"] | None = None

    on_branch: ClassVar[bool] = False
    reads_images: ClassVar[bool] = False  # also those whose latents it has

    @property
    def source(self) -> str:
        """The text source whose captions are read."""
        return BRANCH if self.on_branch else BACKBONE

    @property
    def language(self) -> str:
        """Of the captions."""
        return self.captions or ("zh" if self.on_branch else "en")

    @property
    def row(self) -> Family:
        """The model's."""
        return family_of(self.model, self.family)

    @property
    def encoders(self) -> tuple[str, ...]:
        """The text encoders of its source."""
        return self.row.reader(self.source).encoders

    def sizes(self, read: ReadSizes | None = None) -> Sizes:
        """The networks' sizes, which are read; no weights."""
        if self.on_branch and not self.row.bridge:
            raise UserError(f"{self.model}: {self.row.title} has no branch, which task.target=branch is to change")
        names = {*self.row.step_networks(self.source), *self.row.backbone_networks}
        return {name: (read or read_part)(name, self.model) for name in sorted(names)}


@dataclass(frozen=True)
class LoadedSystem:
    """What a plug-in's training is made of. system: all networks in fp32. parts: the run's records with their moments.
    frozen: the networks that a step works with in the compute type, and a branch's empty prompt. inputs: see
    `Training`.
    """

    system: BridgePipeline
    parts: list[MixturePart]
    frozen: dict[str, Any]
    dtype: jnp.dtype
    inputs: Inputs

    @property
    def sizes(self) -> Sizes:
        """Component name -> config."""
        return {name: component.config for name, component in self.system.networks.items()}

    def tokenizers(self, source: str) -> tuple[Tokenizer, ...]:
        """Of the text source."""
        return tuple(self.system.tokenizers[name] for name in self.system.readers[source].tokenizers)

    def without(self, trained: Trees) -> dict[str, Any]:
        """What is frozen beside these trees."""
        return {name: tree for name, tree in self.frozen.items() if name not in trained}

    def drawing(self, trained: Trees) -> BridgePipeline:
        """The system as progress is shown with it, all but what is trained in the compute type."""
        names = [name for name in self.frozen if name != "empty" and name not in trained]
        return self.system.replace(**{name: Component(self.sizes[name], self.frozen[name]) for name in names})


def load_system(task: PluginTask, sets: Sets, run: Path, dtype: jnp.dtype) -> LoadedSystem:
    """The task's model and records.

    Raises:
        UserError: prompts or a dropout that cannot be, no branch where one is to be changed.
    """
    if not task.prompts or not all(task.prompts):
        raise UserError("task.prompts: give at least one, none of them empty; {} stands for the caption")
    if not 0.0 <= task.caption_dropout <= 1.0:
        raise UserError(f"task.caption_dropout={task.caption_dropout}: must be between 0 and 1")
    with on_host():
        system = BridgePipeline.from_pretrained(task.model, "float32")
        if not task.on_branch:
            system = system.without_bridge()
        elif system.branch is None:
            raise UserError(f"{task.model} has no branch, which task.target=branch is to change")
        names = system.family.step_networks(task.source)
        frozen: dict[str, Any] = {name: cast(system.networks[name].params, dtype) for name in names}
        if task.on_branch:
            frozen["empty"] = empty_prompt(system, dtype)
    parts = sets.latents(system.vae, run, default_size(system), task.reads_images)
    return LoadedSystem(system, parts, frozen, dtype, of_pipeline(system, task.model))


def system_objective(
    task: PluginTask,
    sizes: Sizes,
    trained: dict[str, Any],
    network: Binding | None = None,
) -> SystemObjective:
    """The loss of the whole system, of these sizes, for what is trained; with a `Binding` that puts it in its place."""
    return SystemObjective(
        sizes,
        trained,
        network or WholeNetworks(sizes),
        Denoising(DiscreteSchedule(), sizes["vae"], task.timestep_bias, task.offset_noise, task.min_snr),
        reading_of(task.row.reader(task.source), sizes["branch" if task.on_branch else "unet"], sizes),
        empty_text(task.row, sizes) if task.on_branch else None,
        remat=task.remat,
    )


def loaded_objective(objective: SystemObjective, ready: LoadedSystem) -> SystemObjective:
    """The objective with what only the loaded system tells: its schedule, how it reads its texts."""
    system, source = ready.system, objective.source
    reading = replace(objective.reading, reader=system.readers[source])
    reading = of_tokenizers(reading, system.tokenizers, system.masked and source == BRANCH)
    return replace(objective, denoising=replace(objective.denoising, schedule=system.schedule), reading=reading)


def plugin_captions(task: PluginTask, ready: LoadedSystem) -> Captions:
    """The task's prompts."""
    first, *others = ready.tokenizers(task.source)
    how = {"prompts": task.prompts, "others": tuple(others)}
    return Captions(first, task.language, task.caption_dropout, **how)


def trained_component(config: Config, params: dict[str, jax.Array], dtype: jnp.dtype) -> Component:
    """A network that is trained, in the type that the others are in, to draw with."""
    return as_dtype(Component(config, params), dtype)


def export_backbone(
    model: Path,
    sizes: Sizes,
    params: Trees,
    folder: Path,
    metadata: dict[str, str],
    schedule: Schedule | None = None,
) -> None:
    """A whole backbone with what was trained in it, perhaps another noise schedule; the others file by file as they
    came, where they did so.
    """
    whole = BridgePipeline.from_pretrained(model, "float32").without_bridge()
    whole = whole if schedule is None else whole.replace(schedule=schedule)
    trained = {name: Component(sizes[name], params[name]) for name in params}
    whole.replace(**trained).save_pretrained(folder, metadata=metadata)
    for part in (*whole.family.backbone_names, "scheduler"):
        kept = part not in trained and not (part == "scheduler" and schedule is not None)
        if kept and (model / part).is_dir():
            shutil.rmtree(folder / part)
            shutil.copytree(model / part, folder / part)


def read_part(name: str, model: Path) -> Config:
    """The sizes of one network of a pipeline folder or single file. Raises UserError where it has none."""
    if not model.exists():
        raise UserError(f"{model}: no such model folder")
    return config_of(find_part(model / name if model.is_dir() else model, name))
