"""Training an autoencoder on images."""

import contextlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from bdm_jax.command_line import OptionalModelPath
from bdm_jax.data.loader import MixturePart
from bdm_jax.data.source import Source
from bdm_jax.diffusion import losses
from bdm_jax.errors import BadRecord, UserError
from bdm_jax.images.decode import decode_image, image_size, resize_to_cover
from bdm_jax.latents.moments import record_key, record_moments, round_trip
from bdm_jax.models.config import VAEConfig
from bdm_jax.models.functional import abstract, init, input_dtype
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
from bdm_jax.training.objectives.sample import Sample, read_image
from bdm_jax.training.objectives.starting import load_start
from bdm_jax.training.sets import Sets

_JUDGED = 1000


@dataclass(frozen=True)
class VAETask:
    """Train an AutoencoderKL on images. remat: as in `BackboneTask`.

    start_from: an autoencoder to train on, whose sizes and scaling factor it keeps; None for fresh weights.
    """

    vae: VAEConfig = field(default_factory=VAEConfig)
    kl_weight: float = 1e-3
    remat: Remat = "none"
    start_from: OptionalModelPath = None
    language: str = "zh"  # of the records that are used; no caption is read

    sized: ClassVar[dict[str, str]] = {"vae": "vae"}
    captions: ClassVar[bool] = False  # whether they are read

    def sizes(self, read: ReadSizes = read_sizes) -> Sizes:
        """None is read."""
        return {}

    def objective(self, sizes: Sizes) -> "AutoencoderObjective":
        """The loss."""
        return AutoencoderObjective(self.vae, self.kl_weight, self.remat)

    def start(self, sets: Sets, run: Path, seed: int, dtype: jnp.dtype) -> Training:
        """Fresh weights, or those that it starts from. Raises UserError for images of no multiple of the factor."""
        begun = load_start(self.start_from, run, {"vae": self.vae}, where="in task.vae")
        sets.check_scenes(self.vae.factor)
        parts = sets.images()
        size = _one_size(parts, self.vae)
        if any(side % self.vae.factor for side in size):
            raise UserError(
                f"images of {size[1]} x {size[0]} pixels: both must be multiples of {self.vae.factor} (the "
                "autoencoder's factor)"
            )
        return Training(
            self.objective({}),
            begun.params or {"vae": init(self.vae, seed)},
            {},
            parts,
            Sample(partial(read_image, size), mirrored=True),
            partial(_export, self.vae, parts, size) if self.start_from is None else partial(_export_tuned, self.vae),
            partial(_preview, self.vae, size),
            begun.inputs,
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
        mean, logvar = (x.astype(jnp.float32) for x in vae.encode(images.astype(input_dtype(params["vae"]))))
        noise = draw(key, batch["place"], lambda k: jax.random.normal(k, mean.shape[1:]))
        latents = mean + jnp.exp(0.5 * logvar) * noise
        decoded = vae.decode(latents.astype(input_dtype(params["vae"]))).astype(jnp.float32)
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


def _one_size(parts: Sequence[MixturePart], vae: VAEConfig) -> tuple[int, int]:
    """(height, width) of the images, judged by the headers of the first thousand of each set; the autoencoder's own if
    they have several.
    """
    sizes = set()
    for part in parts:
        for number in range(min(len(part.source), _JUDGED)):
            with contextlib.suppress(BadRecord):
                record = part.source[number]
                sizes.add(image_size(record["image"], name=record_key(record)))
    if len(sizes) == 1:
        return sizes.pop()
    if sizes:
        side = vae.sample_size
        warnings.warn(
            f"images of {len(sizes)} sizes: all are resized to cover {side} x {side} and cropped at the centre "
            "(task.vae.sample-size)",
            stacklevel=2,
        )
    return (vae.sample_size,) * 2


def _export(
    config: VAEConfig,
    parts: list[MixturePart],
    size: tuple[int, int],
    params: Trees,
    folder: Path,
    metadata: dict[str, str],
) -> None:
    """The folder `vae`, its scaling factor measured on the records: latents times it have unit variance."""
    vae = Component(config, params["vae"])
    moments = np.concatenate([_good_moments(vae, part.source, size) for part in parts])
    means, _ = np.split(moments, 2, axis=-1)
    measured = replace(config, scaling_factor=float(1.0 / means.std()))
    save_component(folder / "vae", measured, params["vae"], metadata=metadata)


def _export_tuned(config: VAEConfig, params: Trees, folder: Path, metadata: dict[str, str]) -> None:
    """The folder `vae` with the scaling factor that it had: what was trained on its latents goes on with it."""
    save_component(folder / "vae", config, params["vae"], metadata=metadata)


def _good_moments(vae: Component, source: Source, size: tuple[int, int]) -> np.ndarray:
    """Of the records that can be used; those that cannot were counted when they were trained on."""
    faults: dict[int, BadRecord] = {}
    return np.delete(record_moments(vae, source, None, size, None, faults), [*faults], axis=0)


def _preview(config: VAEConfig, size: tuple[int, int], params: Trees, records: list[dict]) -> list[np.ndarray]:
    images = [resize_to_cover(decode_image(record["image"]), size) for record in records]
    return round_trip(Component(config, params["vae"]), images)
