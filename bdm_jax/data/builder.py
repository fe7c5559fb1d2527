"""Any source as a prepared TFDS set of array_record files, written by this process or through a Beam pipeline.

Pictures are copied as they are, encoded, so that neither writing nor reading needs TensorFlow. Only those whose header
is sound are written; filters may leave out more. `python -m bdm_jax.data.prepare` is the command.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from bdm_jax.data.records import list_files, open_source
from bdm_jax.data.select import Filters, aesthetic_score
from bdm_jax.data.source import Skips, Source
from bdm_jax.errors import BadRecord, Filtered, UserError

_CHUNK = 10_000  # records that a Beam worker takes at a time, where the source is no list of files
_NUMBERS = {"width": np.int32, "height": np.int32}


class ImageText(tfds.core.GeneratorBasedBuilder):
    """Pictures and their captions; the single split is "train", shuffled by TFDS' hash of the keys.

    Args:
        source: path of the records, as `open_source` takes it; on a cluster, one that all workers reach.
        filters: what a record must be.
        beam: write through a Beam pipeline.
        cache: as of `open_source`.

    A record is left out where it cannot be read, its header is damaged, or it does not pass: counted by Beam's
    counters (namespace "left out"), without Beam in `left_out`, and then more than 1% of faults end the work.
    """

    VERSION = tfds.core.Version("1.0.0")
    code_path = epath.Path(__file__)  # TFDS finds it with importlib_resources, which it uses without requiring it

    def __init__(self, *, source: str, filters: Filters | None = None, beam: bool = False, cache=None, **options: Any):
        self._from, self._filters, self._beam, self._cache = source, filters or Filters(), beam, cache
        self.left_out: dict[str, int] = {}
        self._skips = Skips()
        super().__init__(file_format="array_record", **options)

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "image": tfds.features.Image(shape=(None, None, 3), doc="as it came: PNG, JPEG or WebP"),
            "key": tfds.features.Text(doc="name in the source"),
            "captions": tfds.features.Sequence(tfds.features.Text()),
            **{name: tfds.features.Scalar(kind) for name, kind in _NUMBERS.items()},
            "aesthetic": tfds.features.Scalar(np.float32, doc="NaN where the source tells none"),
        }
        told = ", ".join(f"{name}={value}" for name, value in asdict(self._filters).items())
        return tfds.core.DatasetInfo(
            builder=self,
            description=f"Pictures and captions of {self._from}; filters: {told}.",
            features=tfds.features.FeaturesDict(features),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        pieces = list(_pieces(self._from, self._cache))
        if not self._beam:
            return self._all(pieces)
        import apache_beam as beam

        return beam.Create(pieces) | beam.Reshuffle() | beam.FlatMap(_Read(self._cache, self._filters))

    def _all(self, pieces: Sequence["_Piece"]) -> Iterator[tuple[str, dict]]:
        read = _Read(self._cache, self._filters, self._count)
        for piece in pieces:
            for example in read(piece):
                self._skips.good()
                yield example

    def _count(self, error: BadRecord) -> None:
        self.left_out[error.cause] = self.left_out.get(error.cause, 0) + 1
        if not isinstance(error, Filtered):
            self._skips.bad(error)


class _Piece(NamedTuple):
    """What one worker takes at a time: a file of the source, or so many records of it from `start` on."""

    number: int
    path: str
    start: int = 0
    count: int | None = None


def _pieces(path: str, cache: Path | None) -> Iterator[_Piece]:
    files = list_files(path)
    if files:
        yield from (_Piece(number, file) for number, file in enumerate(files))
    else:
        starts = range(0, len(open_source(path, cache=cache)), _CHUNK)
        yield from (_Piece(number, path, start, _CHUNK) for number, start in enumerate(starts))


class _Read:
    """A piece -> its examples. `count` gets what is left out; by default Beam's counters do."""

    def __init__(self, cache: Path | None, filters: Filters, count: Callable[[BadRecord], None] | None = None):
        self._cache, self._filters, self._count = cache, filters, count or _to_beam

    def __call__(self, piece: _Piece) -> Iterator[tuple[str, dict]]:
        try:
            source = _opened(piece.path, self._cache)
        except UserError as error:
            if piece.count is not None:
                raise
            self._count(BadRecord(piece.path, "unreadable file", str(error)))
            return
        for cause, names in getattr(source, "left_out", {}).items():
            for name in names:
                self._count(BadRecord(name, cause, "left out of the index"))
        stop = len(source) if piece.count is None else min(piece.start + piece.count, len(source))
        for index in range(piece.start, stop):
            try:
                record = self._filters.apply(source[index])
            except BadRecord as error:
                self._count(error)
                continue
            score = aesthetic_score(record)
            yield (
                f"{piece.number:06d}-{index:09d}",
                {
                    **{name: record[name] for name in ("image", "key", "captions", *_NUMBERS)},
                    "aesthetic": float("nan") if score is None else score,
                },
            )


@lru_cache(maxsize=1)
def _opened(path: str, cache: Path | None) -> Source:
    """The source that this worker took last, so that the pieces of one set share what opening it costs."""
    return open_source(path, cache=cache)


def _to_beam(error: BadRecord) -> None:
    from apache_beam.metrics import Metrics

    Metrics.counter("left out", error.cause).inc()
