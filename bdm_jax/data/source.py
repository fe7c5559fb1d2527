"""What a source of records is, what every record looks like, and how those that cannot be used are counted."""

import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from bdm_jax.errors import BadRecord, UserError

_CAPTIONS = ("captions", "txt", "text", "caption")
_ENOUGH = 1000  # samples: before so many are seen, a rate says little
_SHOWN = 3


class Source(Protocol):
    """Random access to records: `len(source)`, `source[i] -> dict`.

    A record holds `key` (its name within the source), `image` (encoded bytes) or `moments` (h,w,2C), `captions`
    (list of str) and whatever else is told of it; `width` and `height` where the source tells them. `source[i]` raises
    `BadRecord` for a record that is damaged, and OSError where the storage fails.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...


class Skips:
    """Counts, by cause, the records that were left out; ends the run when they are too many.

    Args:
        rate: share of all samples that may be left out. Ten in the first thousand are within a rate of 0.01, whenever
            they come.
        log: a file that gets one line of JSON per record left out (record, cause, message).
    """

    def __init__(self, rate: float = 0.01, log: Path | None = None):
        self.rate, self.log = rate, log
        self.seen = 0
        self.names: dict[str, list[str]] = {}  # cause -> the first few
        self.counts: dict[str, int] = {}
        self._lock = threading.Lock()

    def good(self) -> None:
        """One sample was used."""
        with self._lock:
            self.seen += 1

    def bad(self, error: BadRecord) -> None:
        """One record was left out. Raises UserError, one line, if those are now more than the rate allows."""
        with self._lock:
            self.seen += 1
            self.counts[error.cause] = self.counts.get(error.cause, 0) + 1
            names = self.names.setdefault(error.cause, [])
            if len(names) < _SHOWN and error.name not in names:
                names.append(error.name)
            if self.log is not None:
                line = {"record": error.name, "cause": error.cause, "message": str(error)}
                with self.log.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
            if self.total > self.rate * max(self.seen, _ENOUGH):
                raise UserError(f"more than {self.rate:.2%} of the records cannot be used: {self}")

    @property
    def total(self) -> int:
        """Records left out so far."""
        return sum(self.counts.values())

    def __str__(self) -> str:
        parts = (f"{count} {cause} ({', '.join(self.names[cause])})" for cause, count in sorted(self.counts.items()))
        return f"{self.total} of {self.seen} left out: " + "; ".join(parts) if self.counts else "none left out"


def make_record(key: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Values from any source -> a record: its texts under `captions` as well, without repetition.

    Raises:
        BadRecord: a caption that is no text.
    """
    captions: list[str] = []
    for name in _CAPTIONS:
        if values.get(name) is not None:
            captions += _texts(key, values[name])
    rest = {name: value for name, value in values.items() if name not in _CAPTIONS}
    return {**rest, "key": key, "captions": list(dict.fromkeys(text for text in captions if text))}


def parse_json(name: str, data: bytes) -> dict[str, Any]:
    """A JSON object that nobody has checked. Raises BadRecord."""
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BadRecord(name, "broken metadata", f"the metadata cannot be read ({error})") from error
    if not isinstance(values, dict):
        raise BadRecord(name, "broken metadata", "the metadata is no JSON object")
    return values


def parse_text(name: str, data: bytes) -> str:
    """A caption in UTF-8, stripped. Raises BadRecord."""
    try:
        return data.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise BadRecord(name, "broken metadata", f"the caption is not UTF-8 ({error})") from error


def _texts(name: str, value: Any) -> list[str]:
    if isinstance(value, str):
        return [value.strip()]
    if isinstance(value, dict) and "text" in value:  # how TFDS keeps a sequence of captions with their ids
        value = value["text"]
    if isinstance(value, list) and all(isinstance(text, str) for text in value):
        return [text.strip() for text in value]
    raise BadRecord(name, "broken metadata", f"a caption is {type(value).__name__}, not text")
