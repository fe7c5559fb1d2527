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


NEW = {"<cat>": [60000], "<cat>_two": [60001, 60002], "birb-style": [60003], "梵高风": [60004]}


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a <cat>, red", ["a", 60000, ", red"]),
        ("a<Cat>s", ["a", 60000, "s"]),
        ("<cat><cat>_two <cat>_twos", [60000, 60001, 60002, 60000, "_twos"]),
        (
            "Birb-Style birb-styles 2birb-style birb-style_ birb-style.",
            [60003, "birb-styles 2birb-style birb-style_", 60003, "."],
        ),
        ("一张梵高风画a梵高风b", ["一张", 60004, "画a", 60004, "b"]),
        ("birb-style画", [60003, "画"]),
        ("", []),
    ],
)
def test_added_tokens(text, parts, chinese, english):
    for tokenizer in (chinese, english):
        expected = [i for part in parts for i in ([part] if isinstance(part, int) else tokenizer.content([part])[0])]
        assert tokenizer.with_tokens(NEW).content([text]) == [expected]
        assert tokenizer.with_tokens(dict(reversed(NEW.items()))).content([text, text]) == [expected] * 2


def test_added_tokens_change_nothing_else(chinese, english):
    for tokenizer in (chinese, english):
        before, texts = tokenizer.vocab_size, ["a red cat, 红灯笼", "", " <cat "]
        larger = tokenizer.with_tokens({"<cat>": [60000]}).with_tokens({"<dog>": [60002, 60001]})
        assert larger.vocab_size == 60003 and larger.added == {"<cat>": (60000,), "<dog>": (60002, 60001)}
        assert tokenizer.vocab_size == before and tokenizer.added == {}
        assert larger.content(texts) == tokenizer.content(texts)
        assert 60000 not in tokenizer.content(["<cat>"])[0]


def test_added_tokens_in_another_normal_form(english):
    larger = english.with_tokens({"caf\u00e9-look": [60000]})
    assert larger.content(["cafe\u0301-look"]) == [[60000]]
    assert english.with_tokens({"cafe\u0301-look": [60000]}).content(["CAF\u00c9-look"]) == [[60000]]


def test_added_tokens_of_several_words(english):
    larger = english.with_tokens({" ink style": [60000]})
    for text in ("Ink  STYLE, wash", "ink\nstyle", "embedding:ink style", "EMBEDDING:ink style.pt, wash"):
        assert 60000 in larger.content([text])[0]
    for text in ("pink style", "ink styles", "ink, style"):
        assert larger.content([text]) == english.content([text])


def test_comfyuis_spelling_leaves_nothing_behind(chinese, english):
    for tokenizer in (chinese, english):
        larger = tokenizer.with_tokens({"birb-style": [60000, 60001], "水墨x": [60002]})
        for text in ("embedding:birb-style", "birb-style.safetensors", "Embedding:birb-style.bin"):
            assert larger.content([text]) == [[60000, 60001]]
        assert larger.content(["embedding:水墨x.pt"]) == [[60002]]
        assert larger.content(["embedding: x"]) == tokenizer.content(["embedding: x"])


def test_added_tokens_that_are_cut_off_are_named(chinese, english):
    for tokenizer in (chinese, english):
        with pytest.warns(PromptWarning, match="has 17 tokens, 14 are read; cut off: '<cat> [a龙]"):
            ids = tokenizer.with_tokens({"<cat>": [60000, 60001]})(
                ["<cat>" * 8 + ("a" if tokenizer is english else "龙")]
            )
        assert ids[0, 1:-1].tolist() == [60000, 60001] * 7


def test_characters_without_a_token_beside_an_added_one(chinese):
    with pytest.warns(PromptWarning, match="'龙<cat>☃' has characters that the vocabulary lacks: ☃"):
        chinese.with_tokens({"<cat>": [60000]}).content(["龙<cat>☃"])


@pytest.mark.parametrize(
    ("token", "message"),
    [
        ("", "no text that can be written"),
        (" \u3000", "no text that can be written"),
        ("a\0b", "no text that can be written"),
        (" <cat>", "'<cat>': added already"),
        ("Red", "'Red': a word of the vocabulary already"),
        ("<CAT>", "'<CAT>': added already"),
    ],
)
def test_tokens_that_cannot_be_added(token, message, chinese, english):
    for tokenizer in (chinese, english):
        word = "灯" if token == "Red" and tokenizer is chinese else token
        with pytest.raises(UserError, match=message.replace("Red", word)):
            tokenizer.with_tokens({"<cat>": [60000]}).with_tokens({word: [60001]})


def test_added_tokens_are_not_lost_in_a_folder(chinese, tmp_path):
    with pytest.raises(UserError, match="the added tokens <cat> cannot be saved"):
        chinese.with_tokens({"<cat>": [60000]}).save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: shutil.rmtree(folder), "no such tokenizer folder"),
        (lambda folder: (folder / "vocab.txt").unlink(), "no vocabulary; expected tokenizer.json or vocab.txt"),
        (lambda folder: edit(folder, tokenizer_class="LlamaTokenizer"), "'LlamaTokenizer' is not one of"),
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
