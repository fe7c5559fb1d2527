"""How good captions are, by five criteria, as Kolors chooses among captions that models write for a picture.

A judge, of whatever kind, says what shares of a picture and of a caption are right; the scores follow from these alone.
Each is from 1 (worst) to 5. What lies between is linear, and how many characters are long is a choice of ours: the
source names the ends only, and for the length nothing but that Chinese characters are counted.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from bdm_jax.data.captions import HAN
from bdm_jax.errors import UserError

LONG = 100  # Chinese characters, from which on a caption gets 5 for its length
_BEST, _WORST = 5.0, 1.0
_POOR = 0.3  # of what is in the picture: below it, 1
_FALSE = 0.5  # of a caption: above it, 1


@dataclass(frozen=True)
class Fractions:
    """What a judge finds, each from 0 to 1.

    objects, foreground: the share of all objects in the picture, and of those in the foreground, that the caption
    names. hallucinated: the share of the caption about what is not there. subjective: the share that is opinion or
    mood. Raises UserError for a value outside.
    """

    objects: float
    foreground: float
    hallucinated: float
    subjective: float

    def __post_init__(self):
        for name, value in vars(self).items():
            if not 0 <= value <= 1:
                raise UserError(f"{name}={value}: a fraction is from 0 to 1")


class CaptionJudge(Protocol):
    """Whoever looks at pictures and captions: a vision-language model, or people."""

    def __call__(self, image: Any, caption: str) -> Fractions:
        """One picture, in whatever form the judge reads, and one of its captions."""


class Scores(NamedTuple):
    """Each from 1 to 5."""

    length: float
    completeness: float
    relevance: float
    hallucination: float
    subjectivity: float

    @property
    def mean(self) -> float:
        """What captions are compared by."""
        return sum(self) / len(self)


def score(caption: str, found: Fractions, long: int = LONG) -> Scores:
    """The five scores of a caption; `long`: Chinese characters that are worth 5."""
    return Scores(
        _linear(len(HAN.findall(caption)), 0, long),
        _linear(found.objects, _POOR, 1),
        _linear(found.foreground, _POOR, 1),
        _linear(found.hallucinated, _FALSE, 0),
        _linear(found.subjective, _FALSE, 0),
    )


def best(image: Any, captions: Sequence[str], judge: CaptionJudge, long: int = LONG) -> tuple[int, Scores]:
    """The caption with the highest mean, the first of equals: its number and its scores. Raises UserError for none."""
    if not captions:
        raise UserError("no captions to choose from")
    scores = [score(caption, judge(image, caption), long) for caption in captions]
    chosen = max(range(len(scores)), key=lambda number: scores[number].mean)
    return chosen, scores[chosen]


def _linear(value: float, worst: float, best: float) -> float:
    """1 at `worst` and beyond, 5 at `best` and beyond."""
    share = min(1.0, max(0.0, (value - worst) / (best - worst)))
    return _WORST + share * (_BEST - _WORST)
