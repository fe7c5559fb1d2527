"""Batches on the devices: rows as the loader makes them, or gathered from tables by the numbers that it deals out."""

import math
import sys

import jax
import numpy as np
from jax.sharding import Mesh

from bdm_jax.data.loader import Loader, mix_loader
from bdm_jax.data.source import Skips
from bdm_jax.errors import UserError
from bdm_jax.runtime.processes import is_first
from bdm_jax.runtime.sharding import batch_sharding, place_batch
from bdm_jax.training.config import TrainConfig
from bdm_jax.training.objectives.objective import Batch, Training
from bdm_jax.training.position import NUMBER, numbered
from bdm_jax.training.tables import Tables, tables_of

_MOST_STEPS = 32  # of one call: more save nothing, and a signal waits for all of them
_MOST_BYTES = 2**28  # of their batches
_PREFETCH = 32  # samples, where a call takes fewer


class Feed:
    """The batches of a run, one after the other.

    loader: of rows with `NUMBER`; with `tables`, of what `Tables.deal` makes. mesh: where the batches go. at_once: how
    many steps are one call.
    """

    def __init__(self, loader: Loader, mesh: Mesh, tables: Tables | None, at_once: int = 1):
        self.loader, self.at_once, self._mesh = loader, at_once, mesh
        self._tables = None if tables is None else tables.arrays
        self._gather = [
            None if tables is None else jax.jit(tables.gather, out_shardings=batch_sharding(mesh, stacked))
            for stacked in (False, True)
        ]

    def take(self, count: int, places: np.ndarray) -> tuple[Batch, list[np.ndarray]]:
        """The next `count` batches, stacked where there are several, and for each of them the part and record of this
        process's rows. `places` (rows,): of these in the global batch.
        """
        dealt = [next(self.loader) for _ in range(count)]
        numbers = [batch.pop(NUMBER) for batch in dealt]
        for batch in dealt:
            batch["place"] = places
        stacked = count > 1
        batch = jax.tree.map(lambda *rows: np.stack(rows), *dealt) if stacked else dealt[0]
        batch = place_batch(self._mesh, batch, stacked)
        return batch if self._tables is None else self._gather[stacked](self._tables, batch), numbers


def open_feed(config: TrainConfig, training: Training, mesh: Mesh, skips: Skips) -> Feed:
    """The batches of a run from its beginning, from tables on the device where these fit; see `tables_of`."""
    tables = tables_of(training, config.data.on_device, config.steps * config.batch_size, mesh)
    parts, sample = (training.parts, training.sample) if tables is None else (tables.parts, tables.deal)
    at_once = steps_per_call(config, tables, len({part.bucket for part in parts}))
    if tables is not None and at_once > 1 and is_first():
        print(f"one call takes up to {at_once} steps", file=sys.stderr, flush=True)
    loader = mix_loader(
        numbered(parts),
        lambda record, rng: {**sample(record, rng), NUMBER: record[NUMBER]},
        config.batch_size,
        config.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        prefetch=max(_PREFETCH, at_once * config.batch_size),
        skips=skips,
        light=tables is not None,
    )
    return Feed(loader, mesh, tables, at_once)


def steps_per_call(config: TrainConfig, tables: Tables | None, buckets: int) -> int:
    """How many steps are one call: a divisor of the intervals of lines, samples and checkpoints.

    Raises:
        UserError: several are asked for where batches have several shapes or there are several processes.
    """
    asked = config.steps_per_call
    if asked is not None and asked > 1 and (buckets > 1 or jax.process_count() > 1):
        why = "several processes" if buckets == 1 else "batches of several shapes"
        raise UserError(f"steps_per_call={asked}: with {why} every step is a call of its own; leave it out")
    if asked is not None:
        most = asked
    elif tables is None or jax.default_backend() == "cpu":
        most = 1
    else:
        row = sum(table.nbytes // len(table) for table in jax.tree.leaves(tables.arrays))
        most = min(_MOST_STEPS, max(1, _MOST_BYTES // (row * config.batch_size)))
    common = math.gcd(config.log_every, config.sample_every, config.checkpoint_every)
    return max(count for count in range(1, min(common, most) + 1) if common % count == 0)
