"""Batches through Grain in one global order, which depends on the seed only: not on hosts, threads or restarts."""

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import grain
import numpy as np

from bdm_jax.data.order import Generators, Order
from bdm_jax.data.source import Skips, Source
from bdm_jax.data.threads import map_ahead
from bdm_jax.errors import BadRecord, UserError

Transform = Callable[[dict, np.random.Generator], dict[str, np.ndarray]]
_MAX_CONSECUTIVE_SKIPS = 100
_MAX_RECORDS = 2**32  # limit of Grain's shuffle
_LOOKED_AT = (0, 1, 2, 1000, 10**6)  # positions


@dataclass(frozen=True)
class MixturePart:
    """One component of a data mixture: records of one source with one weight and one bucket.

    indices: a range, or an array (may be memory-mapped). weight: relative sampling weight; by default the number of
    records. bucket: (height, width) of the images, passed to the transform as `record["bucket"]`; every batch comes
    from a single bucket.
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
    light: bool = False,
) -> "Loader":
    """Infinite shuffled batches from a mixture of parts, the same on every machine and after every restart.

    Each part is reshuffled at each of its epochs. Parts are interleaved by weight: sample by sample within a bucket,
    batch by batch between buckets; Grain rounds weights to within half a percent of the smallest. Batches cross epoch
    boundaries, so all of them are full.
    Sample p of a bucket is `transform(record, rng)`, where the generator depends on (seed, bucket, p) only. A record
    that raises BadRecord is counted and replaced by another record of its part, chosen by that generator; the other
    samples do not change.
    With n processes, process i gets the samples i, i + n, i + 2n, ... of each global batch.

    Args:
        parts: the mixture.
        transform: record -> dict of arrays or scalars, of fixed shapes within a bucket; called from several threads.
        batch_size: samples per global batch; a multiple of `process_count`.
        seed: determines the order and the generators of the transforms.
        start_step: number of the first batch, after a restart.
        threads, prefetch: reading threads, each of which assembles whole batches, and samples to prefetch (at least one
            batch per thread); neither changes the result.
        skips: counts the records that this process skips; by default at most 1%.
        light: the transform costs less than Grain's own layers do: without buckets, one thread makes the same batches
            without them, twice as fast and more. Changes nothing else.

    Raises:
        UserError: no records, weights that are not positive or given for some parts only, or a batch size that is not
            divisible by the number of processes; while reading, if too many records are skipped.
    """
    parts = list(parts)
    if not parts or not all(len(part.indices) for part in parts):
        raise UserError("no records to load: a part has no indices; check the filters of the data")
    if batch_size < 1 or batch_size % process_count:
        raise UserError(f"batch_size {batch_size} is not a positive multiple of the {process_count} processes")
    if max(len(part.indices) for part in parts) > _MAX_RECORDS:
        raise UserError(f"a part has more than {_MAX_RECORDS} records, which Grain cannot shuffle: split it up")
    weights = _weights(parts)
    skips = Skips() if skips is None else skips
    buckets: dict[tuple[int, int] | None, list[int]] = defaultdict(list)
    for number, part in enumerate(parts):
        buckets[part.bucket].append(number)
    read, rows = _Read(parts, transform, skips), batch_size // process_count
    shuffles = [_derived(_seed(seed, len(parts), number)) for number in range(len(parts))]
    streams = []
    for index, numbers in enumerate(buckets.values()):
        orders = [
            grain.MapDataset.source(_Positions(number, len(parts[number].indices)))
            .shuffle(seed=shuffles[number])
            .repeat()
            for number in numbers
        ]
        mixed, draws = _mix(orders, [weights[number] for number in numbers]), _derived(_seed(seed, len(buckets), index))
        samples = mixed.random_map(read, seed=draws)[process_index::process_count]
        streams.append(samples.batch(rows, drop_remainder=True))
    batches = _mix(streams, [sum(weights[number] for number in numbers) for numbers in buckets.values()])
    identity = {"batch_size": batch_size, "seed": seed, "records": [len(part.indices) for part in parts]}
    buffered = max(threads, -(-prefetch * process_count // batch_size))
    order = Order([len(part.indices) for part in parts], weights, shuffles)
    if light and len(buckets) == 1 and _is_grains(order, mixed, draws):
        own = range(process_index, rows * process_count, process_count)  # the process's of a batch's positions

        def open_at(step: int) -> Iterator[dict[str, np.ndarray]]:
            return _without_layers(read, order, draws, own, rows * process_count, step, buffered)
    else:
        reading = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=buffered)

        def open_at(step: int) -> Iterator[dict[str, np.ndarray]]:
            return iter(batches[step:].to_iter_dataset(reading))

    return Loader(open_at, start_step, identity, skips, convertible=len(buckets) == 1)


class Loader(Iterator):
    """Iterator of batches (dicts of stacked arrays) whose only state is the number of the next batch.

    Attributes:
        skips: counts of skipped records.
    """

    def __init__(
        self,
        open_at: Callable[[int], Iterator[dict[str, np.ndarray]]],
        step: int,
        identity: dict[str, Any],
        skips: Skips,
        convertible: bool,
    ):
        self._open_at, self._identity, self._convertible, self.skips = open_at, identity, convertible, skips
        self._seek(step)

    def __next__(self) -> dict[str, np.ndarray]:
        batch = next(self._iterator)
        self._step += 1
        return batch

    def get_state(self) -> dict[str, Any]:
        """The state for `set_state`, JSON-serialisable and the same in every process."""
        return {"step": self._step, **self._identity}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue exactly as an uninterrupted run would, with any number of processes.

        The state of a run with another batch size is converted if it is a whole number of batches and there are no
        buckets.

        Raises:
            UserError: the records, the seed or the batch size do not match (the message names both values).
        """
        identity = self._identity
        for name in ("seed", "records"):
            if state[name] != identity[name]:
                raise UserError(f"the data changed since the checkpoint: {name} was {state[name]}, is {identity[name]}")
        step, before, now = int(state["step"]), int(state["batch_size"]), int(identity["batch_size"])
        if before != now and (step * before % now or not self._convertible):
            why = "" if self._convertible else ", and with buckets the order depends on it"
            raise UserError(
                f"batch_size was {before}, is {now}: {step} old batches are no whole number of new ones{why}"
            )
        self._seek(step * before // now)

    def _seek(self, step: int) -> None:
        self._step, self._iterator = step, self._open_at(step)


class _Positions:
    """(part, position in its indices): what is shuffled; the records themselves are read afterwards."""

    def __init__(self, part: int, length: int):
        self._part, self._length = part, length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> tuple[int, int]:
        return self._part, int(index)


class _Read:
    """A position -> a sample; if the record cannot be used, a sample from another record of the same part."""

    def __init__(self, parts: Sequence[MixturePart], transform: Transform, skips: Skips):
        self._parts, self._transform, self._skips = parts, transform, skips

    def __call__(self, position: tuple[int, int], rng: np.random.Generator) -> dict[str, np.ndarray]:
        part, at = self._parts[position[0]], position[1]
        for _ in range(_MAX_CONSECUTIVE_SKIPS):
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
        raise UserError(f"{_MAX_CONSECUTIVE_SKIPS} records in a row cannot be used; the last one: {last}")


def _without_layers(
    read: _Read, order: Order, draws: int, own: range, stride: int, step: int, ahead: int
) -> Iterator[dict[str, np.ndarray]]:
    """Batches from `step` on, one thread ahead. own: positions in a global batch, of which there are `stride`."""
    generators = Generators(draws)

    def batch(number: int) -> dict[str, np.ndarray]:
        positions = number * stride + np.array(own)
        places = zip(positions.tolist(), *order.at(positions), strict=True)
        made = [read((part, place), generators.at(position)) for position, part, place in places]
        return {name: np.stack([row[name] for row in made]) for name in made[0]}

    return map_ahead(batch, itertools.count(step), threads=1, ahead=ahead)


def _is_grains(order: Order, mixed: grain.MapDataset, seed: int) -> bool:
    """Whether order and generators are those of this version of Grain, where it is looked."""
    draws = mixed.random_map(lambda position, rng: (position, rng.random(), rng.integers(2**32)), seed=seed)
    generators = Generators(seed)
    for position in _LOOKED_AT:
        (part,), (place,) = order.at(np.array([position]))
        rng = generators.at(position)
        if draws[position] != ((part, place), rng.random(), rng.integers(2**32)):
            return False
    return True


def _mix(datasets: list, weights: list[float]):
    return datasets[0] if len(datasets) == 1 else grain.MapDataset.mix(datasets, weights=weights)


def _weights(parts: Sequence[MixturePart]) -> list[float]:
    weights = [part.weight for part in parts]
    if all(weight is None for weight in weights):
        return [float(len(part.indices)) for part in parts]
    if not all(weight is not None and 0 < weight < math.inf for weight in weights):
        raise UserError(f"weights must be positive and given for all sets or for none, not {weights}")
    return weights


def _derived(seed: int) -> int:
    """The seed that Grain derives from `MapDataset.seed(seed)` for the transformation after it."""
    return int(np.random.SeedSequence([seed, 1]).generate_state(1)[0])


def _seed(seed: int, count: int, number: int) -> int:
    """The `number`-th of `count` independent seeds."""
    return seed if count == 1 else int(np.random.SeedSequence([seed, count, number]).generate_state(1)[0])
