"""PNG files with their settings inside, safe names, contact sheets without empty boxes."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from bdm_jax.pictures import contact_sheet, drawable, file_name, next_index, thumbnail, web_ui_parameters, write_png
from convert.files import FileError

SETTINGS = dict(
    prompt="红灯笼，雪",
    negative="低质量",
    english="film grain, night",
    english_negative="",
    seed=7,
    steps=25,
    guidance=4.5,
    sampler="dpmpp-2m",
    width=48,
    height=32,
    bare=False,
    model="demo",
)


def test_settings_are_in_the_picture(tmp_path, rng):
    pixels = rng.integers(0, 256, (32, 48, 3)).astype(np.uint8)
    write_png(tmp_path / "x.png", pixels, SETTINGS)
    with Image.open(tmp_path / "x.png") as image:
        assert json.loads(image.text["bdm_jax"]) == SETTINGS
        assert image.text["parameters"] == web_ui_parameters(SETTINGS)
        np.testing.assert_array_equal(np.asarray(image), pixels)
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"]


def test_parameters_are_what_web_uis_read_back():
    """AUTOMATIC1111's parser: the last line is name: value pairs, those with commas quoted."""
    *lines, last = web_ui_parameters(SETTINGS).split("\n")
    assert lines == ["红灯笼，雪", "Negative prompt: 低质量"]
    pairs = dict(re.findall(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)', last))
    assert pairs == {
        "Steps": "25",
        "Sampler": "DPM++ 2M",
        "CFG scale": "4.5",
        "Seed": "7",
        "Size": "48x32",
        "Model": "demo",
        "English prompt": '"film grain, night"',
    }


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("红灯笼", "0003-红灯笼-seed7.png"),
        ("../../etc/passwd", "0003-etc-passwd-seed7.png"),
        ('a:b*c?"<>|\n\0d', "0003-a-b-c-d-seed7.png"),
        ("", "0003-seed7.png"),
        ("...", "0003-seed7.png"),
    ],
)
def test_names_are_safe(prompt, name):
    assert file_name(3, prompt, 7) == name


def test_long_names_are_cut():
    assert len(file_name(1, "灯" * 400, 2**32 - 1).encode()) < 130


def test_numbers_go_on(tmp_path):
    assert next_index(tmp_path) == 1
    for name in ("0001-a-seed0.png", "0041-b-seed3.png", "contact-sheet.png", "notes.txt"):
        (tmp_path / name).write_text("")
    assert next_index(tmp_path) == 42


def test_nothing_is_left_where_writing_fails(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="cannot be written"):
        write_png(tmp_path / "file" / "x.png", np.zeros((8, 8, 3), np.uint8))


@pytest.mark.parametrize(("count", "columns", "shape"), [(1, None, (1, 1)), (5, None, (2, 3)), (6, 2, (3, 2))])
def test_contact_sheet_holds_every_picture(count, columns, shape):
    colours = [np.full((64, 64, 3), 40 * index + 10, np.uint8) for index in range(count)]
    sheet = contact_sheet(colours, ["红灯笼"] * count, columns)
    rows, across = shape
    assert sheet.shape[1] == across * (64 + 6) + 6 and sheet.shape[0] > rows * 64
    for index in range(count):
        assert (sheet == 40 * index + 10).all(-1).sum() >= 64 * 64


def test_captions_are_drawn():
    blank = contact_sheet([np.zeros((128, 128, 3), np.uint8)], [""])
    for caption in ("红灯笼", "a red lantern", "𠮷"):
        assert (contact_sheet([np.zeros((128, 128, 3), np.uint8)], [caption]) != blank).any()


def test_no_empty_boxes():
    assert drawable("红灯笼，龙 Ab1\n（水墨）") == "红灯笼，龙 Ab1 （水墨）"
    assert drawable("龙☃𠮷😀") == "龙[2603][20BB7][1F600]"


def test_thumbnail():
    assert thumbnail(np.zeros((512, 1024, 3), np.uint8)).shape == (128, 256, 3)
    assert thumbnail(np.zeros((64, 48, 3), np.uint8)).shape == (64, 48, 3)
