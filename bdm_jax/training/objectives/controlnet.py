"""Training a ControlNet (Zhang et al., arXiv 2302.05543): a copy of a frozen backbone's encoder that sees a map."""

from dataclasses import dataclass, fields
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np

from bdm_jax.errors import BadRecord, UserError, unknown
from bdm_jax.images.decode import decode_image, resize_to_cover
from bdm_jax.latents.moments import record_key
from bdm_jax.models.config import Config, ControlNetConfig, EncoderConfig, UNetConfig
from bdm_jax.models.functional import Params, abstract, init
from bdm_jax.plugins.controls import Control
from bdm_jax.sampling.batching import default_size
from bdm_jax.sampling.generate import generate
from bdm_jax.sampling.settings import Sampling
from bdm_jax.systems.components import save_component
from bdm_jax.training.objectives.plugin import LoadedSystem, PluginJob, PluginTask

FOLDER = "controlnet"


@dataclass(frozen=True)
class ControlNetTask(PluginTask):
    """Train a ControlNet that begins as the backbone's encoder.

    hint: which map is made of a sample's picture ("canny", "line", ...; see `plugins.hints`). hint_column: in place of
    that, the field of the records that holds a ready map, encoded like a picture. hint_widths: channels of the layers
    that read the map; each but the first halves it. caption_dropout: half, as the paper has it, so that the map itself
    is read.
    """

    hint: str = "canny"
    hint_column: str | None = None
    hint_widths: tuple[int, ...] = (16, 32, 96, 256)
    caption_dropout: float = 0.5

    reads_pictures: ClassVar[bool] = True

    def trained_shapes(self, configs: dict[str, Config]) -> dict[str, Any]:
        return {FOLDER: abstract(controlnet_config(configs["unet"], self.hint_widths))}

    def make(self, ready: LoadedSystem) -> "ControlNetJob":
        factor = ready.system.vae.config.factor
        if not self.hint_widths or 2 ** (len(self.hint_widths) - 1) != factor:
            raise UserError(
                f"task.hint_widths={self.hint_widths}: {factor.bit_length()} widths are needed, for maps {factor} "
                "times as large as the latents"
            )
        config = controlnet_config(ready.system.unet.config, self.hint_widths)
        params = init_from_unet(init(config, ready.seed), ready.system.unet.params)
        return ControlNetJob(self, ready, {FOLDER: params}, config)


class ControlNetJob(PluginJob):
    """`ControlNetTask` made ready."""

    def __init__(self, task, ready, params, config: ControlNetConfig):
        super().__init__(task, ready, params)
        self.configs[FOLDER], self.size = config, default_size(ready.system)
        if task.hint_column is None:
            from bdm_jax.plugins.hints import HINTS  # OpenCV, where it is asked for

            if task.hint not in HINTS:
                raise unknown("map", task.hint, HINTS)
            self.maker = HINTS[task.hint]

    def sample(self, record, rng):
        return {**super().sample(record, rng), "hint": self.hint(record)}

    def hint(self, record: dict) -> np.ndarray:
        """The map of a record, (H,W,3) uint8."""
        column = self.task.hint_column
        if column is None:
            return self.maker(resize_to_cover(decode_image(record["image"], name=record_key(record)), self.size))
        if not isinstance(record.get(column), bytes):
            raise BadRecord(record_key(record), "no map", f"its field {column} holds no picture")
        return resize_to_cover(decode_image(record[column], name=f"{record_key(record)}: {column}"), self.size)

    def residuals(self, params, frozen, batch, x, t, text):
        hint = (batch["hint"].astype(jnp.float32) / 255).astype(x.dtype)
        return self.network(FOLDER, params, frozen)(x, t, text, hint)

    def pipeline(self, params):
        return self.system

    def pictures(self, params, records):
        network = self.component(FOLDER, params)
        drawn = []
        for seed, record in enumerate(records):
            control = Control(network, self.hint(record))
            request = self.request(self.name(record), seed)
            drawn += generate(self.system, [request], Sampling(steps=20), controls=[control])
        return drawn

    def export(self, params, folder, metadata):
        """The folder `controlnet`, as diffusers' ControlNetModel reads it."""
        save_component(folder / FOLDER, self.configs[FOLDER], params[FOLDER], metadata=metadata)


def controlnet_config(unet: UNetConfig, hint_widths: tuple[int, ...]) -> ControlNetConfig:
    """The sizes of a ControlNet for this UNet."""
    shared = {field.name: getattr(unet, field.name) for field in fields(EncoderConfig)}
    return ControlNetConfig(**shared, conditioning_embedding_out_channels=hint_widths)


def init_from_unet(controlnet: Params, unet: Params) -> Params:
    """Every tensor that the UNet has, copied from it; zero convolutions and the map's layers stay as they are."""
    return {path: unet.get(path, value) for path, value in controlnet.items()}
