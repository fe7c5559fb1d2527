"""Prompts that change from step to step, and prompts that are several, in the notation of Stable Diffusion's web UIs.

| form | effect |
|---|---|
| `[a:b:0.4]`, `[a:b:10]` | a, then b: after that fraction of the steps (a number below 1), or after so many steps |
| `[a:0.4]`, `[a::0.4]` | a from there on, a until there |
| `[a|b]` | a and b in turn, step by step; any number of texts, of which some may be empty |
| `a AND b :1.2` | texts guided by each on its own, with weights (1 where none is given); see `compose` |

They nest, also with the brackets of `grammar`, which reads the texts that are left; a backslash makes each sign an
ordinary character, and full-width ［ ］ ： ｜ mean what the others do. `[a]` and `[a:b]` are a weight. AND is a word of
its own, in upper case, and splits first.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from bdm_jax.errors import UserError, short

MAX_PARTS = 16  # predictions of one prompt
_MAX_DEPTH = 50
_NUMBER = r"[+-]?(?:\d+(?:\.\d*)?|\.\d+)"
_AND = re.compile(r"(?<![A-Za-z0-9_'\\-])AND(?![A-Za-z0-9_'-])")
_WEIGHT = re.compile(rf"(?<!\\)[:：]\s*({_NUMBER})\s*\Z")
_MISTYPED = re.compile(r"(?<!\\)[:：]\s*([+-]?[\dOo]*[.,，．][\dOo]+)\s*\Z")  # a weight that is no number
_WHEN = re.compile(rf"\s*({_NUMBER})\s*")
_COMMA = re.compile(r"\s*[+-]?\d*[,，]\d+\s*")
_SIGNS = re.compile(r"\\.|[()（）]|[\[\]［］]|[:：|｜]|[^\\()（）\[\]［］:：|｜]+|\\", re.DOTALL)


@dataclass(frozen=True)
class Edit:
    """`before` until `when` (a fraction of the steps below 1, else their number), then `after`."""

    before: "EditedText"
    after: "EditedText"
    when: float
    depth: int


@dataclass(frozen=True)
class Turns:
    """One text after the other, step by step, over and over."""

    texts: tuple["EditedText", ...]
    depth: int


EditedText = tuple[str | Edit | Turns, ...]


class ComposedPart(NamedTuple):
    """A prompt of several, and the weight of its guidance."""

    text: str
    weight: float


def compose(prompt: str) -> list[ComposedPart]:
    """A prompt -> the prompts that its ANDs part, with their weights; without AND itself, with weight 1.

    The guided prediction is n + g sum_i w_i (p_i - n), n that of the negative prompt (Liu et al. 2022, 2206.01714,
    eq. 11). Raises UserError for an AND with nothing on one side, for more parts than MAX_PARTS, and for weights such
    as 0,7 that are no numbers.
    """
    texts = _AND.split(prompt)
    if len(texts) == 1:
        return [ComposedPart(prompt, 1.0)]
    if len(texts) > MAX_PARTS:
        raise UserError(f"the prompt {short(prompt)!r} has {len(texts)} parts joined by AND; at most {MAX_PARTS}")
    parts = []
    for text in texts:
        found = _WEIGHT.search(text)
        if not found and (wrong := _MISTYPED.search(text)):
            raise UserError(
                f"the prompt {short(prompt)!r} has the weight {wrong[1]!r}, which is no number: write it as in :0.7, "
                r"or \: for a colon that is text"
            )
        parts.append(
            ComposedPart((text[: found.start()] if found else text).strip(), float(found[1]) if found else 1.0)
        )
        if not parts[-1].text:
            raise UserError(f"the prompt {short(prompt)!r} has AND with nothing on one side; for the word, write and")
    return parts


def parse_edits(prompt: str) -> EditedText:
    """A prompt -> its texts and what changes between them. Takes time in proportion to the prompt.

    Raises UserError for brackets that look like an edit and are none, and for edits in too many others.
    """
    if not re.search("[:：|｜]", prompt):
        return (prompt,)
    stack = [_Frame("")]
    for sign in _SIGNS.findall(prompt):
        if sign in "([（［":
            stack.append(_Frame(sign))
        elif sign in ")）" and stack[-1].opened in "(（" and len(stack) > 1:
            inner = stack.pop()
            stack[-1].fields[-1].append([inner.flat(), sign])
        elif sign in "]］" and (place := _innermost_square(stack)):
            for unclosed in stack[place + 1 :]:
                stack[place].fields[-1].append(unclosed.flat())
            del stack[place + 1 :]
            inner = stack.pop()
            stack[-1].fields[-1].append(_closed(inner, sign, prompt))
        elif sign in ":：|｜":
            stack[-1].marks.append(sign)
            stack[-1].fields.append([])
        else:
            stack[-1].fields[-1].append(sign)
    return _flatten([frame.flat() for frame in stack])


def text_at(text: EditedText, step: int, count: int) -> str:
    """What is read at a step, the first of `count` being 0."""
    found = []
    for piece in text:
        if isinstance(piece, Edit):
            begins = piece.when * count if piece.when < 1 else piece.when
            piece = text_at(piece.before if step < int(begins) else piece.after, step, count)
        elif isinstance(piece, Turns):
            piece = text_at(piece.texts[step % len(piece.texts)], step, count)
        found.append(piece)
    return "".join(found)


def is_edited(text: EditedText) -> bool:
    """Whether it changes from step to step."""
    return any(not isinstance(piece, str) for piece in text)


@dataclass
class _Frame:
    """An open bracket, "" for none: the fields between its marks; pieces are texts, edits, and lists of pieces."""

    opened: str
    fields: list[list] = field(default_factory=lambda: [[]])
    marks: list[str] = field(default_factory=list)

    def flat(self) -> list:
        """The pieces, where nothing is special about them."""
        rest = [piece for mark, pieces in zip(self.marks, self.fields[1:], strict=True) for piece in (mark, pieces)]
        return [self.opened, self.fields[0], *rest]


def _innermost_square(stack: list[_Frame]) -> int:
    """Its place; 0 for none. What was opened after it and is not closed is text."""
    return next((i for i in range(len(stack) - 1, 0, -1) if stack[i].opened in "[［"), 0)


def _closed(frame: _Frame, sign: str, prompt: str) -> list:
    """What a pair of square brackets is."""
    kinds = {"|" if mark in "|｜" else ":" for mark in frame.marks}
    if kinds == {"|"}:
        texts = tuple(_flatten(pieces) for pieces in frame.fields)
        return [Turns(texts, _depth(texts, prompt))]
    last = frame.fields[-1]
    last = "" if any(isinstance(piece, list) for piece in last) else "".join(last)  # brackets are no number
    when = _WHEN.fullmatch(last)
    if not kinds or (len(frame.fields) == 2 and kinds == {":"} and not (when or _COMMA.fullmatch(last))):
        return [frame.flat(), sign]
    if not when or float(when[1]) < 0 or kinds != {":"} or len(frame.fields) > 3:
        shown = "".join(piece if isinstance(piece, str) else "..." for piece in _flatten([frame.flat(), sign]))
        raise UserError(
            f"the prompt's {short(shown)!r} is not understood: write [from:to:when], when a number from 0 on as in "
            r"0.5, or [one|other], or \[ for brackets that are text"
        )
    before, after = ([[]] if len(frame.fields) == 2 else []) + frame.fields[:-1]
    texts = _flatten(before), _flatten(after)
    return [Edit(*texts, float(when[1]), _depth(texts, prompt))]


def _depth(texts: Iterable[EditedText], prompt: str) -> int:
    depth = 1 + max((piece.depth for text in texts for piece in text if not isinstance(piece, str)), default=0)
    if depth > _MAX_DEPTH:
        raise UserError(f"the prompt {short(prompt)!r} has edits within more than {_MAX_DEPTH} others")
    return depth


def _flatten(pieces: list) -> EditedText:
    """Lists of lists of pieces -> pieces, neighbouring texts joined."""
    found, run, waiting = [], [], [iter(pieces)]
    while waiting:
        for piece in waiting[-1]:
            if isinstance(piece, list):
                waiting.append(iter(piece))
                break
            if isinstance(piece, str):
                run.append(piece)
                continue
            found += ["".join(run), piece]
            run = []
        else:
            waiting.pop()
    return tuple(piece for piece in (*found, "".join(run)) if piece != "")
