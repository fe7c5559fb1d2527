"""The words of textual inversions in an English prompt, with their weights: what the prompt says is what counts."""

import re
from pathlib import PurePosixPath


def word_of(name: str) -> str:
    """`style/ink.safetensors` -> `ink`, as the prompt names it."""
    return PurePosixPath(name).stem


def weight_of(prompt: str, word: str) -> float | None:
    """The weight that the word has, 1 where it stands alone; None where it does not stand there."""
    found = _pattern(word).search(prompt)
    return None if found is None else float(found["weight"] or 1)


def with_word(prompt: str, word: str, weight: float = 1.0) -> str:
    """The prompt with the word at this weight: in its place, or at the end where it is not there yet."""
    text = word if weight == 1 else f"({word}:{weight:g})"
    pattern = _pattern(word)
    if pattern.search(prompt):
        return pattern.sub(lambda _: text, prompt, count=1)
    return f"{prompt.rstrip().rstrip(',')}, {text}" if prompt.strip() else text


def without_word(prompt: str, word: str) -> str:
    """The prompt without the word, its weight and the comma before it."""
    return re.sub(rf"(?:,\s*)?(?:{_pattern(word).pattern})", "", prompt, flags=re.IGNORECASE).strip().lstrip(", ")


def _pattern(word: str) -> re.Pattern[str]:
    name = re.escape(word)
    weighted = rf"\(\s*{name}\s*:\s*(?P<weight>\d+(?:\.\d*)?|\.\d+)\s*\)"
    return re.compile(rf"{weighted}|(?<![\w-]){name}(?![\w-])", re.IGNORECASE)
