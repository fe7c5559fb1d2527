"""Tables of pictures over settings."""

import json

import numpy as np
import pytest
from PIL import Image

from bdm_jax.app.compare import _split, main
from bdm_jax.images.pictures import table
from bdm_jax.runtime import compile_cache

TINY = ("--steps", "2", "--model")


@pytest.fixture(autouse=True)
def no_cache(monkeypatch):
    """What a script sets for its process is not to stay on in this one."""
    monkeypatch.setattr(compile_cache, "enable", lambda: None)


def test_table_of_settings(tiny_folder, tmp_path, capsys):
    out = tmp_path / "x.png"
    asked = ["红灯笼", "--x", "sampler=ddim,euler-a", "--y", "branch-strength=0,1,2", "--out", str(out)]
    assert main([*asked, *TINY, str(tiny_folder)]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    with Image.open(out) as image:
        assert image.width > 2 * 32 and image.height > 3 * 32
        values = json.loads(image.text["bdm_jax"])
    assert values["compare"] == {"x": "sampler=ddim,euler-a", "y": "branch-strength=0,1,2"}
    assert values["settings"]["prompt"] == "红灯笼" and values["settings"]["steps"] == 2


@pytest.mark.parametrize(
    "axis",
    [
        "prompt=红灯笼|a, b",
        "seed=1,-1",
        "guess=true,false",
        "size=32x32,48x32",
        "residual-strengths=1 1 1 1 0,0 0 0 0 1",
        "masked=True,False",
    ],
)
def test_any_field_is_an_axis(tiny_folder, tmp_path, axis):
    out = tmp_path / "x.png"
    given = ["猫", "--x", axis, "--out", str(out), "--palette", "--steps", "2", "--model", str(tiny_folder)]
    assert main(given) == 0
    with Image.open(out) as image:
        pixels = np.asarray(image.convert("RGB"))
        assert image.mode == "P"
    assert (pixels != pixels[:, ::-1]).any()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["猫"], "--x is missing"),
        (["--x", "seed=1,2"], "no prompt"),
        (["猫", "--x", "guidence=1,2"], "unknown setting 'guidence': did you mean 'guidance'?"),
        (["猫", "--x", "guidance"], "guidance: write an axis as NAME=A,B,C"),
        (["猫", "--x", "guidance=1,,2"], "write an axis as"),
        (["猫", "--x", "guidance=1,two"], "--guidance two: expected a number"),
        (["猫", "--x", "guess=1"], "--guess 1: it is true or false"),
        (["猫", "--x", "sampler=ddim,dim"], "unknown sampler 'dim'"),
        (["猫", "--x", "strength=0.5,2"], "strength 2.0 is outside 0 .. 1"),
        (["猫", "--x", "steps=1,5000"], "steps 5000"),
        (["猫", "--x", "guidance=1,2", "--seed", "-2"], "seed -2 is negative"),
        (["猫", "--x", "seed=" + ",".join("1" * 401)], "401 images are more than"),
        (["猫", "--x", "seed=1,2", "--model", "nowhere"], "nowhere: no such model folder"),
    ],
)
def test_bad_axes_are_one_line(tiny_folder, tmp_path, capsys, given, message):
    model = [] if "--model" in given else ["--model", str(tiny_folder)]
    assert main([*given, *model, "--out", str(tmp_path / "x.png")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ("[红灯笼|熊猫],龙", ["[红灯笼|熊猫]", "龙"]),
        ("[a|b]|c, d", ["[a|b]", "c, d"]),
        ("(a, b:1.2),［红：蓝，紫,绿：0.5］,<lora:x,y:1>", ["(a, b:1.2)", "［红：蓝，紫,绿：0.5］", "<lora:x,y:1>"]),
        ("[a (b, c], d", ["[a (b, c]", " d"]),
        (":(,cat,:)", [":(,cat,:)"]),
        (":(,:[,a>", [":(", ":[", "a>"]),
        (r"\[a,b\]", [r"\[a", r"b\]"]),
        (r"a\|b,c", [r"a\|b", "c"]),
        ("1,,2", ["1", "", "2"]),
    ],
)
def test_values_within_brackets_are_not_split(values, expected):
    assert _split(values) == expected


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("folder", "folder: a folder; name a file"),
        ("i.jpg", "i.jpg: the table is a PNG file, name it"),
        ("table", "table: the table is a PNG file, name it"),
        ("file/i.png", "i.png: cannot be written"),
    ],
)
def test_what_the_table_cannot_be_written_to(tmp_path, capsys, out, message):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    assert main(["猫", "--x", "seed=1,2", "--out", str(tmp_path / out)]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: --out") and captured.err.count("\n") == 1 and message in captured.err
    assert "drawing" not in captured.err and sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_headings_are_drawn_in_chinese():
    black = [[np.zeros((64, 64, 3), np.uint8)] * 2]
    named = table(black, ["红灯笼", "猫"], [""])
    assert (named[:20] < 128).any() and table(black, ["", ""], [""]).shape[0] < named.shape[0]
    assert (table(black, ["红", "猫"], ["红灯笼"])[30:, :40] < 128).any()
