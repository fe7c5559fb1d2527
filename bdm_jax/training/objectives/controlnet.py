"""Training a ControlNet (Zhang et al., arXiv 2302.05543): a copy of a frozen backbone's encoder that sees a map."""

from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from bdm_jax.command_line import OptionalModelPath
from bdm_jax.errors import BadRecord, UserError, unknown
from bdm_jax.images.decode import decode_image, resize_to_cover
from bdm_jax.latents.moments import record_key
from bdm_jax.models.config import ControlNetConfig, EncoderConfig, UNetConfig
from bdm_jax.models.functional import Params, abstract, init
from bdm_jax.plugins.controls import Control
from bdm_jax.sampling.batching import default_size
from bdm_jax.sampling.generate import generate
from bdm_jax.sampling.settings import Sampling
from bdm_jax.systems.components import save_component
from bdm_jax.systems.pipeline import BridgePipeline
from bdm_jax.training.objectives.captions import Captions
from bdm_jax.training.objectives.objective import Batch, Row, Shapes, Sizes, Training, Trees
from bdm_jax.training.objectives.plugin import (
    PluginTask,
    load_system,
    loaded_objective,
    plugin_captions,
    system_objective,
    trained_component,
)
from bdm_jax.training.objectives.preview import request
from bdm_jax.training.objectives.sample import Sample, read_moments
from bdm_jax.training.objectives.starting import load_start
from bdm_jax.training.objectives.system import SystemObjective
from bdm_jax.training.sets import Sets

FOLDER = "controlnet"


@dataclass(frozen=True)
class ControlNetTask(PluginTask):
    """Train a ControlNet that begins as the backbone's encoder.

    hint: which map is made of a sample's image ("canny", "line", ...; see `plugins.hints`). hint_column: in place of
    that, the field of the records that holds a ready map, encoded like an image. hint_widths: channels of the layers
    that read the map; each but the first halves it. caption_dropout: half, as the paper has it, so that the map itself
    is read. start_from: a ControlNet for this backbone to train on, in place of a fresh one.
    """

    hint: str = "canny"
    hint_column: str | None = None
    hint_widths: tuple[int, ...] = (16, 32, 96, 256)
    caption_dropout: float = 0.5
    start_from: OptionalModelPath = None

    reads_images: ClassVar[bool] = True

    def objective(self, sizes: Sizes) -> "ControlNetObjective":
        """The loss."""
        config = controlnet_config(sizes["unet"], self.hint_widths)
        sizes = {**sizes, FOLDER: config}
        return ControlNetObjective(system_objective(self, sizes, {FOLDER: abstract(config)}))

    def start(self, sets: Sets, run: Path, seed: int, dtype: jnp.dtype) -> Training:
        """The backbone's encoder, fresh zero convolutions and layers for the map, or the ControlNet that it starts
        from; the backbone is loaded and frozen.
        """
        ready = load_system(self, sets, run, dtype)
        factor = ready.system.vae.config.factor
        if not self.hint_widths or 2 ** (len(self.hint_widths) - 1) != factor:
            raise UserError(
                f"task.hint_widths={self.hint_widths}: {factor.bit_length()} widths are needed, for maps {factor} "
                "times as large as the latents"
            )
        config = controlnet_config(ready.system.unet.config, self.hint_widths)
        begun = load_start(self.start_from, run, {FOLDER: config}, where="for task.hint_widths and the backbone here")
        params = begun.params or {FOLDER: init_from_unet(init(config, seed), ready.system.unet.params)}
        hints, texts = Hints(default_size(ready.system), self.hint, self.hint_column), plugin_captions(self, ready)
        return Training(
            ControlNetObjective(loaded_objective(self.objective(ready.sizes).system, ready)),
            params,
            ready.without(params),
            ready.parts,
            Sample(partial(_read, hints), texts, "backbone"),
            partial(_export, config),
            partial(_preview, ready.drawing(params), config, ready.dtype, texts, hints),
            {**ready.inputs, **begun.inputs},
        )


@dataclass(frozen=True)
class ControlNetObjective:
    """The denoising loss of a backbone whose skips and middle a ControlNet adds to."""

    system: SystemObjective

    def loss(self, params: Trees, frozen: dict, batch: Batch, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """See `Objective`; batch: also `hint` (B,H,W,3) uint8."""
        x, t, target = self.system.denoising.noised(batch, key)
        return self.system.denoising.error(self.predict(params, frozen, batch, x, t), target, t), {}

    def predict(self, params: Trees, frozen: dict, batch: Batch, x: jax.Array, t: jax.Array) -> jax.Array:
        """Noisy latents (B,h,w,C) fp32 at t (B,) with the batch's texts and maps -> what the UNet predicts."""

        def residuals(x, t, text):
            hint = (batch["hint"].astype(jnp.float32) / 255).astype(x.dtype)
            return self.system.bound(FOLDER, params, frozen)(x, t, text, hint)

        return self.system.predict(params, frozen, batch["texts"][self.system.source], x, t, residuals)

    def shapes(self) -> Shapes:
        """See `Objective`."""
        return self.system.shapes()

    def row(self, size: int) -> Row:
        """See `Objective`."""
        return {**self.system.row(size), "hint": jax.ShapeDtypeStruct((size, size, 3), jnp.uint8)}


class Hints:
    """The maps of records, (H,W,3) uint8 of one `size`: made of their images, or read from the field `column`."""

    def __init__(self, size: tuple[int, int], kind: str, column: str | None):
        self.size, self.column = size, column
        if column is None:
            from bdm_jax.plugins.hints import HINTS  # OpenCV, where it is asked for

            if kind not in HINTS:
                raise unknown("map", kind, HINTS)
            self._make = HINTS[kind]

    def __call__(self, record: dict) -> np.ndarray:
        if self.column is None:
            return self._make(resize_to_cover(decode_image(record["image"], name=record_key(record)), self.size))
        if not isinstance(record.get(self.column), bytes):
            raise BadRecord(record_key(record), "no map", f"its field {self.column} holds no image")
        name = f"{record_key(record)}: {self.column}"
        return resize_to_cover(decode_image(record[self.column], name=name), self.size)


def controlnet_config(unet: UNetConfig, hint_widths: tuple[int, ...]) -> ControlNetConfig:
    """The sizes of a ControlNet for this UNet."""
    shared: dict[str, Any] = {field.name: getattr(unet, field.name) for field in fields(EncoderConfig)}
    return ControlNetConfig(**shared, conditioning_embedding_out_channels=hint_widths)


def init_from_unet(controlnet: Params, unet: Params) -> Params:
    """Every tensor that the UNet has, copied from it; zero convolutions and the map's layers stay as they are."""
    return {path: unet.get(path, value) for path, value in controlnet.items()}


def _read(hints: Hints, record: dict) -> Row:
    return {**read_moments(record), "hint": hints(record)}


def _preview(
    system: BridgePipeline,
    config: ControlNetConfig,
    dtype: jnp.dtype,
    texts: Captions,
    hints: Hints,
    params: Trees,
    records: list[dict],
) -> list[np.ndarray]:
    network = trained_component(config, params[FOLDER], dtype)
    drawn: list[np.ndarray] = []
    for seed, record in enumerate(records):
        control = Control(network, hints(record))
        drawn += generate(system, [request(texts, record, seed)], Sampling(steps=20), controls=[control])
    return drawn


def _export(config: ControlNetConfig, params: Trees, folder: Path, metadata: dict[str, str]) -> None:
    """The folder `controlnet`, as diffusers' ControlNetModel reads it."""
    save_component(folder / FOLDER, config, params[FOLDER], metadata=metadata)
