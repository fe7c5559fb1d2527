"""ChatGLM's tokenizer: the SentencePiece model of `tokenizer.model`, and nine tokens of its own behind its pieces."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor

from bdm_jax.errors import UserError
from bdm_jax.formats.files import read_json, write_json

MODEL, _SETTINGS = "tokenizer.model", "tokenizer_config.json"
_MOST_BYTES = 64 * 2**20
_SPECIALS = (
    *("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop"),
    *("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
)


class ChatGLMTokenizer:
    """Text to pieces, with the face of transformers' tokenizers as far as `text.tokenizer.Tokenizer` asks for it.

    A text becomes [gMASK] sop and its pieces, with padding before them. As in the published code the padding is the
    piece for the unknown, and what looks like a special token in a text is text.
    """

    bos_token_id = cls_token_id = eos_token_id = sep_token_id = None
    padding_side = "left"
    model_max_length = 256  # as Kolors reads

    def __init__(self, model: bytes):
        """Raises ValueError for what is no SentencePiece model."""
        self._pieces = SentencePieceProcessor()
        try:
            if not model:
                raise ValueError
            self._pieces.LoadFromSerializedProto(model)
        except (RuntimeError, OSError, ValueError) as error:
            raise ValueError("no SentencePiece model, or a damaged one") from error
        self._model = model
        self._own = {name: self._pieces.get_piece_size() + place for place, name in enumerate(_SPECIALS)}
        self.pad_token_id = self.unk_token_id = self._pieces.unk_id()
        self.prefix = (self._own["[gMASK]"], self._own["sop"])

    @classmethod
    def from_pretrained(cls, folder: str | Path, **_: Any) -> "ChatGLMTokenizer":
        """Of a folder with tokenizer.model. Raises UserError for a file that is none."""
        path, settings = Path(folder) / MODEL, Path(folder) / _SETTINGS
        try:
            if path.stat().st_size > _MOST_BYTES:
                raise ValueError(f"{path.stat().st_size} bytes, more than a tokenizer has")
            found = cls(path.read_bytes())
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: {error.strerror if isinstance(error, OSError) else error}") from error
        length = read_json(settings).get("model_max_length", 256) if settings.is_file() else 256
        if type(length) is not int or length < 1:
            raise UserError(f"{settings}: model_max_length={length!r} is not a number of tokens")
        found.model_max_length = length
        return found

    def save_pretrained(self, folder: str | Path) -> None:
        """A folder that `from_pretrained` here and diffusers' ChatGLMTokenizer read."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MODEL).write_bytes(self._model)
        values = {"tokenizer_class": "ChatGLMTokenizer", "padding_side": "left"}
        write_json(folder / _SETTINGS, {**values, "model_max_length": self.model_max_length})

    def __len__(self) -> int:
        return self._pieces.get_piece_size() + len(self._own)

    def __call__(self, texts: Sequence[str], **_: Any) -> dict[str, list]:
        """`input_ids` of each text, and in `offset_mapping` where the characters are that have no piece; what has one
        is at (0, 0).
        """
        ids, offsets = [], []
        for text in texts:
            ids.append(self._pieces.encode(text, out_type=int))
            offsets.append([])
            for id_, piece in zip(ids[-1], self._pieces.encode(text, out_type=str), strict=True):
                at = text.find(piece.lstrip("\u2581")) if id_ == self.unk_token_id else -1
                offsets[-1].append((0, 0) if at < 0 else (at, at + len(piece.lstrip("\u2581"))))
        return {"input_ids": ids, "offset_mapping": offsets}

    def get_vocab(self) -> dict[str, int]:
        """Every token and its id."""
        pieces = {self._pieces.id_to_piece(id_): id_ for id_ in range(self._pieces.get_piece_size())}
        return {**pieces, **self._own}

    def decode(self, ids: Sequence[int]) -> str:
        """The text of pieces; special tokens have none."""
        return self._pieces.decode([int(id_) for id_ in ids if id_ < self._pieces.get_piece_size()])
