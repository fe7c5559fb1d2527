"""Training a branch on a frozen backbone (arXiv 2309.00952, figure 1)."""

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
from bdm_jax.models.config import BranchConfig, Config, UNetConfig, branch_config
from bdm_jax.models.functional import abstract, init, input_dtype
from bdm_jax.models.unet.branch import init_branch_from_unet
from bdm_jax.paths import no_such
from bdm_jax.sampling.batching import default_size
from bdm_jax.systems.components import Component, load_component
from bdm_jax.systems.families import SD15
from bdm_jax.systems.pipeline import BridgePipeline
from bdm_jax.text.tokenizer import Tokenizer
from bdm_jax.training.inputs import of_part, of_pipeline
from bdm_jax.training.objectives.captions import Captions
from bdm_jax.training.objectives.denoising import Denoising
from bdm_jax.training.objectives.frozen import as_dtype, empty_prompt, on_host
from bdm_jax.training.objectives.objective import ReadSizes, Sizes, Training, Trees, read_sizes
from bdm_jax.training.objectives.preview import draw_records, export_pipeline
from bdm_jax.training.objectives.remat import Remat
from bdm_jax.training.objectives.sample import Sample, read_moments
from bdm_jax.training.objectives.starting import Start, folders_of, guidance_of, load_start, settings_of
from bdm_jax.training.objectives.system import BRANCH, SystemObjective, WholeNetworks, empty_text
from bdm_jax.training.sets import Sets

_BDM_LENGTH = 52  # tokens, where the tokenizer is not here


@dataclass(frozen=True)
class BranchTask:
    """Train a branch on a frozen backbone whose own prompt is "", reading a frozen text encoder of another language.

    backbone: a pipeline folder. text_encoder, tokenizer: component folders. The branch starts as a copy of the
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
    language: str = "zh"

    def beside(self, path: Path) -> dict[str, Any]:
        """What a system at `path` has for these fields."""
        backbone = {"backbone": path} if (path / "unet").is_dir() else {}
        towers = folders_of(path, text_encoder="branch_text_encoder", tokenizer="branch_tokenizer")
        return {**backbone, **towers, **guidance_of(path)}

    def sizes(self, read: ReadSizes = read_sizes) -> Sizes:
        """Sizes of the branch and of the frozen networks, which are read; no weights."""
        folders = {name: self.backbone / name for name in SD15.backbone_networks}
        folders["branch_text_encoder"] = self.text_encoder
        sizes = {name: read(name, folder) for name, folder in folders.items()}
        return {**sizes, "branch": _branch_config(sizes["unet"], sizes["branch_text_encoder"])}

    def objective(self, sizes: Sizes, schedule: Schedule | None = None) -> SystemObjective:
        """The loss; `schedule` is the backbone's."""
        here = (self.tokenizer / "tokenizer_config.json").is_file()
        return SystemObjective(
            sizes,
            {"branch": abstract(sizes["branch"])},
            WholeNetworks(sizes),
            Denoising(
                schedule or DiscreteSchedule(), sizes["vae"], self.timestep_bias, self.offset_noise, self.min_snr
            ),
            source=BRANCH,
            empty=empty_text(sizes["unet"], sizes["text_encoder"].max_position_embeddings),
            length=Tokenizer.from_pretrained(self.tokenizer).length if here else _BDM_LENGTH,
            remat=self.remat,
        )

    def start(self, sets: Sets, run: Path, seed: int, dtype: jnp.dtype) -> Training:
        """Fresh zero convolutions, the rest of the branch copied, or the branch that it starts from; everything else is
        loaded and frozen.
        """
        self._check_there()
        with on_host():
            backbone = BridgePipeline.from_pretrained(self.backbone, "float32")
            encoder = load_component(self.text_encoder, "float32")
            config = _branch_config(backbone.unet.config, encoder.config)
            begun = self._begun(run, config)
            params = begun.params.get("branch") or init_branch_from_unet(init(config, seed), backbone.unet.params)
            inputs = {
                **of_pipeline(backbone, self.backbone),
                "branch_text_encoder": of_part(encoder, self.text_encoder),
            }
            encoder = as_dtype(encoder, dtype)
            typed = {name: as_dtype(part, dtype) for name, part in backbone.networks.items() if name != "vae"}
            backbone = backbone.replace(**typed)
            empty = empty_prompt(backbone, dtype)
        parts = sets.latents(backbone.vae, run, common_size=default_size(backbone))
        texts = Captions(
            Tokenizer.from_pretrained(self.tokenizer), self.language, self.caption_dropout, self.style_in_caption
        )
        sizes = {name: part.config for name, part in backbone.networks.items()}
        sizes |= {"branch": config, "branch_text_encoder": encoder.config}
        pipeline = partial(_pipeline, self, config, encoder, texts.tokenizer, backbone)
        frozen = {"unet": backbone.unet.params, "branch_text_encoder": encoder.params, "empty": empty}
        return Training(
            replace(self.objective(sizes, backbone.schedule), length=texts.tokenizer.length),
            {"branch": params},
            frozen,
            parts,
            Sample(read_moments, texts, BRANCH),
            partial(_export, self, pipeline),
            partial(_preview, pipeline, texts, input_dtype(backbone.unet.params)),
            {**inputs, "branch_tokenizer": of_part(texts.tokenizer, self.tokenizer), **begun.inputs},
        )

    def _check_there(self) -> None:
        """Raises UserError for a frozen network that is not there: the setting, and how to come by another."""
        self._needs("backbone", "model folder")
        self._needs("text_encoder", "component folder")
        self._needs("tokenizer", "component folder")

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


def _branch_config(unet: UNetConfig, encoder: Config) -> BranchConfig:
    return branch_config(unet, encoder.hidden_size, encoder.hidden_size if unet.has_addition else None)


def _pipeline(
    task: BranchTask,
    config: BranchConfig,
    encoder: Component,
    tokenizer: Tokenizer,
    backbone: BridgePipeline,
    params: Trees,
) -> BridgePipeline:
    """The bridge that these parameters make of the backbone."""
    return backbone.replace(
        branch=Component(config, params["branch"]),
        branch_text_encoder=encoder,
        branch_tokenizer=tokenizer,
        guidance=task.guidance,
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
    frozen = {part: task.backbone / part for part in (*SD15.backbone_names, "scheduler")}
    for part, origin in {**frozen, "branch_text_encoder": task.text_encoder}.items():
        shutil.copytree(origin, folder / part, dirs_exist_ok=True)
