"""Every form of a prompt file, and what is wrong with those that are none: file and line are named."""

import contextlib
import json
from pathlib import Path

import pytest

from bdm_jax.app import prompts
from bdm_jax.app.prompts import read_prompts
from bdm_jax.errors import UserError
from bdm_jax.formats.plain_text import EncodingNote
from bdm_jax.sampling.settings import Request

BDM_870 = Path(__file__).parents[3] / "shared/data/prompts/BDM_870.json"
DEFAULTS = Request("", negative="低质量", english="film grain", seed=3)


@pytest.fixture
def write(tmp_path):
    def to(name, text):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return to


def requests(path, **options):
    return [row.request for row in read_prompts(path, **options)]


@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_text(write, mark, end):
    path = write("a.txt", mark + end.join(["红灯笼", "", "  # not drawn", " 一只猫, a cat\u2028 ", "龙"]))
    rows = read_prompts(path, DEFAULTS)
    assert [row.number for row in rows] == [1, 2, 3] and not any(row.own_seed for row in rows)
    assert rows[1].request == Request("一只猫, a cat", "低质量", "film grain", seed=3)


def test_csv(write):
    path = write("a.csv", '\ufeffprompt, seed,negative\n"红, 灯笼",7,\n\n猫,,模糊\n"two\nlines",1\n')
    rows = read_prompts(path, DEFAULTS)
    assert [row.request for row in rows] == [
        Request("红, 灯笼", "低质量", "film grain", seed=7),
        Request("猫", "模糊", "film grain", seed=3),
        Request("two\nlines", "低质量", "film grain", seed=1),
    ]
    assert [row.own_seed for row in rows] == [True, False, True]


def test_jsonl_and_files_beside_it(write, tmp_path):
    for name in ("x.png", "m.png"):
        (tmp_path / name).touch()
    lines = [
        {"prompt": "红灯笼", "image": "x.png", "mask": "m.png", "seed": 9},
        {"english": "a cat", "english_negative": "blurry", "negative": None},
    ]
    path = write("a.JSONL", "\n\n".join(map(json.dumps, lines)))
    assert requests(path) == [
        Request("红灯笼", seed=9, image=tmp_path / "x.png", mask=tmp_path / "m.png"),
        Request("", english="a cat", english_negative="blurry"),
    ]


def test_bdms_own_form(write):
    rows = [["1.png", "手到病除", "All is well", "长\n[1]", 'long "x" [', "复合元素", "成语"]] * 2
    path = write("a.json", json.dumps(rows, ensure_ascii=False, indent=1))
    assert requests(path, defaults=DEFAULTS) == [Request("手到病除", "低质量", "film grain", seed=3)] * 2
    assert requests(path, english=True)[0] == Request("All is well")


@pytest.mark.parametrize(
    ("name", "text"), [("a.csv", "prompt,seed\n猫,-1\n"), ("a.jsonl", '{"prompt": "猫", "seed": -1}')]
)
def test_any_seed(write, name, text):
    assert read_prompts(write(name, text)) == [(1, Request("猫", seed=-1), True)]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "gbk"])
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.txt", "红灯笼\r\n熊猫\r\n"),
        ("a.csv", "prompt\r\n红灯笼\r\n熊猫\r\n"),
        ("a.jsonl", '{"prompt": "红灯笼"}\r\n{"prompt": "熊猫"}\r\n'),
        ("a.json", '[["1.png", "红灯笼", "b", "c", "d", "e", "f"], ["2.png", "熊猫", "b", "c", "d", "e", "f"]]'),
    ],
)
def test_what_editors_write(write, name, text, encoding):
    noted = pytest.warns(EncodingNote, match=name) if encoding == "gbk" else contextlib.nullcontext()
    with noted:
        assert [request.prompt for request in requests(write(name, text.encode(encoding)))] == ["红灯笼", "熊猫"]


@pytest.mark.skipif(not BDM_870.is_file(), reason="the authors' prompts are not here")
def test_bdm_870():
    found = requests(BDM_870)
    assert len(found) == 870 and found[0] == Request("手到病除") and all(request.prompt for request in found)


LIST = '[["1.png", "a", "b", "c", "d", "e", "f"],\n'


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.doc", "x", "unknown kind of prompt file '.doc'"),
        ("a.txt", "# nothing\n\n", "a.txt: no prompts in it"),
        ("a.txt", "红灯笼\n猫\n".encode("gbk") + b"\xff", "a.txt, line 3: neither UTF-8 nor GBK"),
        ("a.csv", "prompt,negativ\n", "a.csv, line 1: unknown column 'negativ': did you mean 'negative'?"),
        ("a.csv", "prompt;seed\nx;1\n", "a.csv, line 1: columns are separated by commas; this file has semicolons"),
        ("a.csv", '\n"prompt";"seed"\n', "a.csv, line 2: columns are separated by commas; this file has semicolons"),
        ("a.csv", "prompt\tseed\r\nx\t1".encode("utf-16"), "columns are separated by commas; this file has tabs"),
        ("a.csv", "sep=;\nprompt;seed\n", "this file has semicolons"),
        ("a.csv", "prompt，seed\n", "this file has full-width commas"),
        ("a.csv", "prompt,prompt\n", "a.csv, line 1: column 'prompt' is there twice"),
        ("a.csv", "prompt,seed\nx,1\ny,z\n", "a.csv, line 3: seed 'z'"),
        ("a.csv", "prompt,seed\nx,4294967296\n", "a.csv, line 2: seed '4294967296'"),
        ("a.csv", "prompt,seed\nx,1,2\n", "a.csv, line 2: 3 cells for 2 columns"),
        ("a.csv", "prompt,seed\n,1\n", "a.csv, line 2: no prompt"),
        ("a.csv", 'prompt\n"x\n', "a.csv, line 2: "),
        ("a.csv", "prompt,image\nx,no.png\n", "a.csv, line 2: image .*no.png: no such file"),
        ("a.csv", "prompt,mask\nx,a.csv\n", "a.csv, line 2: a mask without an image"),
        ("a.jsonl", '{"prompt": "x"}\n{"prompt"\n', "a.jsonl, line 2: not JSON"),
        ("a.jsonl", "[" * 100_000, "a.jsonl, line 1: not JSON"),
        ("a.jsonl", '["x"]', "a.jsonl, line 1: not an object"),
        ("a.jsonl", '{"prompt": ["x"]}', r"a.jsonl, line 1: prompt is \"\['x'\]\", not a string"),
        ("a.jsonl", '{"prompt": "x", "seed": true}', "a.jsonl, line 1: seed 'True'"),
        ("a.jsonl", '{"prompt": "x", "seed": 1.5}', "a.jsonl, line 1: seed '1.5'"),
        ("a.jsonl", '{"prompt": "x", "seed": -2}', "a.jsonl, line 1: seed '-2'"),
        ("a.jsonl", '{"prompt": "x", "size": 1}', "a.jsonl, line 1: unknown column 'size'"),
        ("a.json", '{"a": 1}', "a.json: not a list of lists"),
        ("a.json", LIST + "x", "a.json, line 2: not JSON"),
        ("a.json", LIST + ' ["2.png", "a"]]', "a.json, line 2: entry 2 is not a list of 7 strings"),
    ],
)
def test_what_is_wrong_is_named(write, name, text, message):
    with pytest.raises(UserError, match=message) as error:
        read_prompts(write(name, text))
    assert "\n" not in str(error.value)


def test_bounded(write, monkeypatch):
    monkeypatch.setattr(prompts, "MAX_BYTES", 100)
    with pytest.raises(UserError, match="a.txt: larger than"):
        read_prompts(write("a.txt", "x" * 101))


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match="nix.txt: cannot be read"):
        read_prompts(tmp_path / "nix.txt")
