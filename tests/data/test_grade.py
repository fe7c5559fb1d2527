"""Grades beside a set's records, and what is selected by them."""

import json

import numpy as np
import pytest

from bdm_jax.data import grade
from bdm_jax.data.records import open_source
from bdm_jax.data.select import Filters, select
from bdm_jax.errors import UserError
from bdm_jax.images.pictures import encode_png


@pytest.fixture
def folder(tmp_path, write_folder):
    sharp = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    images = [encode_png(sharp), encode_png(np.full((16, 16, 3), 99, np.uint8)), b"", encode_png(sharp[:4])]
    rows = [{"image": image, "text": "灯"} for image in images]
    (tmp_path / "votes.csv").write_text(
        "key,level\n" + "".join(f"0000{row}.png,{level}\n" for row in (0, 1, 3) for level in (5, 5, 4)), "utf-8"
    )
    return write_folder(tmp_path / "set", rows)


def test_graded_counted_and_selected(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["set", str(tmp_path / "graded"), "--votes", str(tmp_path / "votes.csv")]
    assert grade.main([*arguments, "--sharpness", "1", "--level", "5", "--side", "8"]) == 0
    monkeypatch.chdir("/")
    out = capsys.readouterr().out
    assert "3 of 4 records graded" in out and "level 5:        3" in out
    assert "1 pass; left out: 1 empty file, 1 resolution, 1 sharpness" in out
    source = open_source(tmp_path / "graded")
    assert (source[1]["sharpness"], source[1]["level"], source[1]["captions"]) == (0, 5, ["灯"])
    chosen = select(source, Filters(sharpness=1, level=5, side=8))
    assert chosen.indices.tolist() == [0] and chosen.left_out == {"sharpness": 1, "resolution": 1, "empty file": 1}
    with pytest.raises(UserError, match="no text_area"):
        select(source, Filters(text_area=0.5))
    assert source.fingerprint != open_source(folder).fingerprint != source.contents()


def test_grades_of_a_set_that_has_changed(folder, tmp_path):
    assert grade.main([str(folder), str(tmp_path / "graded")]) == 0
    with (folder / "metadata.jsonl").open("a") as file:
        file.write(json.dumps({"file_name": "00000.png"}) + "\n")
    with pytest.raises(UserError, match="grade it again"):
        open_source(tmp_path / "graded")
    (tmp_path / "graded" / "grades.json").write_text("{}", "utf-8")
    with pytest.raises(UserError, match="names no source"):
        open_source(tmp_path / "graded")


def test_functions_that_are_not_there(folder, tmp_path, capsys):
    for name in ("json", "json:nothing", "no_such_module:f"):
        assert grade.main([str(folder), str(tmp_path / "graded"), "--text", name]) == 2
        assert f"--text {name}: no such function" in capsys.readouterr().err
