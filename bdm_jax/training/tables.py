"""Sets that lie on the device: every record is read once, and a batch is then gathered there by numbers.

The numbers come from the loader itself, which deals them out in place of rows: same order, same generators, same
draws. So a training with tables is the training without them, bit for bit.
"""

import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from bdm_jax.data.captions import Choices
from bdm_jax.data.loader import MixturePart
from bdm_jax.data.source import Source
from bdm_jax.data.threads import map_ahead
from bdm_jax.errors import BadRecord, UserError
from bdm_jax.latents.moments import record_key
from bdm_jax.runtime.processes import is_first
from bdm_jax.runtime.sharding import place, replicated
from bdm_jax.sampling.memory import machine_memory
from bdm_jax.training.objectives.objective import Batch, Row, Training
from bdm_jax.training.objectives.sample import Sample

SHARE = 0.25  # of the device's free memory; what a step needs is not known yet
_CHUNK = 64  # records that are read, and whose texts are tokenized, at once
_TRIED = 1000  # records, for one that shows how large they are


@dataclass(frozen=True)
class Tables:
    """All that the samples of a training are made of.

    sample: what makes them. arrays, whole on every device: "rows", the records' arrays (N, ...), and "ids" (M,S) int32,
    the texts' ids, the empty one first. parts: the mixture as the loader reads it here, whose records are numbers.
    """

    sample: Sample
    arrays: dict[str, Any]
    parts: list[MixturePart]

    def deal(self, record: dict, rng: np.random.Generator) -> Row:
        """`sample` without its arrays: "dealt" (3,) int32, the row, the text, whether it is mirrored. Raises BadRecord
        as `sample` does, after the same draws.
        """
        if _ENTRY not in record:  # it could not be read: what is wrong is said, and drawn before, by the sample itself
            self.sample(record, rng)
            raise UserError(f"{record_key(record)} could not be read when the run began, and now it can: run it again")
        entry: _Entry = record[_ENTRY]
        text = 0
        if self.sample.captions is not None and (drawn := self.sample.captions.draw(lambda: entry.choices, rng)):
            prompt, number = drawn
            text = entry.text + prompt * entry.choices.total + number
        return {"dealt": np.array([entry.row, text, self.sample.mirror(rng)], np.int32)}

    def gather(self, arrays: dict[str, Any], batch: Batch) -> Batch:
        """The rows (..., and their arrays) of what was dealt (..., 3); pure. `arrays`: the tables' on the device."""
        row, text, mirror = jnp.moveaxis(batch["dealt"], -1, 0)
        take = partial(jnp.take, axis=0, mode="clip")
        rows = jax.tree.map(lambda table: take(table, row), arrays["rows"])
        ids = take(arrays["ids"], text) if "ids" in arrays else None
        return {**self.sample.batch(rows, ids, mirror > 0), "place": batch["place"]}


def tables_of(training: Training, on_device: bool | None, samples: int, mesh: Mesh) -> Tables | None:
    """The training's tables on the mesh, or None where they cannot lie there; a line on stderr says what was chosen.

    Args:
        training: what is trained.
        on_device: False for none; True where anything else is an error; None to choose: they must take at most `SHARE`
            of the memory that is free, and the run must read more samples than texts and records have to be read for
            them.
        samples: that the run reads.
        mesh: the devices.

    Raises:
        UserError: with True, where it cannot be (why is said).
    """
    if on_device is False:
        return None
    try:
        free = _free_memory()
        tables = _make(training.sample, training.parts, SHARE * free, samples if on_device is None else None)
    except _Unfit as reason:
        if on_device:
            raise UserError(f"data.on_device=True: {reason}; leave it out, and the loader reads them") from None
        if is_first():
            print(f"the sets are read as they are needed: {reason}", file=sys.stderr, flush=True)
        return None
    size, records = _bytes(tables.arrays), len(jax.tree.leaves(tables.arrays["rows"])[0])
    print(
        f"the sets lie on the device: {records} records, {_mb(size)} of {_mb(free)} free", file=sys.stderr, flush=True
    )
    return replace(tables, arrays=place(tables.arrays, replicated(mesh)))


class _Unfit(Exception):
    """Why the sets cannot lie on the device."""


@dataclass(frozen=True)
class _Entry:
    """Where a record's row is, its first text, and how many texts of each prompt there are."""

    row: int
    text: int
    choices: Choices | None


_ENTRY = "entry"


class _Dealt:
    """Records as entries of the tables; those that cannot be used stay what they are."""

    def __init__(self, source: Source, entries: Mapping[int, _Entry]):
        self._source, self._entries, self.fingerprint = source, entries, source.fingerprint

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        entry = self._entries.get(index)
        return self._source[index] if entry is None else {_ENTRY: entry}

    def __repr__(self) -> str:
        return repr(self._source)


def _make(sample: Any, parts: Sequence[MixturePart], limit: float, samples: int | None) -> Tables:
    """Raises _Unfit for more than `limit` bytes, more to be read than `samples`, and what cannot be a table."""
    if jax.process_count() > 1:
        raise _Unfit("each of several processes reads its own share")
    if not isinstance(sample, Sample):
        raise _Unfit("this task makes every sample anew")
    if len({part.bucket for part in parts}) > 1:
        raise _Unfit("their images are in several buckets")
    numbers = [part.indices if isinstance(part.indices, range) else np.unique(part.indices) for part in parts]
    count = sum(map(len, numbers))
    _check_samples(count, samples)
    wanted = [(number, int(index)) for number, indices in enumerate(numbers) for index in indices]
    first = _first_row(sample, parts, wanted)
    rows = {name: np.empty((count, *array.shape), array.dtype) for name, array in first.items()}
    _check_bytes(_bytes(rows), limit)
    entries: list[dict[int, _Entry]] = [{} for _ in parts]
    texts = [] if sample.captions is None else [sample.captions.empty[None]]
    filled, text = 0, 1
    for found in map_ahead(partial(_read, sample, parts), _chunks(wanted), min(os.cpu_count() or 1, 8)):
        for part, index, row, choices, ids in found:
            if {name: (array.shape, array.dtype) for name, array in row.items()} != {
                name: (array.shape[1:], array.dtype) for name, array in rows.items()
            }:
                raise _Unfit("their arrays have several shapes or types")
            for name, array in row.items():
                rows[name][filled] = array
            entries[part][index] = _Entry(filled, text, choices)
            filled += 1
            if ids is not None:
                texts.append(ids)
                text += len(ids)
        _check_samples(count + text, samples)
        _check_bytes(_bytes(rows) + text * (texts[0].nbytes if texts else 0), limit)
    arrays: dict[str, Any] = {"rows": {name: array[:filled] for name, array in rows.items()}}
    if texts:
        arrays["ids"] = np.concatenate(texts)
    dealt = [replace(part, source=_Dealt(part.source, known)) for part, known in zip(parts, entries, strict=True)]
    return Tables(sample, arrays, dealt)


def _chunks(wanted: Sequence[tuple[int, int]]) -> Iterator[Sequence[tuple[int, int]]]:
    return (wanted[begin : begin + _CHUNK] for begin in range(0, len(wanted), _CHUNK))


def _read(
    sample: Sample, parts: Sequence[MixturePart], wanted: Sequence[tuple[int, int]]
) -> list[tuple[int, int, Row, Choices | None, np.ndarray | None]]:
    """(part, index, row, choices, ids) of those records that can be used."""
    captions, found, records = sample.captions, [], []
    for part, index in wanted:
        try:
            record = parts[part].source[index]
            found.append((part, index, sample.read(record), None if captions is None else captions.choices(record)))
        except BadRecord as error:
            if captions is not None and captions.mixed:  # it may do for those prompts that have no caption
                raise _Unfit(f"some prompts may be used without captions, and a record has none ({error})") from error
        else:
            records.append(record)
    ids = [None] * len(found) if captions is None or not found else captions.all_ids(records)
    return [(*each, text) for each, text in zip(found, ids, strict=True)]


def _first_row(sample: Sample, parts: Sequence[MixturePart], wanted: Sequence[tuple[int, int]]) -> Row:
    for part, index in islice(wanted, _TRIED):
        try:
            return sample.read(parts[part].source[index])
        except BadRecord:
            continue
    raise _Unfit(f"of the first {_TRIED} records none can be used")


def _check_samples(needed: int, samples: int | None) -> None:
    if samples is not None and needed > samples:
        raise _Unfit(f"the run reads {samples} samples, and {needed} records and texts or more would be read for it")


def _check_bytes(size: int, limit: float) -> None:
    if size > limit:
        raise _Unfit(f"they take {_mb(size)} or more, and {_mb(limit)} may be used, {SHARE:.0%} of what is free")


def _free_memory() -> int:
    """Bytes on each device; on a CPU its share of the machine's."""
    if jax.default_backend() == "cpu":
        return machine_memory() // jax.local_device_count()
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    return min(each.get("bytes_limit", 0) - each.get("bytes_in_use", 0) for each in stats)


def _bytes(arrays: Any) -> int:
    return sum(array.nbytes for array in jax.tree.leaves(arrays))


def _mb(size: float) -> str:
    return f"{size / 1e6:,.1f} MB"
