"""What can be trained: the autoencoder, the backbone with its text tower, the branch (arXiv 2309.00952, figure 1).

A task names the networks and where the ready ones come from. `start` makes a `Job`: trees to train, trees to leave
alone, the records, how one becomes a sample, the loss, and how the result becomes a folder.
"""

import shutil
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bdm_jax.data.loader import MixturePart
from bdm_jax.diffusion import losses
from bdm_jax.diffusion.schedule import DiscreteSchedule
from bdm_jax.errors import UserError
from bdm_jax.formats.files import read_json
from bdm_jax.images.decode import decode_image
from bdm_jax.latents.moments import record_key, record_moments, round_trip
from bdm_jax.models.config import (
    BranchConfig,
    CLIPTextConfig,
    Config,
    EncoderConfig,
    RobertaConfig,
    UNetConfig,
    VAEConfig,
    from_json,
)
from bdm_jax.models.functional import abstract, bind, init
from bdm_jax.models.unet.branch import init_branch_from_unet
from bdm_jax.models.unet.conditioning import Conditioning
from bdm_jax.paths import TOKENIZERS
from bdm_jax.systems.components import Component, load_component, save_component
from bdm_jax.systems.pipeline import BridgePipeline
from bdm_jax.text.encode import encode
from bdm_jax.text.tokenizer import Tokenizer
from bdm_jax.training.objectives.denoising import CaptionJob, DiffusionJob
from bdm_jax.training.objectives.job import Shapes, TimestepBias, Trees, draw
from bdm_jax.training.objectives.remat import Remat, network, param_dtype
from bdm_jax.training.sets import Sets

# --------------------------------------------------------------------------------------------------- the autoencoder


@dataclass(frozen=True)
class VAETask:
    """Train an AutoencoderKL on pictures. remat: as in `BackboneTask`."""

    vae: VAEConfig = field(default_factory=VAEConfig)
    kl_weight: float = 1e-3
    remat: Remat = "none"
    language: str = "zh"  # whose records it sees; no caption is read

    def shapes(self) -> Shapes:
        """Of what is trained and of what is left alone; nothing is allocated."""
        return {"vae": abstract(self.vae)}, {}

    def start(self, sets: Sets, run: Path, seed: int, dtype: jnp.dtype) -> "VAEJob":
        """Fresh weights."""
        return VAEJob(self, {"vae": init(self.vae, seed)}, sets.pictures())


class VAEJob:
    """`VAETask` made ready."""

    def __init__(self, task: VAETask, params: Trees, parts: list[MixturePart]):
        self.task, self.params, self.frozen, self.parts = task, params, {}, parts

    def sample(self, record, rng):
        pixels = decode_image(record["image"], name=record_key(record))
        return {"image": pixels[:, ::-1] if rng.random() < 0.5 else pixels}

    def loss(self, params, frozen, batch, key):
        images = batch["image"].astype(jnp.float32) / 127.5 - 1.0
        vae = network(self.task.vae, params["vae"], self.task.remat)
        mean, logvar = (x.astype(jnp.float32) for x in vae.encode(images.astype(param_dtype(params["vae"]))))
        noise = draw(key, batch["place"], lambda k: jax.random.normal(k, mean.shape[1:]))
        latents = mean + jnp.exp(0.5 * logvar) * noise
        decoded = vae.decode(latents.astype(param_dtype(params["vae"]))).astype(jnp.float32)
        reconstruction = jnp.mean(losses.reconstruction(images, decoded))
        kl = jnp.mean(losses.kl_to_unit_normal(mean, logvar))
        error = jnp.mean(jnp.square((decoded - images) / 2))
        metrics = {"reconstruction": reconstruction, "kl": kl, "psnr": -10 * jnp.log10(error)}
        return reconstruction + self.task.kl_weight * kl, metrics

    def export(self, params, folder, metadata):
        """The folder `vae`, its scaling factor measured on the records: latents times it have unit variance."""
        vae = Component(self.task.vae, params["vae"])
        moments = np.concatenate([record_moments(vae, part.source) for part in self.parts])
        means, _ = np.split(moments, 2, axis=-1)
        config = replace(self.task.vae, scaling_factor=float(1.0 / means.std()))
        save_component(folder / "vae", config, params["vae"], metadata=metadata)

    def pictures(self, params, records):
        vae = Component(self.task.vae, params["vae"])
        return round_trip(vae, [decode_image(record["image"]) for record in records])


# ------------------------------------------------------------------------------------------------------- the backbone


@dataclass(frozen=True)
class BackboneTask:
    """Train a UNet together with its English text tower, on latents of a ready autoencoder.

    vae: a folder with a `vae` component. caption_dropout: share of captions replaced by "", so that guidance works.
    timestep_bias: "later" trains noisy steps more, as diffusers' --timestep_bias_strategy does.
    min_snr: weight the loss by min(SNR, min_snr) in terms of x0 (arXiv 2303.09556), None not at all. offset_noise: how
    much of the noise is one number per sample and channel. zero_snr: the last step is pure noise (arXiv 2305.08891).
    remat: "blocks" keeps only the inputs of resnets and transformers and computes the rest again for the gradient.
    """

    unet: UNetConfig = field(default_factory=UNetConfig)
    text_encoder: CLIPTextConfig = field(default_factory=CLIPTextConfig)
    vae: Path = Path("runs/emoji-vae/export/vae")
    tokenizer: Path = TOKENIZERS / "english"
    prediction_type: Literal["epsilon", "v_prediction"] = "v_prediction"
    zero_snr: bool = False
    timestep_bias: TimestepBias = "none"
    min_snr: float | None = None
    offset_noise: float = 0.0
    remat: Remat = "none"
    caption_dropout: float = 0.1
    style_in_caption: bool = False
    guidance: float = 3.0
    language: str = "en"

    def shapes(self) -> Shapes:
        """Of what is trained and of what is left alone; nothing is allocated."""
        return {"unet": abstract(self.unet), "text_encoder": abstract(self.text_encoder)}, {}

    def start(self, sets: Sets, run: Path, seed: int, dtype: jnp.dtype) -> "BackboneJob":
        """Fresh UNet and text tower; the autoencoder is loaded and only used."""
        vae = load_component(self.vae, "float32")  # on any device: it is written out again unchanged
        parts = sets.latents(vae, run)
        params = {"unet": init(self.unet, seed), "text_encoder": init(self.text_encoder, seed + 1)}
        tokenizer = Tokenizer.from_pretrained(self.tokenizer)
        schedule = DiscreteSchedule(prediction_type=self.prediction_type, rescale_betas_zero_snr=self.zero_snr)
        return BackboneJob(self, params, vae, tokenizer, schedule, parts)


class BackboneJob(DiffusionJob):
    """`BackboneTask` made ready."""

    frozen: dict = {}

    def loss(self, params, frozen, batch, key):
        x, t, target = self.noised(batch, key)
        x = x.astype(param_dtype(params["unet"]))
        cond = Conditioning(bind(self.task.text_encoder, params["text_encoder"])(batch["ids"]).astype(x.dtype))
        unet = network(self.task.unet, params["unet"], self.task.remat)
        return self.error(unet(x, t, cond), target, t), {}

    def pipeline(self, params: Trees) -> BridgePipeline:
        """The system that these parameters make."""
        return BridgePipeline(
            unet=Component(self.task.unet, params["unet"]),
            vae=self.vae,
            text_encoder=Component(self.task.text_encoder, params["text_encoder"]),
            tokenizer=self.tokenizer,
            schedule=self.schedule,
            guidance=self.task.guidance,
        )


# ------------------------------------------------------------------------------------------- the branch's text tower


@dataclass(frozen=True)
class TextTask:
    """Train the tower that a branch reads with, against pictures, as Chinese-CLIP is trained (arXiv 2211.01335).

    A caption's mean state and a linear map of its picture's latents find each other among those of the batch.
    """

    text_encoder: RobertaConfig = field(default_factory=RobertaConfig)
    vae: Path = Path("runs/emoji-vae/export/vae")
    tokenizer: Path = TOKENIZERS / "chinese"
    temperature: float = 0.07
    caption_dropout: float = 0.0
    style_in_caption: bool = False
    language: str = "zh"

    def shapes(self) -> Shapes:
        """Of what is trained and of what is left alone; the autoencoder's sizes are read, no weights."""
        vae = _config(self.vae)
        side = vae.sample_size // 2 ** (len(vae.block_out_channels) - 1)
        kernel = jax.ShapeDtypeStruct((side * side * vae.latent_channels, self.text_encoder.hidden_size), jnp.float32)
        return {"text_encoder": abstract(self.text_encoder), "picture": {"kernel": kernel}}, {}

    def start(self, sets: Sets, run: Path, seed: int, dtype: jnp.dtype) -> "TextJob":
        """Fresh tower and map; the autoencoder is loaded and only used."""
        vae = load_component(self.vae, "float32")
        parts = sets.latents(vae, run, pictures=True)
        if len({part.bucket for part in parts}) > 1:
            raise UserError(f"{', '.join(map(str, sets.folders))}: the text tower needs pictures of one size")
        size = parts[0].source[0]["moments"].size // 2
        kernel = jax.random.normal(jax.random.key(seed), (size, self.text_encoder.hidden_size)) / np.sqrt(size)
        params = {"text_encoder": init(self.text_encoder, seed), "picture": {"kernel": kernel}}
        return TextJob(self, params, vae, Tokenizer.from_pretrained(self.tokenizer), DiscreteSchedule(), parts)


class TextJob(CaptionJob):
    """`TextTask` made ready."""

    frozen: dict = {}

    def loss(self, params, frozen, batch, key):
        similar = self.similarity(params, batch["ids"], batch["moments"]) / self.task.temperature
        right = jnp.arange(len(similar))
        both = [optax.softmax_cross_entropy_with_integer_labels(table, right).mean() for table in (similar, similar.T)]
        return sum(both) / 2, {"found": jnp.mean(similar.argmax(axis=1) == right)}

    def similarity(self, params: Trees, ids: jax.Array, moments: jax.Array) -> jax.Array:
        """Captions (B,S) and pictures (N,h,w,2C) -> cosines (B,N)."""
        kernel = params["picture"]["kernel"]
        means = moments[..., : moments.shape[-1] // 2] * self.vae.config.scaling_factor
        pictures = means.reshape(len(means), -1).astype(kernel.dtype) @ kernel
        texts = bind(self.task.text_encoder, params["text_encoder"])(ids).mean(axis=1)
        full = lambda x: x.astype(jnp.float32)  # noqa: E731
        unit = lambda x: full(x) / jnp.linalg.norm(full(x), axis=-1, keepdims=True)  # noqa: E731
        return unit(texts) @ unit(pictures).T

    def export(self, params, folder, metadata):
        """The folders `branch_text_encoder` and `branch_tokenizer`."""
        tower = folder / "branch_text_encoder"
        save_component(tower, self.task.text_encoder, params["text_encoder"], metadata=metadata)
        self.tokenizer.save_pretrained(folder / "branch_tokenizer")

    def pictures(self, params, records):
        """For the name of each record, the picture that it finds among them."""
        ids = self.tokenizer([self.name(record) for record in records])
        moments = np.stack([record["moments"] for record in records])
        found = np.asarray(self.similarity(params, ids, moments)).argmax(axis=1)
        return [decode_image(records[i]["image"]) for i in found]


# --------------------------------------------------------------------------------------------------------- the branch


@dataclass(frozen=True)
class BranchTask:
    """Train a branch on a frozen backbone whose own prompt is "", reading a frozen text tower of another language.

    backbone: a pipeline folder. text_encoder, tokenizer: component folders. The branch starts as a copy of the
    backbone's encoder. min_snr, offset_noise, remat: as in `BackboneTask`. Schedule and target are the backbone's.
    """

    backbone: Path = Path("runs/emoji-backbone/export")
    text_encoder: Path = Path("runs/emoji-text/export/branch_text_encoder")
    tokenizer: Path = Path("runs/emoji-text/export/branch_tokenizer")
    timestep_bias: TimestepBias = "none"
    min_snr: float | None = None
    offset_noise: float = 0.0
    remat: Remat = "none"
    caption_dropout: float = 0.1
    style_in_caption: bool = False
    guidance: float = 3.0
    language: str = "zh"

    def shapes(self) -> Shapes:
        """Of what is trained and of what is left alone; the frozen networks' sizes are read, no weights."""
        unet, tower = _config(self.backbone / "unet"), _config(self.text_encoder)
        return {"branch": abstract(_branch_config(unet, tower))}, {"unet": abstract(unet), "tower": abstract(tower)}

    def start(self, sets: Sets, run: Path, seed: int, dtype: jnp.dtype) -> "BranchJob":
        """Fresh zero convolutions, the rest of the branch copied; everything else is loaded and only used."""
        backbone = BridgePipeline.from_pretrained(self.backbone, "float32")
        tower = load_component(self.text_encoder, dtype.name)
        parts = sets.latents(backbone.vae, run)
        config = _branch_config(backbone.unet.config, tower.config)
        branch = Component(config, init_branch_from_unet(init(config, seed), backbone.unet.params))
        backbone = replace(backbone, unet=_as(backbone.unet, dtype), text_encoder=_as(backbone.text_encoder, dtype))
        return BranchJob(self, branch, tower, backbone, Tokenizer.from_pretrained(self.tokenizer), parts)


class BranchJob(DiffusionJob):
    """`BranchTask` made ready."""

    def __init__(
        self, task: BranchTask, branch: Component, tower: Component, backbone: BridgePipeline, tokenizer, parts
    ):
        super().__init__(task, {"branch": branch.params}, backbone.vae, tokenizer, backbone.schedule, parts)
        self.config, self.tower, self.backbone = branch.config, tower, backbone
        empty = encode(backbone.tokenizer, *backbone.text_encoder, [""])
        empty = replace(empty, tokens=empty.tokens.astype(param_dtype(backbone.unet.params)))
        self.frozen = {"unet": backbone.unet.params, "tower": tower.params, "english": empty}

    def loss(self, params, frozen, batch, key):
        x, t, target = self.noised(batch, key)
        x = x.astype(param_dtype(params["branch"]))
        chinese = Conditioning(bind(self.tower.config, frozen["tower"])(batch["ids"]).astype(x.dtype))
        english = jax.tree.map(lambda states: jnp.broadcast_to(states, (len(x), *states.shape[1:])), frozen["english"])
        unet = network(self.backbone.unet.config, frozen["unet"], self.task.remat)
        branch = network(self.config, params["branch"], self.task.remat)
        return self.error(unet(x, t, english, branch(x, t, chinese)), target, t), {}

    def export(self, params, folder, metadata):
        """A whole pipeline folder; frozen components are handed on file by file, in whatever type they came."""
        super().export(params, folder, metadata)
        task = self.task
        frozen = {part: task.backbone / part for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler")}
        for part, origin in {**frozen, "branch_text_encoder": task.text_encoder}.items():
            shutil.copytree(origin, folder / part, dirs_exist_ok=True)

    def pictures(self, params, records):
        """In the type that the backbone is in, as users draw them."""
        branch = _as(Component(self.config, params["branch"]), param_dtype(self.backbone.unet.params))
        return super().pictures({"branch": branch.params}, records)

    def pipeline(self, params: Trees) -> BridgePipeline:
        """The bridge that these parameters make of the backbone."""
        return replace(
            self.backbone,
            branch=Component(self.config, params["branch"]),
            branch_text_encoder=self.tower,
            branch_tokenizer=self.tokenizer,
            guidance=self.task.guidance,
        )


def _config(folder: Path) -> Config:
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}: no such component folder (config.json is missing there)")
    return from_json(read_json(folder / "config.json"))


def _branch_config(unet: UNetConfig, tower: RobertaConfig) -> BranchConfig:
    shared = {field.name: getattr(unet, field.name) for field in fields(EncoderConfig)}
    return BranchConfig(**{**shared, "cross_attention_dim": tower.hidden_size})


def _as(component: Component, dtype: jnp.dtype) -> Component:
    return component._replace(params={path: jnp.asarray(value, dtype) for path, value in component.params.items()})
