"""Grade a set: `python -m bdm_jax.data.grade SOURCE OUT [--votes FILE ...]`; OUT is then a set with the grades beside.

Prints how many records would be left by limits on the grades, and how many each limit drops; with the same flags
`bdm_jax.data.prepare`, `bdm_jax.latents.precompute` and whatever else selects records leave those out.
"""

import importlib
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from bdm_jax import command_line
from bdm_jax.data.graded import GRADES, SUMMARY
from bdm_jax.data.grading import LEVELS, Grader, read_votes
from bdm_jax.data.records import open_source
from bdm_jax.data.select import Filters
from bdm_jax.data.source import Source
from bdm_jax.data.threads import map_ahead
from bdm_jax.errors import BadRecord, UserError
from bdm_jax.formats.files import write_json
from bdm_jax.paths import atomic_file


@dataclass(frozen=True)
class GradeArgs:
    """Grade a set's pictures."""

    source: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")]
    """records, of any kind that is trained on"""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """folder for the grades; a set itself, of the same records"""
    votes: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """csv with the columns key and level (1 to 5), three rows for each record"""
    text: Annotated[str | None, tyro.conf.arg(metavar="MODULE:FUNCTION")] = None
    """a detector of text: (H,W,3) uint8 -> boxes (left, top, right, bottom)"""
    aesthetic_model: Annotated[str | None, tyro.conf.arg(metavar="MODULE:FUNCTION")] = None
    """a model of aesthetics: (H,W,3) uint8 -> score; without it, the set's own column counts"""
    threads: int = 4
    """records graded at a time"""
    filters: Filters = Filters()


def grade(source: Source, grader: Grader, threads: int = 4, filters: Filters | None = None) -> "Grades":
    """Grade every record once. Raises UserError for votes that are not valid."""
    filters, found = filters or Filters(), Grades([], Counter(), Counter())

    def one(index: int) -> tuple[dict[str, Any], str]:
        try:
            record = source[index]
            grades = grader(record)
        except BadRecord as error:
            return {}, error.cause
        try:
            filters.apply({**record, **grades})
        except BadRecord as error:
            return grades, error.cause
        return grades, ""

    for grades, cause in map_ahead(one, range(len(source)), threads):
        found.rows.append(grades)
        if cause:
            found.left_out[cause] += 1
        if "level" in grades:
            found.levels[grades["level"]] += 1
    return found


@dataclass(frozen=True)
class Grades:
    """rows: each record's grades, {} where it cannot be read. left_out: cause -> records that the filters would leave
    out. levels: level -> records.
    """

    rows: list[dict[str, Any]]
    left_out: Counter[str]
    levels: Counter[int]


def main(args: Sequence[str] | None = None) -> int:
    """Write the grades and print the counts; 2 after bad input (one line on stderr)."""
    return command_line.run(lambda: _grade(command_line.parse(GradeArgs, args, prog="python -m bdm_jax.data.grade")))


def _grade(asked: GradeArgs) -> None:
    source = open_source(asked.source)
    votes = {} if asked.votes is None else read_votes(asked.votes)
    text = _function("--text", asked.text)
    aesthetic = _function("--aesthetic-model", asked.aesthetic_model)
    found = grade(source, Grader(text, aesthetic, votes), asked.threads, asked.filters)
    with atomic_file(asked.out / GRADES) as file:
        file.write("".join(f"{json.dumps(row)}\n" for row in found.rows).encode())
    graded = sum(map(bool, found.rows))
    where = asked.source if "://" in asked.source else os.path.abspath(asked.source)  # it is opened from anywhere
    summary = {"source": where, "fingerprint": source.fingerprint, "graded": graded}
    write_json(asked.out / SUMMARY, {**summary, "left_out": dict(sorted(found.left_out.items()))})
    print(f"{graded} of {len(source)} records graded in {asked.out}")
    for level in sorted(found.levels):
        print(f"level {level}: {found.levels[level]:8}  {LEVELS[level]}")
    kept, dropped = len(source) - found.left_out.total(), sorted(found.left_out.items())
    print(f"{kept} pass" + ("; left out: " + ", ".join(f"{n} {cause}" for cause, n in dropped) if dropped else ""))


def _function(flag: str, name: str | None) -> Callable[..., Any] | None:
    """The function that a flag names. Raises UserError where there is none."""
    if name is None:
        return None
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"{flag} {name}: no such function, it must be MODULE:FUNCTION ({error})") from error


if __name__ == "__main__":
    sys.exit(main())
