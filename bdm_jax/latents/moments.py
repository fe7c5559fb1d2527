"""Images through the autoencoder: the latents of a set that fits into memory, and the way there and back."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from bdm_jax.data.source import Source
from bdm_jax.errors import UserError
from bdm_jax.images.decode import decode_image, resize_to_cover
from bdm_jax.latents import autoencoder
from bdm_jax.models.config import TinyVAEConfig, VAEConfig, to_json
from bdm_jax.models.functional import Params, bind, param_dtype
from bdm_jax.paths import atomic_file
from bdm_jax.systems.components import Component

_BATCH = 16


def record_key(record: dict) -> str:
    """The name of a record within its set."""
    return f"{record['style']}/{record['id']}" if "style" in record else record["key"]


def digest(component: Component) -> str:
    """Of a network's sizes and weights, 32 hexadecimal digits; of the weights' values, as fp32."""
    sha = hashlib.sha256(json.dumps(to_json(component.config), sort_keys=True, default=str).encode())
    for path in sorted(component.params):
        sha.update(path.encode())
        sha.update(np.asarray(component.params[path], np.float32).tobytes())
    return sha.hexdigest()[:32]


def record_moments(
    vae: Component, source: Source, cache: Path | None = None, size: tuple[int, int] | None = None
) -> np.ndarray:
    """Mean and log-variance of the raw latents of every record, (N,h,w,2C) fp32.

    `cache` (.npz) is read when it was made with the same weights and records, else rewritten. With `size` (height,
    width) images of any size are resized to cover it and cropped at the centre; without, all must have one size.

    Raises:
        UserError: an image that cannot be decoded, or is of another size than those before it.
    """
    records = [source[i] for i in range(len(source))]
    key = hashlib.sha256(f"{digest(vae)}\n{size}\n".encode() + "\n".join(map(record_key, records)).encode())
    if size is not None:  # images of a user, who may put another one under a name
        key.update(b"".join(hashlib.sha256(record["image"]).digest() for record in records))
    if cache is not None and cache.is_file():
        with np.load(cache) as stored:
            if str(stored["digest"]) == key.hexdigest():
                return stored["moments"]

    moments = np.stack(list(_through(encode, vae, _images(records, size))))
    if cache is not None:
        with atomic_file(cache) as file:
            np.savez(file, moments=moments, digest=key.hexdigest())
    return moments


def round_trip(vae: Component, images: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Images (H,W,3) uint8 through the autoencoder's mean and back."""

    def both(config, params, images):
        return autoencoder.decode(vae, autoencoder.encode(vae, images))[0]

    return list(_through(both, vae, images))


@partial(jax.jit, static_argnums=0)
def encode(config: VAEConfig | TinyVAEConfig, params: Params, images: jax.Array) -> jax.Array:
    """(B,H,W,3) uint8 -> mean and log-variance (B,h,w,2C) fp32, computed in the type of the parameters."""
    dtype = param_dtype(params)
    mean, logvar = bind(config, params).encode((images.astype(jnp.float32) / 127.5 - 1.0).astype(dtype))
    return jnp.concatenate([mean, logvar], axis=-1).astype(jnp.float32)


def _images(records: Sequence[dict], size: tuple[int, int] | None) -> Iterator[np.ndarray]:
    shape = None
    for record in records:
        image = decode_image(record["image"], name=record_key(record))
        image = image if size is None else resize_to_cover(image, size)
        shape = image.shape if shape is None else shape
        if image.shape != shape:
            (height, width), others = image.shape[:2], f"{shape[1]} x {shape[0]}"
            raise UserError(
                f"{record_key(record)}: {width} x {height} pixels, those before it {others}: bring them to one size, "
                "or precompute its latents (python -m bdm_jax.latents.precompute --buckets)"
            )
        yield image


def _through(function: Callable, vae: Component, rows: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """`function(config, params, images)` of every image, in batches of one size."""
    rest = iter(rows)
    while images := list(islice(rest, _BATCH)):  # itertools.batched came with Python 3.12
        filled = np.stack([*images, *images[-1:] * (_BATCH - len(images))])
        yield from np.asarray(function(vae.config, vae.params, filled))[: len(images)]
