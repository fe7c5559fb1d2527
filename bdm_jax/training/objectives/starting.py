"""Trainings that start from weights that exist: `start_from` of their tasks.

The weights may lie in a component folder, in a whole pipeline folder or a run's export, or in a single file, in any
layout that `formats.open` finds. What a run keeps of them is their digest and, in its config, their sizes: once it has
a checkpoint it goes on without them.
"""

import dataclasses
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from bdm_jax.command_line import ModelPath, OptionalModelPath
from bdm_jax.diffusion.schedule import DiscreteSchedule, Schedule
from bdm_jax.errors import UserError, unknown
from bdm_jax.formats.files import read_json, shown
from bdm_jax.formats.hub import is_remote, parse_name
from bdm_jax.formats.open import Found
from bdm_jax.formats.weights import read_weights
from bdm_jax.models.config import Config, to_json
from bdm_jax.models.values import pick
from bdm_jax.systems import families
from bdm_jax.systems.components import Component, config_of, find_part, load_found
from bdm_jax.systems.families import Family
from bdm_jax.systems.fetch import local
from bdm_jax.systems.folder import family_at, load_schedule, tokenizer_beside
from bdm_jax.systems.index import INDEX, read_index
from bdm_jax.text.tokenizer import Tokenizer
from bdm_jax.training.inputs import PROBE, Input, has_checkpoints, of_part
from bdm_jax.training.objectives.frozen import on_host
from bdm_jax.training.objectives.objective import Sizes, Trees

T = TypeVar("T")

# What weights do not tell of their network's sizes, by config.json's names: of a file alone these are the task's.
_UNTOLD = ("attention_head_dim", "norm_num_groups", "norm_eps", "addition_time_embed_dim")
# What of a schedule a network is trained with; the rest is about sampling.
_TRAINED_WITH = ("prediction_type", "rescale_betas_zero_snr", "beta_schedule", "beta_start", "beta_end")
_TRAINED_WITH += ("num_train_timesteps",)


class Start(NamedTuple):
    """Initial parameters, fp32, by tree, and what a run keeps of them (see `Training.inputs`); both empty for a run
    that starts afresh, or goes on from its checkpoint where the weights are gone.
    """

    params: Trees
    inputs: dict[str, Input]


FRESH = Start({}, {})


def fetched(task: T, run: Path) -> T:
    """The task with paths here for the models that it names on a hub or by links (`systems.fetch`).

    Of a run that has a checkpoint the commits are those that it began with, unless others are named. Raises UserError
    or FileError for what cannot be had; not for the weights that such a run started from, which it needs no more.
    """
    resumed = has_checkpoints(run) and (run / "config.json").is_file()
    before = read_json(run / "config.json").get("task", {}) if resumed else {}
    changes: dict[str, Any] = {}
    for field in dataclasses.fields(task):
        source = getattr(task, field.name)
        if field.type in (ModelPath, OptionalModelPath) and source is not None and is_remote(source):
            part = field.name if field.name in families.names() else None
            try:
                changes[field.name] = local(_as_begun(source, before.get(field.name)), part)
            except UserError:
                if field.name != "start_from" or not before:
                    raise
                changes[field.name] = Path(source)
    return dataclasses.replace(task, **changes)


def _as_begun(source: str | Path, before: Any) -> str | Path:
    """A name with the commit that the run has recorded for it, where it says no revision itself."""
    asked, begun = parse_name(str(source)), parse_name(before) if isinstance(before, str) else None
    same = asked and begun and (asked.name, asked.place, asked.revision) == (begun.name, begun.place, "main")
    return before if same else source


def settled(task: T, run: Path, default: T | None = None) -> T:
    """The task with what the weights that it starts from say: the sizes of their networks (`task.sized`).

    default: the task as its config file has it, where the task is what a command line made of it. What is the same in
    both is nobody's choice: where the weights lie in a whole system, the networks beside them, which are frozen, and
    its settings are those of that system (`task.beside`), which a note says.

    Raises:
        UserError: there is nothing, and the run has no checkpoint to go on from; a network that it lacks; sizes that
            were chosen and are others than the weights'.
    """
    path: Path | None = getattr(task, "start_from", None)
    if path is None:
        return task
    sized: Mapping[str, str] = getattr(task, "sized", {})
    if not is_there(path, run):
        values = read_json(run / "config.json")["task"]
        return dataclasses.replace(task, **{name: pick(type(getattr(task, name)), values[name]) for name in sized})
    changes: dict[str, Any] = {}
    for name, part in sized.items():
        own, changes[name] = getattr(task, name), config_of(find_start(path, part))
        _check_class(path, part, changes[name], type(own))
        usual = own if default is None else getattr(default, name)
        for field, value, chosen in _differing(changes[name], own):
            if chosen != getattr(usual, field):
                raise UserError(f"task.{name}.{field}={chosen}: the weights in {path} have {value}: leave it out")
    if default is not None and hasattr(task, "beside"):
        found = task.beside(path)
        usual = {name: getattr(default, name) for name in found}
        free = [name for name, value in usual.items() if value is not None and value == getattr(task, name)]
        if taken := {name: found[name] for name in free if found[name] != usual[name]}:
            told = ", ".join(f"task.{name}={value}" for name, value in taken.items())
            warnings.warn(f"taken from {path}, which the run starts from: {told}", stacklevel=2)
        changes |= taken
    return dataclasses.replace(task, **changes)


def family_of(model: Path, usual: str) -> Family:
    """The row of a model, as its folder or file tells; where nothing is there, that of the name `usual`.

    Raises:
        UserError: no such family.
    """
    if usual not in families.FAMILIES:
        raise unknown("task.family", usual, families.FAMILIES)
    return family_at(model) or families.FAMILIES[usual]


def find_start(path: Path, part: str) -> Found:
    """The network of that name in a component folder, a pipeline folder (or what a run has exported) or a file.

    Raises:
        UserError: there is none.
    """
    inside = path.is_dir() and not (path / "config.json").is_file()
    where = path / part if inside else path
    if inside and not where.is_dir():
        there = sorted(child.name for child in path.iterdir() if (child / "config.json").is_file())
        raise UserError(f"{path}: has no folder {part}" + (f", only {', '.join(there)}" if there else ""))
    return find_part(where, part)


def load_start(
    path: Path | None, run: Path, sizes: Sizes, parts: Mapping[str, str] | None = None, *, where: str = "in the task"
) -> Start:
    """The weights that a task starts from, of exactly the networks of `sizes`.

    parts: what a tree is called in folders and files, where that is another name. where: whence the sizes, for errors.

    Raises:
        UserError: nothing is there (unless the run has a checkpoint), sizes differ (both are said), weights are
            missing, unknown or not finite.
    """
    if not is_there(path, run):
        return FRESH
    params, inputs = {}, {}
    for tree, config in sizes.items():
        part = (parts or {}).get(tree, tree)
        found = find_start(path, part)
        component = _load(found, path, part, config, where)
        params[tree], inputs[f"start_from.{part}"] = component.params, of_part(component, path)
    return Start(params, inputs)


def is_there(path: Path | None, run: Path) -> bool:
    """Whether there are weights to start from: not where none are named, and not where they are gone and needed no
    more, as the run has a checkpoint. Raises UserError where they are needed.
    """
    if path is None or path.exists():
        return path is not None
    if not has_checkpoints(run):
        raise UserError(f"task.start_from={shown(str(path))}: no such file or folder")
    return False


def check_finite(path: Path, params: Trees) -> None:
    """Raises UserError that names the first of all weights that is not a number, or infinite."""
    for tree in params.values():
        for name, value in tree.items():
            if not np.isfinite(np.asarray(value)).all():
                raise UserError(f"{path}: {name} has values that are not finite: no training can start from them")


def check_tokenizer(ours: Tokenizer, where: Path, config: Any, path: Path, part: str) -> None:
    """Whether a text encoder was trained with this tokenizer: its own lies beside it, or it has as many rows.

    Raises:
        UserError: it was not; what to give is said.
    """
    (theirs,) = tokenizer_beside(part, path).values()
    rows, places = config.vocab_size, config.max_position_embeddings
    if ours.length > places:
        raise UserError(f"{where}: windows of {ours.length} tokens, the {part} in {path} has {places} positions")
    if theirs is None and ours.vocab_size != rows:
        raise UserError(
            f"{where}: {ours.vocab_size} tokens, the {part} in {path} has embeddings of {rows}: give the tokenizer "
            "that it was trained with (--task.tokenizer)"
        )
    if theirs is not None:
        known = Tokenizer.from_pretrained(theirs, ours.length)
        if known.fingerprint(PROBE) != ours.fingerprint(PROBE):
            raise UserError(f"{where} is not the tokenizer of the {part} in {path}: give --task.tokenizer {theirs}")


def folders_of(path: Path, **parts: str) -> dict[str, Path]:
    """Field -> folder of the part that it is given as, of those that a system at `path` has."""
    return {field: path / part for field, part in parts.items() if (path / part).is_dir()}


def settings_of(path: Path) -> dict[str, Any]:
    """What the model_index.json of a pipeline folder records, {} where there is none."""
    return read_index(path / INDEX)["settings"]


def guidance_of(path: Path) -> dict[str, float]:
    """The guidance that a pipeline folder records, under its name."""
    return {name: value for name, value in settings_of(path).items() if name == "guidance"}


def schedule_of(path: Path) -> Schedule:
    """The noise schedule of a backbone: its folder's; of a file what it records, epsilon where it says nothing."""
    if (path / "scheduler").is_dir():
        return load_schedule(path / "scheduler")
    return DiscreteSchedule(prediction_type=find_start(path, "unet").prediction or "epsilon")


def check_schedule(path: Path, ours: Schedule) -> None:
    """Warns where a backbone was trained with another target or other noise levels than `ours`."""
    theirs = schedule_of(path)
    pairs = ((name, getattr(theirs, name, None), getattr(ours, name, None)) for name in _TRAINED_WITH)
    if told := ", ".join(f"{name} {one}, not {other}" for name, one, other in pairs if one != other):
        warnings.warn(f"{path} was trained with {told}: it has to learn that first", stacklevel=4)


def _load(found: Found, path: Path, part: str, config: Config, where: str) -> Component:
    kinds, recorded = (part, *families.other_kinds(part)), {} if path.is_dir() else read_weights(path).metadata
    if not path.is_dir() and not any(f"bdm_jax.{kind}" in recorded for kind in kinds):
        wanted = to_json(config)
        values = {**found.values, **{key: wanted[key] for key in _UNTOLD if key in wanted}}
        found = dataclasses.replace(found, values=values)
    own = config_of(found)
    _check_class(path, part, own, type(config))
    for field, value, wanted in _differing(own, config):
        raise UserError(f"{path}: its {part} does not fit: {field} is {value}, but {wanted} {where}")
    with on_host():
        component = load_found(found, "float32")
    check_finite(path, {part: component.params})
    return component


def _check_class(path: Path, part: str, config: Config, kind: type) -> None:
    if type(config) is not kind:
        raise UserError(f"{path}: its {part} is a {type(config).__name__}, this trains a {kind.__name__}")


def _differing(one: Config, other: Config) -> list[tuple[str, Any, Any]]:
    """(field, value, the other value) of each that differs; heads may be said once or for each level."""
    pairs = [(field.name, getattr(one, field.name), getattr(other, field.name)) for field in dataclasses.fields(one)]
    same_heads = getattr(one, "heads", None) == getattr(other, "heads", None)
    return [(name, *both) for name, *both in pairs if both[0] != both[1] and not (name == "num_heads" and same_heads)]
