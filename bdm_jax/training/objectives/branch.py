"""Training a branch on a frozen backbone (arXiv 2309.00952, figure 1)."""

import json
import shutil
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from bdm_jax.command_line import ModelPath, OptionalModelPath
from bdm_jax.diffusion.schedule import DiscreteSchedule, Schedule, TimestepBias
from bdm_jax.errors import UserError
from bdm_jax.formats.files import shown
from bdm_jax.models.config import BranchConfig, branch_config
from bdm_jax.models.functional import abstract, init, input_dtype
from bdm_jax.models.unet.branch import init_branch_from_unet
from bdm_jax.paths import no_such
from bdm_jax.sampling.batching import default_size
from bdm_jax.systems.components import Component, load_component
from bdm_jax.systems.families import FAMILIES, Family, tokenizer_of
from bdm_jax.systems.index import branch_towers, tower_json
from bdm_jax.systems.pipeline import BridgePipeline
from bdm_jax.text import readers
from bdm_jax.text.tokenizer import Tokenizer
from bdm_jax.text.towers import Reader, Tower
from bdm_jax.training.inputs import of_part, of_pipeline
from bdm_jax.training.objectives.captions import Captions
from bdm_jax.training.objectives.denoising import Denoising
from bdm_jax.training.objectives.frozen import as_dtype, empty_prompt, on_host
from bdm_jax.training.objectives.objective import ReadSizes, Sizes, Training, Trees, read_sizes
from bdm_jax.training.objectives.preview import draw_records, export_pipeline
from bdm_jax.training.objectives.reading import Reading, of_tokenizers, reading_of
from bdm_jax.training.objectives.remat import Remat
from bdm_jax.training.objectives.sample import Sample, read_moments
from bdm_jax.training.objectives.starting import Start, family_of, folders_of, guidance_of, load_start, settings_of
from bdm_jax.training.objectives.system import BRANCH, SystemObjective, WholeNetworks, empty_text
from bdm_jax.training.sets import Sets

# The parts that a branch adds -> the fields that name their folders.
_FIELDS = {part.name: part.name.removeprefix("branch_") for family in FAMILIES.values() for part in family.bridge[1:]}
_ENCODERS = {name for name in _FIELDS if tokenizer_of(name) is not None}


@dataclass(frozen=True)
class BranchTask:
    """Train a branch on a frozen backbone whose own prompt is "", reading a frozen text encoder of another language.

    backbone: a pipeline folder. text_encoder, tokenizer: component folders; text_encoder_2: the second text encoder of
    a branch of SDXL, with its projection (a whole Chinese-CLIP). towers: how they are read, if not as the family's row
    says: JSON as `_bdm_branch_towers` of model_index.json has it (`bdm_jax.systems.index.branch_towers`). context: the
    width that a trained layer takes the text's states to first, as from a language model's 4096; None for none. family:
    the backbone's (`bdm_jax.systems.families`) where it is not here to tell. The branch starts as a copy of the
    backbone's encoder, or, with start_from, as a branch that exists: a component or pipeline folder or a file. min_snr,
    offset_noise, remat: as in `BackboneTask`. Schedule and target are the backbone's.
    """

    backbone: ModelPath = Path("runs/emoji-backbone/export")
    text_encoder: ModelPath = Path("runs/emoji-text/export/branch_text_encoder")
    tokenizer: ModelPath = Path("runs/emoji-text/export/branch_tokenizer")
    timestep_bias: TimestepBias = "none"
    min_snr: float | None = None
    offset_noise: float = 0.0
    remat: Remat = "none"
    caption_dropout: float = 0.1
    style_in_caption: bool = False
    guidance: float = 3.0
    start_from: OptionalModelPath = None
    text_encoder_2: OptionalModelPath = None
    towers: str | None = None
    context: int | None = None
    family: str = "sd15"
    language: str = "zh"

    def beside(self, path: Path) -> dict[str, Any]:
        """What a system at `path` has for these fields."""
        backbone = {"backbone": path} if (path / "unet").is_dir() else {}
        towers = folders_of(path, **{field: part for part, field in _FIELDS.items()})
        if (told := settings_of(path).get("branch_towers")) is not None:
            towers["towers"] = json.dumps([*map(tower_json, told)])
        return {**backbone, **towers, **guidance_of(path)}

    @property
    def row(self) -> Family:
        """The backbone's. Raises UserError for one without a bridge, and for text encoders that its branch has not."""
        family = family_of(self.backbone, self.family)
        if not family.bridge:
            raise UserError(f"task.backbone={self.backbone}: {family.title}, for which there is no branch")
        for part, field in _FIELDS.items():
            given = getattr(self, field) is not None
            if given != (part in family.parts):
                flag = f"--task.{field.replace('_', '-')}"
                told = f"has none: leave {flag} out" if given else f"needs one: give {flag}"
                raise UserError(f"task.{field}: a branch of {family.title} {told}")
        return family

    @property
    def reader(self) -> Reader:
        """How the branch's texts are read."""
        reader = self.row.reader(BRANCH)
        return reader if self.towers is None else replace(reader, towers=self.branch_towers)

    @property
    def branch_towers(self) -> tuple[Tower, ...] | None:
        """What `towers` says. Raises UserError for what cannot be."""
        if self.towers is None:
            return None
        try:
            return branch_towers(json.loads(self.towers), "task.towers")
        except ValueError as error:
            raise UserError(f"task.towers={shown(self.towers)}: no JSON ({error})") from error

    def sizes(self, read: ReadSizes = read_sizes) -> Sizes:
        """Sizes of the branch and of the frozen networks, which are read; no weights."""
        folders = {name: self.backbone / name for name in self.row.backbone_networks}
        folders |= self._encoders
        sizes = {name: read(name, folder) for name, folder in folders.items()}
        return {**sizes, "branch": _branch_config(self.reader, sizes, self.context)}

    def objective(self, sizes: Sizes, schedule: Schedule | None = None) -> SystemObjective:
        """The loss; `schedule` is the backbone's."""
        here = (self.tokenizer / "tokenizer_config.json").is_file()
        reading = reading_of(self.reader, sizes["branch"], sizes)
        if here:
            reading = _with_tokenizer(reading, Tokenizer.from_pretrained(self.tokenizer))
        return SystemObjective(
            sizes,
            {"branch": abstract(sizes["branch"])},
            WholeNetworks(sizes),
            Denoising(
                schedule or DiscreteSchedule(), sizes["vae"], self.timestep_bias, self.offset_noise, self.min_snr
            ),
            reading,
            empty_text(self.row, sizes),
            self.remat,
        )

    def start(self, sets: Sets, run: Path, seed: int, dtype: jnp.dtype) -> Training:
        """Fresh zero convolutions, the rest of the branch copied, or the branch that it starts from; everything else is
        loaded and frozen.
        """
        self._check_there()
        with on_host():
            backbone = BridgePipeline.from_pretrained(self.backbone, "float32")
            encoders = {name: load_component(path, "float32", name) for name, path in self._encoders.items()}
            sizes = {name: part.config for name, part in (*backbone.networks.items(), *encoders.items())}
            sizes["branch"] = config = _branch_config(self.reader, sizes, self.context)
            begun = self._begun(run, config)
            params = begun.params.get("branch") or init_branch_from_unet(init(config, seed), backbone.unet.params)
            inputs = {
                **of_pipeline(backbone, self.backbone),
                **{name: of_part(encoder, self._encoders[name]) for name, encoder in encoders.items()},
            }
            encoders = {name: as_dtype(encoder, dtype) for name, encoder in encoders.items()}
            typed = {name: as_dtype(part, dtype) for name, part in backbone.networks.items() if name != "vae"}
            backbone = backbone.replace(**typed)
            empty = empty_prompt(backbone, dtype)
        parts = sets.latents(backbone.vae, run, common_size=default_size(backbone))
        texts = Captions(
            Tokenizer.from_pretrained(self.tokenizer), self.language, self.caption_dropout, self.style_in_caption
        )
        pipeline = partial(_pipeline, self, config, encoders, texts.tokenizer, backbone)
        frozen = {"unet": backbone.unet.params, "empty": empty}
        frozen |= {name: encoders[name].params for name in self.reader.encoders}
        objective = self.objective(sizes, backbone.schedule)
        return Training(
            replace(objective, reading=_with_tokenizer(objective.reading, texts.tokenizer)),
            {"branch": params},
            frozen,
            parts,
            Sample(read_moments, texts, BRANCH),
            partial(_export, self, pipeline),
            partial(_preview, pipeline, texts, input_dtype(backbone.unet.params)),
            {**inputs, "branch_tokenizer": of_part(texts.tokenizer, self.tokenizer), **begun.inputs},
        )

    @property
    def _encoders(self) -> dict[str, Path]:
        """The branch's text encoders, by the names of their parts."""
        return {part: path for part, field in _FIELDS.items() if (path := getattr(self, field)) and part in _ENCODERS}

    def _check_there(self) -> None:
        """Raises UserError for a frozen network that is not there: the setting, and how to come by another."""
        self._needs("backbone", "model folder")
        for name in _FIELDS.values():
            if getattr(self, name) is not None:
                self._needs(name, "component folder")

    def _needs(self, name: str, kind: str) -> None:
        if not (path := getattr(self, name)).exists():
            raise UserError(
                f"task.{name}={no_such(path, kind)}; give --task.{name.replace('_', '-')}, or start from a whole "
                "pipeline folder (--task.start-from assets/demo)"
            )

    def _begun(self, run: Path, config: BranchConfig) -> Start:
        """The branch that it starts from, which must be one of this backbone and text encoder."""
        begun = load_start(self.start_from, run, {"branch": config}, where="for the backbone and text_encoder here")
        if begun.params and settings_of(self.start_from).get("masked"):
            raise UserError(
                f"{self.start_from}: its branch was trained with the padding of prompts hidden, which this run would "
                "show it; a LoRA of it can be trained (task.target=branch)"
            )
        return begun


def _with_tokenizer(reading: Reading, tokenizer: Tokenizer) -> Reading:
    """The reading with the windows of the one tokenizer that a branch has."""
    return of_tokenizers(reading, dict.fromkeys(reading.reader.tokenizers, tokenizer))


def _branch_config(reader: Reader, sizes: Sizes, context: int | None) -> BranchConfig:
    """The branch of the UNet of these sizes for the text that the reader gives."""
    parts = {name: Component(config, {}) for name, config in sizes.items()}
    reader = reading_of(reader, sizes["unet"], sizes).reader
    pooled = readers.pooled_width(reader, parts) if sizes["unet"].has_addition else None
    try:
        return branch_config(sizes["unet"], readers.width(reader, parts), pooled, context)
    except ValueError as error:
        raise UserError(f"task.context={context}: {error}") from error


def _pipeline(
    task: BranchTask,
    config: BranchConfig,
    encoders: dict[str, Component],
    tokenizer: Tokenizer,
    backbone: BridgePipeline,
    params: Trees,
) -> BridgePipeline:
    """The bridge that these parameters make of the backbone."""
    return backbone.replace(
        branch=Component(config, params["branch"]),
        **encoders,
        branch_tokenizer=tokenizer,
        guidance=task.guidance,
        branch_towers=task.branch_towers,
    )


def _preview(
    pipeline: partial, texts: Captions, dtype: jnp.dtype, params: Trees, records: list[dict]
) -> list[np.ndarray]:
    """In the type that the backbone is in, as users draw them."""
    cast = {"branch": {path: jnp.asarray(value, dtype) for path, value in params["branch"].items()}}
    return draw_records(pipeline, texts, cast, records)


def _export(task: BranchTask, pipeline: partial, params: Trees, folder: Path, metadata: dict[str, str]) -> None:
    """A whole pipeline folder; frozen components are copied file by file, in whatever type they came."""
    export_pipeline(pipeline, params, folder, metadata)
    frozen = {part: task.backbone / part for part in (*task.row.backbone_names, "scheduler")}
    for part, origin in {**frozen, **task._encoders}.items():
        shutil.copytree(origin, folder / part, dirs_exist_ok=True)
