"""Select the records to train on and assign each to an aspect-ratio bucket: one pass over the data, then cached."""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from bdm_jax.data.captions import is_written_in
from bdm_jax.data.loader import MixturePart
from bdm_jax.data.source import Source
from bdm_jax.data.threads import map_ahead
from bdm_jax.errors import BadRecord, Filtered, UserError
from bdm_jax.formats.files import read_json, write_json
from bdm_jax.images.decode import image_size
from bdm_jax.paths import new_folder

Size = tuple[int, int]  # height, width in pixels
_AESTHETIC = ("aesthetic", "aesthetic_score", "AESTHETIC_SCORE")
_GRADES = {"sharpness": 1, "text_area": -1, "level": 1}  # at least (1) or at most (-1)
_CHUNK = 256


@dataclass(frozen=True)
class Filters:
    """Requirements on a record. Captions that fail are dropped; a record is rejected when no caption is left."""

    language: Literal["zh", "en"] | None = None
    """keep only captions in this language, judged by script"""
    shortest: int = 1
    """minimum caption length in characters"""
    longest: int = 1000
    """maximum caption length in characters"""
    aesthetic: float | None = None
    """minimum score (aesthetic, aesthetic_score or AESTHETIC_SCORE); records without one are rejected"""
    side: int = 1
    """minimum length of the image's shorter side in pixels"""
    sharpness: float | None = None
    """minimum sharpness (`bdm_jax.data.grade`); records without one are rejected, as for the next two"""
    text_area: float | None = None
    """maximum share of the image that text covers"""
    level: int | None = None
    """minimum level, 1 to 5, of the votes on the image"""

    def apply(self, record: dict[str, Any]) -> dict[str, Any]:
        """The record with only the captions that pass, and with the image size from its header.

        Raises Filtered, whose cause says which requirement failed, or BadRecord for a damaged header.
        """
        key, record = record["key"], dict(record)
        if "captions" in record:
            right_length = [text for text in record["captions"] if self.shortest <= len(text) <= self.longest]
            if not right_length:
                raise Filtered(key, "caption length", f"no caption of {self.shortest} to {self.longest} characters")
            captions = [t for t in right_length if self.language is None or is_written_in(t, self.language)]
            if not captions:
                raise Filtered(key, "language", f"no caption is written in {self.language}")
            record["captions"] = captions
        if self.aesthetic is not None:
            score = aesthetic_score(record)
            if score is None:
                raise Filtered(key, "no aesthetic score", f"none of {', '.join(_AESTHETIC)} is present")
            if not score >= self.aesthetic:
                raise Filtered(key, "aesthetic score", f"{score} is less than {self.aesthetic}")
        if "image" in record:
            height, width = record["height"], record["width"] = image_size(record["image"], name=key)
            if min(height, width) < self.side:
                raise Filtered(key, "resolution", f"{width} x {height} pixels: the shorter side is below {self.side}")
        for name, sign in _GRADES.items():
            limit = getattr(self, name)
            if limit is None:
                continue
            if (value := record.get(name)) is None:
                raise Filtered(key, f"no {name}", "grade the set first: python -m bdm_jax.data.grade")
            if not sign * value >= sign * limit:
                raise Filtered(key, name, f"{value} is {'less' if sign > 0 else 'more'} than {limit}")
        return record

    def identity(self) -> dict[str, Any]:
        """Plain values that tell filters from others; those on grades only where they are set."""
        return {name: value for name, value in asdict(self).items() if name not in _GRADES or value is not None}


@dataclass(frozen=True)
class Selection:
    """The records of a source that pass `filters`.

    indices: (N,) uint32 or uint64, ascending. bucket: (N,) uint8, index into `buckets`. left_out: cause -> number of
    rejected records.
    """

    indices: np.ndarray
    bucket: np.ndarray
    buckets: tuple[Size, ...]
    left_out: dict[str, int]
    filters: Filters

    def parts(self, source: Source, weight: float | None = None) -> list[MixturePart]:
        """Parts for `mix_loader`, one per bucket, with `weight` divided in proportion to their records. Their records
        contain only the captions that pass.
        """
        parts = []
        for number, size in enumerate(self.buckets):
            if len(chosen := self.indices[self.bucket == number]):
                share = None if weight is None else weight * len(chosen) / len(self.indices)
                parts.append(MixturePart(_Filtered(source, self.filters), chosen, share, size))
        return parts


class _Filtered:
    """A source whose records contain only the captions that pass."""

    def __init__(self, source: Source, filters: Filters):
        self._source, self._filters = source, filters

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._filters.apply(self._source[index])

    def __repr__(self) -> str:
        return repr(self._source)


def aesthetic_score(record: dict[str, Any]) -> float | None:
    """The record's aesthetic score under one of its usual names; None if there is none."""
    score = next((record[name] for name in _AESTHETIC if name in record), None)
    return float(score) if isinstance(score, int | float) and not math.isnan(score) else None


def make_buckets(side: int = 512, step: int = 64, longest: float = 2.0) -> tuple[Size, ...]:
    """Aspect-ratio buckets (height, width) as NovelAI's: multiples of `step`, close to but at most side x side pixels,
    aspect ratio at most `longest`; from the widest to the tallest, including the square.
    """
    if side % step or side < step or longest < 1:
        raise UserError(f"buckets: side {side} must be a multiple of {step}, and the ratio {longest} at least 1")
    sizes = set()
    for short in range(step, side + 1, step):
        long = side * side // short // step * step
        if long <= longest * short:
            sizes |= {(short, long), (long, short)}
    return tuple(sorted(sizes, key=lambda size: (size[0] / size[1], size)))


def nearest(size: Size, buckets: Sequence[Size]) -> int:
    """Index of the bucket whose aspect ratio is nearest to that of an image (height, width)."""
    ratio = math.log(size[0] / size[1])
    return min(range(len(buckets)), key=lambda number: abs(math.log(buckets[number][0] / buckets[number][1]) - ratio))


def select(
    source: Source,
    filters: Filters,
    buckets: Sequence[Size] = ((512, 512),),
    cache: Path | None = None,
    threads: int = 8,
) -> Selection:
    """Read every record once, parsing image headers but no pixels, and keep those that pass.

    Args:
        source: the records; with `cache`, it needs a `fingerprint`.
        buckets: from `make_buckets`, at most 256.
        cache: folder that keeps the result, which is memory-mapped from there if source, filters and buckets are
            unchanged. One process must write it before others read it.

    Raises:
        UserError: no record passes (the message counts the causes).
    """
    buckets = tuple(map(tuple, buckets))
    identity = json.dumps([getattr(source, "fingerprint", None), len(source), filters.identity(), buckets])
    folder = None if cache is None else cache / f"selection-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
    if folder is not None and (folder / "left_out.json").is_file():
        arrays = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("indices", "bucket"))
        return Selection(*arrays, buckets, read_json(folder / "left_out.json"), filters)
    left_out: Counter[str] = Counter()
    kept: list[tuple[np.ndarray, np.ndarray]] = []
    chunks = (range(start, min(start + _CHUNK, len(source))) for start in range(0, len(source), _CHUNK))
    for indices, numbers, causes in map_ahead(lambda chunk: _chunk(source, filters, buckets, chunk), chunks, threads):
        kept.append((indices, numbers))
        left_out.update(causes)
    indices, numbers = (np.concatenate(arrays) for arrays in zip(*kept, strict=True)) if kept else (np.zeros(0),) * 2
    if not len(indices):
        raise UserError(f"{source!r}: no record passes the filters: {dict(left_out)}")
    if folder is not None:
        with new_folder(folder) as new:
            np.save(new / "indices.npy", indices)
            np.save(new / "bucket.npy", numbers)
            write_json(new / "left_out.json", left_out)
        return select(source, filters, buckets, cache)
    return Selection(indices, numbers, buckets, dict(left_out), filters)


def _chunk(source: Source, filters: Filters, buckets: Sequence[Size], numbers: range) -> tuple:
    indices, assigned, causes = [], [], []
    for number in numbers:
        try:
            record = filters.apply(source[number])
        except BadRecord as error:
            causes.append(error.cause)
        else:
            indices.append(number)
            assigned.append(nearest((record["height"], record["width"]), buckets) if len(buckets) > 1 else 0)
    dtype = np.uint32 if len(source) <= 2**32 else np.uint64
    return np.array(indices, dtype), np.array(assigned, np.uint8), causes
