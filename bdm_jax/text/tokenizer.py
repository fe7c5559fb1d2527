"""Prompts to token ids: CLIP's byte-pair and BERT's Chinese tokenizers behind one small class."""

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from transformers import BertTokenizer, CLIPTokenizer

from bdm_jax.errors import UserError
from bdm_jax.text.windows import split
from convert.files import read_json


class PromptWarning(UserWarning):
    """A prompt will not be read as it was written: something was cut off, or has no token."""


# class name -> (class, files one of which sets must be there, default window length)
_KINDS = {
    "CLIPTokenizer": (CLIPTokenizer, (("tokenizer.json",), ("vocab.json", "merges.txt")), 77),
    "BertTokenizer": (BertTokenizer, (("tokenizer.json",), ("vocab.txt",)), 52),
}
_NO_WINDOW = 512  # a model_max_length from here on is BERT's number of positions, or "no limit"; not a window


class Tokenizer:
    """One language's tokenizer.

    Attributes:
      length: tokens in a window, both ends included (77 for CLIP, 52 for Chinese-CLIP).
      start, end, pad: ids around and after the content.
    """

    def __init__(self, tokenizer: CLIPTokenizer | BertTokenizer, length: int):
        self._tokenizer = tokenizer
        self.length = length
        self.start = _first(tokenizer.bos_token_id, tokenizer.cls_token_id)
        self.end = _first(tokenizer.eos_token_id, tokenizer.sep_token_id)
        self.pad = _first(tokenizer.pad_token_id, self.end)
        # Byte-pair encoding spells anything; only a word list can lack a character.
        self._unknown = tokenizer.unk_token_id if isinstance(tokenizer, BertTokenizer) else None

    @classmethod
    def from_pretrained(cls, folder: str | Path, length: int | None = None) -> "Tokenizer":
        """Read a tokenizer folder in transformers' layout; windows of `length` tokens, or of as many as it says.

        Raises UserError that names what the folder lacks.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise UserError(f"{folder}: no such tokenizer folder")
        path = folder / "tokenizer_config.json"
        values = read_json(path) if path.is_file() else {}
        likely = "BertTokenizer" if (folder / "vocab.txt").is_file() else "CLIPTokenizer"
        kind = str(values.get("tokenizer_class") or likely)
        if kind.removesuffix("Fast") not in _KINDS:
            raise UserError(f"{path}: tokenizer_class {kind!r} is not one of {', '.join(_KINDS)}")
        make, choices, usual = _KINDS[kind.removesuffix("Fast")]
        if not any(all((folder / name).is_file() for name in names) for names in choices):
            raise UserError(f"{folder}: no vocabulary; expected {' or '.join('+'.join(names) for names in choices)}")
        tokenizer = make.from_pretrained(folder, local_files_only=True)
        if length is None:
            length = int(tokenizer.model_max_length) if tokenizer.model_max_length < _NO_WINDOW else usual
        if length < 3:
            raise UserError(f"{path}: model_max_length {length} leaves no room for a prompt")
        return cls(tokenizer, length)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder that `from_pretrained` here and transformers' read."""
        self._tokenizer.model_max_length = self.length
        try:
            self._tokenizer.save_pretrained(folder)
        except OSError as error:
            raise UserError(f"{folder}: cannot be written ({error.strerror or error})") from error

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included."""
        return len(self._tokenizer)

    def content(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text without start and end, nothing cut off.

        Warns with PromptWarning, naming the characters, where a text has some that the vocabulary lacks.
        """
        if not texts:
            return []
        offsets = self._unknown is not None
        rows = self._tokenizer(
            list(texts), add_special_tokens=False, return_offsets_mapping=offsets, verbose=False, truncation=False
        )
        if offsets:
            self._name_unknown(texts, rows["input_ids"], rows["offset_mapping"])
        return rows["input_ids"]

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """One window per text: (B, length) int32, padded. Warns with PromptWarning where a text is cut off."""
        rows = [self.fit(text, ids, 1) for text, ids in zip(texts, self.content(texts), strict=True)]
        return np.concatenate(rows) if rows else np.zeros((0, self.length), np.int32)

    def fit(self, text: str, ids: list[int], windows: int) -> np.ndarray:
        """Content ids in (windows, length) int32; warns with PromptWarning, naming the words, where they do not fit."""
        room = windows * (self.length - 2)
        if len(ids) > room:
            lost = self._tokenizer.decode(ids[room:])
            warnings.warn(
                f"the prompt {_short(text)!r} has {len(ids)} tokens, {room} are read; cut off: {_short(lost, 200)!r}",
                PromptWarning,
                stacklevel=2,
            )
        return split(ids, windows, self.length, self.start, self.end, self.pad)

    def _name_unknown(self, texts: Sequence[str], rows: list[list[int]], offsets: list[list[tuple[int, int]]]) -> None:
        for text, ids, spans in zip(texts, rows, offsets, strict=True):
            if lost := [text[begin:end] for id_, (begin, end) in zip(ids, spans, strict=True) if id_ == self._unknown]:
                names = " ".join(dict.fromkeys(lost))
                message = f"the prompt {_short(text)!r} has characters that the vocabulary lacks: {names}"
                warnings.warn(message, PromptWarning, stacklevel=3)


def _first(*ids: int | None) -> int:
    found = next((id_ for id_ in ids if id_ is not None), None)
    if found is None:
        raise UserError("the tokenizer lacks its start, end or padding token")
    return found


def _short(text: str, limit: int = 60) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
