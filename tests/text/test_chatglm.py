"""ChatGLM's tokenizer against diffusers', on a small SentencePiece model made here."""

import json
import warnings

import numpy as np
import pytest
from diffusers.pipelines.kolors.tokenizer import ChatGLMTokenizer as Theirs
from kolors import pieces

from bdm_jax.errors import UserError
from bdm_jax.text.encode import read
from bdm_jax.text.tokenizer import PromptWarning, Tokenizer

TEXTS = ["一只可爱的猫", "", "a red lantern, 红灯笼", "  two  blanks ", "𠀀🐈", "a</s>b <unk> sop", "水墨 " * 20]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(pieces())
    return tmp_path


@pytest.mark.filterwarnings("ignore::bdm_jax.text.tokenizer.PromptWarning")
@pytest.mark.parametrize("saved", [False, True])
def test_ids_equal_diffusers(folder, saved):
    """Chinese, English, mixed, empty, over-long and strange texts, in windows of 24 with the padding first."""
    if saved:
        Tokenizer.from_pretrained(folder).save_pretrained(folder / "saved")
        folder = folder / "saved"
    ours = Tokenizer.from_pretrained(folder, 24)
    theirs = Theirs.from_pretrained(str(folder))
    expected = theirs(TEXTS, padding="max_length", max_length=24, truncation=True)
    tokens = read(ours, TEXTS)
    assert tokens.ids[:, 0].tolist() == expected["input_ids"]
    assert np.maximum(tokens.positions[:, 0], 0).tolist() == expected["position_ids"]
    assert (tokens.positions[:, 0] >= 0).astype(int).tolist() == expected["attention_mask"]
    assert ours.vocab_size == theirs.vocab_size and ours.pad == theirs.pad_token_id
    assert Tokenizer.from_pretrained(folder).length == 256


def test_what_is_lost_is_named(folder):
    ours = Tokenizer.from_pretrained(folder, 4)
    with pytest.warns(PromptWarning, match="has 8 tokens, 2 are read; cut off: '水 红灯笼 春夏秋冬'"):
        ours(["水墨山水 红灯笼 春夏秋冬"])
    (folder / "tokenizer.model").write_bytes(pieces(byte_fallback=False))
    plain = Tokenizer.from_pretrained(folder)
    with pytest.warns(PromptWarning, match="vocabulary lacks: 鼎"):
        plain(["红灯笼鼎"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain(["红灯笼"])


def test_what_is_no_model_is_refused(folder):
    whole = (folder / "tokenizer.model").read_bytes()
    for content in (b"", b"junk", whole[: len(whole) // 2]):
        (folder / "tokenizer.model").write_bytes(content)
        with pytest.raises(UserError, match="tokenizer.model: no SentencePiece model, or a damaged one"):
            Tokenizer.from_pretrained(folder)
    (folder / "tokenizer.model").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "ChatGLMTokenizer"}))
    with pytest.raises(UserError, match="no vocabulary; expected tokenizer.model"):
        Tokenizer.from_pretrained(folder)
    (folder / "tokenizer.model").write_bytes(whole)
    (folder / "tokenizer_config.json").write_text(json.dumps({"model_max_length": "long"}))
    with pytest.raises(UserError, match="model_max_length='long' is not a number"):
        Tokenizer.from_pretrained(folder)
