"""Captions by five criteria, against scores worked by hand."""

import pytest

from bdm_jax.data.caption_scores import Fractions, best, score
from bdm_jax.errors import UserError

PERFECT = Fractions(1, 1, 0, 0)


def test_ends_and_middles():
    assert score("灯" * 100, PERFECT) == (5, 5, 5, 5, 5)
    assert score("a lamp", Fractions(0.3, 0.1, 0.5, 0.9)) == (1, 1, 1, 1, 1)
    middle = score("灯" * 25 + "lamp", Fractions(0.65, 0.475, 0.25, 0.125))
    assert middle == pytest.approx((2, 3, 2, 3, 4)) and middle.mean == pytest.approx(2.8)
    assert score("红灯笼", PERFECT, long=4).length == 4


def test_the_best_caption_of_several():
    found = {"灯": Fractions(0.3, 1, 0, 0), "红灯笼": PERFECT, "月饼": Fractions(1, 1, 0.5, 0), "白灯笼": PERFECT}
    number, scores = best(b"image", list(found), lambda image, caption: found[caption])
    assert number == 1 and scores == score("红灯笼", PERFECT)
    with pytest.raises(UserError, match="no captions"):
        best(b"image", [], lambda image, caption: PERFECT)
    with pytest.raises(UserError, match=r"hallucinated=1\.5"):
        Fractions(1, 1, 1.5, 0)
