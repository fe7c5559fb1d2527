"""What grades mean, against values worked by hand."""

import numpy as np
import pytest

from bdm_jax.data.grading import Grader, read_votes, sharpness, text_area, vote
from bdm_jax.errors import UserError


@pytest.mark.parametrize(
    ("levels", "level"),
    [((5, 5, 5), 5), ((5, 4, 5), 5), ((2, 5, 5), 5), ((2, 2, 5), 2), ((3, 4, 5), 3), ((5, 1, 4), 1)],
)
def test_three_votes(levels, level):
    assert vote(levels) == level


@pytest.mark.parametrize("levels", [(5, 5), (0, 5, 5), (5, 5, 6), (4, 4, 4, 4)])
def test_votes_that_are_none(levels):
    with pytest.raises(UserError, match="give 3"):
        vote(levels)


def test_sharpness_is_the_variance_of_the_laplacian():
    pixels = np.zeros((5, 5, 3), np.uint8)
    assert sharpness(pixels) == 0
    pixels[2, 2] = 100  # the Laplacian is -400 there, 100 at its four neighbours, 0 at the other twenty
    assert sharpness(pixels) == pytest.approx((400**2 + 4 * 100**2) / 25)  # its mean is 0


def test_boxes_of_text_count_once():
    assert text_area((10, 20), []) == 0
    assert text_area((10, 20), [(0, 0, 10, 5), (5, 0, 15, 5)]) == pytest.approx(75 / 200)
    assert text_area((10, 20), [(-5, -5, 40, 40)]) == 1


def test_a_users_models_and_votes(picture):
    record = {"key": "a", "image": picture(0, (8, 10)), "aesthetic_score": 4}
    grades = Grader()(record)
    assert set(grades) == {"sharpness", "aesthetic"} and grades["aesthetic"] == 4
    grades = Grader(lambda pixels: [(0, 0, 5, 8)], lambda pixels: 6.5, {"a": (5, 4, 5)})(record)
    assert (grades["text_area"], grades["aesthetic"], grades["level"]) == (0.5, 6.5, 5)
    with pytest.raises(UserError, match="a: votes"):
        Grader(votes={"a": (5, 4)})(record)


def test_votes_of_a_file(tmp_path):
    path = tmp_path / "votes.csv"
    path.write_text("who,key,level\nx,a.png,5\ny,b.png,2\nz,a.png,4\n", "utf-8")
    assert read_votes(path) == {"a.png": [5, 4], "b.png": [2]}
    for text, message in (("key,levels\na,5\n", "level is missing"), ("key,level\na,5\nb,9\n", "line 3: level '9'")):
        path.write_text(text, "utf-8")
        with pytest.raises(UserError, match=message):
            read_votes(path)
