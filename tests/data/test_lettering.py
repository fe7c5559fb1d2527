"""Pictures of text as a set."""

import json

import numpy as np
import pytest

from bdm_jax.data.captions import of_language
from bdm_jax.data.lettering import COLOURS, PAIRS, RULES, Rules, SyntheticText, Writing, captions, coverage, draw
from bdm_jax.data.records import open_source
from bdm_jax.errors import UserError
from bdm_jax.images.decode import decode_image

RULES_OF_TWO = Rules(("山", "灯笼"), count=40, seed=3, size=32, scale=(0.6, 1.0))


def test_a_record_follows_from_its_number_alone():
    one, other = SyntheticText(RULES_OF_TWO), SyntheticText(RULES_OF_TWO)
    last = one[39]
    assert [other[i] for i in range(40)][39] == last
    assert {one[i]["word"] for i in range(40)} == {"山", "灯笼"}
    assert one[0]["image"] != SyntheticText(Rules(**{**vars(RULES_OF_TWO), "seed": 4}))[0]["image"]
    with pytest.raises(IndexError):
        one[40]


def test_captions_say_the_text_in_both_languages():
    writing = Writing("山", "red", "white", 20, (0, 0), np.zeros((2, 3)))
    assert of_language({"key": "", "captions": captions(writing)}, "zh") == ['写着"山"', '白底红字"山"']
    english = ['the Chinese text "山"', 'the Chinese text "山" in red on white']
    assert of_language({"key": "", "captions": captions(writing)}, "en") == english


def test_a_picture_is_ink_over_ground_where_it_is_said_to_be():
    writing = Writing("灯笼", "red", "white", 12, (1.0, 0.5), np.array([[0, 1, 2], [-2, -1, 0]]))
    picture, covered = draw(writing, 32), coverage("灯笼", 12)
    ink, ground = np.array([200, 33, 38]), np.array([240, 241, 242])
    assert covered.shape == (12, 24) and covered.max() > 0.9  # strokes thinner than a pixel do not cover one
    expected = np.full((32, 32, 3), ground, float)
    expected[10:22, 8:32] = covered[..., None] * ink + (1 - covered[..., None]) * ground
    assert np.abs(picture - expected).max() <= 0.5 + 1e-3  # rounding


def test_characters_stand_in_their_squares():
    for character in "国鱼夏":  # which fill theirs: anchored anywhere else, they are cut
        small, large = coverage(character, 40), coverage(character, 48)
        assert abs(small.sum() / large.sum() - (40 / 48) ** 2) < 0.03
        assert max(small[0].sum(), small[-1].sum()) < 0.02 * small.sum()


def test_ink_and_ground_differ_in_luminance():
    grey = {name: np.dot(colour.rgb, (0.299, 0.587, 0.114)) for name, colour in COLOURS.items()}
    assert all(abs(grey[ink] - grey[ground]) >= 100 for ink, ground in PAIRS) and ("red", "blue") not in PAIRS
    source = SyntheticText(Rules(("山",), count=30, size=16, grounds=("white",)))
    assert {source[i]["ground"] for i in range(30)} == {"white"}


def test_opened_as_any_set(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / RULES).write_text(json.dumps({"words": ["山"], "size": 24, "count": 5}), "utf-8")
    source = open_source(folder)
    assert len(source) == 5 and decode_image(source[4]["image"]).shape == (24, 24, 3)
    before = source.contents()
    (folder / RULES).write_text(json.dumps({"words": ["水"], "size": 24, "count": 5}), "utf-8")
    assert open_source(folder).contents() != before
    for wrong in ('{"words": ["山"], "sizes": 3}', "[]", "{", '{"words": []}'):
        (folder / RULES).write_text(wrong, "utf-8")
        with pytest.raises(UserError, match=RULES):
            open_source(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"words": ("\U0002a6d6",)}, "the bundled font"),
        ({"words": ("一二三四五",)}, "it needs 80 pixels"),
        ({"count": 0}, "count=0"),
        ({"scale": (0.9, 0.5)}, "the smaller first"),
        ({"grounds": ("pink",)}, "black, white"),
    ],
)
def test_rules_that_cannot_be(changes, message):
    with pytest.raises(UserError, match=message):
        Rules(**{"words": ("山",), "size": 64, "scale": (0.5, 1.0), **changes})
