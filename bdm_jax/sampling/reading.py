"""Which texts a request has, and which of them are read at each row: see `text.editing` for prompts that change from
step to step and for prompts of several parts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from bdm_jax.errors import UserError, short
from bdm_jax.text.editing import compose, is_edited, parse_edits, text_at


class RowTexts(NamedTuple):
    """The texts of one source that a row reads, by number: the negative prompt's, and one for each positive part."""

    negative: int = 0
    positives: tuple[int, ...] = (1,)


@dataclass(frozen=True)
class SourceTexts:
    """The texts of one source, those of the negative prompt first.

    Attributes:
      texts: without edits the negative prompt and the positive one (or its parts).
      negatives: how many of them are the negative prompt's.
      rows: what each row reads, by the number of rows of a pass; empty where all rows read texts 0 and 1.
      weights: of the positive prompt's parts, whose guidance they multiply.
    """

    texts: tuple[str, ...]
    negatives: int = 1
    rows: dict[int, tuple[RowTexts, ...]] = field(default_factory=dict)
    weights: tuple[float, ...] = (1.0,)

    @property
    def kind(self) -> tuple:
        """All but the texts themselves."""
        return len(self.texts), self.negatives, self.rows, self.weights


def source_texts(negative: str, positive: str, counts: Callable[[], Sequence[int]]) -> SourceTexts:
    """A source's two prompts -> its texts.

    `counts`: gives the number of rows of each pass; asked only where a prompt has edits or parts. Raises UserError for
    what `text.editing` refuses, and for a negative prompt of several parts.
    """
    parts = compose(positive)
    if len(compose(negative)) > 1:
        raise UserError(
            f"the negative prompt {short(negative)!r} has AND, which joins positive ones; write and, or a comma"
        )
    trees = [parse_edits(negative), *(parse_edits(part.text) for part in parts)]
    if len(parts) == 1 and not any(map(is_edited, trees)):
        return SourceTexts((negative, positive))
    negatives: dict[str, int] = {}
    positives: dict[str, int] = {}
    rows = {}
    for count in counts():
        read = [[text_at(tree, row, count) for tree in trees] for row in range(count)]
        rows[count] = [
            (negatives.setdefault(first, len(negatives)), [positives.setdefault(x, len(positives)) for x in rest])
            for first, *rest in read
        ]
    found = {
        count: tuple(RowTexts(first, tuple(len(negatives) + number for number in rest)) for first, rest in numbered)
        for count, numbered in rows.items()
    }
    return SourceTexts((*negatives, *positives), len(negatives), found, tuple(part.weight for part in parts))


def shared_weights(sources: Sequence[SourceTexts]) -> tuple[float, ...]:
    """The weights of a request's parts. Raises UserError for two languages whose parts do not go together."""
    several = {source.weights for source in sources if len(source.weights) > 1}
    if len(several) > 1:
        raise UserError(
            "the prompts of both languages have AND: give both the same number of parts with the same weights, "
            "which go together one by one, or use it in one of them"
        )
    return next(iter(several), (1.0,))
