"""Training the text tower that a branch reads with, against images, as Chinese-CLIP is trained (arXiv 2211.01335)."""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bdm_jax.command_line import ModelPath, OptionalModelPath
from bdm_jax.errors import UserError
from bdm_jax.images.decode import decode_image, resize_to_cover
from bdm_jax.models.config import RobertaConfig, VAEConfig
from bdm_jax.models.functional import abstract, bind, init
from bdm_jax.paths import TOKENIZERS
from bdm_jax.systems.components import load_component, save_component
from bdm_jax.text.tokenizer import Tokenizer
from bdm_jax.training.inputs import of_part
from bdm_jax.training.objectives.captions import Captions
from bdm_jax.training.objectives.objective import Batch, ReadSizes, Row, Shapes, Sizes, Training, Trees, read_sizes
from bdm_jax.training.objectives.sample import Sample, read_moments
from bdm_jax.training.objectives.starting import check_tokenizer, folders_of, load_start
from bdm_jax.training.sets import Sets, first_record

_SOURCE = "branch"


@dataclass(frozen=True)
class TextTask:
    """Train the tower that a branch reads with, against images, as Chinese-CLIP is trained (arXiv 2211.01335).

    A caption's mean state and a linear map of its image's latents find each other among those of the batch.
    start_from: a tower to train on, whose sizes it keeps; None for fresh weights. The map is fresh in any case.
    """

    text_encoder: RobertaConfig = field(default_factory=RobertaConfig)
    vae: ModelPath = Path("runs/emoji-vae/export/vae")
    tokenizer: ModelPath = TOKENIZERS / "chinese"
    temperature: float = 0.07
    caption_dropout: float = 0.0
    style_in_caption: bool = False
    start_from: OptionalModelPath = None
    language: str = "zh"

    sized: ClassVar[dict[str, str]] = {"text_encoder": "branch_text_encoder"}

    def beside(self, path: Path) -> dict[str, Any]:
        """What a system at `path` has for these fields."""
        return folders_of(path, vae="vae", tokenizer="branch_tokenizer")

    def sizes(self, read: ReadSizes = read_sizes) -> Sizes:
        """The autoencoder's sizes; no weights are read."""
        return {"vae": read("vae", self.vae)}

    def objective(self, sizes: Sizes) -> "TextTowerObjective":
        """The loss."""
        length = self.text_encoder.max_position_embeddings
        return TextTowerObjective(self.text_encoder, sizes["vae"], self.temperature, length)

    def start(self, sets: Sets, run: Path, seed: int, dtype: jnp.dtype) -> Training:
        """Fresh tower and map, or the tower that it starts from; the autoencoder is loaded and frozen."""
        tokenizer = Tokenizer.from_pretrained(self.tokenizer)
        begun = load_start(
            self.start_from, run, {"text_encoder": self.text_encoder}, parts=self.sized, where="in task.text_encoder"
        )
        if begun.params:
            part = self.sized["text_encoder"]
            check_tokenizer(tokenizer, self.tokenizer, self.text_encoder, self.start_from, part)
        vae = load_component(self.vae, "float32")
        parts = sets.latents(vae, run, images=True, common_size=(vae.config.sample_size,) * 2)
        if len({part.bucket for part in parts}) > 1:
            raise UserError(f"{', '.join(map(str, sets.folders))}: the text tower needs images of one size")
        size = first_record(parts[0].source)["moments"].size // 2
        kernel = jax.random.normal(jax.random.key(seed), (size, self.text_encoder.hidden_size)) / np.sqrt(size)
        tower = begun.params or {"text_encoder": init(self.text_encoder, seed)}
        params = {**tower, "picture": {"kernel": kernel}}
        texts = Captions(tokenizer, self.language, self.caption_dropout, self.style_in_caption)
        objective = self.objective({"vae": vae.config})
        return Training(
            objective,
            params,
            {},
            parts,
            Sample(read_moments, texts, _SOURCE),
            partial(_export, self.text_encoder, tokenizer),
            partial(_preview, objective, texts),
            {"tokenizer": of_part(tokenizer, self.tokenizer), "vae": of_part(vae, self.vae), **begun.inputs},
        )


@dataclass(frozen=True)
class TextTowerObjective:
    """Contrastive loss of captions and images, in both directions."""

    text_encoder: RobertaConfig
    vae: VAEConfig
    temperature: float
    length: int = 52

    def loss(self, params: Trees, frozen: dict, batch: Batch, key: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
        """See `Objective`."""
        similar = self.similarity(params, batch["texts"][_SOURCE], batch["moments"]) / self.temperature
        right = jnp.arange(len(similar))
        both = [optax.softmax_cross_entropy_with_integer_labels(table, right).mean() for table in (similar, similar.T)]
        return sum(both) / 2, {"found": jnp.mean(similar.argmax(axis=1) == right)}

    def shapes(self) -> Shapes:
        """See `Objective`; the map is of the autoencoder's own image size."""
        side = self.vae.sample_size // self.vae.factor
        kernel = jax.ShapeDtypeStruct(
            (side * side * self.vae.latent_channels, self.text_encoder.hidden_size), jnp.float32
        )
        return {"text_encoder": abstract(self.text_encoder), "picture": {"kernel": kernel}}, {}

    def row(self, size: int) -> Row:
        """See `Objective`; of the autoencoder's own image size, which is that of the map."""
        side = self.vae.sample_size // self.vae.factor
        return {
            "moments": jax.ShapeDtypeStruct((side, side, 2 * self.vae.latent_channels), jnp.float32),
            "texts": {_SOURCE: jax.ShapeDtypeStruct((self.length,), jnp.int32)},
            "place": jax.ShapeDtypeStruct((), jnp.int32),
        }

    def similarity(self, params: Trees, ids: jax.Array, moments: jax.Array) -> jax.Array:
        """Captions (B,S) and images (N,h,w,2C) -> cosines (B,N)."""
        kernel = params["picture"]["kernel"]
        means = moments[..., : moments.shape[-1] // 2] * self.vae.scaling_factor
        images = means.reshape(len(means), -1).astype(kernel.dtype) @ kernel
        texts = bind(self.text_encoder, params["text_encoder"])(ids).mean(axis=1)
        return _unit(texts) @ _unit(images).T


def _unit(x: jax.Array) -> jax.Array:
    x = x.astype(jnp.float32)
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def _export(config: RobertaConfig, tokenizer: Tokenizer, params: Trees, folder: Path, metadata: dict[str, str]) -> None:
    """The folders `branch_text_encoder` and `branch_tokenizer`."""
    save_component(folder / "branch_text_encoder", config, params["text_encoder"], metadata=metadata)
    tokenizer.save_pretrained(folder / "branch_tokenizer")


def _preview(objective: TextTowerObjective, texts: Captions, params: Trees, records: list[dict]) -> list[np.ndarray]:
    """For the name of each record, the image that it finds among them."""
    ids = texts.tokenizer([texts.name(record) for record in records])
    moments = np.stack([record["moments"] for record in records])
    found = np.asarray(objective.similarity(params, ids, moments)).argmax(axis=1)
    height, width = (side * objective.vae.factor for side in moments.shape[1:3])
    return [resize_to_cover(decode_image(records[i]["image"]), (height, width)) for i in found]
