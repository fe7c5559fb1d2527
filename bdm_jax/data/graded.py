"""A set with grades beside its records: a folder that names the set and holds a line of grades for each record.

    grades.json     {"source": "the set", "fingerprint": ..., "graded": ..., "left_out": {cause: number}}
    grades.jsonl    line N is about record N: {"sharpness": 812.4, "level": 5}; {} for one that cannot be read

The pictures stay where they are.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from bdm_jax.data.source import Source
from bdm_jax.errors import UserError

SUMMARY, GRADES = "grades.json", "grades.jsonl"
COLUMNS = ("sharpness", "text_area", "aesthetic", "level")


class GradedSource:
    """The records of a source, with their grades (some of `COLUMNS`, in place of the record's own).

    Raises UserError where the grades are not the set's: it has changed since.
    """

    def __init__(self, source: Source, summary: Mapping[str, Any], lines: bytes, name: str):
        self._source, self._name = source, name
        if summary.get("fingerprint") != source.fingerprint:
            raise UserError(f"{name}: {source!r} has changed since it was graded: grade it again")
        try:
            self._grades = [json.loads(line) for line in lines.splitlines()]
        except ValueError as error:
            raise UserError(f"{name}/{GRADES}: not one JSON object per line ({error})") from error
        if len(self._grades) != len(source):
            raise UserError(f"{name}/{GRADES}: {len(self._grades)} lines for {len(source)} records: grade them again")
        self._digest = hashlib.sha256(lines).hexdigest()
        self.fingerprint = self._joined(source.fingerprint)[:16]

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        grades = self._grades[int(index)]
        return {**self._source[index], **{name: grades[name] for name in COLUMNS if name in grades}}

    def __getattr__(self, name: str) -> Any:
        """What the source says of itself, as `repeats`."""
        if name in ("repeats", "left_out"):
            return getattr(self._source, name)
        raise AttributeError(name)

    def contents(self) -> str:
        """See `Source`."""
        return self._joined(self._source.contents())[:32]

    def _joined(self, told: str) -> str:
        return hashlib.sha256(f"{told} {self._digest}".encode()).hexdigest()

    def __repr__(self) -> str:
        return f"GradedSource({self._source!r}, {self._name})"
