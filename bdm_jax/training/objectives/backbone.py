"""Training a backbone from scratch: a UNet together with its English text encoder."""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import jax.numpy as jnp

from bdm_jax.command_line import ModelPath, OptionalModelPath
from bdm_jax.data.loader import MixturePart
from bdm_jax.diffusion.schedule import DiscreteSchedule, TimestepBias
from bdm_jax.errors import UserError
from bdm_jax.models.config import CLIPTextConfig, UNetConfig
from bdm_jax.models.functional import abstract, init
from bdm_jax.paths import TOKENIZERS
from bdm_jax.systems.components import Component, load_component
from bdm_jax.systems.families import FAMILIES, SD15
from bdm_jax.systems.pipeline import BridgePipeline
from bdm_jax.text.tokenizer import Tokenizer
from bdm_jax.training.inputs import of_part
from bdm_jax.training.objectives.captions import Captions
from bdm_jax.training.objectives.denoising import Denoising
from bdm_jax.training.objectives.objective import ReadSizes, Sizes, Training, Trees, read_sizes
from bdm_jax.training.objectives.preview import draw_records, export_pipeline
from bdm_jax.training.objectives.reading import reading_of
from bdm_jax.training.objectives.remat import Remat
from bdm_jax.training.objectives.sample import Sample, read_image, read_moments
from bdm_jax.training.objectives.starting import (
    check_schedule,
    check_tokenizer,
    folders_of,
    guidance_of,
    load_start,
    schedule_of,
)
from bdm_jax.training.objectives.system import BACKBONE, SystemObjective, WholeNetworks
from bdm_jax.training.sets import Sets

PredictionType = Literal["epsilon", "v_prediction"]


@dataclass(frozen=True)
class BackboneTask:
    """Train a UNet together with its English text encoder, on latents of a ready autoencoder, or on pixels.

    vae: a folder with a `vae` component; None trains on pixels, images resized to the UNet's sample_size.
    num_train_timesteps, beta_end: the noise schedule's length and its last beta (Kolors' second phase: 1100, 0.014).
    caption_dropout: share of captions replaced by "", so that guidance works. timestep_bias: "later" trains noisy steps
    more, as diffusers' --timestep_bias_strategy does. min_snr: weight the loss by min(SNR, min_snr) in terms of x0
    (arXiv 2303.09556), None not at all. offset_noise: how much of the noise is one number per sample and channel.
    zero_snr: the last step is pure noise (arXiv 2305.08891). remat: "blocks" keeps only the inputs of resnets and
    transformers and computes the rest again for the gradient. start_from: a UNet and text encoder to train on, a
    pipeline folder or single file, whose sizes they keep; None for fresh weights.
    """

    unet: UNetConfig = field(default_factory=UNetConfig)
    text_encoder: CLIPTextConfig = field(default_factory=CLIPTextConfig)
    vae: OptionalModelPath = Path("runs/emoji-vae/export/vae")
    tokenizer: ModelPath = TOKENIZERS / "english"
    prediction_type: PredictionType = "v_prediction"
    num_train_timesteps: int = 1000
    beta_end: float = 0.012
    zero_snr: bool = False
    timestep_bias: TimestepBias = "none"
    min_snr: float | None = None
    offset_noise: float = 0.0
    remat: Remat = "none"
    caption_dropout: float = 0.1
    style_in_caption: bool = False
    guidance: float = 3.0
    start_from: OptionalModelPath = None
    language: str = "en"

    sized: ClassVar[dict[str, str]] = {name: name for name in SD15.step_networks(BACKBONE)}

    def beside(self, path: Path) -> dict[str, Any]:
        """What a system at `path` has for these fields."""
        theirs, folders = schedule_of(path), folders_of(path, vae="vae", tokenizer="tokenizer")
        found = {**folders, **guidance_of(path)}
        if theirs.prediction_type in get_args(PredictionType):
            found["prediction_type"] = theirs.prediction_type
        return {**found, "zero_snr": getattr(theirs, "rescale_betas_zero_snr", False)}

    @property
    def schedule(self) -> DiscreteSchedule:
        """The noise schedule that the backbone will have."""
        return DiscreteSchedule(
            num_train_timesteps=self.num_train_timesteps,
            beta_end=self.beta_end,
            prediction_type=self.prediction_type,
            rescale_betas_zero_snr=self.zero_snr,
        )

    def sizes(self, read: ReadSizes = read_sizes) -> Sizes:
        """Those that are trained, and the autoencoder's sizes; no weights are read."""
        own = {"unet": self.unet, "text_encoder": self.text_encoder}
        return own if self.vae is None else {**own, "vae": read("vae", self.vae)}

    def objective(self, sizes: Sizes) -> SystemObjective:
        """The loss."""
        return SystemObjective(
            sizes,
            {name: abstract(sizes[name]) for name in self.sized},
            WholeNetworks(sizes),
            Denoising(self.schedule, sizes.get("vae"), self.timestep_bias, self.offset_noise, self.min_snr),
            reading_of(SD15.reader(BACKBONE), self.unet, sizes),
            remat=self.remat,
        )

    def start(self, sets: Sets, run: Path, seed: int, dtype: jnp.dtype) -> Training:
        """Fresh UNet and text encoder, or those that it starts from; the autoencoder is loaded and frozen."""
        sizes = {"unet": self.unet, "text_encoder": self.text_encoder}
        begun = load_start(self.start_from, run, sizes)
        tokenizer = Tokenizer.from_pretrained(self.tokenizer)
        # fp32 on any device: it is written out again unchanged
        vae = None if self.vae is None else load_component(self.vae, "float32")
        pipeline = partial(_pipeline, self, vae, tokenizer)
        if begun.params:
            self._check_start(tokenizer)
            pipeline(begun.params)  # which networks that do not belong together do not make
        if vae is None:
            parts = self._pixels(sets)
        else:
            parts = sets.latents(vae, run, common_size=(self.unet.sample_size * vae.config.factor,) * 2)
        fresh = {"unet": (self.unet, seed), "text_encoder": (self.text_encoder, seed + 1)}
        params = begun.params or {name: init(*one) for name, one in fresh.items()}
        texts = Captions(tokenizer, self.language, self.caption_dropout, self.style_in_caption)
        sizes |= {} if vae is None else {"vae": vae.config}
        read = read_moments if vae is not None else partial(read_image, (self.unet.sample_size,) * 2)
        return Training(
            self.objective(sizes),
            params,
            {},
            parts,
            Sample(read, texts, BACKBONE),
            partial(export_pipeline, pipeline),
            partial(draw_records, pipeline, texts),
            {
                "tokenizer": of_part(texts.tokenizer, self.tokenizer),
                **({} if vae is None else {"vae": of_part(vae, self.vae)}),
                **begun.inputs,
            },
        )

    def _check_start(self, tokenizer: Tokenizer) -> None:
        """The tokenizer must be the text encoder's; that another target is trained is said."""
        check_tokenizer(tokenizer, self.tokenizer, self.text_encoder, self.start_from, "text_encoder")
        check_schedule(self.start_from, self.schedule)

    def _pixels(self, sets: Sets) -> list[MixturePart]:
        if self.unet.in_channels != 3 or self.unet.out_channels != 3:
            raise UserError(
                f"task.vae=None trains on pixels: task.unet needs 3 channels in and out, not {self.unet.in_channels} "
                f"and {self.unet.out_channels}"
            )
        return sets.images()


def _pipeline(task: BackboneTask, vae: Component | None, tokenizer: Tokenizer, params: Trees) -> BridgePipeline:
    """The system that these parameters make."""
    parts = {
        "unet": Component(task.unet, params["unet"]),
        "text_encoder": Component(task.text_encoder, params["text_encoder"]),
        "tokenizer": tokenizer,
        **({} if vae is None else {"vae": vae}),
    }
    family = FAMILIES["pixels" if vae is None else "sd15"]
    return BridgePipeline(family, parts, task.schedule, guidance=task.guidance)
