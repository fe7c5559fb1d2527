"""From the words of a record to the token ids of one text source, by one tokenizer or by several."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from bdm_jax.data import captions
from bdm_jax.data.captions import Choices
from bdm_jax.errors import BadRecord, UserError
from bdm_jax.latents.moments import record_key
from bdm_jax.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Captions:
    """Captions in one language, tokenized into one window: ids (S,), or (T,S) by this tokenizer and `others`, whose
    windows must be of one length.

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
    others: tuple[Tokenizer, ...] = ()

    def __post_init__(self):
        if len(lengths := {tokenizer.length for tokenizer in self._tokenizers}) > 1:
            raise UserError(
                f"one text in windows of {' and '.join(map(str, sorted(lengths)))} tokens is not trained on"
            )

    def ids(self, record: dict, rng: np.random.Generator) -> np.ndarray:
        """A sample's ids, int32. Raises BadRecord for a record that this language must not be trained on."""
        self._check(record)
        drawn = self.draw(lambda: captions.choices(record, self.language), rng)
        if drawn is None:
            return self.empty
        which, number = drawn
        return self._windows([self._texts(record, self._prompts[which])[number]])[0]

    @property
    def empty(self) -> np.ndarray:
        """The ids of a caption that is left out."""
        return self.of_text("")

    def of_text(self, text: str) -> np.ndarray:
        """The ids of a text, truncated where it does not fit."""
        return self._windows([(text, text)])[0]

    def draw(self, choices: Callable[[], Choices], rng: np.random.Generator) -> tuple[int, int] | None:
        """A sample's prompt, and which of the texts that the record's captions make of it; None for the empty text.
        `choices`: what the record's captions are chosen from, asked for where the prompt has a place for one.
        """
        which = int(rng.integers(len(self.prompts))) if self.prompts else 0
        number = choices().draw(rng) if self._has_caption(self._prompts[which]) else 0
        return None if rng.random() < self.dropout else (which, number)

    def choices(self, record: dict) -> Choices:
        """How many texts a record makes of every prompt. Raises BadRecord for a record that no sample can be made of
        with some prompt.
        """
        self._check(record)
        if any(map(self._has_caption, self._prompts)):
            return captions.choices(record, self.language)
        return Choices(own=1)

    def all_ids(self, records: Sequence[dict]) -> list[np.ndarray]:
        """Of each record that `choices` takes, with n texts for each of P prompts: the ids (P * n, ...) int32 of text
        `number` of prompt `which` at which * n + number.
        """
        pairs, ends = [], []
        for record in records:
            count = self.choices(record).total
            for prompt in self._prompts:
                found = self._texts(record, prompt)
                pairs += found if len(found) == count else found * count
            ends.append(len(pairs))
        return np.split(self._windows(pairs), ends[:-1])

    @property
    def mixed(self) -> bool:
        """Whether some prompts have a caption in them and others have none."""
        return len({self._has_caption(prompt) for prompt in self._prompts}) > 1

    @property
    def _tokenizers(self) -> tuple[Tokenizer, ...]:
        return self.tokenizer, *self.others

    @property
    def _prompts(self) -> tuple[str, ...]:
        return self.prompts or ("{}",)

    def _has_caption(self, prompt: str) -> bool:
        return self.word is None and "{}" in prompt

    def _check(self, record: dict) -> None:
        if self.language == "en" and record.get("zh_only"):
            raise BadRecord(record_key(record), "zh_only", "English training must not see it")

    def _texts(self, record: dict, prompt: str) -> list[tuple[str, str]]:
        """The texts that a record makes of a prompt, each with a shorter one in case it does not fit."""
        if not self._has_caption(prompt):
            return [(prompt.replace("{}", self.word or ""),) * 2]
        shorter = prompt.replace("{}", captions.name(record, self.language, self.style))
        texts = captions.variants(record, self.language, self.style)
        return [(prompt.replace("{}", text), shorter) for text in texts]

    def _windows(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        """Texts, each with a shorter one -> ids (N,S) or (N,T,S) int32."""
        texts = list(dict.fromkeys(text for pair in pairs for text in pair))  # many share the shorter one
        contents = [dict(zip(texts, one.content(texts), strict=True)) for one in self._tokenizers]
        fitting = {
            text
            for text in texts
            if all(len(own[text]) <= one.format.room for one, own in zip(self._tokenizers, contents, strict=True))
        }
        chosen = [longer if longer in fitting else shorter for longer, shorter in pairs]
        ids = [
            np.stack([_window(one, own[text]) for text in chosen])
            for one, own in zip(self._tokenizers, contents, strict=True)
        ]
        return np.stack(ids, axis=1) if self.others else ids[0]

    def name(self, record: dict) -> str:
        """The prompt that a record is previewed with."""
        prompt = self.prompts[0] if self.prompts else "{}"
        if self.word is not None:
            return prompt.replace("{}", self.word)
        if "{}" not in prompt:
            return prompt
        return prompt.replace("{}", captions.name(record, self.language, self.style))


def _window(tokenizer: Tokenizer, content: list[int]) -> np.ndarray:
    """Token ids -> one window (S,) int32 with start, end and padding; truncated to the tokenizer's length."""
    return tokenizer.format.fill([content[: tokenizer.format.room]], 1)[0]
