"""Samples: a record becomes a row of a batch. What is the same each time is kept apart from what is chosen at random,
so that the former can lie on the device (`training.tables`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bdm_jax.images.decode import decode_image, resize_to_cover
from bdm_jax.latents.moments import record_key
from bdm_jax.training.objectives.captions import Captions
from bdm_jax.training.objectives.objective import Row


@dataclass(frozen=True)
class Sample:
    """One record -> one row; what `Training.sample` is where nothing else is drawn for a sample than its text and
    whether it is mirrored.

    read(record): the arrays that a record always has, of fixed shapes; raises BadRecord.
    captions, source: the text, as batch["texts"][source]; None for none.
    mirrored: half of the rows have their `image` (H,W,3) mirrored.
    """

    read: Callable[[dict], Row]
    captions: Captions | None = None
    source: str = ""
    mirrored: bool = False

    def __call__(self, record: dict, rng: np.random.Generator) -> Row:
        """See `Training`; the text is drawn first, then the mirror."""
        texts = {} if self.captions is None else {"texts": {self.source: self.captions.ids(record, rng)}}
        row = {**self.read(record), **texts}
        return {**row, "image": row["image"][:, ::-1]} if self.mirror(rng) else row

    def mirror(self, rng: np.random.Generator) -> bool:
        """Draw whether a sample is mirrored."""
        return self.mirrored and rng.random() < 0.5

    def batch(self, rows: dict[str, Any], ids: jax.Array | None, mirror: jax.Array) -> dict[str, Any]:
        """What was read for each sample (..., arrays), its ids (..., S) and whether it is mirrored (...) -> rows as
        calls make them.
        """
        texts = {} if self.captions is None else {"texts": {self.source: ids}}
        if self.mirrored:
            image = rows["image"]
            rows = {**rows, "image": jnp.where(mirror[..., None, None, None], image[..., ::-1, :], image)}
        return {**rows, **texts}


def read_moments(record: dict) -> Row:
    """The latents of a record that has them."""
    return {"moments": record["moments"]}


def read_image(size: tuple[int, int], record: dict) -> Row:
    """The image of a record, brought to (height, width)."""
    return {"image": resize_to_cover(decode_image(record["image"], name=record_key(record)), size)}
