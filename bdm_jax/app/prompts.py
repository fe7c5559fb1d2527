"""Prompts from a file that a person wrote: text, CSV, JSON lines, or the list that BDM's authors publish. No JAX."""

import csv
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from bdm_jax.errors import UserError, unknown
from bdm_jax.formats.plain_text import decode_text, wrong_separator
from bdm_jax.images.decode import read_bytes
from bdm_jax.sampling.settings import ANY_SEED, Request

MAX_BYTES = 1 << 26
COLUMNS = ("prompt", "negative", "english", "english_negative", "seed", "image", "mask")
_FILES = ("image", "mask")
_BDM_FIELDS = 7  # file name, Chinese, English, long Chinese, long English, kind, category


class Row(NamedTuple):
    """One row: its number, from 1, what to draw, and whether it names a seed of its own."""

    number: int
    request: Request
    own_seed: bool


def read_prompts(path: str | Path, defaults: Request | None = None, *, english: bool = False) -> list[Row]:
    """The rows of a prompt file, by the end of its name:

      .txt    a prompt on each line; empty lines and those that begin with # are left out
      .csv    a first line that names some of COLUMNS, then a row on each line
      .jsonl  on each line an object with some of COLUMNS as keys
      .json   a list of lists of seven strings, as BDM_870.json: the second is the prompt

    Args:
      defaults: what rows that lack something have.
      english: from .json take the English translation (the third) instead, for a bare backbone.

    Paths of images and masks are relative to the file's folder. Encodings are those of `formats.plain_text`.
    Raises UserError that names file and line.
    """
    path = Path(path)
    readers = {".txt": _text, ".csv": _csv, ".jsonl": _jsonl, ".json": _bdm}
    if path.suffix.lower() not in readers:
        raise unknown("kind of prompt file", path.suffix or path.name, readers)
    text = decode_text(read_bytes(path, MAX_BYTES, "file of prompts"), str(path))
    found = readers[path.suffix.lower()](path, text)
    rows = []
    for number, (line, values) in enumerate(found, 1):
        if english and "translation" in values:
            values["prompt"] = values["translation"]
        rows.append(_row(number, f"{path}, line {line}", values, defaults or Request(""), path.parent))
    if not rows:
        raise UserError(f"{path}: no prompts in it")
    return rows


_Found = Iterator[tuple[int, dict[str, Any]]]  # line, values by column


def _text(path: Path, text: str) -> _Found:
    for line, prompt in enumerate(io.StringIO(text, newline=None), 1):
        if prompt.strip() and not prompt.lstrip().startswith("#"):
            yield line, {"prompt": prompt.strip()}


def _csv(path: Path, text: str) -> _Found:
    for line, header in enumerate(io.StringIO(text, newline=None), 1):
        if header := header.strip():
            if found := wrong_separator(header):
                raise UserError(f"{path}, line {line}: columns are separated by commas; this file has {found}")
            break
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    columns: list[str] = []
    try:
        for cells in reader:
            cells = [cell.strip() for cell in cells]
            if not any(cells):
                continue
            if not columns:
                columns = cells
                _known(f"{path}, line {reader.line_num}", columns)
                continue
            if len(cells) > len(columns):
                raise UserError(f"{path}, line {reader.line_num}: {len(cells)} cells for {len(columns)} columns")
            yield reader.line_num, {name: cell for name, cell in zip(columns, cells, strict=False) if cell}
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: {error}") from error


def _jsonl(path: Path, text: str) -> _Found:
    for line, content in enumerate(io.StringIO(text, newline=None), 1):
        if not content.strip():
            continue
        where = f"{path}, line {line}"
        values = _json(where, content.strip())
        if not isinstance(values, dict):
            raise UserError(f"{where}: not an object in braces")
        _known(where, list(values))
        yield line, {name: value for name, value in values.items() if value is not None}


def _bdm(path: Path, text: str) -> _Found:
    rows = _json(str(path), text)
    if not isinstance(rows, list):
        raise UserError(f"{path}: not a list of lists, as BDM_870.json is; use .jsonl for objects")
    lines = _starts(text)
    for number, row in enumerate(rows, 1):
        line = next(lines, number)
        if not isinstance(row, list) or len(row) != _BDM_FIELDS or not all(isinstance(field, str) for field in row):
            raise UserError(f"{path}, line {line}: entry {number} is not a list of {_BDM_FIELDS} strings")
        yield line, {"prompt": row[1].strip(), "translation": row[2].strip()}


def _starts(text: str) -> Iterator[int]:
    """The lines on which the entries of a list of lists of strings begin."""
    line, depth, inside, escaped = 1, 0, False, False
    for character in text:
        if character == "\n":
            line += 1
        if inside:
            inside, escaped = escaped or character != '"', character == "\\" and not escaped
        elif character == '"':
            inside = True
        elif character == "[":
            depth += 1
            if depth == 2:
                yield line
        elif character == "]":
            depth -= 1


def _json(where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f", line {error.lineno}" if error.lineno > 1 else ""
        raise UserError(f"{where}{line}: not JSON ({error.msg})") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON that can be read ({error})") from error


def _known(where: str, columns: list[str]) -> None:
    for name in columns:
        if name not in COLUMNS:
            error = unknown("column", name, COLUMNS)
            raise UserError(f"{where}: {error}")
        if columns.count(name) > 1:
            raise UserError(f"{where}: column {name!r} is there twice")


def _row(number: int, where: str, values: Mapping[str, Any], defaults: Request, folder: Path) -> Row:
    given: dict[str, Any] = {}
    for name in COLUMNS:
        if name not in values:
            continue
        value = values[name]
        if name == "seed":
            given[name] = _seed(where, value)
        elif not isinstance(value, str):
            raise UserError(f"{where}: {name} is {str(value)[:80]!r}, not a string")
        elif name in _FILES:
            given[name] = folder / value
            if not given[name].is_file():
                raise UserError(f"{where}: {name} {given[name]}: no such file")
        else:
            given[name] = value
    request = replace(defaults, **given)
    if not (request.prompt.strip() or request.english.strip()):
        raise UserError(f"{where}: no prompt")
    if request.mask is not None and request.image is None:
        raise UserError(f"{where}: a mask without an image")
    return Row(number, request, "seed" in given)


def _seed(where: str, value: Any) -> int:
    digits = str(value) if isinstance(value, str | int) and not isinstance(value, bool) else ""
    if digits == str(ANY_SEED):
        return ANY_SEED
    if not (digits.isdecimal() and len(digits) < 20 and int(digits) < 2**32):
        raise UserError(f"{where}: seed {str(value)[:40]!r} is no number in 0 .. 2**32 - 1, nor -1 for any")
    return int(digits)
