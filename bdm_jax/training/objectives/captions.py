"""From the words of a record to the token ids of one text source."""

from dataclasses import dataclass

import numpy as np

from bdm_jax.data import captions
from bdm_jax.errors import BadRecord
from bdm_jax.latents.moments import record_key
from bdm_jax.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Captions:
    """Captions in one language, tokenized into one window.

    dropout: share of captions replaced by the empty one, for guidance. style: captions name the record's art style.
    prompts: one of them at random for each sample, {} in it standing for the caption, or for `word` where that is set;
    () is the caption itself.
    """

    tokenizer: Tokenizer
    language: str
    dropout: float = 0.0
    style: bool = False
    prompts: tuple[str, ...] = ()
    word: str | None = None

    def ids(self, record: dict, rng: np.random.Generator) -> np.ndarray:
        """A sample's ids (S,) int32. Raises BadRecord for a record that this language must not be trained on."""
        if self.language == "en" and record.get("zh_only"):
            raise BadRecord(record_key(record), "zh_only", "English training must not see it")
        longer, shorter = self.tokenizer.content(self.texts(record, rng))
        content = longer if len(longer) <= self.tokenizer.length - 2 else shorter
        if rng.random() < self.dropout:
            content = []
        return window(self.tokenizer, content)

    def texts(self, record: dict, rng: np.random.Generator) -> tuple[str, str]:
        """A sample's text, and a shorter one in case it does not fit."""
        prompt = self.prompts[int(rng.integers(len(self.prompts)))] if self.prompts else "{}"
        if self.word is not None or "{}" not in prompt:
            text = prompt.replace("{}", self.word or "")
            return text, text
        longer = captions.caption(record, self.language, rng, self.style)
        return prompt.replace("{}", longer), prompt.replace("{}", captions.name(record, self.language, self.style))

    def name(self, record: dict) -> str:
        """The prompt that a record is previewed with."""
        prompt = self.prompts[0] if self.prompts else "{}"
        if self.word is not None:
            return prompt.replace("{}", self.word)
        if "{}" not in prompt:
            return prompt
        return prompt.replace("{}", captions.name(record, self.language, self.style))


def window(tokenizer: Tokenizer, content: list[int]) -> np.ndarray:
    """Token ids -> one window (S,) int32 with start, end and padding; truncated to the tokenizer's length."""
    return tokenizer.format.fill([content[: tokenizer.format.room]], 1)[0]
