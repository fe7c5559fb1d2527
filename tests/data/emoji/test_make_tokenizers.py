"""The demo's tokenizer folders: read by transformers, no unknown tokens, no name cut, split as the real CLIP does."""

import pytest
from transformers import BertTokenizer, CLIPTokenizer

from bdm_jax.data import records
from bdm_jax.data.emoji import make_tokenizers
from bdm_jax.paths import EMOJI, TOKENIZERS


@pytest.fixture(scope="module")
def rows():
    source = records.open_source(EMOJI)
    return list({row["id"]: row for row in (source[i] for i in range(len(source)))}.values())


def test_chinese_names_and_keywords_hold_no_unknown_token(rows):
    tokenizer = BertTokenizer.from_pretrained(TOKENIZERS / "chinese")
    assert len(tokenizer) == 21128 and tokenizer.model_max_length == 16
    assert tokenizer.tokenize("红灯笼") == ["红", "灯", "笼"]
    ids = tokenizer([row["zh"] for row in rows]).input_ids
    assert max(map(len, ids)) <= 16
    ids += tokenizer([keyword for row in rows for keyword in row["zh_keywords"]], truncation=True).input_ids
    assert not [row for row in ids if tokenizer.unk_token_id in row]


def test_english_names_fit(rows):
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZERS / "english")
    assert len(tokenizer) == 512 + make_tokenizers.MERGES + 2 and tokenizer.model_max_length == 16
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == len(tokenizer) - 1
    ids = tokenizer([row["en"] for row in rows]).input_ids
    assert max(map(len, ids)) <= 16
    assert all(row[0] == tokenizer.bos_token_id and row[-1] == tokenizer.eos_token_id for row in ids)


def test_words_whose_merges_are_kept_are_split_as_by_the_real_clip(rows):
    real = CLIPTokenizer.from_pretrained(TOKENIZERS / "clip")
    assert (len(real), real.model_max_length) == (49408, 77)
    assert real("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    cut = CLIPTokenizer.from_pretrained(TOKENIZERS / "english")
    vocabulary = cut.get_vocab()
    words = {word for row in rows for word in row["en"].split()}
    kept = [word for word in words if all(token in vocabulary for token in real.tokenize(word))]
    assert len(kept) > len(words) / 3
    assert [word for word in kept if cut.tokenize(word) != real.tokenize(word)] == []


def test_wrong_vocabulary_files_are_refused(tmp_path, capsys):
    (tmp_path / "vocab.txt").write_text("[PAD]\n")
    arguments = ["--bpe", str(tmp_path / "vocab.txt"), "--vocab", str(tmp_path / "vocab.txt"), "--out", str(tmp_path)]
    assert make_tokenizers.main(arguments) == 2
    assert "SHA-256" in capsys.readouterr().err
