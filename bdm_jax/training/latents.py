"""The autoencoder's latents of a set that fits into memory, computed once per run."""

import hashlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from bdm_jax.components import Component
from bdm_jax.data.records import Source, decode_image
from bdm_jax.models.functional import bind

_BATCH = 16


def record_key(record: dict) -> str:
    """The name of a record within its set."""
    return f"{record['style']}/{record['id']}"


def record_moments(
    vae: Component, source: Source, indices: np.ndarray, cache: Path | None = None
) -> dict[str, np.ndarray]:
    """Record key -> mean and log-variance of its raw latents, (h, w, 2C) fp32.

    `cache` (.npz) is read when it was made with the same weights and records, else written anew.
    """
    records = [source[int(i)] for i in indices]
    keys = [record_key(record) for record in records]
    digest = hashlib.sha256("\n".join(keys).encode())
    for path in sorted(vae.params):
        digest.update(np.asarray(vae.params[path]).tobytes())
    if cache is not None and cache.is_file():
        with np.load(cache) as stored:
            if str(stored["digest"]) == digest.hexdigest():
                return dict(zip(keys, stored["moments"], strict=True))

    @jax.jit
    def encode(params, images):
        mean, logvar = bind(vae.config, params).encode(images.astype(jnp.float32) / 127.5 - 1.0)
        return jnp.concatenate([mean, logvar], axis=-1).astype(jnp.float32)

    moments = []
    for begin in range(0, len(records), _BATCH):
        images = [decode_image(r["image"], name=record_key(r)) for r in records[begin : begin + _BATCH]]
        missing = _BATCH - len(images)
        rows = encode(vae.params, np.stack(images + images[-1:] * missing))
        moments.append(np.asarray(rows)[: _BATCH - missing])
    moments = np.concatenate(moments)
    if cache is not None:
        cache.parent.mkdir(parents=True, exist_ok=True)
        unfinished = cache.with_suffix(".partial.npz")
        np.savez(unfinished, moments=moments, digest=digest.hexdigest())
        unfinished.replace(cache)
    return dict(zip(keys, moments, strict=True))
