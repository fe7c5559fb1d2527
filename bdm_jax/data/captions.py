"""Captions from names and keywords, and the records that each language is trained on."""

import re
from itertools import permutations
from typing import NamedTuple

import numpy as np

from bdm_jax.data.photos import missing_caption
from bdm_jax.data.source import Source
from bdm_jax.errors import BadRecord, UserError
from bdm_jax.images.decode import SUFFIXES

LANGUAGES = ("zh", "en")
STYLE_PHRASES = {
    "fluent": {"zh": "扁平插画", "en": "flat illustration"},
    "noto": {"zh": "立体插画", "en": "shaded illustration"},
}
_SEPARATORS = {"zh": "，", "en": ", "}
_MAX_KEYWORDS = 2
HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af]")
_KANA_HANGUL = re.compile("[\u3040-\u30fa\u1100-\u11ff\uac00-\ud7af]")


def caption(record: dict, language: str, rng: np.random.Generator, style: bool = False) -> str:
    """A random caption of a record: one of its `captions` in the language, uniformly. A record of the bundled set has
    none; its caption is its name, followed with probability 1/2 by one or two of its keywords.

    Args:
        record: as read by `records.open_source`, with `captions`, or with `zh`, `en`, `zh_keywords`, `en_keywords`,
            `style`.
        language: "zh" or "en".
        rng: makes the random choice.
        style: append the phrase of the record's art style, for training on several styles at once; a scene's caption
            has it already, or leaves it out.

    Raises:
        BadRecord: no caption in the language.
    """
    choice = choices(record, language).draw(rng)
    return variants(record, language, style)[choice]


class Choices(NamedTuple):
    """How many captions there are to choose from: a record's `own`, or its name with some of its `keywords`."""

    own: int = 0
    keywords: int = 0

    @property
    def total(self) -> int:
        """How many captions there are."""
        return self.own or 1 + self.keywords + self.keywords * (self.keywords - 1)

    def draw(self, rng: np.random.Generator) -> int:
        """The number of a random one of `variants`, with the probabilities of `caption`."""
        if self.own:
            return int(rng.integers(self.own))
        count = self.keywords
        if not (count and rng.random() < 0.5):
            return 0
        chosen = min(count, int(rng.integers(1, _MAX_KEYWORDS + 1)))
        first, *others = rng.permutation(count)[:chosen].tolist()
        if not others:
            return 1 + first
        second = others[0] - (others[0] > first)  # among those that are left
        return 1 + count + first * (count - 1) + second


def choices(record: dict, language: str) -> Choices:
    """What `caption` chooses from. Raises BadRecord as it does."""
    _check_language(language)
    if _is_bundled(record):
        return Choices(keywords=len(record[f"{language}_keywords"]))
    return Choices(own=len(of_language(record, language)))


def variants(record: dict, language: str, style: bool = False) -> list[str]:
    """All captions that `caption` may give, in the order that `Choices.draw` counts them in: the record's own; or its
    name, then with each keyword, then with each two in either order. Raises BadRecord as `caption` does.
    """
    _check_language(language)
    if not _is_bundled(record):
        return of_language(record, language)
    phrase = [STYLE_PHRASES[record["style"]][language]] if style and "style" in record else []
    return [
        _SEPARATORS[language].join([record[language], *keywords, *phrase])
        for count in range(_MAX_KEYWORDS + 1)
        for keywords in permutations(record[f"{language}_keywords"], count)
    ]


def name(record: dict, language: str, style: bool = False) -> str:
    """The plain prompt of a record: its first caption, or its name; with `style` also the phrase of its art style."""
    _check_language(language)
    if not _is_bundled(record):
        return of_language(record, language)[0]
    phrase = [STYLE_PHRASES[record["style"]][language]] if style and "style" in record else []
    return _SEPARATORS[language].join([record[language], *phrase])


def of_language(record: dict, language: str) -> list[str]:
    """The record's captions that are written in the language. Raises BadRecord if there are none."""
    texts = [text for text in record["captions"] if is_written_in(text, language)]
    if not texts:
        wanted, key = {"zh": "Chinese", "en": "English"}[language], record["key"]
        if not record["captions"]:
            beside = f"{missing_caption(key)}, or " if key.lower().endswith(SUFFIXES) else ""
            found = f"no caption is there; expected {beside}a field text of its metadata, in {wanted}"
            raise BadRecord(key, f"no {language} caption", found)
        found = f"none of {len(record['captions'])} captions is in {wanted}: {record['captions'][0][:60]!r}"
        raise BadRecord(key, f"no {language} caption", f"{found}; a branch reads Chinese, a backbone English")
    return texts


def is_written_in(text: str, language: str) -> bool:
    """Judged by script: "zh" has at least half of its letters Han and no kana or Hangul; "en" at least half Latin.

    Chinese captions of products often contain a Latin brand name, hence one half; Japanese text also uses Han
    characters, but rarely without kana.
    """
    letters = [character for character in text if character.isalpha()]
    if language == "zh":
        return not _KANA_HANGUL.search(text) and 0 < len(letters) <= 2 * len(HAN.findall(text))
    return 0 < len(letters) <= 2 * sum(letter < "\u0250" for letter in letters)


def concepts(
    source: Source, style: str | None = None, *, language: str, include_zh_only: bool | None = None
) -> np.ndarray:
    """Indices (int64, ascending) of the records that may be used to train in a language.

    Args:
        source: records with `style` and `zh_only`.
        style: only this art style; None for all.
        language: "zh" or "en".
        include_zh_only: also the concepts of Chinese culture; by default for Chinese only.

    Raises:
        UserError: English with `include_zh_only`, or an unknown language or style.
    """
    _check_language(language)
    if include_zh_only is None:
        include_zh_only = language == "zh"
    if language == "en" and include_zh_only:
        raise UserError("English training must not see the zh_only concepts: remove include_zh_only")
    all_records = (source[i] for i in range(len(source)))
    rows = [(i, record["style"], record["zh_only"]) for i, record in enumerate(all_records)]
    styles = sorted({row_style for _, row_style, _ in rows})
    if style is not None and style not in styles:
        raise UserError(f"unknown style {style!r}; the set has {', '.join(styles)}")
    chosen = [i for i, row_style, zh_only in rows if style in (None, row_style) and (include_zh_only or not zh_only)]
    return np.asarray(chosen, np.int64)


def _is_bundled(record: dict) -> bool:
    return not record.get("captions") and "zh_keywords" in record


def _check_language(language: str) -> None:
    if language not in LANGUAGES:
        raise UserError(f"unknown language {language!r}; choose {' or '.join(LANGUAGES)}")
