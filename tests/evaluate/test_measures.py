"""Measures on composed pictures, whose attributes are known, and on hand-made wrong ones."""

import numpy as np
import pytest
from cutouts import cells, concept

from bdm_jax.data.emoji.scenes import GROUNDS, PLACES, Scene, compose
from bdm_jax.evaluate import measures, recognise
from bdm_jax.evaluate.gallery import Gallery
from bdm_jax.evaluate.twins import twins


@pytest.fixture(scope="module")
def gallery():
    return Gallery([concept(i) for i in range(40)], cells)


@pytest.fixture
def one(gallery):
    return gallery.rows[5]


def test_every_ground_is_told(one):
    for name in GROUNDS:
        noise = np.random.default_rng(0).normal(0, 6, (128, 128, 3))
        picture = np.clip(compose(Scene("ground", (one,), ground=name)) + noise, 0, 255).astype(np.uint8)
        assert measures.ground(picture) == name
    assert measures.ground(compose(Scene("plain", (one,)))) == measures.WHITE
    assert measures.ground(np.full((64, 64, 3), 20, np.uint8)) is None  # no ground is black


def test_most_of_the_border_decides(one):
    picture = compose(Scene("ground", (one,), ground="blue"))
    picture[:, :40] = GROUNDS["red"].rgb  # a third of it, and half of the corners
    assert measures.ground(picture) == "blue"
    picture[:, :100] = GROUNDS["red"].rgb
    assert measures.ground(picture) == "red"


def test_the_ground_is_taken_away_and_nothing_else(one):
    plain = compose(Scene("plain", (one,)))
    for name in GROUNDS:
        np.testing.assert_array_equal(measures.on_white(compose(Scene("ground", (one,), ground=name))), plain)
    ring = np.full((128, 128, 3), GROUNDS["green"].rgb, np.uint8)
    ring[30:90, 30:90] = 0
    ring[50:70, 50:70] = GROUNDS["green"].rgb  # within the thing: part of it
    found = measures.on_white(ring)
    assert (found[0, 0] == 255).all() and (found[60, 60] == GROUNDS["green"].rgb).all()


@pytest.mark.parametrize("ground", [None, "yellow"])
def test_every_place_is_told(one, ground):
    for name in PLACES:
        assert measures.place(compose(Scene("small", (one,), place=name, ground=ground, shift=(3, -3)))) == name
    assert measures.place(compose(Scene("plain", (one,)))) is None
    assert measures.place(compose(Scene("count", (one,), count=2))) is None
    assert measures.place(np.full((128, 128, 3), 255, np.uint8)) is None


def test_a_part_is_as_large_as_the_picture(one):
    small = measures.part(
        compose(Scene("small", (one,), place="at the top")),
        *recognise.boxes(Scene("small", (one,), place="at the top"))[0],
    )
    difference = np.abs(small.astype(int) - compose(Scene("plain", (one,))))
    assert small.shape == (128, 128, 3) and np.median(difference) < 3  # all but the edges of the cells


def scenes_of(a, b):
    """Of each kind a true scene, and wrong ones: with another attribute, or with another thing."""
    pair = Scene("pair", (a, b))
    yield Scene("ground", (a,), ground="red"), Scene("ground", (a,), ground="pink"), Scene("ground", (b,), ground="red")
    yield Scene("ground", (a,), ground="red"), Scene("plain", (a,)), Scene("ground", (b,), ground="red")
    places = [Scene("small", (a,), place=place) for place in ("on the left", "at the top")]
    yield *places, Scene("small", (b,), place="on the left")
    two, three = (Scene("count", (a,), count=count) for count in (2, 3))
    yield two, three, Scene("count", (b,), count=2)
    yield three, two, Scene("count", (b,), count=3)
    yield two, Scene("plain", (a,)), Scene("count", (b,), count=2)
    yield pair, Scene("pair", (b, a)), Scene("pair", (b, a))


def test_what_a_scene_says_is_recognised_and_what_it_does_not_say_is_not(gallery):
    for true, other, another_thing in scenes_of(gallery.rows[3], gallery.rows[8]):
        pictures = [compose(scene) for scene in (true, other, another_thing)]
        attributes = recognise.attributes(gallery, [true] * 3, pictures)
        assert attributes[:2].tolist() == [True, False], (true.kind, other.kind)
        found = recognise.things(gallery, [true] * 3, pictures)
        assert found[0] and not found[2], true.kind
    grounds = [Scene("ground", (gallery.rows[i],), ground="gray") for i in (3, 8)]
    assert recognise.attributes(gallery, grounds, [compose(s) for s in grounds[::-1]]).all()  # on its own


def test_one_wrong_part_spoils_the_things(gallery):
    a, b = gallery.rows[3], gallery.rows[8]
    picture = compose(Scene("count", (a,), count=3))
    other = compose(Scene("count", (b,), count=3))
    picture[:, 85:] = other[:, 85:]
    assert not recognise.things(gallery, [Scene("count", (a,), count=3)], [picture])[0]


def test_kinds_may_be_mixed(gallery):
    a, b = gallery.rows[1], gallery.rows[2]
    scenes = [Scene("pair", (a, b)), Scene("ground", (b,), ground="blue"), Scene("count", (a,), count=2)]
    pictures = [compose(scene) for scene in scenes]
    assert recognise.attributes(gallery, scenes, pictures).all() and recognise.things(gallery, scenes, pictures).all()
    assert recognise.things(gallery, scenes, [pictures[0], pictures[2], pictures[2]]).tolist() == [True, False, True]


def test_a_search_among_some(gallery):
    picture = [gallery.artwork[7]]
    assert gallery.search([4], picture).nearest[0] == 7
    assert gallery.search([4], picture, among=[4, 7]).nearest[0] == 7
    assert gallery.search([4], picture, among=[9]).nearest[0] in (4, 9)


TWINS = [
    (("1f3c3-200d-2640", "woman running"), ("1f3c3-200d-2642", "man running")),
    (("1f3c3", "person running"), ("1f3c3-200d-2640-200d-27a1", "woman running: facing right")),
    (("1f468-200d-1f33e", "man farmer"), ("1f9d1-200d-1f33e", "farmer")),
    (("1f466", "boy"), ("1f467", "girl")),
    (("1f551", "two o’clock"), ("1f567", "twelve-thirty")),
    (("1f499", "blue heart"), ("1fa75", "light blue heart")),
    (("2764", "red heart"), ("1fa76", "grey heart")),
    (("1f535", "blue circle"), ("26aa", "white circle")),
]
STRANGERS = [
    (("1f468-200d-1f33e", "man farmer"), ("1f469-200d-1f373", "woman cook")),
    (("1f3c3", "person running"), ("1f6b6", "person walking")),
    (("1f535", "blue circle"), ("1f7e6", "blue square")),
    (("1f408", "cat"), ("1f408-200d-2b1b", "black cat")),
    (("1f551", "two o’clock"), ("231a", "watch")),
    (("1f466", "boy"), ("1f468", "man")),
    (("1f436", "dog face"), ("1f436", "dog face")),
]


def test_twins():
    for pairs, expected in ((TWINS, True), (STRANGERS, False)):
        for pair in pairs:
            one, other = ({"id": id_, "en": name} for id_, name in pair)
            assert twins(one, other) is twins(other, one) is expected, pair
