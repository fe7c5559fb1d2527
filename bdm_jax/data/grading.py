"""How good pictures are, as numbers: what Kolors chooses the pictures of its second phase by.

First what can be measured (resolution, sharpness, text, aesthetics), then what people judge: three of them give every
picture a level, and the majority counts. `python -m bdm_jax.data.grade` writes both beside a set's records, and
`select.Filters` chooses by them.
"""

import csv
import io
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from bdm_jax.data.select import aesthetic_score
from bdm_jax.errors import UserError
from bdm_jax.formats.plain_text import decode_text
from bdm_jax.images.decode import decode_image, read_bytes

LEVELS = {
    1: "unsafe",
    2: "marks of processing: a watermark, a border, parts stitched together",
    3: "faults of the capture: blurred, badly exposed, without a subject",
    4: "a plain picture without faults",
    5: "a picture of high aesthetic quality",
}
VOTES = 3  # for each picture
_COLUMNS = ("key", "level")
_MAX_VOTES = 1 << 30  # bytes of a file of votes

Pixels = np.ndarray  # (H,W,3) uint8
Boxes = Sequence[Sequence[float]]  # left, top, right, bottom in pixels


def vote(levels: Sequence[int]) -> int:
    """The level that most people gave; of those that equally many gave, the lowest: a fault that one in three has seen
    is not outvoted by two who disagree.

    Raises UserError for levels that are none of `LEVELS`, or not `VOTES` of them.
    """
    if len(levels) != VOTES or not set(levels) <= set(LEVELS):
        raise UserError(f"votes {list(levels)}: give {VOTES}, each from {min(LEVELS)} to {max(LEVELS)}")
    counts = Counter(levels)
    return min(counts, key=lambda level: (-counts[level], level))


def sharpness(pixels: Pixels) -> float:
    """The variance of the Laplacian of the grey values (Pech-Pacheco et al. 2000), which blur makes small.

    Of values from 0 to 255, with the kernel of four neighbours. It depends on the size of a picture: compare pictures
    of similar resolution.
    """
    return float(cv2.Laplacian(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY), cv2.CV_64F).var())


def text_area(size: tuple[int, int], boxes: Boxes) -> float:
    """The share (0 .. 1) of a picture (height, width) that lies in at least one box of text."""
    covered = np.zeros(size, bool)
    for left, top, right, bottom in boxes:
        covered[max(0, round(top)) : max(0, round(bottom)), max(0, round(left)) : max(0, round(right))] = True
    return float(covered.mean())


@dataclass(frozen=True)
class Grader:
    """A record -> its grades, as columns that `select.Filters` knows.

    text: pixels -> boxes of text; None measures no text. aesthetic: pixels -> a score; None leaves the record's own
    column. votes: levels by key.
    """

    text: Callable[[Pixels], Boxes] | None = None
    aesthetic: Callable[[Pixels], float] | None = None
    votes: Mapping[str, Sequence[int]] = field(default_factory=dict)

    def __call__(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Raises BadRecord for an image that cannot be read, UserError for votes that are not valid."""
        pixels = decode_image(record["image"], name=record["key"])
        found: dict[str, Any] = {"sharpness": sharpness(pixels)}
        if self.text is not None:
            found["text_area"] = text_area(pixels.shape[:2], self.text(pixels))
        score = aesthetic_score(record) if self.aesthetic is None else float(self.aesthetic(pixels))
        if score is not None:
            found["aesthetic"] = score
        if record["key"] in self.votes:
            try:
                found["level"] = vote(self.votes[record["key"]])
            except UserError as error:
                raise UserError(f"{record['key']}: {error}") from error
        return found


def read_votes(path: Path) -> dict[str, list[int]]:
    """A csv file with the columns key and level, one row for each vote -> levels by key.

    Raises UserError, naming the file and the row, for other columns or a level that is none.
    """
    text = decode_text(read_bytes(path, _MAX_VOTES, "file of votes"), str(path))
    rows, votes = csv.DictReader(io.StringIO(text, newline="")), {}
    if missing := [name for name in _COLUMNS if name not in (rows.fieldnames or ())]:
        raise UserError(f"{path}: its first row must name the columns key and level; {missing[0]} is missing")
    for row in rows:
        try:
            level = int(row["level"])
        except (TypeError, ValueError):
            level = None
        if level not in LEVELS:
            raise UserError(f"{path}, line {rows.line_num}: level {row['level']!r} is none of 1 to {max(LEVELS)}")
        votes.setdefault(row["key"], []).append(level)
    return votes
