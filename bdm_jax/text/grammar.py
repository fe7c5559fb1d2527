"""Weights in prompts, in the notation of Stable Diffusion's web interfaces.

| form | effect |
|---|---|
| `(x)`, `(x:1.3)`, `[x]` | x times 1.1, times 1.3, divided by 1.1; nested factors multiply |
| `\\(` | a backslash makes a bracket, a colon or a backslash an ordinary character; before others it is dropped |
| `(x` | what is not closed lasts to the end, at its default factor |
| `x)` | what was not opened is an ordinary character |
| `BREAK` | on its own: what follows begins a new window |

Round and square brackets are matched apart from each other, so that `(a [b) c]` weighs b with both.
Full-width （ ） ［ ］ ： mean what the others do; 【 】 are ordinary characters.
"""

import re
from collections.abc import Iterator
from math import isclose
from typing import NamedTuple

FACTOR = 1.1
MAX_WEIGHT = 1e6  # weights end here, so that any nesting stays finite


class WeightedText(NamedTuple):
    """Text of one weight."""

    text: str
    weight: float


def parse(prompt: str, *, reference: bool = False) -> list[list[WeightedText]]:
    """A prompt -> the parts between its BREAKs (one, if there are none), each a list of segments.

    Neighbouring segments of a part differ in weight, and none is empty; a part without text has no segments. Takes
    time in proportion to the prompt, whatever it holds.

    Args:
      reference: read as BDM's reference implementation does: no full-width signs, no BREAK, no blanks around a weight,
        no escaped colon.
    """
    products = ([1.0], [1.0])  # of the round and of the square brackets open so far; the last entry is in force
    parts: list[list[tuple[list[str], float]]] = [[]]
    for item in _items(prompt, _REFERENCE if reference else _TOKEN, breaks=not reference):
        if isinstance(item, str):
            weight = _limit(products[0][-1] * products[1][-1])
            # Products of the same factors in another order may differ in their last digit.
            if parts[-1] and isclose(parts[-1][-1][1], weight, rel_tol=1e-9):
                parts[-1][-1][0].append(item)
            else:
                parts[-1].append(([item], weight))
        elif isinstance(item, _Open):
            stack = products[item.square]
            stack.append(_limit(stack[-1] * item.factor))
        elif isinstance(item, _Close):
            products[item.square].pop()
        else:
            parts.append([])
    return [[WeightedText("".join(texts), weight) for texts, weight in part] for part in parts]


_NUMBER = r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)"  # after any start of a match, there is one way to match: no backtracking
_TOKEN = re.compile(
    rf"""\\(?P<escaped>[()\[\]:\\（）［］：])
    | (?P<open>[(（\[［])
    | [:：]\s*(?P<weight>{_NUMBER})\s*[)）]
    | (?P<close>[)）\]］])
    | (?P<text>[^\\()\[\]:（）［］：]+)
    | .""",
    re.VERBOSE | re.DOTALL,
)
_REFERENCE = re.compile(
    rf"""\\(?P<escaped>[()\[\]\\])
    | (?P<open>[(\[])
    | :(?P<weight>{_NUMBER})\)
    | (?P<close>[)\]])
    | (?P<text>[^\\()\[\]:]+)
    | .""",
    re.VERBOSE | re.DOTALL,
)
# Chinese has no blanks between words: BREAK may touch its characters, but no part of a Latin word.
_BREAK = re.compile(r"(?<![A-Za-z0-9_'-])BREAK(?![A-Za-z0-9_'-])")
_SQUARE = "[]［］"


class _Open:
    """An opening bracket; what closes it sets its factor."""

    def __init__(self, square: bool):
        self.square, self.factor = square, 1 / FACTOR if square else FACTOR


class _Close(NamedTuple):
    """The end of the innermost open bracket of its kind."""

    square: bool


def _items(prompt: str, token: re.Pattern, breaks: bool) -> Iterator[str | _Open | _Close | None]:
    """Texts, brackets that have their factors, and None for a BREAK."""
    items: list[str | _Open | _Close | None] = []
    opened: tuple[list[_Open], list[_Open]] = ([], [])
    for match in token.finditer(prompt):
        kind, text = match.lastgroup, match[0]
        square = text in _SQUARE
        if kind == "open":
            items.append(_Open(square))
            opened[square].append(items[-1])
        elif kind in ("close", "weight") and opened[square]:
            bracket = opened[square].pop()
            if kind == "weight":
                bracket.factor = _limit(float(match["weight"]))
            items.append(_Close(square))
        elif kind == "text" and breaks:
            for index, part in enumerate(_BREAK.split(text)):
                items += [None] * (index > 0) + [part] * bool(part)
        elif text != "\\":
            items.append(match["escaped"] or text)
    return iter(items)


def _limit(weight: float) -> float:
    return max(-MAX_WEIGHT, min(MAX_WEIGHT, weight))
