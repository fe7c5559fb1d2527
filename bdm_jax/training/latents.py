"""Pictures through the autoencoder: the latents of a set that fits into memory, and the way there and back."""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from bdm_jax.components import Component
from bdm_jax.data.images import covering
from bdm_jax.data.records import Source, decode_image
from bdm_jax.models.config import TinyVAEConfig, VAEConfig
from bdm_jax.models.functional import Params, bind
from convert.files import atomic_file

_BATCH = 16


def record_key(record: dict) -> str:
    """The name of a record within its set."""
    return f"{record['style']}/{record['id']}" if "style" in record else record["key"]


def record_moments(
    vae: Component,
    source: Source,
    indices: np.ndarray,
    cache: Path | None = None,
    size: tuple[int, int] | None = None,
) -> dict[str, np.ndarray]:
    """Record key -> mean and log-variance of its raw latents, (h, w, 2C) fp32.

    `cache` (.npz) is read when it was made with the same weights and records, else written anew. With `size` (height,
    width) pictures of any size are made that large, what is over cut off evenly; without, all must have one size.
    """
    records = [source[int(i)] for i in indices]
    keys = [record_key(record) for record in records]
    digest = hashlib.sha256("\n".join(keys).encode())
    if size is not None:  # pictures of a user, who may put another one under a name
        digest.update(f"{size}".encode() + b"".join(hashlib.sha256(record["image"]).digest() for record in records))
    for path in sorted(vae.params):
        digest.update(np.asarray(vae.params[path]).tobytes())
    if cache is not None and cache.is_file():
        with np.load(cache) as stored:
            if str(stored["digest"]) == digest.hexdigest():
                return dict(zip(keys, stored["moments"], strict=True))

    pictures = (decode_image(record["image"], name=record_key(record)) for record in records)
    if size is not None:
        pictures = (covering(picture, size) for picture in pictures)
    moments = np.stack(list(_through(_moments, vae, pictures)))
    if cache is not None:
        with atomic_file(cache) as file:
            np.savez(file, moments=moments, digest=digest.hexdigest())
    return dict(zip(keys, moments, strict=True))


def round_trip(vae: Component, pictures: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Pictures (H,W,3) uint8 through the autoencoder's mean and back."""
    return list(_through(_there_and_back, vae, pictures))


def _through(function: Callable, vae: Component, pictures: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """`function(config, params, images)` of every picture, in batches of one size."""
    rest = iter(pictures)
    while images := list(islice(rest, _BATCH)):  # itertools.batched came with Python 3.12
        filled = np.stack([*images, *images[-1:] * (_BATCH - len(images))])
        yield from np.asarray(function(vae.config, vae.params, filled))[: len(images)]


@partial(jax.jit, static_argnums=0)
def _moments(config: VAEConfig | TinyVAEConfig, params: Params, images: jax.Array) -> jax.Array:
    """(B,H,W,3) uint8 -> mean and log-variance (B,h,w,2C) fp32."""
    mean, logvar = bind(config, params).encode(images.astype(jnp.float32) / 127.5 - 1.0)
    return jnp.concatenate([mean, logvar], axis=-1).astype(jnp.float32)


@partial(jax.jit, static_argnums=0)
def _there_and_back(config: VAEConfig | TinyVAEConfig, params: Params, images: jax.Array) -> jax.Array:
    """(B,H,W,3) uint8 -> the same, as the autoencoder gives it back."""
    network, dtype = bind(config, params), next(iter(params.values())).dtype
    decoded = network.decode(network.encode(images.astype(dtype) / 127.5 - 1.0)[0]).astype(jnp.float32)
    return jnp.round(jnp.clip(decoded, -1.0, 1.0) * 127.5 + 127.5).astype(jnp.uint8)
