"""Where in the data a run is: what a checkpoint notes of it, and whether a later session may resume from there."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from bdm_jax.data.loader import Loader, MixturePart
from bdm_jax.data.source import Source
from bdm_jax.errors import UserError

NUMBER = "number"  # (2,) uint32, a record's part and place in its source, on its way through the loader


def numbered(parts: Sequence[MixturePart]) -> list[MixturePart]:
    """The same parts, whose records say under `NUMBER` which they are."""
    return [replace(part, source=_Numbered(part.source, number)) for number, part in enumerate(parts)]


class Position:
    """The order of the samples is made of the seed and the parts alone; a position is a number of whole batches."""

    def __init__(self, loader: Loader, parts: Sequence[MixturePart]):
        self._loader, self._parts = loader, parts

    def note(self) -> dict[str, Any]:
        """What a checkpoint keeps (JSON): the loader's state, a fingerprint of every part's source."""
        state, prints = self._loader.get_state(), [part.source.fingerprint for part in self._parts]
        samples = state["step"] * state["batch_size"]
        return {**state, "sources": prints, "samples": samples, "processes": jax.process_count()}

    def restore(self, note: dict[str, Any]) -> int:
        """Let the loader resume from there; the number of batches before. Another number of processes is no obstacle,
        and is reported.

        Raises:
            UserError: the note is of other records or of another order (both values are named).
        """
        self._loader.set_state(note)
        for part, before in zip(self._parts, note["sources"], strict=True):
            if part.source.fingerprint != before:
                raise UserError(
                    f"the data are not those of the checkpoint: the fingerprint of {part.source!r} was {before}, is "
                    f"{part.source.fingerprint}; with them this run would see some samples twice and others never"
                )
        if note["processes"] != jax.process_count() and jax.process_index() == 0:
            line = f"going on with {jax.process_count()} processes in place of {note['processes']}"
            print(f"{line}, from sample {note['samples']}", file=sys.stderr, flush=True)
        return note["step"]

    def places(self) -> np.ndarray:
        """(rows,) int32: the places in the global batch of this process's rows, as the loader deals them out."""
        return np.arange(jax.process_index(), self._loader.get_state()["batch_size"], jax.process_count(), np.int32)


class _Numbered:
    def __init__(self, source: Source, part: int):
        self._source, self._part = source, part

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self._source[index], NUMBER: np.array([self._part, index], np.uint32)}
