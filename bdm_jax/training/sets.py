"""The records of a run: sets whose latents fit into memory, and precomputed ones that are read as they are needed."""

import hashlib
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bdm_jax.data.balance import repeats
from bdm_jax.data.captions import concepts
from bdm_jax.data.emoji.scenes import Cutouts, Scenes
from bdm_jax.data.loader import MixturePart
from bdm_jax.data.moments import is_precomputed, moments_contents, open_moments
from bdm_jax.data.records import open_source
from bdm_jax.data.source import Source
from bdm_jax.errors import BadRecord, UserError, unknown
from bdm_jax.latents.moments import digest, record_moments
from bdm_jax.paths import EMOJI
from bdm_jax.systems.components import Component
from bdm_jax.training.inputs import Input

_TRIED = 1000


@dataclass(frozen=True)
class DataConfig:
    """Which records are trained on.

    folder: records, of any kind that `open_source` reads, or latents written by `python -m bdm_jax.latents.precompute`.
    also: more such sets. weights: how much of the training is `folder`'s and each of `also`'s, in any unit; () is by
    their records. style: one art style, or None for all. concepts: at most so many of them (the zh_only ones first,
    then at random by `seed`), None for all. scenes: train on so many scenes, drawn by `seed`, that are composed of
    `folder`'s records, images with transparency (`data.emoji.scenes`), of scene_size pixels; None takes images as they
    are. balance: a field of `folder`'s records, whose values are classes; all are then alike often (`data.balance`).
    skip_rate: share of the records that may turn out not to be usable. on_device: whether all that samples are made of
    lies on the device; None where it fits and pays (`training.tables`).
    """

    folder: Path = EMOJI
    also: tuple[Path, ...] = ()
    weights: tuple[float, ...] = ()
    style: str | None = None
    concepts: int | None = None
    scenes: int | None = None
    scene_size: int = 128
    balance: str | None = None
    seed: int = 0
    skip_rate: float = 0.01
    on_device: bool | None = None


class Sets:
    """The sets of a run, opened.

    Args:
        data: which.
        language: that captions are read in.
        only: see `select`.
        captions: whether captions are read; without, scenes need none.

    Raises:
        UserError: a set that is not there or leaves nothing to train on, a choice among precomputed records.
    """

    def __init__(self, data: DataConfig, language: str, only: Sequence[str] = (), *, captions: bool = True):
        self.folders, self.skip_rate = (data.folder, *data.also), data.skip_rate
        self._weights = data.weights or (None,) * len(self.folders)
        self._side = None if data.scenes is None else data.scene_size
        as_they_are = replace(data, scenes=None, balance=None)
        opened = [_open(folder, as_they_are, language, only, captions) for folder in data.also]
        self._chosen = [_open(data.folder, data, language, only, captions), *opened]

    def inputs(self) -> dict[str, Input]:
        """What lies in the sets' files, under the names of their settings."""
        names = ["data.folder", *(f"data.also[{number}]" for number in range(len(self.folders) - 1))]
        return {
            name: Input(str(folder), partial(moments_contents, folder) if chosen is None else chosen.contents)
            for name, folder, chosen in zip(names, self.folders, self._chosen, strict=True)
        }

    def check_scenes(self, factor: int) -> None:
        """Raises UserError for scenes that an autoencoder of this factor cannot make whole latents of."""
        if self._side is not None and self._side % factor:
            raise UserError(
                f"data.scene_size={self._side}: must be a multiple of {factor} (the autoencoder's factor), such as "
                f"{-(-self._side // factor) * factor}"
            )

    def images(self) -> list[MixturePart]:
        """The sets, whose records hold images.

        Raises:
            UserError: a set holds precomputed latents.
        """
        for folder, chosen in zip(self.folders, self._chosen, strict=True):
            if chosen is None:
                raise UserError(f"{folder} holds precomputed latents, this training reads images: give it their set")
        pairs = zip(self._chosen, self._weights, strict=True)
        return [MixturePart(source, source.order(), weight) for source, weight in pairs]

    def latents(
        self,
        vae: Component,
        run: Path,
        size: tuple[int, int] | None = None,
        images: bool = False,
        common_size: tuple[int, int] | None = None,
    ) -> list[MixturePart]:
        """The sets, whose records hold `moments` (h,w,2C), mean and log-variance of their raw latents.

        Those of images are computed and kept in memory, fp32 (fp16 beside precomputed ones, which are), cached in the
        run's folder; see `record_moments`. Those that are precomputed are one part per bucket.

        Args:
            vae: the run's own autoencoder.
            run: the run's folder.
            size: (height, width) that images are resized to; None for their own.
            images: the records must hold their images too.
            common_size: the size if a set has several; None where this is an error.

        Raises:
            UserError: latents of another autoencoder, not all there, images of several sizes, scenes whose size is no
                multiple of the autoencoder's factor, more images that cannot be used than the run tolerates, or
                precomputed latents where images are needed.
        """
        self.check_scenes(vae.config.factor)
        if images:
            self.images()
        kind = np.float16 if None in self._chosen else np.float32
        own = digest(vae) if None in self._chosen else None
        pairs = list(zip(self.folders, self._chosen, strict=True))
        # encoding takes long: what cannot be read is found before it
        opened = [open_moments(folder, own) if source is None else [] for folder, source in pairs]
        parts = []
        for number, ((folder, source), found) in enumerate(zip(pairs, opened, strict=True)):
            if source is not None:
                faults: dict[int, BadRecord] = {}
                cache = run / f"latents-{number}.npz"
                moments = record_moments(vae, source, cache, size, common_size, faults).astype(kind)
                check_faults(folder, faults.values(), len(source), self.skip_rate)
                bucket = (moments.shape[1] * vae.config.factor, moments.shape[2] * vae.config.factor)
                found = [MixturePart(_Encoded(source, moments, faults, images), source.order(), bucket=bucket)]
            parts += _weighted(found, self._weights[number])
        return parts


def check_faults(folder: Path, faults: Collection[BadRecord], count: int, rate: float, or_else: str = "") -> None:
    """Note how many of a set's records cannot be used. Raises UserError for more than the rate; `or_else`: another
    way out, told last.
    """
    if not faults:
        return
    first, *others = faults
    more = f", and {len(others)} more" if others else ""
    said = f"{folder}: {len(faults)} of {count} records cannot be used ({first}{more})"
    if len(faults) > rate * count:
        raise UserError(f"{said}: mend or remove them, or allow for them (--data.skip-rate, now {rate:g}){or_else}")
    warnings.warn(f"{said}; others take their places", stacklevel=2)


def first_record(source: Source) -> dict[str, Any]:
    """The first that can be used, of the first thousand. Raises BadRecord where none can."""
    for number in range(min(len(source), _TRIED)):
        try:
            return source[number]
        except BadRecord as error:
            fault = error
    raise fault


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
    names = [_name(source, int(i)) for i in indices]
    if missing := [one for one in only if one not in names]:
        raise unknown("record", missing[0], filter(None, names))
    return indices[[one in only for one in names]]


def _name(source: Source, index: int) -> str | None:
    try:
        record = source[index]
    except BadRecord:  # it has to be chosen to be counted
        return None
    return record["id"] if "style" in record else record["key"]


def _of_language(source: Source, data: DataConfig, language: str) -> np.ndarray:
    if len(source) and "style" not in first_record(source):
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


def _open(folder: Path, data: DataConfig, language: str, only: Sequence[str], captions: bool) -> "_Chosen | None":
    """What is trained on of a set; None for precomputed latents, which wait for the autoencoder."""
    if is_precomputed(folder):
        if data.scenes is not None:
            raise UserError(f"{folder} holds precomputed latents: scenes (data.scenes) are composed of images")
        if data.style is not None or data.concepts is not None or data.balance is not None or only:
            raise UserError(
                f"{folder} holds precomputed latents, all of which are trained on alike: leave data.style, "
                "data.concepts, data.balance and task.only out (None, None, None, ())"
            )
        return None
    source = open_source(folder)
    if data.scenes is not None:
        if data.balance is not None:
            raise UserError(f"data.balance={data.balance!r}: scenes (data.scenes) are drawn with shares of their own")
        return _compose(folder, source, data, language if captions else None, only)
    indices = select(source, data, language, only)
    if not len(indices):
        raise UserError(f"{folder}: data.concepts={data.concepts} leaves no records to train on in this language")
    return _Chosen(source, indices, None if data.balance is None else _balanced(source, indices, data))


def _balanced(source: Source, indices: np.ndarray, data: DataConfig) -> np.ndarray:
    """How often each chosen record is wanted in an epoch, (N,) int64; those that cannot be read are a class."""
    classes = []
    for index in map(int, indices):
        try:
            record = source[index]
        except BadRecord:
            classes.append(None)
            continue
        if data.balance not in record:
            known = ", ".join(sorted(set(record) - {"image"}))
            raise UserError(f"data.balance={data.balance!r}: {record['key']} has no such field, only {known}")
        classes.append(str(record[data.balance]))
    return repeats(classes, data.seed)


def _compose(folder: Path, source: Source, data: DataConfig, language: str | None, only: Sequence[str]) -> "_Chosen":
    """The scenes that have a caption in the language, the same scenes for every language; all where it is None."""
    chosen = select(source, data, "zh", only)
    cutouts = Cutouts(source, chosen, captions=language is not None)
    opaque = any(fault.cause == "no transparency" for fault in cutouts.faults.values())
    or_else = ", or train on the pictures as they are: --data.scenes None" if opaque else ""
    check_faults(folder, cutouts.faults.values(), len(chosen), data.skip_rate, or_else)
    scenes = Scenes(cutouts, data.scenes, data.seed, data.scene_size)
    indices = np.arange(len(scenes), dtype=np.int64) if language is None else scenes.of_language(language)
    if not len(indices):
        wanted = {"zh": "Chinese", "en": "English"}[language]
        raise UserError(f"{folder}: none of its records has a caption in {wanted}, so that no scene has one")
    return _ChosenScenes(scenes, indices)


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

    def __init__(self, source: Source, indices: np.ndarray, repeats: np.ndarray | None = None):
        """`repeats`: (N,) int64, how often each is wanted in an epoch; None as the source says, or once."""
        self._source, self._indices, self._repeats = source, indices, repeats
        content = source.fingerprint.encode() + np.asarray(indices, np.int64).tobytes()
        self.fingerprint = hashlib.sha256(content).hexdigest()[:16]

    def order(self) -> Sequence[int]:
        """Every record's number, as often as it is wanted in an epoch."""
        wanted = self._repeats
        if wanted is None and (own := getattr(self._source, "repeats", None)) is not None:
            wanted = own[self._indices]
        if wanted is None or (wanted == 1).all():
            return range(len(self))
        return np.repeat(np.arange(len(self)), wanted)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._source[int(self._indices[index])]

    def words(self, index: int) -> dict[str, Any]:
        """A record, of scenes without the image, which costs time to make."""
        return getattr(self._source, "words", self._source.__getitem__)(int(self._indices[index]))

    def contents(self) -> str:
        """See `Source`."""
        return self._source.contents()

    def __repr__(self) -> str:
        return repr(self._source)


class _ChosenScenes(_Chosen):
    """Some scenes."""

    def recipe(self) -> str:
        """What their pictures follow from, which are not composed for it."""
        return hashlib.sha256(self.contents().encode() + self._indices.tobytes()).hexdigest()[:32]


class _Encoded:
    """Records with their moments (N,h,w,2C); those whose images cannot be used raise what is wrong with them."""

    def __init__(self, source: _Chosen, moments: np.ndarray, faults: Mapping[int, BadRecord], images: bool):
        self._source, self._moments, self.fingerprint = source, moments, source.fingerprint
        self._record = source.__getitem__ if images else source.words
        self._faults = {number: fault.__reduce__()[1] for number, fault in faults.items()}

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index in self._faults:
            raise BadRecord(*self._faults[index])
        return {**self._record(index), "moments": self._moments[index]}

    def __repr__(self) -> str:
        return repr(self._source)
