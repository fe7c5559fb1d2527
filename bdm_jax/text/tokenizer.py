"""Prompts to token ids: CLIP's byte-pair, BERT's Chinese, T5's and ChatGLM's tokenizers behind one small class."""

import copy
import hashlib
import json
import re
import unicodedata
import warnings
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path

import ftfy
import numpy as np
from transformers import BertTokenizer, CLIPTokenizer, T5TokenizerFast

from bdm_jax.errors import UserError, short
from bdm_jax.formats.files import read_json
from bdm_jax.text.chatglm import MODEL, ChatGLMTokenizer
from bdm_jax.text.windows import WindowFormat


class PromptWarning(UserWarning):
    """A prompt will not be read as it was written: something was cut off, or has no token."""


# class name -> (class, files one of which sets must be there, default window length)
_KINDS = {
    "CLIPTokenizer": (CLIPTokenizer, (("tokenizer.json",), ("vocab.json", "merges.txt")), 77),
    "BertTokenizer": (BertTokenizer, (("tokenizer.json",), ("vocab.txt",)), 52),
    "T5Tokenizer": (T5TokenizerFast, (("tokenizer.json",), ("spiece.model",)), 256),
    "ChatGLMTokenizer": (ChatGLMTokenizer, ((MODEL,),), 256),
}
_BY_FILE = {"vocab.txt": "BertTokenizer", MODEL: "ChatGLMTokenizer"}  # where tokenizer_config.json does not say it
# Letters and digits of scripts that set blanks between words; Chinese, Japanese and Korean do not, or glue parts on.
_LETTER = r"[^\W\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff\U00020000-\U0003ffff]"
_NO_WINDOW = 512  # a model_max_length from here on is BERT's number of positions, or "no limit"; not a window


class Tokenizer:
    """One language's tokenizer.

    Attributes:
      format: what its windows look like.
      length: tokens in a window, both ends included (77 for CLIP, 52 for Chinese-CLIP).
      start, end, pad: ids around and after the content; start or end None where it has none (T5, ChatGLM).
      byte_pairs: CLIP's kind, which spells anything; a list of words (BERT's, Chinese) or pieces (T5's) otherwise.
    """

    def __init__(
        self,
        tokenizer: CLIPTokenizer | BertTokenizer | T5TokenizerFast | ChatGLMTokenizer,
        length: int,
        prefix: Sequence[int] | None = None,
    ):
        """`prefix`: ids at the start in place of the tokenizer's own start token (ChatGLM's [gMASK] sop)."""
        self._tokenizer = tokenizer
        start = _first(tokenizer.bos_token_id, tokenizer.cls_token_id)
        self.end = _first(tokenizer.eos_token_id, tokenizer.sep_token_id)
        self.pad = _first(tokenizer.pad_token_id, self.end)
        if self.pad is None:
            raise UserError("the tokenizer lacks its end and padding tokens")
        prefix = tuple(() if start is None else (start,)) if prefix is None else tuple(prefix)
        self.start = prefix[0] if prefix else None
        suffix = () if self.end is None else (self.end,)
        self.format = WindowFormat(length, prefix, suffix, self.pad, tokenizer.padding_side == "left")
        self.byte_pairs = isinstance(tokenizer, CLIPTokenizer)
        self._added: dict[str, tuple[int, ...]] = {}
        self._pattern: re.Pattern | None = None

    @classmethod
    def from_pretrained(cls, folder: str | Path, length: int | None = None, pad: str | None = None) -> "Tokenizer":
        """Read a tokenizer folder in transformers' layout; windows of `length` tokens, or of as many as it says.

        `pad`: the token that fills windows, if not the folder's own (SDXL's second text encoder: "!").

        Raises UserError that names what the folder lacks.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise UserError(f"{folder}: no such tokenizer folder")
        path = folder / "tokenizer_config.json"
        values = read_json(path) if path.is_file() else {}
        likely = next((kind for file, kind in _BY_FILE.items() if (folder / file).is_file()), "CLIPTokenizer")
        kind = str(values.get("tokenizer_class") or likely)
        if kind.removesuffix("Fast") not in _KINDS:
            raise UserError(f"{path}: tokenizer_class {kind!r} is not one of {', '.join(_KINDS)}")
        make, choices, usual = _KINDS[kind.removesuffix("Fast")]
        if not any(all((folder / name).is_file() for name in names) for names in choices):
            raise UserError(f"{folder}: no vocabulary; expected {' or '.join('+'.join(names) for names in choices)}")
        tokenizer = make.from_pretrained(folder, local_files_only=True, **({} if pad is None else {"pad_token": pad}))
        if length is None:
            length = int(tokenizer.model_max_length) if tokenizer.model_max_length < _NO_WINDOW else usual
        found = cls(tokenizer, length, getattr(tokenizer, "prefix", None))
        if found.format.room < 1:
            raise UserError(f"{path}: model_max_length {length} leaves no room for a prompt")
        return found

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder that `from_pretrained` here and transformers' read.

        Raises UserError for a tokenizer with added tokens, which no such folder can hold as they are read here.
        """
        if self._added:
            names = ", ".join(map(short, self._added))
            raise UserError(f"{folder}: the added tokens {names} cannot be saved; save the tokenizer without them")
        self._tokenizer.model_max_length = self.length
        try:
            self._tokenizer.save_pretrained(folder)
        except OSError as error:
            raise UserError(f"{folder}: cannot be written ({error.strerror or error})") from error

    @property
    def length(self) -> int:
        """Tokens in a window."""
        return self.format.length

    @property
    def vocab_size(self) -> int:
        """Number of ids, added tokens included."""
        return max([len(self._tokenizer), *(id_ + 1 for ids in self._added.values() for id_ in ids)])

    @property
    def added(self) -> dict[str, tuple[int, ...]]:
        """The tokens of `with_tokens` and their ids."""
        return dict(self._added)

    def fingerprint(self, probe: str) -> str:
        """32 hexadecimal digits of the vocabulary, how words are made of it, what windows look like, and how the text
        `probe` is read.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PromptWarning)
            ids = [int(id_) for id_ in self.content([probe])[0]]
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        model = json.loads(backend.to_str())["model"] if backend else {}
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model.get("merges") or ()]
        scores = model["vocab"] if isinstance(model.get("vocab"), list) else ()  # T5's
        parts = [sorted(self._tokenizer.get_vocab().items()), merges, scores, repr(self.format), ids]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]

    def with_tokens(self, tokens: Mapping[str, Sequence[int]]) -> "Tokenizer":
        """A tokenizer that reads each of these tokens as its ids, beyond the vocabulary; this one stays as it is.

        A token is found in a text whatever its case, as these tokenizers read all text; blanks inside it stand for any
        blanks. Where it begins or ends with a letter or digit, none may adjoin it ("easy" is not in "uneasy"; a Chinese
        token needs no blanks around it); where it begins or ends otherwise ("<cat>"), anything may. Of several that
        begin at one place the longest is taken. So it is found wherever AUTOMATIC1111's interface or transformers'
        added tokens find a whole word, but not in parts of words, where either may. ComfyUI's spelling
        ("embedding:easy", "embedding:easy.pt") is the same token. The grammar's brackets in a token are escaped in a
        prompt.

        Several tokens may have the same ids: they are names of one thing.

        Raises UserError for an empty token, one with control characters, and one that is there already.
        """
        added = dict(self._added)
        taken = {name.casefold() for name in added}
        for token, ids in tokens.items():
            name = " ".join(unicodedata.normalize("NFC", token).split())
            if not name or not name.isprintable():
                raise UserError(f"token {short(name)!r}: no text that can be written; give it another name")
            if self.has_word(name):
                raise UserError(f"token {short(name)!r}: a word of the vocabulary already; give it another name")
            if name.casefold() in taken:
                raise UserError(f"token {short(name)!r}: added already; give it another name")
            taken.add(name.casefold())
            added[name] = tuple(ids)
        result = copy.copy(self)
        result._added = dict(sorted(added.items(), key=lambda item: -len(item[0])))
        result._pattern = re.compile("|".join(map(_whole, result._added)), re.IGNORECASE) if added else None
        return result

    def has_word(self, text: str) -> bool:
        """Whether it is a word or a part of words of the vocabulary, whatever its case; no added token can be."""
        known, word = {name.casefold() for name in self._tokenizer.get_vocab()}, text.casefold()
        return not known.isdisjoint((word, f"{word}</w>"))

    def content(
        self, texts: Sequence[str], prompts: Sequence[str] | None = None, *, mended: bool = False
    ) -> list[list[int]]:
        """Ids of each text without start and end, nothing cut off. Brackets are characters like others here.

        Warns with PromptWarning, naming the characters, where a text has some that the vocabulary lacks.

        Args:
          prompts: the names that the texts go by in the warning; the texts themselves if None.
          mended: for a tokenizer of byte pairs, mend the texts first as CLIP's own tokenizer and transformers' slow one
            do: wrongly decoded characters, curly quotes, full-width forms, ligatures, HTML entities (`ftfy.fix_text`).
        """
        if not texts:
            return []
        parts = [self._parts(text) for text in texts]
        plain = [(part, prompt) for row, prompt in zip(parts, prompts or texts, strict=True) for part in row[::2]]
        texts, prompts = zip(*plain, strict=True)
        if mended and self.byte_pairs:
            texts = [ftfy.fix_text(text).lower() for text in texts]
        offsets = not self.byte_pairs
        rows = self._tokenizer(
            list(texts), add_special_tokens=False, return_offsets_mapping=offsets, verbose=False, truncation=False
        )
        if offsets:
            self._name_unknown(texts, rows["input_ids"], rows["offset_mapping"], prompts)
        found = iter(rows["input_ids"])
        return [[id_ for i, part in enumerate(row) for id_ in (part if i % 2 else next(found))] for row in parts]

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """One window per text: (B, length) int32, padded. Warns with PromptWarning where a text is cut off."""
        contents = (self.format.cut([ids]) for ids in self.content(texts))
        rows = [self.fit(text, content, 1) for text, content in zip(texts, contents, strict=True)]
        return np.concatenate(rows) if rows else np.zeros((0, self.length), np.int32)

    def fit(self, text: str, contents: Sequence[Sequence[int]], windows: int) -> np.ndarray:
        """Contents of windows (see `cut`) in (windows, length) int32.

        Warns with PromptWarning, naming the words, where there are more than `windows`.
        """
        if lost := [id_ for content in contents[windows:] for id_ in content]:
            kept = sum(map(len, contents[:windows]))
            words = short(self._words(lost), 200)
            message = f"the prompt {short(text)!r} has {kept + len(lost)} tokens, {kept} are read; cut off: {words!r}"
            warnings.warn(message, PromptWarning, stacklevel=2)
        return self.format.fill(contents, windows)

    def _parts(self, text: str) -> list:
        """A text's parts: plain texts at even places, and between them the ids of added tokens."""
        if self._pattern is None:
            return [text]
        parts, ids, begin = [], list(self._added.values()), 0
        text = unicodedata.normalize("NFC", text)
        for match in self._pattern.finditer(text):
            parts += [text[begin : match.start()], ids[match.lastindex - 1]]
            begin = match.end()
        return [*parts, text[begin:]]

    def _words(self, ids: Sequence[int]) -> str:
        """Ids as text."""
        names = {id_: name for name, row in self._added.items() for id_ in row}
        return " ".join(name or self._tokenizer.decode(list(run)) for name, run in groupby(ids, names.get))

    def _name_unknown(
        self,
        texts: Sequence[str],
        rows: Sequence[Sequence[int]],
        offsets: Sequence[Sequence[tuple[int, int]]],
        prompts: Sequence[str],
    ) -> None:
        unknown, lost = self._tokenizer.unk_token_id, {}
        for text, ids, spans, prompt in zip(texts, rows, offsets, prompts, strict=True):
            for id_, (begin, end) in zip(ids, spans, strict=True):
                if id_ == unknown:
                    lost.setdefault(prompt, {})[text[begin:end]] = None
        for prompt, names in lost.items():
            message = f"the prompt {short(prompt)!r} has characters that the vocabulary lacks: {' '.join(names)}"
            warnings.warn(message, PromptWarning, stacklevel=3)


def _first(*ids: int | None) -> int | None:
    return next((id_ for id_ in ids if id_ is not None), None)


def _whole(token: str) -> str:
    """The pattern of a token as a whole word, in a group; around it what ComfyUI writes."""
    before = f"(?<!{_LETTER})" if re.match(_LETTER, token) else ""
    after = f"(?!{_LETTER})" if re.match(_LETTER, token[-1]) else ""
    spelling = r"\s+".join(map(re.escape, token.split(" ")))
    return rf"(?:(?<!{_LETTER})embedding:|{before})({spelling})(?:\.(?:pt|bin|safetensors)(?!{_LETTER})|{after})"
