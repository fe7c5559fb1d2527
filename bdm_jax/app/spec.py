"""How plug-ins are named on the command line; read before JAX is loaded.

Paths and settings share a text, and file names may hold the commas, colons and equals signs between them: **the
longest path that exists wins**, as in `a,b.png` or `C:/x:1.safetensors`. Where none exists, the signs mean what they
usually do, and the paths may be names on a hub (OWNER/NAME, OWNER/NAME:FILE) or links; numbers after a `:` at the end
are strengths, what is left of them is the name. A link with a `?` is one name down to its end, `=` included.
"""

import math
import os.path
from collections.abc import Callable, Collection, Iterator
from itertools import combinations, pairwise
from pathlib import Path

from bdm_jax.errors import UserError, unknown
from bdm_jax.formats.hub import is_link, is_remote
from bdm_jax.plugins.spec import Spec

Place = Path | str  # of a model or plug-in: a text where it is a link, which is no path
_MAX_PIECES = 40  # between commas; a path with more of them is not looked for
_CONTROL = ("NETWORK", "MAP"), {"strength": "1", "start": "0", "end": "1", "from": "canny"}
_IMAGE_PROMPT = ("ADAPTER", "VISION", "PICTURE"), {"strength": "1"}


def parse_spec(text: str) -> Spec:
    """`FILE`, `FILE:0.8` or `FILE:0.8:0.5`: strength in the UNet or branch, strength in its text encoder (the same).

    Numbers are read from the end, what is left is the path, colons included. Raises UserError.
    """
    path, strengths = _strengths(text)
    strength, text_strength = (strengths + strengths + [1.0, 1.0])[:2]
    return Spec(_place(path), strength, text_strength)


def parse_blend(text: str) -> tuple[Place, Place | None, float]:
    """`OTHER:0.3` or `OTHER,BASE:0.3` -> the models and the weight. Raises UserError."""
    models, value = _blend(text)
    return _place(models[0]), _place(models[1]) if models[1:] else None, value


def parse_embedding(text: str) -> tuple[Place, str | None]:
    """`FILE` or `FILE=TOKEN`, where the token is to be another than the file's own. Raises UserError."""
    path = _before_token(text)
    return _place(path), text[len(path) + 1 :] or None


def parse_control(text: str) -> tuple[Place, Path, dict[str, str | float]]:
    """`NETWORK,MAP[,strength=0.8][,start=0][,end=0.6][,from=canny]` -> the two paths and what is set.

    A ControlNet and its map, or a T2I-Adapter. Raises UserError for what is no such setting, or no number where one is
    needed.
    """
    (network, image), settings = _parse("control", text, *_CONTROL)
    return _place(network), Path(image), _values("control", text, settings, _CONTROL[1])


def parse_image_prompt(text: str) -> tuple[Place, Place, Path, dict[str, float]]:
    """`ADAPTER,VISION,PICTURE[,strength=0.7]` -> the three paths and what is set. Raises UserError likewise."""
    paths, settings = _parse("image prompt", text, *_IMAGE_PROMPT)
    adapter, vision, picture = paths
    return _place(adapter), _place(vision), Path(picture), _values("image prompt", text, settings, _IMAGE_PROMPT[1])


def rewritten(flag: str, text: str, change: Callable[[str, int], str]) -> str:
    """The value of a flag of plug-ins with other paths. change: a path, and which of them it is -> what replaces it."""
    if flag in ("control", "adapter", "image_prompt"):
        paths, rest = _parse(flag, text, *(_IMAGE_PROMPT if flag == "image_prompt" else _CONTROL))
        return ",".join([*(change(path, i) for i, path in enumerate(paths)), *rest])
    if flag == "blend":
        return ",".join(change(path, i) for i, path in enumerate(_blend(text)[0])) + ":" + text.rpartition(":")[2]
    path = _before_token(text) if flag.endswith("embedding") else _strengths(text)[0]
    return change(path, 0) + text[len(path) :]


def _place(text: str) -> Place:
    return text if is_link(text) else Path(text)


def _strengths(text: str) -> tuple[str, list[float]]:
    path, strengths = text, []
    while not _exists(path) and len(strengths) < 2 and ":" in path:
        before, _, last = path.rpartition(":")
        if (number := _number(last)) is None:
            if _exists(before):
                raise UserError(f"{text!r}: {last!r} is not a number; write it as FILE:STRENGTH[:TEXT_STRENGTH]")
            break
        path, strengths = before, [number, *strengths]
    if not path or not all(map(math.isfinite, strengths)):
        raise UserError(f"{text!r}: write it as FILE, FILE:STRENGTH or FILE:STRENGTH:TEXT_STRENGTH, numbers finite")
    return path, strengths


def _before_token(text: str) -> str:
    ends = [i for i, letter in enumerate(text) if letter == "="]
    found = (text[:end] for end in (len(text), *ends[::-1][:_MAX_PIECES]) if _exists(text[:end]))
    path = next(found, text if is_link(text) and "?" in text else text.partition("=")[0])
    if not path or text[len(path) :] == "=":
        raise UserError(f"embedding {text!r}: write it as FILE, or FILE=TOKEN")
    return path


def _blend(text: str) -> tuple[list[str], float]:
    paths, _, weight = text.rpartition(":")
    pieces, value = paths.split(","), _number(weight)
    splits = [(",".join(pieces[:end]), ",".join(pieces[end:])) for end in _ends(pieces, _exists)]
    whole = (split for split in splits if not split[1] or _exists(split[1]))
    other, base = next(whole, splits[0] if splits else paths.partition(",")[::2])
    if not other or value is None or not math.isfinite(value):
        raise UserError(f"blend {text!r}: write it as MODEL:WEIGHT, or MODEL,BASE:WEIGHT to add a difference")
    return [other, base] if base else [other], value


def _parse(what: str, text: str, names: tuple[str, ...], settings: dict[str, str]) -> tuple[list[str], list[str]]:
    """As many paths as there are names, and the settings, which may stand anywhere behind the first."""
    pieces = text.split(",")
    for there in (_exists, _may_be):
        if (found := _placed(pieces, len(names), settings, there)) and all("=" in piece for piece in found[1]):
            return found
    paths, rest = [pieces[0]], []
    for piece in pieces[1:]:
        (rest if "=" in piece else paths).append(piece)
    if len(paths) == len(names) and all(paths):
        return paths, rest
    if lost := _missing(paths, len(names)):
        raise UserError(f"{lost}: no such file or folder")
    more = "".join(f"[,{key}={value}]" for key, value in settings.items())
    lost = "; no files of these names are there" if len(paths) > len(names) else ""
    raise UserError(f"{what.replace('_', ' ')} {text!r}: write it as {','.join(names)}{more}{lost}")


def _missing(pieces: list[str], count: int) -> str | None:
    """The only one of so many paths that does not exist, the shortest; None where more are missing."""
    if not count < len(pieces) <= _MAX_PIECES:
        return None
    found = []
    for ends in combinations(range(1, len(pieces)), count - 1):
        cuts = pairwise((0, *ends, len(pieces)))
        lost = [path for path in (",".join(pieces[begin:end]) for begin, end in cuts) if not _exists(path)]
        found += lost if len(lost) == 1 else []
    return min(found, key=len, default=None)


def _placed(
    pieces: list[str], count: int, settings: Collection[str], there: Callable[[str], bool]
) -> tuple[list[str], list[str]] | None:
    """So many existing paths, each the longest that leaves the others theirs, and the pieces that are none.

    Only settings come between paths; None where paths are missing.
    """
    if count == 0:
        return [], pieces
    for end in _ends(pieces, there):
        skipped = 0
        while True:
            if found := _placed(pieces[end + skipped :], count - 1, settings, there):
                return [",".join(pieces[:end]), *found[0]], [*pieces[end : end + skipped], *found[1]]
            if end + skipped >= len(pieces) or pieces[end + skipped].partition("=")[0] not in settings:
                break
            skipped += 1
    return None


def _ends(pieces: list[str], there: Callable[[str], bool]) -> Iterator[int]:
    """How many pieces make a path that is there, the longest first."""
    return (end for end in range(min(len(pieces), _MAX_PIECES), 0, -1) if there(",".join(pieces[:end])))


def _values(what: str, text: str, given: list[str], settings: dict[str, str]) -> dict[str, str | float]:
    """`settings` has an example of each."""
    values: dict[str, str | float] = {}
    for piece in given:
        key, equals, value = piece.partition("=")
        if key not in settings or not equals:
            raise unknown(f"setting of {'an' if what[0] == 'i' else 'a'} {what}", key, settings)
        number = _number(value)
        if key != "from" and number is None:
            raise UserError(f"{what} {text!r}: {key}={value} is not a number")
        values[key] = value if key == "from" else number
    return values


def _exists(path: str) -> bool:
    return bool(path) and os.path.exists(path)


def _may_be(path: str) -> bool:
    """Whether it exists, or has the form of what lies elsewhere."""
    return _exists(path) or is_remote(path)


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
