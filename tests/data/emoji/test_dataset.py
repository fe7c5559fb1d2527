"""The bundled set: what it holds, how large it is, and who may see what."""

import collections

import numpy as np
import pytest

from bdm_jax.data import captions, records
from bdm_jax.data.emoji import artwork
from bdm_jax.errors import UserError
from bdm_jax.images import decode
from bdm_jax.paths import ASSETS, EMOJI

LANTERN = "1f3ee"


@pytest.fixture(scope="module")
def source():
    return records.open_source(EMOJI)


@pytest.fixture(scope="module")
def rows(source):
    return [source[i] for i in range(len(source))]


def test_at_least_1500_concepts_in_two_styles(rows):
    styles = collections.defaultdict(set)
    for row in rows:
        styles[row["id"]].add(row["style"])
    assert sum(len(s) >= 2 for s in styles.values()) >= 1500
    assert {row["style"] for row in rows} == set(artwork.STYLES)


def test_records_are_sorted_and_unique(rows):
    keys = [(row["style"], row["id"]) for row in rows]
    assert keys == sorted(set(keys))
    assert all(row["id"] == artwork.concept_id(row["character"]) for row in rows)


def test_every_picture_is_readable_and_not_blank(rows):
    for row in rows[::7]:
        picture = decode.decode_image(row["image"], name=row["id"])
        assert picture.shape == (128, 128, 3) and picture.dtype == np.uint8
        assert picture.std() > 0, row["id"]


def test_names_without_skin_tones_and_distinct_within_a_style(rows):
    for style in artwork.STYLES:
        for language in captions.LANGUAGES:
            names = [row[language] for row in rows if row["style"] == style]
            assert all(names) and len(set(names)) == len(names)
            assert not [name for name in names if "skin tone" in name or "肤色" in name]


def test_zh_only_concepts_are_those_of_the_list(rows):
    listed = {character: (zh, en) for character, zh, en in artwork.zh_only_concepts()}
    found = {row["character"]: (row["zh"], row["en"]) for row in rows if row["zh_only"]}
    assert found == listed and len(listed) >= 25
    assert listed["🏮"] == ("红灯笼", "red paper lantern")
    fluent = {row["character"] for row in rows if row["style"] == "fluent"}
    assert set(listed) <= fluent


def test_english_side_never_sees_zh_only(rows):
    for style in (None, *artwork.STYLES):
        english = captions.concepts(rows, style, language="en")
        assert len(english) > 1500 and not any(rows[i]["zh_only"] for i in english)
        chinese = captions.concepts(rows, style, language="zh")
        assert {rows[i]["id"] for i in chinese} > {rows[i]["id"] for i in english}
    with pytest.raises(UserError, match="zh_only"):
        captions.concepts(rows, language="en", include_zh_only=True)
    with pytest.raises(UserError, match="fluent, noto"):
        captions.concepts(rows, "fluid", language="zh")


def test_captions_start_with_the_name(rows):
    row = next(row for row in rows if row["id"] == LANTERN)
    rng = np.random.default_rng(0)
    drawn = [captions.caption(row, "zh", rng) for _ in range(400)]
    assert 150 < drawn.count("红灯笼") < 250
    assert all(text.split("，")[0] == "红灯笼" and len(text.split("，")) <= 3 for text in drawn)
    assert captions.caption(row, "en", rng, style=True).endswith(", flat illustration")


def test_captions_are_drawn_from_a_list(rows):
    """The name, with each keyword, with each two in either order: what is drawn is there, and all that is there is
    drawn; of a name with two keywords, each with its probability.
    """
    row = next(row for row in rows if len(row["zh_keywords"]) == 2 and len({*row["zh_keywords"], row["zh"]}) == 3)
    name, (first, second) = row["zh"], row["zh_keywords"]
    texts = captions.variants(row, "zh")
    both = [f"{name}，{first}，{second}", f"{name}，{second}，{first}"]
    assert texts == [name, f"{name}，{first}", f"{name}，{second}", *both]
    choices = captions.choices(row, "zh")
    rng = np.random.default_rng(0)
    counts = np.bincount([choices.draw(rng) for _ in range(8000)], minlength=choices.total)
    np.testing.assert_allclose(counts / 8000, [1 / 2, 1 / 8, 1 / 8, 1 / 8, 1 / 8], atol=0.02)  # 4 sigma
    for row in rows[::97]:
        drawn = {captions.caption(row, "en", rng, style=True) for _ in range(50)}
        assert drawn <= {*captions.variants(row, "en", style=True)}
        assert len(captions.variants(row, "en")) == captions.choices(row, "en").total


def test_assets_stay_small():
    assert sum(path.stat().st_size for path in EMOJI.rglob("*") if path.is_file()) <= 25e6
    assert sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()) <= 75e6
