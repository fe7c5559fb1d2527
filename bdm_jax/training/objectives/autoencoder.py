"""Training an autoencoder on images."""

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from bdm_jax.data.loader import MixturePart
from bdm_jax.diffusion import losses
from bdm_jax.images.decode import decode_image
from bdm_jax.latents.moments import record_key, record_moments, round_trip
from bdm_jax.models.config import VAEConfig
from bdm_jax.models.functional import abstract, init, param_dtype
from bdm_jax.systems.components import Component, save_component
from bdm_jax.training.objectives.objective import (
    Batch,
    ReadSizes,
    Row,
    Shapes,
    Sizes,
    Training,
    Trees,
    draw,
    read_sizes,
)
from bdm_jax.training.objectives.remat import Remat, network
from bdm_jax.training.sets import Sets


@dataclass(frozen=True)
class VAETask:
    """Train an AutoencoderKL on images. remat: as in `BackboneTask`."""

    vae: VAEConfig = field(default_factory=VAEConfig)
    kl_weight: float = 1e-3
    remat: Remat = "none"
    language: str = "zh"  # of the records that are used; no caption is read

    def sizes(self, read: ReadSizes = read_sizes) -> Sizes:
        """None is read."""
        return {}

    def objective(self, sizes: Sizes) -> "AutoencoderObjective":
        """The loss."""
        return AutoencoderObjective(self.vae, self.kl_weight, self.remat)

    def start(self, sets: Sets, run: Path, seed: int, dtype: jnp.dtype) -> Training:
        """Fresh weights."""
        parts = sets.images()
        return Training(
            self.objective({}),
            {"vae": init(self.vae, seed)},
            {},
            parts,
            _sample,
            partial(_export, self.vae, parts),
            partial(_preview, self.vae),
        )


@dataclass(frozen=True)
class AutoencoderObjective:
    """Reconstruction of an image from a random latent of its posterior, and the posterior's KL to a unit normal."""

    vae: VAEConfig
    kl_weight: float
    remat: Remat = "none"

    def loss(self, params: Trees, frozen: dict, batch: Batch, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """See `Objective`; batch: `image` (B,H,W,3) uint8."""
        images = batch["image"].astype(jnp.float32) / 127.5 - 1.0
        vae = network(self.vae, params["vae"], self.remat)
        mean, logvar = (x.astype(jnp.float32) for x in vae.encode(images.astype(param_dtype(params["vae"]))))
        noise = draw(key, batch["place"], lambda k: jax.random.normal(k, mean.shape[1:]))
        latents = mean + jnp.exp(0.5 * logvar) * noise
        decoded = vae.decode(latents.astype(param_dtype(params["vae"]))).astype(jnp.float32)
        reconstruction = jnp.mean(losses.reconstruction(images, decoded))
        kl = jnp.mean(losses.kl_to_unit_normal(mean, logvar))
        error = jnp.mean(jnp.square((decoded - images) / 2))
        metrics = {"reconstruction": reconstruction, "kl": kl, "psnr": -10 * jnp.log10(error)}
        return reconstruction + self.kl_weight * kl, metrics

    def shapes(self) -> Shapes:
        """See `Objective`."""
        return {"vae": abstract(self.vae)}, {}

    def row(self, size: int) -> Row:
        """See `Objective`."""
        return {
            "image": jax.ShapeDtypeStruct((size, size, 3), jnp.uint8),
            "place": jax.ShapeDtypeStruct((), jnp.int32),
        }


def _sample(record: dict, rng: np.random.Generator) -> Row:
    pixels = decode_image(record["image"], name=record_key(record))
    return {"image": pixels[:, ::-1] if rng.random() < 0.5 else pixels}


def _export(config: VAEConfig, parts: list[MixturePart], params: Trees, folder: Path, metadata: dict[str, str]) -> None:
    """The folder `vae`, its scaling factor measured on the records: latents times it have unit variance."""
    vae = Component(config, params["vae"])
    moments = np.concatenate([record_moments(vae, part.source) for part in parts])
    means, _ = np.split(moments, 2, axis=-1)
    measured = replace(config, scaling_factor=float(1.0 / means.std()))
    save_component(folder / "vae", measured, params["vae"], metadata=metadata)


def _preview(config: VAEConfig, params: Trees, records: list[dict]) -> list[np.ndarray]:
    return round_trip(Component(config, params["vae"]), [decode_image(record["image"]) for record in records])
