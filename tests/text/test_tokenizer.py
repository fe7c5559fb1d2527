"""Ids equal transformers' own; whatever is lost on the way is named."""

import json
import shutil
import warnings

import numpy as np
import pytest
import transformers

from bdm_jax.errors import UserError
from bdm_jax.paths import TOKENIZERS
from bdm_jax.text.tokenizer import PromptWarning, Tokenizer

CHINESE, ENGLISH = TOKENIZERS / "chinese", TOKENIZERS / "english"


@pytest.fixture(params=["as stored", "saved again"])
def chinese(request, tmp_path):
    tokenizer = Tokenizer.from_pretrained(CHINESE)
    if request.param == "saved again":
        tokenizer.save_pretrained(tmp_path / "zh")
        tokenizer = Tokenizer.from_pretrained(tmp_path / "zh")
    return tokenizer


@pytest.fixture(params=["as stored", "saved again"])
def english(request, tmp_path):
    tokenizer = Tokenizer.from_pretrained(ENGLISH)
    if request.param == "saved again":
        tokenizer.save_pretrained(tmp_path / "en")
        tokenizer = Tokenizer.from_pretrained(tmp_path / "en")
    return tokenizer


def test_chinese_ids(chinese):
    assert (chinese.length, chinese.start, chinese.end, chinese.pad, chinese.vocab_size) == (16, 101, 102, 0, 21128)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ids = chinese(["红灯笼", "", "一只白色的猫, HAT"])
    assert ids.dtype == np.int32 and ids.shape == (3, 16)
    assert ids[0].tolist() == [101, 5273, 4128, 5021, 102] + [0] * 11
    assert ids[1].tolist() == [101, 102] + [0] * 14
    assert 100 not in ids
    theirs = transformers.BertTokenizer.from_pretrained(CHINESE)
    padded = theirs(["一只白色的猫, HAT"], padding="max_length", max_length=16)["input_ids"]
    assert ids[2].tolist() == padded[0]


def test_english_ids(english):
    ids = english(["a red lantern", "", "crème brûlée, 红"])
    theirs = transformers.CLIPTokenizer.from_pretrained(ENGLISH)
    expected = theirs(["a red lantern", "", "crème brûlée, 红"], padding="max_length", max_length=16)["input_ids"]
    assert ids.tolist() == expected
    assert ids[1, 0] == english.start and (ids[1, 1:] == english.end).all()
    assert english.pad == english.end


def test_characters_without_a_token_are_named(chinese):
    with pytest.warns(PromptWarning, match="'龙☃和𠮷'.*vocabulary lacks: ☃ 𠮷"):
        ids = chinese(["龙☃和𠮷"])
    assert (ids == 100).sum() == 2


def test_what_is_cut_off_is_named(chinese, english):
    with pytest.warns(PromptWarning, match="has 16 tokens, 14 are read; cut off: '丑 寅'"):
        ids = chinese(["甲乙丙丁戊己庚辛壬癸天地人子丑寅"])
    assert ids[0, -1] == 102 and 0 not in ids[0]
    with pytest.warns(PromptWarning, match="cut off: 'cat"):
        english(["dog " * 14 + "cat"])


def test_no_texts(chinese):
    assert chinese([]).shape == (0, 16) and chinese.content([]) == []


def test_brackets_and_literal_specials_do_not_break_a_prompt(chinese):
    assert chinese(["(红)[灯]"])[0, 0] == 101


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: shutil.rmtree(folder), "no such tokenizer folder"),
        (lambda folder: (folder / "vocab.txt").unlink(), "no vocabulary; expected tokenizer.json or vocab.txt"),
        (lambda folder: edit(folder, tokenizer_class="T5Tokenizer"), "'T5Tokenizer' is not one of"),
        (lambda folder: edit(folder, model_max_length=2), "leaves no room"),
    ],
)
def test_folders_that_cannot_be_read(change, message, tmp_path):
    folder = shutil.copytree(CHINESE, tmp_path / "zh")
    change(folder)
    with pytest.raises(UserError, match=message):
        Tokenizer.from_pretrained(folder)


def test_bert_positions_are_not_a_window(tmp_path):
    folder = shutil.copytree(CHINESE, tmp_path / "zh")
    edit(folder, model_max_length=512)
    assert Tokenizer.from_pretrained(folder).length == 52


def edit(folder, **values):
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **values}), "utf-8")
