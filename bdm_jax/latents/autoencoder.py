"""Images into latents and back: whole, or large ones in tiles; as much of a batch at a time as memory should hold."""

import math
from functools import partial
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np

from bdm_jax.latents.tiles import slices, tiled
from bdm_jax.models.config import TinyVAEConfig, VAEConfig
from bdm_jax.models.functional import Params, bind, input_dtype
from bdm_jax.runtime.programs import program
from bdm_jax.systems.components import Component

# On a device at a time, but for a single image or tile: four images of 512 x 512.
_PIXELS = 2**20


def encode(vae: Component | None, images: jax.Array, tile: int = 0) -> np.ndarray:
    """Images (B,H,W,3) uint8 -> clean latents (B,h,w,C) fp32: the mean of the autoencoder's, scaled; without one, the
    pixels in [-1,1].

    Images larger than `tile` pixels a side go in tiles (`tiles.tiled`), an approximation; 0 for none. How many go at
    a time changes nothing.
    """
    if vae is None:
        return np.asarray(images, np.float32) / 127.5 - 1.0
    size, scale = images.shape[1:3], 1 / vae.config.factor
    run = partial(_encode, vae.config, vae.params)
    found = {}
    for part in _slices(images, size, tile):
        own = images[part]
        found[part.start] = run(own) if _whole(size, tile) else tiled(partial(_on_tile, run, own), size, tile, scale)
    return _joined(found)


def decode(vae: Component | None, latents: jax.Array, tile: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Latents (B,h,w,C) -> images (B,H,W,3) uint8, and whether each has finite values only (B,). As `encode`."""
    if vae is None:
        return _to_uint8(np.asarray(latents, np.float32), np)
    factor = vae.config.factor
    height, width = (side * factor for side in latents.shape[1:3])
    run = partial(_images, vae.config, vae.params)
    pixels, finite = {}, {}
    for part in _slices(latents, (height, width), tile):
        own = latents[part]
        if _whole((height, width), tile):
            found = _decode(vae.config, vae.params, own)
        else:
            images = tiled(partial(_on_tile, run, own), own.shape[1:3], tile // factor, factor)
            found = _to_uint8(images, np)
        pixels[part.start], finite[part.start] = found
    return _joined(pixels), _joined(finite)


def _whole(size: tuple[int, int], tile: int) -> bool:
    return not tile or max(size) <= tile


def _slices(batch: jax.Array, size: tuple[int, int], tile: int) -> list[slice]:
    pixels = math.prod(size) if _whole(size, tile) else tile**2
    return slices(len(batch), jax.local_device_count(), max(1, _PIXELS // pixels))


def _joined(found: dict[int, jax.Array]) -> np.ndarray:
    """Every n-th row from the first, from the second, ... -> all rows in order."""
    parts = np.stack([np.asarray(found[number]) for number in sorted(found)], axis=1)
    return parts.reshape(-1, *parts.shape[2:])


def _on_tile(function, x: jax.Array, top: int, left: int, *size: int) -> jax.Array:
    return function(_cut(x, size, top, left))


@partial(jax.jit, static_argnums=1)
def _cut(x: jax.Array, size: tuple[int, int], top: int, left: int) -> jax.Array:
    """A piece of `size` (h,w) of x (B,H,W,C)."""
    return jax.lax.dynamic_slice(x, (0, top, left, 0), (len(x), *size, x.shape[-1]))


@program
def _encode(config: VAEConfig | TinyVAEConfig, params: Params, images: jax.Array) -> jax.Array:
    images = (images.astype(jnp.float32) / 127.5 - 1.0).astype(input_dtype(params))
    mean, _ = bind(config, params).encode(images)
    return mean.astype(jnp.float32) * config.scaling_factor


@program
def _decode(config: VAEConfig | TinyVAEConfig, params: Params, latents: jax.Array) -> tuple[jax.Array, jax.Array]:
    return _to_uint8(_images(config, params, latents), jnp)


@program
def _images(config: VAEConfig | TinyVAEConfig, params: Params, latents: jax.Array) -> jax.Array:
    """Latents (B,h,w,C) -> images (B,H,W,3) fp32 in about [-1,1]."""
    latents = (latents / config.scaling_factor).astype(input_dtype(params))
    return bind(config, params).decode(latents).astype(jnp.float32)


def _to_uint8(images: jax.Array | np.ndarray, xp: ModuleType) -> tuple[jax.Array | np.ndarray, ...]:
    """Images (B,H,W,3) in [-1,1] -> uint8, and whether each has finite values only (B,); `xp` is jnp or np."""
    finite = xp.isfinite(images).all(axis=(1, 2, 3))
    return xp.round(xp.clip(images, -1.0, 1.0) * 127.5 + 127.5).astype(xp.uint8), finite
