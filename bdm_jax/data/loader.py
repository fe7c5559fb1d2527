"""Batches through Grain: one order for the whole job, made of the seed alone, whatever hosts, threads and restarts."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import grain
import numpy as np

from bdm_jax.data.source import Skips, Source
from bdm_jax.errors import BadRecord, UserError

Transform = Callable[[dict, np.random.Generator], dict[str, np.ndarray]]
_IN_A_ROW = 100
_LARGEST = 2**32  # of Grain's shuffle


@dataclass(frozen=True)
class MixturePart:
    """Records of one source that are drawn in the same way.

    indices: a range, or an array, which may be memory-mapped. weight: of the part among all, by default the number of
    its records. bucket: (height, width) of its pictures, told to the transform as `record["bucket"]`; the samples of a
    batch are of one bucket.
    """

    source: Source
    indices: Sequence[int]
    weight: float | None = None
    bucket: tuple[int, int] | None = None


def mix_loader(
    parts: Sequence[MixturePart],
    transform: Transform,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    *,
    process_index: int = 0,
    process_count: int = 1,
    threads: int = 2,
    prefetch: int = 32,
    skips: Skips | None = None,
) -> "Loader":
    """Endless shuffled batches over all parts, the same on every machine and after every restart.

    Each part has a fresh permutation per epoch of its own. Parts take turns by weight: within a bucket sample by
    sample, buckets batch by batch; Grain rounds weights to within half a percent of the smallest. Batches run across
    the ends of epochs: all are full.
    Sample number p of a bucket goes through `transform(record, rng)`; the generator depends on (seed, bucket, p) only.
    A record that is refused (BadRecord) is counted, and another one of its part, drawn by that generator, takes its
    place; nothing else moves.
    With several processes, process i gets samples i, i + count, i + 2 count, ... of each global batch.

    Args:
        parts: what to draw from.
        transform: record -> dict of arrays (or scalars), of fixed shape within a bucket; runs in several threads.
        batch_size: samples per global batch; a multiple of `process_count`.
        seed: of the order and of the transforms.
        start_step: number of the first batch, as after a restart.
        threads, prefetch: reading threads, each of which makes whole batches, and samples kept ready (at least a batch
            per thread); neither changes the result.
        skips: counts what is left out, of this process; by default up to 1%.

    Raises:
        UserError: nothing to draw, weights of which some are left out or not positive, or a batch size that the
            processes do not share evenly; while reading, if too many records are refused.
    """
    parts = list(parts)
    if not parts or not all(len(part.indices) for part in parts):
        raise UserError("no records to load: the list of indices is empty")
    if batch_size < 1 or batch_size % process_count:
        raise UserError(f"batch_size {batch_size} is not a positive multiple of the {process_count} processes")
    if max(len(part.indices) for part in parts) > _LARGEST:
        raise UserError(f"a part has more than {_LARGEST} records, which Grain cannot shuffle: split it in several")
    weights = _weights(parts)
    skips = Skips() if skips is None else skips
    buckets: dict[tuple[int, int] | None, list[int]] = defaultdict(list)
    for number, part in enumerate(parts):
        buckets[part.bucket].append(number)
    streams = []
    for place, numbers in enumerate(buckets.values()):
        orders = [
            grain.MapDataset.source(_Places(number, len(parts[number].indices)))
            .seed(_seed(seed, len(parts), number))
            .shuffle()
            .repeat()
            for number in numbers
        ]
        samples = _mix(orders, [weights[number] for number in numbers]).seed(_seed(seed, len(buckets), place))
        samples = samples.random_map(_Read(parts, transform, skips))[process_index::process_count]
        streams.append(samples.batch(batch_size // process_count, drop_remainder=True))
    batches = _mix(streams, [sum(weights[number] for number in numbers) for numbers in buckets.values()])
    identity = {"batch_size": batch_size, "seed": seed, "records": [len(part.indices) for part in parts]}
    ready = max(threads, -(-prefetch * process_count // batch_size))
    reading = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ready)
    return Loader(batches, reading, start_step, identity, skips, convertible=len(buckets) == 1)


class Loader(Iterator):
    """Iterator of batches (dicts of stacked arrays) whose whole state is the number of the next one.

    Attributes:
        skips: what was left out.
    """

    def __init__(self, batches, options, step: int, identity: dict[str, Any], skips: Skips, convertible: bool):
        self._batches, self._options, self._identity = batches, options, identity
        self._convertible, self.skips = convertible, skips
        self._go_to(step)

    def __next__(self) -> dict[str, np.ndarray]:
        batch = next(self._iterator)
        self._step += 1
        return batch

    def get_state(self) -> dict[str, Any]:
        """What `set_state` needs to go on with the same next batch (JSON); the same in every process."""
        return {"step": self._step, **self._identity}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue exactly as an uninterrupted run would, with however many processes.

        A position of another batch size is converted where it is a whole number of batches and there are no buckets.

        Raises:
            UserError: it is of other records, another seed, or a batch size that does not fit (both values are named).
        """
        own = self._identity
        for name in ("seed", "records"):
            if state[name] != own[name]:
                raise UserError(f"the position is one of other data: {name} was {state[name]}, is {own[name]}")
        step, before, now = int(state["step"]), int(state["batch_size"]), int(own["batch_size"])
        if before != now and (step * before % now or not self._convertible):
            why = "" if self._convertible else ", and with buckets the order depends on it"
            raise UserError(f"batch_size was {before}, is {now}: batch {step} of {before} is no whole number{why}")
        self._go_to(step * before // now)

    def _go_to(self, step: int) -> None:
        self._step = step
        self._iterator = iter(self._batches[step:].to_iter_dataset(self._options))


class _Places:
    """(part, place in its indices): the shuffle moves these, records are only read at the end."""

    def __init__(self, part: int, length: int):
        self._part, self._length = part, length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> tuple[int, int]:
        return self._part, int(index)


class _Read:
    """A place -> a sample, or another one of the same part where the record is refused."""

    def __init__(self, parts: Sequence[MixturePart], transform: Transform, skips: Skips):
        self._parts, self._transform, self._skips = parts, transform, skips

    def __call__(self, place: tuple[int, int], rng: np.random.Generator) -> dict[str, np.ndarray]:
        part, at = self._parts[place[0]], place[1]
        for _ in range(_IN_A_ROW):
            try:
                record = part.source[int(part.indices[at])]
                if part.bucket is not None:
                    record = {**record, "bucket": part.bucket}
                sample = self._transform(record, rng)
            except BadRecord as error:
                self._skips.bad(error)
                at, last = int(rng.integers(len(part.indices))), error
            else:
                self._skips.good()
                return sample
        raise UserError(f"{_IN_A_ROW} records in a row cannot be used, the last one: {last}")


def _mix(datasets: list, weights: list[float]):
    return datasets[0] if len(datasets) == 1 else grain.MapDataset.mix(datasets, weights=weights)


def _weights(parts: Sequence[MixturePart]) -> list[float]:
    given = [part.weight for part in parts]
    if all(weight is None for weight in given):
        return [float(len(part.indices)) for part in parts]
    if not all(weight is not None and 0 < weight < math.inf for weight in given):
        raise UserError(f"weights must be positive and given for all sets or for none, not {given}")
    return given


def _seed(seed: int, count: int, number: int) -> int:
    """One of `count` seeds that have nothing to do with each other."""
    return seed if count == 1 else int(np.random.SeedSequence([seed, count, number]).generate_state(1)[0])
