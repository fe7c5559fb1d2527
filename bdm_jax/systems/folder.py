"""Systems on disk: a diffusers-style pipeline folder, single files, parts from elsewhere in place of a system's own."""

import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bdm_jax.diffusion import scheduler_config
from bdm_jax.diffusion.schedule import Schedule
from bdm_jax.errors import UserError, unknown
from bdm_jax.formats.files import read_json
from bdm_jax.formats.open import Found, find
from bdm_jax.formats.weights import weights_among
from bdm_jax.paths import TOKENIZERS, no_such
from bdm_jax.systems import families
from bdm_jax.systems.components import Component, config_of, find_part, load_found
from bdm_jax.systems.families import Family
from bdm_jax.systems.index import CHECKERS, INDEX, SCHEDULE, read_index
from bdm_jax.systems.int8 import quantised
from bdm_jax.text.tokenizer import Tokenizer
from bdm_jax.text.towers import Tower

# For text encoders that come without their tokenizer: vocabulary -> (bundled folder, tokens in a window).
_BUNDLED = {49408: (TOKENIZERS / "clip", 77), 21128: (TOKENIZERS / "chinese", 52)}

_OF_BRANCHES = {"masked", "branch_towers"}  # settings that go with a branch, not with a backbone


@dataclass(frozen=True)
class FoundSystem:
    """What a pipeline folder, a component folder or a file holds.

    Attributes:
      networks: by name, not yet in memory.
      tokenizers: folder by name; None stands for the bundled one that fits the text encoder.
      schedule: the noise schedule, None where nothing records it.
      prediction: what the UNet predicts, where a single file records it.
      pipeline_class: diffusers' name of the system.
      settings: guidance, masked, zero_empty, branch_towers: those that the folder records.
    """

    networks: dict[str, Found] = field(default_factory=dict)
    tokenizers: dict[str, Path | None] = field(default_factory=dict)
    schedule: Schedule | None = None
    prediction: str | None = None
    pipeline_class: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def family(self) -> Family:
        """The row that it is of."""
        configs = {}
        for name, network in self.networks.items():
            with suppress(UserError):  # which is raised where it is loaded
                configs[name] = config_of(network)
        return families.family_of([*self.networks, *self.tokenizers], self.pipeline_class, configs)


def find_system(model: Path, variant: str | None = None) -> FoundSystem:
    """Everything in a pipeline folder, a component folder or a file."""
    if not model.exists():
        raise no_such(model, "model folder")
    if model.is_file() or (model / "config.json").is_file():
        return _in_file(model, variant)
    index = read_index(model / INDEX)
    networks, tokenizers = {}, {}
    for part in families.parts():
        folder = model / part.name
        if part.name in families.names() and folder.is_dir() and any(folder.iterdir()):
            if part.configs:
                networks[part.name] = find_part(folder, part.name, variant)
            else:
                tokenizers[part.name] = folder
    for name in networks:  # Kolors' own folders have their tokenizer in its text encoder's
        inside = {key: path for key, path in tokenizer_beside(name, model / name).items() if path is not None}
        tokenizers = {**inside, **tokenizers}
    schedule = load_schedule(model / "scheduler") if (model / "scheduler").is_dir() else None
    if not networks and not tokenizers and schedule is None:
        raise _not_whole(model, families.SD15.backbone_names)
    found = FoundSystem(networks, tokenizers, schedule, **index)
    if left := strangers(model, found):
        warnings.warn(f"{model}: no part of a {found.family.title} system: {', '.join(left)}: left out", stacklevel=2)
    return found


def family_at(model: Path) -> Family | None:
    """The row of the system in a pipeline folder, by its model_index.json and its parts' names, or in a file; None
    where there is none. No weights are read. Raises UserError for a system that this library does not have.
    """
    if model.is_file():
        return find_system(model).family
    names = {child.name for child in model.iterdir()} & families.names() if model.is_dir() else ()
    return families.family_of(names, read_index(model / INDEX)["pipeline_class"]) if names else None


def is_pipeline(folder: Path) -> bool:
    """Whether a folder is that of a system: it has model_index.json or component folders."""
    return (folder / INDEX).is_file() or any((child / "config.json").is_file() for child in folder.iterdir())


def strangers(model: Path, found: FoundSystem) -> list[str]:
    """Component folders of a pipeline folder that its system has no place for, but those that only check its images."""
    inside = {child.name for child in model.iterdir() if (child / "config.json").is_file()} - CHECKERS
    return sorted((inside | {*found.networks, *found.tokenizers}) - found.family.parts.keys())


def find_parts(
    model: Path, backbone: Path | None, networks: Mapping[str, Path], variant: str | None = None
) -> FoundSystem:
    """A system with another backbone, and with other networks by name, in place of its own.

    Of a backbone all that it has is taken, with its tokenizers and its guidance. A text encoder brings its tokenizer.
    `variant` chooses among the weight files of the model and the backbone, and of the networks that have it.
    """
    found = find_system(model, variant)
    if backbone is not None:
        bridge = [name for name in (*found.networks, *found.tokenizers) if families.in_bridge(name)]
        found = _with_backbone(found, find_system(backbone, variant))
        if lost := [name for name in bridge if name not in found.family.parts]:
            raise UserError(f"{backbone}: {found.family.title}, in which {model}'s {', '.join(lost)} have no place")
    known = [part.name for part in families.parts() if part.configs and part.name in families.names()]
    given, tokenizers = {}, {}
    for name, path in networks.items():
        if name not in known:
            raise unknown("part of a system", name, known)
        given[name] = find_part(path, name, _of_part(path, variant))
        for tokenizer, folder in tokenizer_beside(name, path).items():  # which two may share, and one of them have
            tokenizers[tokenizer] = tokenizers.get(tokenizer) or folder
    found = replace(found, networks={**found.networks, **given}, tokenizers={**found.tokenizers, **tokenizers})
    _check_branch(found)
    for name, path in networks.items():
        if name not in found.family.parts:
            raise UserError(f"{path}: {model} is a system of the family {found.family.title}, which has no {name}")
    return found


def load_parts(
    model: Path, found: FoundSystem, dtype: str | None, text_weights: str | None = None
) -> tuple[Family, dict[str, Component | Tokenizer], Schedule]:
    """Read all that was found into memory, text encoders in int8 where `text_weights` says so.

    Raises UserError, naming `model`, where a part is missing.
    """
    family, tokenizers = found.family, dict(found.tokenizers)
    for tower in family.towers:
        if tower.encoder in found.networks and tokenizers.get(tower.tokenizer, "") is None:
            tokenizers[tower.tokenizer] = _usual_tokenizer(found, tower)
    schedule = found.schedule
    if schedule is None and found.prediction is not None:
        schedule = family.default_schedule(prediction_type=found.prediction)
    there = {**found.networks, **tokenizers, "scheduler": schedule}
    names = (*family.backbone_names, "scheduler")
    names += family.bridge_names if any(name in there for name in family.bridge_names) else ()
    if missing := [name for name in names if there.get(name) is None]:
        raise _not_whole(model, missing)
    parts: dict[str, Component | Tokenizer] = {}
    for name in names:
        part = there[name]
        if isinstance(part, Found):
            small = text_weights == "int8" and name in family.text_encoders
            parts[name] = load_found(part, dtype, quantised) if small else load_found(part, dtype)
        elif name != "scheduler":
            parts[name] = part if isinstance(part, Tokenizer) else Tokenizer.from_pretrained(part)
    return family, parts, schedule


def load_tokenizer(model: Path, found: FoundSystem, tower: Tower) -> Tokenizer:
    """The tokenizer of a text encoder that was found. Raises UserError, naming `model`, where there is none."""
    if (path := found.tokenizers.get(tower.tokenizer)) is not None:
        return Tokenizer.from_pretrained(path)
    if (tokenizer := _usual_tokenizer(found, tower)) is None:
        raise _not_whole(model, [tower.tokenizer])
    return tokenizer


def scheduler_values(family: Family, schedule: Schedule) -> dict[str, Any]:
    """scheduler_config.json of a system's schedule, under the name of the scheduler that diffusers reads it with."""
    own = getattr(schedule, "to_json", None)
    values = own() if own else scheduler_config.to_json(schedule)
    return {**values, "_class_name": family.scheduler_class} if type(schedule) is family.schedule_class else values


def load_schedule(folder: Path) -> Schedule:
    """The noise schedule of a `scheduler` folder. Raises UserError or FileError that names its file.

    It is of the class of the family that has such a scheduler, where that class reads it itself.
    """
    values = read_json(folder / SCHEDULE)
    name, read = values.get("_class_name"), scheduler_config.from_json
    for family in families.FAMILIES.values():
        if family.scheduler_class == name:
            read = getattr(family.schedule_class, "from_json", read)
    try:
        return read(values)
    except (TypeError, ValueError) as error:
        raise UserError(f"{folder / SCHEDULE}: {error}") from error


def bundled_tokenizer(words: int, pad: str | None = None) -> Tokenizer | None:
    """The tokenizer of a text encoder with that many tokens, for encoders that come without; None where none fits.

    `pad`: the token that fills its windows, where it is another than the tokenizer's own.
    """
    if words not in _BUNDLED:
        return None
    folder, length = _BUNDLED[words]
    return Tokenizer.from_pretrained(folder, length, pad)


def tokenizer_beside(encoder: str, path: Path) -> dict[str, Path | None]:
    """The tokenizer that a text encoder's folder holds or has beside it; None (a bundled one) where it has none."""
    name = families.tokenizer_of(encoder)
    if name is None:
        return {}
    files = ("tokenizer.json", "vocab.txt", "vocab.json", "tokenizer.model")
    inside = path.is_dir() and any((path / file).is_file() for file in files)
    beside = path.parent / name if path.name == encoder else path / name
    return {name: path if inside else beside if beside.is_dir() else None}


def _usual_tokenizer(found: FoundSystem, tower: Tower) -> Tokenizer | None:
    words = config_of(found.networks[tower.encoder]).vocab_size
    return bundled_tokenizer(words, found.family.parts[tower.tokenizer].pad)


def _in_file(model: Path, variant: str | None) -> FoundSystem:
    found = find(model, variant, whole=True)
    if beside := [name for name in found if name not in families.names()]:
        if len(beside) == len(found):
            raise UserError(f"{model}: holds {', '.join(beside)}, which is no part of a system")
        warnings.warn(f"{model}: its {', '.join(beside)} is no part of a system: left out", stacklevel=2)
        found = {name: part for name, part in found.items() if name not in beside}
    encoders = {name: tokenizer for name in found if (tokenizer := families.tokenizer_of(name)) is not None}
    prediction = found["unet"].prediction if "unet" in found else None
    if prediction is None and encoders:  # a whole SD1.x or SDXL model that says nothing predicts epsilon
        prediction = "epsilon"
    backbone = {name: tokenizer for name, tokenizer in encoders.items() if not families.in_bridge(name)}
    return FoundSystem(found, dict.fromkeys(backbone.values()), prediction=prediction)


def _with_backbone(found: FoundSystem, other: FoundSystem) -> FoundSystem:
    networks = {name: part for name, part in other.networks.items() if not families.in_bridge(name)}
    tokenizers = {name: part for name, part in other.tokenizers.items() if not families.in_bridge(name)}
    settings = {name: value for name, value in found.settings.items() if name in _OF_BRANCHES}
    settings |= {name: value for name, value in other.settings.items() if name not in _OF_BRANCHES}
    schedule, prediction = found.schedule, found.prediction
    if other.schedule is not None or other.prediction is not None:
        schedule, prediction = other.schedule, other.prediction
    return FoundSystem(
        {**found.networks, **networks},
        {**found.tokenizers, **tokenizers},
        schedule,
        prediction,
        other.pipeline_class or found.pipeline_class,
        settings,
    )


def _check_branch(found: FoundSystem) -> None:
    """Raises UserError for a branch of one kind of backbone with another: the only sign that weights bear is whether
    pooled texts and sizes are added to the time embedding.
    """
    if not found.family.bridge:
        return
    unet, branch = (found.networks.get(parts[0].name) for parts in (found.family.backbone, found.family.bridge))
    if unet is None or branch is None or config_of(unet).has_addition == config_of(branch).has_addition:
        return
    with_bridge = [family for family in families.FAMILIES.values() if family.bridge and family.sizes]
    titles = {family.sizes[family.bridge[0].name].has_addition: family.title for family in reversed(with_bridge)}
    own, other = (titles[config_of(network).has_addition] for network in (branch, unet))
    raise UserError(
        f"{branch.path}: a branch for {own}, but {unet.path} is {other}: give a branch that was trained on {other} "
        f"(--branch), or a backbone of {own} (--backbone)"
    )


def _of_part(path: Path, variant: str | None) -> str | None:
    """The variant of a network that is named by itself: none where its folder has no such file."""
    if variant is None or not path.is_dir():
        return variant
    return variant if weights_among({file.name for file in path.iterdir()}, variant) else None


def _not_whole(model: Path, missing) -> UserError:
    return UserError(f"{model}: not a whole model folder; missing: {', '.join(missing)}")
