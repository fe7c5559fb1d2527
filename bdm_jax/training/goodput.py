"""Goodput: the share of a run's wall time, over all its sessions, that was spent in steps whose result it kept."""

import json
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bdm_jax.paths import atomic_file

FILE = "goodput.jsonl"


class Goodput:
    """The account of a run in its folder, a line for each session's beginning and for each line of its metrics:

        {"from": 500}                                            a session goes on from step 500
        {"step": 520, "seconds": {"start": 41.2, "step": 9.3}}   where the time since the last line went

    Nothing is ever taken out of it, so that steps which a killed session took after its last checkpoint stay there.
    """

    def __init__(self, folder: Path, start: int):
        self._path, self._rows = folder / FILE, _read(folder / FILE)
        self._rows.append({"from": start})
        with atomic_file(self._path) as file:  # whole lines only: a killed session may have left half a one
            file.write("".join(json.dumps(row) + "\n" for row in self._rows).encode("utf-8"))

    def add(self, step: int, seconds: dict[str, float]) -> float:
        """Note where the time has gone since the last call, up to this step; the share of all sessions."""
        self._rows.append({"step": step, "seconds": {cause: round(value, 3) for cause, value in seconds.items()}})
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(self._rows[-1]) + "\n")
        return share(spent(self._rows))


def spent(rows: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Seconds by cause over all sessions. "step" are those of the steps that the run kept, "lost" those of steps that
    a later session took again.
    """
    causes, steps = defaultdict(float), []  # of steps: first and last, seconds
    at = 0
    for row in rows:
        if "from" in row:
            at, kept = row["from"], []
            for first, last, seconds in steps:
                again = min(max(last - max(first, at), 0) / (last - first), 1.0)
                causes["lost"] += again * seconds
                if again < 1:
                    kept.append((first, min(last, at), (1 - again) * seconds))
            steps = kept
            continue
        for cause, seconds in row["seconds"].items():
            if cause == "step" and row["step"] > at:
                steps.append((at, row["step"], seconds))
            else:  # after the last step there is the rest of a session
                causes["end" if cause == "step" else cause] += seconds
        at = row["step"]
    return {**causes, "step": sum(seconds for *_, seconds in steps)}


def share(causes: dict[str, float]) -> float:
    """The goodput of what `spent` returns, in [0, 1]."""
    return causes["step"] / max(sum(causes.values()), 1e-9)


def read(folder: Path) -> dict[str, float]:
    """`spent` of a run's folder."""
    return spent(_read(folder / FILE))


def _read(path: Path) -> list[dict[str, Any]]:
    """The lines that were written whole."""
    lines = path.read_text("utf-8").splitlines() if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("}")]
