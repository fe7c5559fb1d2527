"""The records of a run: sets whose latents fit into memory, and precomputed ones that are read as they are needed."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bdm_jax.data.captions import concepts
from bdm_jax.data.loader import MixturePart
from bdm_jax.data.moments import is_precomputed, open_moments
from bdm_jax.data.records import open_source
from bdm_jax.data.source import Source
from bdm_jax.errors import UserError, unknown
from bdm_jax.latents.moments import digest, record_moments
from bdm_jax.paths import EMOJI
from bdm_jax.systems.components import Component


@dataclass(frozen=True)
class DataConfig:
    """Which records are trained on.

    folder: records, of any kind that `open_source` reads, or latents written by `python -m bdm_jax.latents.precompute`.
    also: more such sets. weights: how much of the training is `folder`'s and each of `also`'s, in any unit; () is by
    their records. style: one art style, or None for all. concepts: at most so many of them (the zh_only ones first,
    then at random by `seed`), None for all. skip_rate: share of the records that may turn out not to be usable.
    """

    folder: Path = EMOJI
    also: tuple[Path, ...] = ()
    weights: tuple[float, ...] = ()
    style: str | None = None
    concepts: int | None = None
    seed: int = 0
    skip_rate: float = 0.01


class Sets:
    """The sets of a run, opened.

    Args:
        data: which.
        language: that captions are read in.
        only: see `select`.

    Raises:
        UserError: a set that is not there or leaves nothing to train on, a choice among precomputed records.
    """

    def __init__(self, data: DataConfig, language: str, only: Sequence[str] = ()):
        self.folders = (data.folder, *data.also)
        self._weights = data.weights or (None,) * len(self.folders)
        self._chosen = [_open(folder, data, language, only) for folder in self.folders]

    def images(self) -> list[MixturePart]:
        """The sets, whose records hold images.

        Raises:
            UserError: a set holds precomputed latents.
        """
        for folder, chosen in zip(self.folders, self._chosen, strict=True):
            if chosen is None:
                raise UserError(f"{folder} holds precomputed latents, this training reads images: give it their set")
        pairs = zip(self._chosen, self._weights, strict=True)
        return [MixturePart(source, range(len(source)), weight) for source, weight in pairs]

    def latents(
        self, vae: Component, run: Path, size: tuple[int, int] | None = None, images: bool = False
    ) -> list[MixturePart]:
        """The sets, whose records hold `moments` (h,w,2C), mean and log-variance of their raw latents.

        Those of images are computed and kept in memory, fp32 (fp16 beside precomputed ones, which are), cached in the
        run's folder; see `record_moments`. Those that are precomputed are one part per bucket.

        Args:
            vae: the run's own autoencoder.
            run: the run's folder.
            size: (height, width) that images are resized to; None if all of a set are of one size.
            images: the records must hold their images too.

        Raises:
            UserError: latents of another autoencoder, not all there, images of several sizes, or precomputed latents
                where images are needed.
        """
        if images:
            self.images()
        kind = np.float16 if None in self._chosen else np.float32
        own = digest(vae) if None in self._chosen else None
        parts = []
        for number, (folder, source) in enumerate(zip(self.folders, self._chosen, strict=True)):
            if source is None:
                found = open_moments(folder, own)
            else:
                moments = record_moments(vae, source, run / f"latents-{number}.npz", size).astype(kind)
                bucket = (moments.shape[1] * vae.config.factor, moments.shape[2] * vae.config.factor)
                found = [MixturePart(_Encoded(source, moments), range(len(source)), bucket=bucket)]
            parts += _weighted(found, self._weights[number])
        return parts


def select(source: Source, data: DataConfig, language: str, only: Sequence[str] = ()) -> np.ndarray:
    """Indices of the records that a run in this language trains on; English never sees zh_only.

    With `data.concepts` the same concepts are taken for every language and style, all zh_only ones among them. `only`:
    ids of concepts, or names of other sets' records; () takes all.

    Raises:
        UserError: of `only` there is none, or the records have no styles or concepts to choose by.
    """
    indices = _of_language(source, data, language)
    if not only:
        return indices
    records = [source[int(i)] for i in indices]
    names = [record["id"] if "style" in record else record["key"] for record in records]
    if missing := [one for one in only if one not in names]:
        raise unknown("record", missing[0], names)
    return indices[[one in only for one in names]]


def _of_language(source: Source, data: DataConfig, language: str) -> np.ndarray:
    if len(source) and "style" not in source[0]:
        if data.style is not None or data.concepts is not None:
            raise UserError(f"{source!r}: its records have no styles and concepts; leave data.style and concepts out")
        return np.arange(len(source), dtype=np.int64)
    indices = concepts(source, data.style, language=language)
    if data.concepts is None:
        return indices
    everything = [source[int(i)] for i in concepts(source, data.style, language="zh")]
    chinese = sorted({record["id"] for record in everything if record["zh_only"]})
    others = sorted({record["id"] for record in everything} - set(chinese))
    room = max(0, data.concepts - len(chinese))
    chosen = {*chinese, *np.random.default_rng(data.seed).permutation(others)[:room].tolist()}
    return np.asarray([i for i in indices if source[int(i)]["id"] in chosen], np.int64)


def _open(folder: Path, data: DataConfig, language: str, only: Sequence[str]) -> "_Chosen | None":
    """What is trained on of a set; None for precomputed latents, which wait for the autoencoder."""
    if is_precomputed(folder):
        if data.style is not None or data.concepts is not None or only:
            raise UserError(
                f"{folder} holds precomputed latents, all of which are trained on: leave data.style, data.concepts and "
                "task.only out (None, None, ())"
            )
        return None
    source = open_source(folder)
    indices = select(source, data, language, only)
    if not len(indices):
        raise UserError(f"{folder}: data.concepts={data.concepts} leaves no records to train on in this language")
    return _Chosen(source, indices)


def _weighted(parts: list[MixturePart], weight: float | None) -> list[MixturePart]:
    """A set's weight, divided among its parts by their records."""
    if weight is None:
        return parts
    total = sum(len(part.indices) for part in parts)
    shares = [weight * len(part.indices) / total for part in parts]
    return [
        MixturePart(part.source, part.indices, share, part.bucket) for part, share in zip(parts, shares, strict=True)
    ]


class _Chosen:
    """Some records of a source."""

    def __init__(self, source: Source, indices: np.ndarray):
        self._source, self._indices = source, indices
        content = source.fingerprint.encode() + np.asarray(indices, np.int64).tobytes()
        self.fingerprint = hashlib.sha256(content).hexdigest()[:16]

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._source[int(self._indices[index])]

    def __repr__(self) -> str:
        return repr(self._source)


class _Encoded:
    """Records with their moments (N,h,w,2C)."""

    def __init__(self, source: _Chosen, moments: np.ndarray):
        self._source, self._moments, self.fingerprint = source, moments, source.fingerprint

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self._source[index], "moments": self._moments[index]}

    def __repr__(self) -> str:
        return repr(self._source)
