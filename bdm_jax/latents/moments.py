"""Images through the autoencoder: the latents of a set that fits into memory, and the way there and back."""

import hashlib
import json
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from bdm_jax.data.source import Source
from bdm_jax.errors import BadRecord, UserError
from bdm_jax.images.decode import decode_image, resize_to_cover
from bdm_jax.latents import autoencoder
from bdm_jax.models.config import TinyVAEConfig, VAEConfig, to_json
from bdm_jax.models.functional import Params, bind, input_dtype
from bdm_jax.paths import atomic_file
from bdm_jax.runtime.processes import is_first
from bdm_jax.systems.components import Component

_BATCH = 16
_SILENCE = 30.0  # seconds between two lines


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
    vae: Component,
    source: Source,
    cache: Path | None = None,
    size: tuple[int, int] | None = None,
    common_size: tuple[int, int] | None = None,
    faults: dict[int, BadRecord] | None = None,
) -> np.ndarray:
    """Mean and log-variance of the raw latents of every record, (N,h,w,2C) fp32.

    Records are read one after the other, twice where their latents are not cached: images are not kept. Of a source
    with a `recipe()`, which tells its images without making them, they are read only to be encoded. The first process
    says on stderr that it encodes, and every half a minute how far it is.

    Args:
        vae: the autoencoder.
        source: the records.
        cache: an .npz file, read when it was made with the same weights and images, else rewritten.
        size: (height, width) that images are resized to cover and cropped to at the centre; None for their own.
        common_size: the size if they have several; None where this is an error.
        faults: filled with the records that cannot be used, by their numbers; their latents are zeros. None where the
            first of them is an error.

    Raises:
        UserError: images of several sizes, a record that cannot be used, or none that can.
    """
    bad: dict[int, BadRecord] = {}
    key = _key(f"{digest(vae)}\n{size}\n{common_size}\n", source, bad)
    found = _cached(cache, key)
    if found is None:
        try:
            moments = _encoded(vae, source, size, bad)
        except _Sizes as error:
            if common_size is None:
                raise UserError(
                    f"{error}: bring them to one size, or precompute their latents "
                    "(python -m bdm_jax.latents.precompute --buckets)"
                ) from None
            height, width = common_size
            warnings.warn(
                f"{error}: all are resized to cover {width} x {height} and cropped at the centre; to keep their "
                "proportions, precompute their latents (python -m bdm_jax.latents.precompute --buckets)",
                stacklevel=2,
            )
            moments = _encoded(vae, source, common_size, bad)
        if cache is not None:
            with atomic_file(cache) as file:
                listed = [[str(number), *error.__reduce__()[1]] for number, error in sorted(bad.items())]
                np.savez(file, moments=moments, digest=key, faults=np.array(listed, dtype=str).reshape(-1, 4))
    else:
        moments, bad = found
    if bad and faults is None:
        raise bad[min(bad)]
    if faults is not None:
        faults.update(bad)
    return moments


def round_trip(vae: Component, images: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Images (H,W,3) uint8 through the autoencoder's mean and back."""

    def both(config, params, images):
        return autoencoder.decode(vae, autoencoder.encode(vae, images))[0]

    return list(_through(both, vae, images))


@partial(jax.jit, static_argnums=0)
def encode(config: VAEConfig | TinyVAEConfig, params: Params, images: jax.Array) -> jax.Array:
    """(B,H,W,3) uint8 -> mean and log-variance (B,h,w,2C) fp32, computed in the type of the parameters."""
    dtype = input_dtype(params)
    mean, logvar = bind(config, params).encode((images.astype(jnp.float32) / 127.5 - 1.0).astype(dtype))
    return jnp.concatenate([mean, logvar], axis=-1).astype(jnp.float32)


class _Sizes(Exception):
    """Images have several sizes; which."""


def _key(about: str, source: Source, bad: dict[int, BadRecord]) -> str:
    """Of all that latents follow from."""
    sha = hashlib.sha256(about.encode())
    if (recipe := getattr(source, "recipe", None)) is not None:
        sha.update(recipe().encode())
        return sha.hexdigest()
    for number in range(len(source)):  # a user may put another image under a name
        record = _record(source, number, bad)
        name, image = (record_key(record), record["image"]) if record else ("", b"")
        sha.update(hashlib.sha256(name.encode() + b"\n" + image).digest())
    return sha.hexdigest()


def _record(source: Source, number: int, bad: dict[int, BadRecord]) -> dict | None:
    try:
        return source[number]
    except BadRecord as error:
        bad[number] = error
        return None


def _cached(cache: Path | None, key: str) -> tuple[np.ndarray, dict[int, BadRecord]] | None:
    if cache is None or not cache.is_file():
        return None
    with np.load(cache) as stored:
        if str(stored["digest"]) != key:
            return None
        listed = stored["faults"].tolist() if "faults" in stored else []
        return stored["moments"], {int(number): BadRecord(*fault) for number, *fault in listed}


def _encoded(vae: Component, source: Source, size: tuple[int, int] | None, bad: dict[int, BadRecord]) -> np.ndarray:
    moments = list(_followed(_through(encode, vae, _images(source, size, bad)), len(source)))
    if not moments:
        raise next(iter(bad.values()), UserError("there are no images to encode"))
    good = [number for number in range(len(source)) if number not in bad]
    whole = np.zeros((len(source), *moments[0].shape), moments[0].dtype)
    whole[good] = moments
    return whole


def _images(source: Source, size: tuple[int, int] | None, bad: dict[int, BadRecord]) -> Iterator[np.ndarray]:
    """Those that can be used; the others' errors go to `bad`."""
    shape = None
    for number in range(len(source)):
        record = None if number in bad else _record(source, number, bad)
        if record is None:
            continue
        try:
            image = decode_image(record["image"], name=record_key(record))
        except BadRecord as error:
            bad[number] = error
            continue
        image = image if size is None else resize_to_cover(image, size)
        shape = image.shape if shape is None else shape
        if image.shape != shape:
            (height, width), others = image.shape[:2], f"{shape[1]} x {shape[0]}"
            raise _Sizes(f"{record_key(record)}: {width} x {height} pixels, those before it {others}")
        yield image


def _followed(rows: Iterator[np.ndarray], count: int) -> Iterator[np.ndarray]:
    """The same rows; the first process says that they are made, and from time to time how far it is."""
    if not is_first():
        yield from rows
        return
    began = said = time.monotonic()
    print(f"encoding {count:,} images into latents", file=sys.stderr, flush=True)
    for done, row in enumerate(rows, 1):
        yield row
        if (now := time.monotonic()) - said >= _SILENCE:
            left = (count - done) * (now - began) / done / 60
            print(f"encoded {done:,} of {count:,} images, {left:.0f} min left", file=sys.stderr, flush=True)
            said = now


def _through(function: Callable, vae: Component, rows: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """`function(config, params, images)` of every image, in batches of one size."""
    rest = iter(rows)
    while images := list(islice(rest, _BATCH)):  # itertools.batched came with Python 3.12
        filled = np.stack([*images, *images[-1:] * (_BATCH - len(images))])
        yield from np.asarray(function(vae.config, vae.params, filled))[: len(images)]
