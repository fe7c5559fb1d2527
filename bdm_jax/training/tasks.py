"""What can be trained: the autoencoder, the backbone with its text tower, the branch (arXiv 2309.00952, figure 1).

A task names the networks and where the ready ones come from. `start` makes a `Job`: trees to train, trees to leave
alone, how a record becomes a sample, the loss, and how the result becomes a folder.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from bdm_jax.data.captions import caption
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
from bdm_jax.pipeline import BridgePipeline, Component, load_component, save_component
from bdm_jax.text.encode import encode
from bdm_jax.text.tokenizer import Tokenizer
from bdm_jax.text.windows import split
from bdm_jax.training.latents import record_key, record_moments

Trees = dict[str, Params]  # component name -> its parameters
Batch = dict[str, jax.Array]


class Job(Protocol):
    """A task made ready: networks initialised or loaded, latents cached."""

    params: Trees
    frozen: dict[str, Any]

    def sample(self, record: dict, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """One record -> one row of a batch; runs in the loader's threads."""

    def loss(self, params: Trees, frozen: dict, batch: Batch, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Mean loss of a batch and what else to log; pure."""

    def export(self, params: Trees, folder: Path, source: Source, indices: np.ndarray) -> None:
        """Write what came out as folders that `load_component` and diffusers read."""

    def pictures(self, params: Trees, records: list[dict]) -> list[np.ndarray]:
        """Pictures (H,W,3) uint8 that show how far training is, one per record."""


def draw(key: jax.Array, count: int, make: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """(count, ...) draws that depend on the key and the place in the global batch only, on any number of devices."""
    return jax.vmap(lambda i: make(jax.random.fold_in(key, i)))(jnp.arange(count))


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

    def export(self, params, folder, source, indices):
        """The folder `vae`, its scaling factor measured on the records: latents times it have unit variance."""
        moments = record_moments(Component(self.task.vae, params["vae"]), source, indices)
        means, _ = np.split(np.stack(list(moments.values())), 2, axis=-1)
        save_component(folder / "vae", replace(self.task.vae, scaling_factor=float(1.0 / means.std())), params["vae"])

    def pictures(self, params, records):
        images = np.stack([decode_image(record["image"]) for record in records])

        @jax.jit
        def round_trip(params, images):
            vae = bind(self.task.vae, params)
            return vae.decode(vae.encode(images)[0])

        decoded = np.asarray(round_trip(params["vae"], images.astype(np.float32) / 127.5 - 1.0))
        return list(np.clip((decoded + 1) * 127.5 + 0.5, 0, 255).astype(np.uint8))


# ------------------------------------------------------------------------------------------------------- the backbone


@dataclass(frozen=True)
class BackboneTask:
    """Train a UNet together with its English text tower, on latents of a ready autoencoder.

    vae: a folder with a `vae` component. caption_dropout: share of captions replaced by "", so that guidance works.
    """

    unet: UNetConfig = field(default_factory=UNetConfig)
    text_encoder: CLIPTextConfig = field(default_factory=CLIPTextConfig)
    vae: Path = Path("runs/emoji-vae/export/vae")
    tokenizer: Path = TOKENIZERS / "english"
    prediction_type: str = "v_prediction"
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


class _DiffusionJob:
    """What training on cached latents and captions has in common."""

    def __init__(self, task, params: Trees, vae: Component, tokenizer: Tokenizer, schedule: Schedule, moments):
        self.task, self.params, self.vae, self.tokenizer = task, params, vae, tokenizer
        self.schedule, self._moments = schedule, moments

    def sample(self, record, rng):
        text = caption(record, self.task.language, rng, style=self.task.style_in_caption)
        if rng.random() < self.task.caption_dropout:
            text = ""
        special = (self.tokenizer.start, self.tokenizer.end, self.tokenizer.pad)
        ids = split(self.tokenizer.content([text])[0], 1, self.tokenizer.length, *special)
        return {"moments": self._moments[record_key(record)], "ids": ids[0]}

    def noised(self, batch: Batch, key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Batch -> noisy latents (B,h,w,C), timesteps (B,), targets (B,h,w,C)."""
        mean, logvar = jnp.split(batch["moments"].astype(jnp.float32), 2, axis=-1)
        count, shape = len(mean), mean.shape[1:]
        key_latent, key_noise, key_t = jax.random.split(key, 3)
        spread = draw(key_latent, count, lambda k: jax.random.normal(k, shape))
        latents = (mean + jnp.exp(0.5 * logvar) * spread) * self.vae.config.scaling_factor
        noise = draw(key_noise, count, lambda k: jax.random.normal(k, shape))
        t = draw(key_t, count, lambda k: jax.random.randint(k, (), 0, self.schedule.num_train_timesteps))
        return self.schedule.add_noise(latents, noise, t), t, self.schedule.target(latents, noise, t)

    def export(self, params, folder, source, indices):
        """A whole pipeline folder."""
        self.pipeline(params).save_pretrained(folder)

    def pictures(self, params, records):
        requests = [
            Request(record["zh"], seed=index)
            if self.task.language == "zh"
            else Request("", english=record["en"], seed=index)
            for index, record in enumerate(records)
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


# --------------------------------------------------------------------------------------------------------- the branch


@dataclass(frozen=True)
class BranchTask:
    """Train a branch, and its text tower where that is not ready, on a frozen backbone whose own prompt is "".

    backbone: a pipeline folder. The branch starts as a copy of the backbone's encoder.
    """

    backbone: Path = Path("runs/emoji-backbone/export")
    cross_attention_dim: int = 1024
    text_encoder: RobertaConfig = field(default_factory=RobertaConfig)
    tokenizer: Path = TOKENIZERS / "chinese"
    caption_dropout: float = 0.1
    style_in_caption: bool = False
    guidance: float = 3.0
    language: str = "zh"

    def start(self, source: Source, indices: np.ndarray, run: Path, seed: int) -> "BranchJob":
        """Fresh text tower and zero convolutions; backbone, autoencoder and English tower are loaded and only used."""
        backbone = BridgePipeline.from_pretrained(self.backbone, "float32")  # written out again, byte for byte
        moments = record_moments(backbone.vae, source, indices, run / "latents.npz")
        unet = backbone.unet.config
        shared = {field.name: getattr(unet, field.name) for field in fields(EncoderConfig)}
        config = BranchConfig(**{**shared, "cross_attention_dim": self.cross_attention_dim})
        params = {
            "branch": init_branch_from_unet(init(config, seed), backbone.unet.params),
            "branch_text_encoder": init(self.text_encoder, seed + 1),
        }
        return BranchJob(self, params, config, backbone, Tokenizer.from_pretrained(self.tokenizer), moments)


class BranchJob(_DiffusionJob):
    """`BranchTask` made ready."""

    def __init__(self, task: BranchTask, params, config: BranchConfig, backbone: BridgePipeline, tokenizer, moments):
        super().__init__(task, params, backbone.vae, tokenizer, backbone.schedule, moments)
        self.config, self.backbone = config, backbone
        empty = encode(backbone.tokenizer, *backbone.text_encoder, [""])
        self.frozen = {"unet": backbone.unet.params, "english": empty}

    def loss(self, params, frozen, batch, key):
        x, t, target = self.noised(batch, key)
        chinese = Conditioning(bind(self.task.text_encoder, params["branch_text_encoder"])(batch["ids"]))
        english = jax.tree.map(lambda states: jnp.broadcast_to(states, (len(x), *states.shape[1:])), frozen["english"])
        unet = bind(self.backbone.unet.config, frozen["unet"])
        residuals = bind(self.config, params["branch"])(x, t, chinese)
        prediction = unet(x, t, english, residuals)
        return jnp.mean(losses.denoising(prediction, target)), {}

    def pipeline(self, params: Trees) -> BridgePipeline:
        """The bridge that these parameters make of the backbone."""
        return replace(
            self.backbone,
            branch=Component(self.config, params["branch"]),
            branch_text_encoder=Component(self.task.text_encoder, params["branch_text_encoder"]),
            branch_tokenizer=self.tokenizer,
            guidance=self.task.guidance,
        )
