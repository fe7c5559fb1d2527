"""Prompts that change from step to step, prompts of several parts, and tags."""

import time

import pytest

from bdm_jax.errors import UserError
from bdm_jax.text.editing import compose, is_edited, parse_edits, text_at
from bdm_jax.text.tags import LoraTag, take_tags

COUNT = 10


def rows(prompt):
    text = parse_edits(prompt)
    found = [text_at(text, row, COUNT) for row in range(COUNT)]
    assert is_edited(text) or set(found) == {prompt}
    return found


def until(place, before, after):
    return [before] * place + [after] * (COUNT - place)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a [b:c:0.5] d", until(5, "a b d", "a c d")),
        ("a [b:c:3] d", until(3, "a b d", "a c d")),
        ("a [b:c: .25 ]", until(2, "a b", "a c")),
        ("[b:0.3]", until(3, "", "b")),
        ("[b::0.3]", until(3, "b", "")),
        ("[:b:0.3]", until(3, "", "b")),
        ("[b:c:0]", ["c"] * COUNT),
        ("[b:c:10]", ["b"] * COUNT),
        ("[b:c:99]", ["b"] * COUNT),
        ("[b|c]", ["b", "c"] * 5),
        ("x[b||c]", (["xb", "x", "xc"] * 4)[:COUNT]),
        ("[a [b:c:0.2] d:e:0.5]", [*["a b d"] * 2, *["a c d"] * 3, *["e"] * 5]),
        ("[x [b|c]:(d:1.2):0.5]", [*["x b", "x c"] * 2, "x b", *["(d:1.2)"] * 5]),
        ("([b:c:0.5]:1.3)", until(5, "(b:1.3)", "(c:1.3)")),
        ("[(b:1.2):[c]:0.5]", until(5, "(b:1.2)", "[c]")),
        ("(a [b) c:d:0.2]", until(2, "(a b) c", "(a d")),
        (r"[a\:b:0.5]", until(5, "", r"a\:b")),
        (r"[a\|b|c]", [r"a\|b", "c"] * 5),
        ("［红：蓝：０.５］灯笼", until(5, "红灯笼", "蓝灯笼")),
        ("［红｜蓝]", ["红", "蓝"] * 5),
        ("[红:蓝:0.5][猫|狗]", ["红猫", "红狗", "红猫", "红狗", "红猫", "蓝狗", "蓝猫", "蓝狗", "蓝猫", "蓝狗"]),
    ],
)
def test_edits(prompt, expected):
    assert rows(prompt) == expected


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "[a]",
        "[[a] b]",
        "(a:1.3) b: c | d",
        "[a:b]",
        "[a:b",
        "a:b:0.5]",
        "[a(b:c:0.5]",
        "[a (b:1.3) c]",
        r"\[a:b:0.5\]",
        r"\[a|b\]",
        r"[a\|b]",
        "a) b] [c: d",
        "【红：蓝：0.5】",
        "<lora:ink:0.5>",
    ],
)
def test_what_is_no_edit_stays_as_it_is(prompt):
    assert not is_edited(parse_edits(prompt)) and rows(prompt) == [prompt] * COUNT


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a [b|c:0.5]", r"'\[b\|c:0.5\]' is not understood: write .* or \\\[ for brackets that are text"),
        ("[a:b:c:0.5]", r"'\[a:b:c:0.5\]' is not understood"),
        *((text, "understood: .* number from 0 on") for text in ("[a:b:x]", "[a:b:]", "[a::]", "［红：蓝：绿］")),
        *((text, "is not understood") for text in ("[a:b:-3]", "[b:-0.5]", "[a cat:a dog:0,5]", "[b:0，5]")),
        *((text, "is not understood") for text in ("[a:b:c:d]", "[a|b:c]", "[a:b:0.5[c|d]]", "x (y [a:b:c] z)")),
        ("[" * 60 + "a" + ":b:0.5]" * 60, "edits within more than 50 others"),
        ("a AND ", "AND with nothing on one side; for the word, write and"),
        ("a AND b :O.7", r"has the weight 'O.7', which is no number: write it as in :0.7, or \\: for a colon"),
        ("a:0,7 AND b", "has the weight '0,7'"),
        (" AND ".join("abcdefghijklmnopq"), "17 parts joined by AND; at most 16"),
    ],
)
def test_what_is_not_understood(prompt, message):
    with pytest.raises(UserError, match=message) as error:
        compose(prompt)
        parse_edits(prompt)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a cat", [("a cat", 1)]),
        ("a cat :1.2", [("a cat :1.2", 1)]),  # a weight is a part's
        ("a cat AND a dog", [("a cat", 1), ("a dog", 1)]),
        ("a cat :1.2 AND (a:1.5) dog:-.5", [("a cat", 1.2), ("(a:1.5) dog", -0.5)]),
        ("a (cat:1.2) AND [b:c:0.5]", [("a (cat:1.2)", 1), ("[b:c:0.5]", 1)]),
        ("红AND蓝：０.５ AND\n黄", [("红", 1), ("蓝", 0.5), ("黄", 1)]),
        (r"a\:2 AND b\:0,7", [(r"a\:2", 1), (r"b\:0,7", 1)]),
        ("at 7:30 am AND b: no. 7, 8", [("at 7:30 am", 1), ("b: no. 7, 8", 1)]),
        *((word, [(word, 1)]) for word in ("a and b", "BAND", "ANDY", "R-AND-B", "AND_x", r"a \AND b")),
    ],
)
def test_parts(prompt, expected):
    assert [tuple(part) for part in compose(prompt)] == expected


@pytest.mark.parametrize(
    "prompt",
    ["[" * 50_000 + ":", "(:" * 30_000 + ")" * 30_000, "[(:" * 20_000 + "]" * 20_000, "[a|b]" * 10_000, "|)]" * 20_000]
    + ["[:" * 20_000 + "]" * 20_000],
    ids=["open", "round", "unclosed", "turns", "marks", "colons"],
)
def test_hostile_prompts_take_no_time(prompt):
    began = time.process_time()
    text_at(parse_edits(prompt), 1, 3)
    compose(prompt)
    assert time.process_time() - began < 10


@pytest.mark.parametrize(
    ("prompt", "text", "tags"),
    [
        ("a cat", "a cat", []),
        ("a <cat> <b:c>", "a <cat> <b:c>", []),
        ("<lora:ink>红灯笼", "红灯笼", [LoraTag("ink")]),
        ("a<lora:my ink v1.0:0.8> b<lyco:x:-1>", "a b", [LoraTag("my ink v1.0", 0.8, 0.8), LoraTag("x", -1, -1)]),
        ("<lora:ink:0.5:0.8>", "", [LoraTag("ink", 0.8, 0.5)]),
        ("<lora:ink:te=0.5:unet=0.8>", "", [LoraTag("ink", 0.8, 0.5)]),
        ("<lora:ink:0.5:unet=0.8>", "", [LoraTag("ink", 0.8, 0.5)]),
        (r"\<lora:ink:1>", r"\<lora:ink:1>", []),
        ("<LORA:Ink:0.8>a<Lyco:x>", "a", [LoraTag("Ink", 0.8, 0.8), LoraTag("x")]),
        ("＜lora：ink：0.8＞红<lora：水墨：０.５:0.8＞", "红", [LoraTag("ink", 0.8, 0.8), LoraTag("水墨", 0.8, 0.5)]),
        (r"\<lora:ink \＜LORA：ink", r"\<lora:ink \＜LORA：ink", []),
    ],
)
def test_tags(prompt, text, tags):
    assert take_tags(prompt) == (text, tags)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("<hypernet:x:1>", "<hypernet:x:1>: hypernetworks are not supported"),
        ("<lora:x:y>", "<lora:x:y>: write it as"),
        ("<lora::1>", "<lora::1>: write it as"),
        ("<lora:x:nan>", "<lora:x:nan>: write it as"),
        *((tag, f"{tag}: .* or .*< for text") for tag in ("<lora:ink:0.8", "＜LORA：ink：0.8")),
        ("<lora:ink:0.8, a cat <lora:x>", "<lora:ink:0.8, a cat : the tag has no > at its end"),
        ("<Hypernet:x:1>", "hypernetworks are not supported"),
        ("<lora:x:1:1:4>", "<lora:x:1:1:4>: write it as"),
        ("<lora:x:1:dyn=4>", "<lora:x:1:dyn=4>: write it as"),
    ],
)
def test_tags_that_are_not_understood(prompt, message):
    with pytest.raises(UserError, match=message):
        take_tags(prompt)
