"""What can be trained: the autoencoder, the backbone with its text tower, the branch (arXiv 2309.00952, figure 1).

A task names the networks and where the ready ones come from. `start` makes a `Job`: trees to train, trees to leave
alone, how a record becomes a sample, the loss, and how the result becomes a folder.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bdm_jax.components import Component, load_component, save_component
from bdm_jax.data.captions import caption, name
from bdm_jax.data.records import Source, decode_image
from bdm_jax.diffusion import losses
from bdm_jax.diffusion.schedule import Schedule
from bdm_jax.generate import Request, generate
from bdm_jax.models.branch import init_branch_from_unet
from bdm_jax.models.conditioning import Conditioning
from bdm_jax.models.config import (
    BranchConfig,
    CLIPTextConfig,
    EncoderConfig,
    RobertaConfig,
    UNetConfig,
    VAEConfig,
)
from bdm_jax.models.functional import Params, bind, init
from bdm_jax.paths import TOKENIZERS
from bdm_jax.pipeline import BridgePipeline
from bdm_jax.text.encode import encode
from bdm_jax.text.tokenizer import Tokenizer
from bdm_jax.text.windows import split
from bdm_jax.training.latents import record_key, record_moments, round_trip

Trees = dict[str, Params]  # component name -> its parameters
TimestepBias = Literal["none", "later"]
Batch = dict[str, jax.Array]


class Job(Protocol):
    """A task made ready: networks initialised or loaded, latents cached."""

    params: Trees
    frozen: dict[str, Any]

    def sample(self, record: dict, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """One record -> one row of a batch; runs in the loader's threads."""

    def loss(self, params: Trees, frozen: dict, batch: Batch, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Mean loss of a batch and what else to log; pure."""

    def export(
        self, params: Trees, folder: Path, source: Source, indices: np.ndarray, metadata: dict[str, str]
    ) -> None:
        """Write what came out as folders that `load_component` and diffusers read, `metadata` in what was trained."""

    def pictures(self, params: Trees, records: list[dict]) -> list[np.ndarray]:
        """Pictures (H,W,3) uint8 that show how far training is, one per record."""


def draw(key: jax.Array, count: int, make: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """(count, ...) draws that depend on the key and the place in the global batch only, on any number of devices."""
    return jax.vmap(lambda i: make(jax.random.fold_in(key, i)))(jnp.arange(count))


def timestep(key: jax.Array, count: int, bias: TimestepBias) -> jax.Array:
    """One of 0..count-1, each as likely as the others, or, with "later", likely in proportion to itself: the noisier
    half, where the words decide what the picture shows, then gets three quarters of the training.
    """
    if bias == "none":
        return jax.random.randint(key, (), 0, count)
    return jnp.minimum(jnp.int32(count * jnp.sqrt(jax.random.uniform(key))), count - 1)


# --------------------------------------------------------------------------------------------------- the autoencoder


@dataclass(frozen=True)
class VAETask:
    """Train an AutoencoderKL on pictures."""

    vae: VAEConfig = field(default_factory=VAEConfig)
    kl_weight: float = 1e-3
    language: str = "zh"  # whose records it sees; no caption is read

    def start(self, source: Source, indices: np.ndarray, run: Path, seed: int) -> "VAEJob":
        """Fresh weights."""
        return VAEJob(self, {"vae": init(self.vae, seed)})


class VAEJob:
    """`VAETask` made ready."""

    def __init__(self, task: VAETask, params: Trees):
        self.task, self.params, self.frozen = task, params, {}

    def sample(self, record, rng):
        pixels = decode_image(record["image"], name=record_key(record))
        return {"image": pixels[:, ::-1] if rng.random() < 0.5 else pixels}

    def loss(self, params, frozen, batch, key):
        images = batch["image"].astype(jnp.float32) / 127.5 - 1.0
        vae = bind(self.task.vae, params["vae"])
        mean, logvar = vae.encode(images)
        noise = draw(key, len(mean), lambda k: jax.random.normal(k, mean.shape[1:]))
        decoded = vae.decode(mean + jnp.exp(0.5 * logvar) * noise)
        reconstruction = jnp.mean(losses.reconstruction(images, decoded))
        kl = jnp.mean(losses.kl_to_unit_normal(mean, logvar))
        error = jnp.mean(jnp.square((decoded - images) / 2))
        metrics = {"reconstruction": reconstruction, "kl": kl, "psnr": -10 * jnp.log10(error)}
        return reconstruction + self.task.kl_weight * kl, metrics

    def export(self, params, folder, source, indices, metadata):
        """The folder `vae`, its scaling factor measured on the records: latents times it have unit variance."""
        moments = record_moments(Component(self.task.vae, params["vae"]), source, indices)
        means, _ = np.split(np.stack(list(moments.values())), 2, axis=-1)
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
    """

    unet: UNetConfig = field(default_factory=UNetConfig)
    text_encoder: CLIPTextConfig = field(default_factory=CLIPTextConfig)
    vae: Path = Path("runs/emoji-vae/export/vae")
    tokenizer: Path = TOKENIZERS / "english"
    prediction_type: Literal["epsilon", "v_prediction"] = "v_prediction"
    timestep_bias: TimestepBias = "none"
    caption_dropout: float = 0.1
    style_in_caption: bool = False
    guidance: float = 3.0
    language: str = "en"

    def start(self, source: Source, indices: np.ndarray, run: Path, seed: int) -> "BackboneJob":
        """Fresh UNet and text tower; the autoencoder is loaded and only used."""
        vae = load_component(self.vae, "float32")  # on any device: it is written out again unchanged
        moments = record_moments(vae, source, indices, run / "latents.npz")
        params = {"unet": init(self.unet, seed), "text_encoder": init(self.text_encoder, seed + 1)}
        tokenizer = Tokenizer.from_pretrained(self.tokenizer)
        return BackboneJob(self, params, vae, tokenizer, Schedule(prediction_type=self.prediction_type), moments)


class _CaptionJob:
    """What training on cached latents and captions has in common."""

    def __init__(self, task, params: Trees, vae: Component, tokenizer: Tokenizer, schedule: Schedule, moments):
        self.task, self.params, self.vae, self.tokenizer = task, params, vae, tokenizer
        self.schedule, self.moments = schedule, moments

    def sample(self, record, rng):
        language, style = self.task.language, self.task.style_in_caption
        texts = [caption(record, language, rng, style), name(record, language, style)]
        longer, shorter = self.tokenizer.content(texts)
        content = longer if len(longer) <= self.tokenizer.length - 2 else shorter
        if rng.random() < self.task.caption_dropout:
            content = []
        special = (self.tokenizer.start, self.tokenizer.end, self.tokenizer.pad)
        ids = split([content], 1, self.tokenizer.length, *special)
        return {"moments": self.moments[record_key(record)], "ids": ids[0]}


class _DiffusionJob(_CaptionJob):
    """What training of a denoiser has in common."""

    def noised(self, batch: Batch, key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Batch -> noisy latents (B,h,w,C), timesteps (B,), targets (B,h,w,C)."""
        mean, logvar = jnp.split(batch["moments"].astype(jnp.float32), 2, axis=-1)
        count, shape = len(mean), mean.shape[1:]
        key_latent, key_noise, key_t = jax.random.split(key, 3)
        spread = draw(key_latent, count, lambda k: jax.random.normal(k, shape))
        latents = (mean + jnp.exp(0.5 * logvar) * spread) * self.vae.config.scaling_factor
        noise = draw(key_noise, count, lambda k: jax.random.normal(k, shape))
        t = draw(key_t, count, lambda k: timestep(k, self.schedule.num_train_timesteps, self.task.timestep_bias))
        return self.schedule.add_noise(latents, noise, t), t, self.schedule.target(latents, noise, t)

    def export(self, params, folder, source, indices, metadata):
        """A whole pipeline folder."""
        self.pipeline(params).save_pretrained(folder, metadata=metadata)

    def pictures(self, params, records):
        texts = [name(record, self.task.language, self.task.style_in_caption) for record in records]
        requests = [
            Request(text, seed=seed) if self.task.language == "zh" else Request("", english=text, seed=seed)
            for seed, text in enumerate(texts)
        ]
        return list(generate(self.pipeline(params), requests, steps=20, batch_size=len(requests)))


class BackboneJob(_DiffusionJob):
    """`BackboneTask` made ready."""

    frozen: dict = {}

    def loss(self, params, frozen, batch, key):
        x, t, target = self.noised(batch, key)
        cond = Conditioning(bind(self.task.text_encoder, params["text_encoder"])(batch["ids"]))
        prediction = bind(self.task.unet, params["unet"])(x, t, cond)
        return jnp.mean(losses.denoising(prediction, target)), {}

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

    def start(self, source: Source, indices: np.ndarray, run: Path, seed: int) -> "TextJob":
        """Fresh tower and map; the autoencoder is loaded and only used."""
        vae = load_component(self.vae, "float32")
        moments = record_moments(vae, source, indices, run / "latents.npz")
        size = next(iter(moments.values())).size // 2
        kernel = jax.random.normal(jax.random.key(seed), (size, self.text_encoder.hidden_size)) / np.sqrt(size)
        params = {"text_encoder": init(self.text_encoder, seed), "picture": {"kernel": kernel}}
        return TextJob(self, params, vae, Tokenizer.from_pretrained(self.tokenizer), Schedule(), moments)


class TextJob(_CaptionJob):
    """`TextTask` made ready."""

    frozen: dict = {}

    def loss(self, params, frozen, batch, key):
        similar = self.similarity(params, batch["ids"], batch["moments"]) / self.task.temperature
        right = jnp.arange(len(similar))
        both = [optax.softmax_cross_entropy_with_integer_labels(table, right).mean() for table in (similar, similar.T)]
        return sum(both) / 2, {"found": jnp.mean(similar.argmax(axis=1) == right)}

    def similarity(self, params: Trees, ids: jax.Array, moments: jax.Array) -> jax.Array:
        """Captions (B,S) and pictures (N,h,w,2C) -> cosines (B,N)."""
        means = moments[..., : moments.shape[-1] // 2] * self.vae.config.scaling_factor
        pictures = means.reshape(len(means), -1) @ params["picture"]["kernel"]
        texts = bind(self.task.text_encoder, params["text_encoder"])(ids).mean(axis=1)
        unit = lambda x: x / jnp.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
        return unit(texts) @ unit(pictures).T

    def export(self, params, folder, source, indices, metadata):
        """The folders `branch_text_encoder` and `branch_tokenizer`."""
        tower = folder / "branch_text_encoder"
        save_component(tower, self.task.text_encoder, params["text_encoder"], metadata=metadata)
        self.tokenizer.save_pretrained(folder / "branch_tokenizer")

    def pictures(self, params, records):
        """For the name of each record, the picture that it finds among them."""
        ids = self.tokenizer([name(record, self.task.language, self.task.style_in_caption) for record in records])
        moments = np.stack([self.moments[record_key(record)] for record in records])
        found = np.asarray(self.similarity(params, ids, moments)).argmax(axis=1)
        return [decode_image(records[i]["image"]) for i in found]


# --------------------------------------------------------------------------------------------------------- the branch


@dataclass(frozen=True)
class BranchTask:
    """Train a branch on a frozen backbone whose own prompt is "", reading a frozen text tower of another language.

    backbone: a pipeline folder. text_encoder, tokenizer: component folders. The branch starts as a copy of the
    backbone's encoder.
    """

    backbone: Path = Path("runs/emoji-backbone/export")
    text_encoder: Path = Path("runs/emoji-text/export/branch_text_encoder")
    tokenizer: Path = Path("runs/emoji-text/export/branch_tokenizer")
    timestep_bias: TimestepBias = "none"
    caption_dropout: float = 0.1
    style_in_caption: bool = False
    guidance: float = 3.0
    language: str = "zh"

    def start(self, source: Source, indices: np.ndarray, run: Path, seed: int) -> "BranchJob":
        """Fresh zero convolutions, the rest of the branch copied; everything else is loaded and only used."""
        backbone = BridgePipeline.from_pretrained(self.backbone, "float32")
        tower = load_component(self.text_encoder, "float32")
        moments = record_moments(backbone.vae, source, indices, run / "latents.npz")
        shared = {field.name: getattr(backbone.unet.config, field.name) for field in fields(EncoderConfig)}
        config = BranchConfig(**{**shared, "cross_attention_dim": tower.config.hidden_size})
        branch = Component(config, init_branch_from_unet(init(config, seed), backbone.unet.params))
        return BranchJob(self, branch, tower, backbone, Tokenizer.from_pretrained(self.tokenizer), moments)


class BranchJob(_DiffusionJob):
    """`BranchTask` made ready."""

    def __init__(
        self, task: BranchTask, branch: Component, tower: Component, backbone: BridgePipeline, tokenizer, moments
    ):
        super().__init__(task, {"branch": branch.params}, backbone.vae, tokenizer, backbone.schedule, moments)
        self.config, self.tower, self.backbone = branch.config, tower, backbone
        empty = encode(backbone.tokenizer, *backbone.text_encoder, [""])
        self.frozen = {"unet": backbone.unet.params, "tower": tower.params, "english": empty}

    def loss(self, params, frozen, batch, key):
        x, t, target = self.noised(batch, key)
        chinese = Conditioning(bind(self.tower.config, frozen["tower"])(batch["ids"]))
        english = jax.tree.map(lambda states: jnp.broadcast_to(states, (len(x), *states.shape[1:])), frozen["english"])
        unet = bind(self.backbone.unet.config, frozen["unet"])
        residuals = bind(self.config, params["branch"])(x, t, chinese)
        prediction = unet(x, t, english, residuals)
        return jnp.mean(losses.denoising(prediction, target)), {}

    def export(self, params, folder, source, indices, metadata):
        """A whole pipeline folder; frozen components are handed on file by file, in whatever type they came."""
        super().export(params, folder, source, indices, metadata)
        task = self.task
        frozen = {part: task.backbone / part for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler")}
        for part, origin in {**frozen, "branch_text_encoder": task.text_encoder}.items():
            shutil.copytree(origin, folder / part, dirs_exist_ok=True)

    def pipeline(self, params: Trees) -> BridgePipeline:
        """The bridge that these parameters make of the backbone."""
        return replace(
            self.backbone,
            branch=Component(self.config, params["branch"]),
            branch_text_encoder=self.tower,
            branch_tokenizer=self.tokenizer,
            guidance=self.task.guidance,
        )
