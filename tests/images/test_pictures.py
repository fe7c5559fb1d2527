"""PNG files with their settings inside, safe names, contact sheets without empty boxes."""

import hashlib
import json

import numpy as np
import pytest
from PIL import Image

from bdm_jax.app.metadata import describe, text_chunks, web_ui_parameters
from bdm_jax.errors import FileError
from bdm_jax.images.pictures import contact_sheet, drawable, file_name, next_index, thumbnail, write_png
from bdm_jax.sampling.settings import Request, Sampling

SETTINGS = describe(
    Request("红灯笼，雪", "低质量", "film grain, night", seed=7),
    Sampling(guidance=4.5, size=(32, 48)),
    {"model": "demo"},
)


def test_settings_are_in_the_picture(tmp_path, rng):
    pixels = rng.integers(0, 256, (32, 48, 3)).astype(np.uint8)
    write_png(tmp_path / "x.png", pixels, text_chunks(SETTINGS))
    with Image.open(tmp_path / "x.png") as image:
        assert json.loads(image.text["bdm_jax"]) == SETTINGS
        assert image.text["parameters"] == web_ui_parameters(SETTINGS)
        np.testing.assert_array_equal(np.asarray(image), pixels)
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"]


def test_a_palette_makes_small_files(tmp_path, rng):
    pixels = rng.integers(0, 256, (64, 64, 3)).astype(np.uint8)
    text = text_chunks({"sheet": []})
    digests = [write_png(tmp_path / f"{palette}.png", pixels, text, palette=palette) for palette in (0, 1)]
    files = [(tmp_path / f"{palette}.png").read_bytes() for palette in (0, 1)]
    assert digests == [hashlib.sha256(file).hexdigest() for file in files] and len(files[1]) < len(files[0]) / 2
    with Image.open(tmp_path / "1.png") as image:
        assert json.loads(image.text["bdm_jax"]) == {"sheet": []} and "parameters" not in image.text
        assert np.abs(np.asarray(image.convert("RGB")).astype(int) - pixels).mean() < 32


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


def test_contact_sheet_of_several_sizes():
    colours = [np.full((64, 32, 3), 10, np.uint8), np.full((32, 64, 3), 20, np.uint8)]
    sheet = contact_sheet(iter(colours), ["", ""], 2)
    assert all((sheet == colour).all(-1).sum() == 64 * 32 for colour in (10, 20))


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
