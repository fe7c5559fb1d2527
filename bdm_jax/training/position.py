"""Where in the data a run is: what a checkpoint notes of it, and whether a later leg may go on from there."""

import hashlib
import sys
from typing import Any

import jax
import numpy as np

from bdm_jax.data.records import Source
from bdm_jax.errors import UserError

NUMBER = "number"  # of a record in its source, on its way through the loader


class Numbered:
    """A source whose records say under `NUMBER` which they are."""

    def __init__(self, source: Source):
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self._source[index], NUMBER: int(index)}


class Position:
    """The order of the samples is made of the seed and the records alone; a position is a number of whole batches."""

    def __init__(self, batch_size: int, seed: int, indices: np.ndarray, processes: int):
        digest = hashlib.sha256(np.asarray(indices, np.int64).tobytes()).hexdigest()[:16]
        self._own = {"batch_size": batch_size, "seed": seed, "records": len(indices), "records_digest": digest}
        self._batch_size, self._processes = batch_size, processes

    def note(self, batches: int) -> dict[str, Any]:
        """What a checkpoint after so many batches keeps (JSON)."""
        return {**self._own, "batches": batches, "samples": batches * self._batch_size, "processes": self._processes}

    def check(self, note: dict[str, Any]) -> int:
        """The number of batches to go on after. Another number of processes is no obstacle, and is told.

        Raises:
            UserError: the note is of other records or of another order (both values are named).
        """
        for name, value in self._own.items():
            if note.get(name) != value:
                raise UserError(
                    f"the data are not those of the checkpoint: {name} was {note.get(name)}, is {value}; "
                    "with them this run would see some samples twice and others never"
                )
        if note["processes"] != self._processes and jax.process_index() == 0:
            line = f"going on with {self._processes} processes in place of {note['processes']}"
            print(f"{line}, from sample {note['samples']}", file=sys.stderr, flush=True)
        return note["batches"]

    def places(self) -> np.ndarray:
        """(rows,) int32: the places in the global batch of this process's rows, as `make_loader` deals them out."""
        return np.arange(jax.process_index(), self._batch_size, self._processes, dtype=np.int32)
