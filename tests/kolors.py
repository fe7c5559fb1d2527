"""A small Kolors as diffusers makes it, with a SentencePiece model of its own."""

import io
from functools import lru_cache

import sentencepiece

_TEXTS = ("一只可爱的猫", "红灯笼在屋檐下", "a red lantern under a roof", "水墨山水", "a photo of a cat", "春夏秋冬")


@lru_cache
def pieces(byte_fallback: bool = True) -> bytes:
    """The bytes of a tokenizer.model: pieces of a few words and, as ChatGLM's, of every byte."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_TEXTS * 20),
        model_writer=model,
        vocab_size=320,
        hard_vocab_limit=False,
        model_type="bpe",
        byte_fallback=byte_fallback,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        minloglevel=2,
    )
    return model.getvalue()
