"""Any source as a prepared TFDS set of array_record files, written by this process or through a Beam pipeline.

Images are copied in their encoded form, so that neither writing nor reading needs TensorFlow. Records with a damaged
image header are skipped, and filters may skip more. The command is `python -m bdm_jax.data.prepare`.
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

_CHUNK = 10_000  # records per unit of work, for a source that is not a list of files
_NUMBERS = {"width": np.int32, "height": np.int32}


class ImageText(tfds.core.GeneratorBasedBuilder):
    """Images and their captions; the single split is "train", shuffled by TFDS's hash of the keys.

    Args:
        source: path of the records, as for `open_source`; on a cluster, one that every worker can read.
        filters: requirements on a record.
        beam: write through a Beam pipeline.
        cache: as for `open_source`.

    A record is skipped if it cannot be read, its image header is damaged, or a filter rejects it. Skipped records are
    counted by cause: in Beam's counters (namespace "left out"), or without Beam in `left_out`. Without Beam, more than
    1% of damaged records is an error.
    """

    VERSION = tfds.core.Version("1.0.0")
    code_path = epath.Path(__file__)  # otherwise TFDS needs importlib_resources, which it does not declare

    def __init__(self, *, source: str, filters: Filters | None = None, beam: bool = False, cache=None, **options: Any):
        self._from, self._filters, self._beam, self._cache = source, filters or Filters(), beam, cache
        self.left_out: dict[str, int] = {}
        self._skips = Skips()
        super().__init__(file_format="array_record", **options)

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "image": tfds.features.Image(shape=(None, None, 3), doc="as in the source: PNG, JPEG or WebP"),
            "key": tfds.features.Text(doc="name in the source"),
            "captions": tfds.features.Sequence(tfds.features.Text()),
            **{name: tfds.features.Scalar(kind) for name, kind in _NUMBERS.items()},
            "aesthetic": tfds.features.Scalar(np.float32, doc="NaN if the source has none"),
        }
        filters = ", ".join(f"{name}={value}" for name, value in asdict(self._filters).items())
        return tfds.core.DatasetInfo(
            builder=self,
            description=f"Images and captions of {self._from}; filters: {filters}.",
            features=tfds.features.FeaturesDict(features),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        units = list(_work_units(self._from, self._cache))
        if not self._beam:
            return self._read_all(units)
        import apache_beam as beam

        return beam.Create(units) | beam.Reshuffle() | beam.FlatMap(_Read(self._cache, self._filters))

    def _read_all(self, units: Sequence["_WorkUnit"]) -> Iterator[tuple[str, dict]]:
        read = _Read(self._cache, self._filters, self._count)
        for unit in units:
            for example in read(unit):
                self._skips.good()
                yield example

    def _count(self, error: BadRecord) -> None:
        self.left_out[error.cause] = self.left_out.get(error.cause, 0) + 1
        if not isinstance(error, Filtered):
            self._skips.bad(error)


class _WorkUnit(NamedTuple):
    """What a worker processes at a time: a file of the source, or `count` of its records from `start`."""

    number: int
    path: str
    start: int = 0
    count: int | None = None


def _work_units(path: str, cache: Path | None) -> Iterator[_WorkUnit]:
    files = list_files(path)
    if files:
        yield from (_WorkUnit(number, file) for number, file in enumerate(files))
    else:
        starts = range(0, len(open_source(path, cache=cache)), _CHUNK)
        yield from (_WorkUnit(number, path, start, _CHUNK) for number, start in enumerate(starts))


class _Read:
    """A unit of work -> its examples. `count` is called for each skipped record; by default Beam's counters."""

    def __init__(self, cache: Path | None, filters: Filters, count: Callable[[BadRecord], None] | None = None):
        self._cache, self._filters, self._count = cache, filters, count or _count_in_beam

    def __call__(self, unit: _WorkUnit) -> Iterator[tuple[str, dict]]:
        try:
            source = _open_cached(unit.path, self._cache)
        except UserError as error:
            if unit.count is not None:
                raise
            self._count(BadRecord(unit.path, "unreadable file", str(error)))
            return
        for cause, names in getattr(source, "left_out", {}).items():
            for name in names:
                self._count(BadRecord(name, cause, "skipped by the index"))
        stop = len(source) if unit.count is None else min(unit.start + unit.count, len(source))
        for index in range(unit.start, stop):
            try:
                record = self._filters.apply(source[index])
            except BadRecord as error:
                self._count(error)
                continue
            score = aesthetic_score(record)
            yield (
                f"{unit.number:06d}-{index:09d}",
                {
                    **{name: record[name] for name in ("image", "key", "captions", *_NUMBERS)},
                    "aesthetic": float("nan") if score is None else score,
                },
            )


@lru_cache(maxsize=1)
def _open_cached(path: str, cache: Path | None) -> Source:
    """The source this worker opened last, so that consecutive units of one set open it only once."""
    return open_source(path, cache=cache)


def _count_in_beam(error: BadRecord) -> None:
    from apache_beam.metrics import Metrics

    Metrics.counter("left out", error.cause).inc()
