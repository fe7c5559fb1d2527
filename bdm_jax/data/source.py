"""What a source of records is, what a record contains, and how unusable records are counted."""

import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from bdm_jax.errors import BadRecord, FileError, UserError
from bdm_jax.formats.plain_text import decode_text

CAPTIONS = ("captions", "txt", "text", "caption")
_MIN_SEEN = 1000  # samples; below this number a rate is not meaningful
_NAMES_SHOWN = 3


class Source(Protocol):
    """Random access to records: `len(source)`, `source[i] -> dict`.

    A record holds `key` (its name within the source), `image` (encoded bytes) or `moments` (h,w,2C), `captions`
    (list of str), and any further metadata of the source, such as `width` and `height`. `source[i]` raises `BadRecord`
    for a damaged record and OSError if the storage fails. `fingerprint` tells one set from another by names and sizes;
    `contents()` reads the files (see `contents.digest_files`).
    """

    fingerprint: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...

    def contents(self) -> str: ...


class Skips:
    """Counts skipped records by cause, and ends the run when there are too many.

    Args:
        rate: fraction of samples that may be skipped, taken of at least 1000 samples: a rate of 0.01 always allows ten.
        log: file to which one line of JSON per skipped record is appended (record, cause, message).
    """

    def __init__(self, rate: float = 0.01, log: Path | None = None):
        self.rate, self.log = rate, log
        self.seen = 0
        self.names: dict[str, list[str]] = {}  # cause -> the first few
        self.counts: dict[str, int] = {}
        self._lock = threading.Lock()

    def good(self) -> None:
        """Count one sample that was used."""
        with self._lock:
            self.seen += 1

    def bad(self, error: BadRecord) -> None:
        """Count one skipped record. Raises UserError if there are now more than the rate allows."""
        with self._lock:
            self.seen += 1
            self.counts[error.cause] = self.counts.get(error.cause, 0) + 1
            names = self.names.setdefault(error.cause, [])
            if len(names) < _NAMES_SHOWN and error.name not in names:
                names.append(error.name)
            if self.log is not None:
                line = {"record": error.name, "cause": error.cause, "message": str(error)}
                with self.log.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
            if self.total > self.rate * max(self.seen, _MIN_SEEN):
                raise UserError(f"more than {self.rate:.2%} of the records cannot be used: {self}")

    @property
    def total(self) -> int:
        """Number of records skipped so far."""
        return sum(self.counts.values())

    def __str__(self) -> str:
        parts = (f"{count} {cause} ({', '.join(self.names[cause])})" for cause, count in sorted(self.counts.items()))
        return f"{self.total} of {self.seen} left out: " + "; ".join(parts) if self.counts else "none left out"


def make_record(key: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Values from any source -> a record, with all of its caption texts under `captions`, without duplicates.

    Raises:
        BadRecord: a caption is not text.
    """
    captions: list[str] = []
    for name in CAPTIONS:
        if values.get(name) is not None:
            captions += _texts(key, values[name])
    rest = {name: value for name, value in values.items() if name not in CAPTIONS}
    return {**rest, "key": key, "captions": list(dict.fromkeys(text for text in captions if text))}


def parse_json(name: str, data: bytes) -> dict[str, Any]:
    """Parse an untrusted JSON object. Raises BadRecord."""
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadRecord(name, "invalid metadata", f"the metadata is not valid JSON ({error})") from error
    if not isinstance(values, dict):
        raise BadRecord(name, "invalid metadata", "the metadata is not a JSON object")
    return values


def parse_text(name: str, data: bytes, noted_as: str) -> str:
    """Decode a caption (see `plain_text.decode_text`; `noted_as` is its set) and strip it. Raises BadRecord."""
    try:
        return decode_text(data, name, noted_as).strip()
    except FileError as error:
        raise BadRecord(name, "invalid metadata", f"the caption cannot be read ({error})") from error


def _texts(name: str, value: Any) -> list[str]:
    if isinstance(value, str):
        return [value.strip()]
    if isinstance(value, dict) and "text" in value:  # TFDS's form of a sequence of captions with ids
        value = value["text"]
    if isinstance(value, list) and all(isinstance(text, str) for text in value):
        return [text.strip() for text in value]
    raise BadRecord(name, "invalid metadata", f"a caption is {type(value).__name__}, not text")
