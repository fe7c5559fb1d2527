"""Mixing, ambiguity and composition with stand-ins for the model: one that does all it is told, some that do not."""

from types import SimpleNamespace

import numpy as np
import pytest
from cutouts import cells, concept

from bdm_jax.data import captions, records
from bdm_jax.data.emoji.scenes import COUNTS, GROUNDS, PLACES, Scene, compose, held_out
from bdm_jax.data.emoji.scenes import captions as words_of
from bdm_jax.evaluate import studio
from bdm_jax.evaluate.claims import ambiguity, composition, mixing
from bdm_jax.evaluate.gallery import Gallery
from bdm_jax.evaluate.studio import EvaluateArgs, Studio
from bdm_jax.paths import EMOJI

CULTURE = 4
ROWS = [concept(i, zh_only=i < CULTURE) for i in range(40)]
OTHER = [concept(i, "noto", zh_only=i < CULTURE) for i in range(40)]
ATTRIBUTES = {
    **{f"{ground} background": {"kind": "ground", "ground": ground} for ground in GROUNDS},
    **{place: {"kind": "small", "place": place} for place in PLACES},
    **{count.en: {"kind": "count", "count": number} for number, count in COUNTS.items()},
}


@pytest.fixture
def room(monkeypatch):
    """A studio whose model is `room.draw`, a function of a request and of whether the bare backbone reads it."""
    found = SimpleNamespace(draw=None)

    def generate(pipeline, requests, settings, *, batch_size):
        return (found.draw(request, settings.bare) for request in requests)

    monkeypatch.setattr(studio, "generate", generate)
    monkeypatch.setattr(composition, "round_trip", lambda vae, pictures: pictures)
    monkeypatch.setattr(mixing, "open_source", lambda path: ROWS + OTHER)
    found.studio = Studio(EvaluateArgs(count=12, seeds=2), cells)
    found.studio.__dict__["pipeline"] = SimpleNamespace(vae=None)
    found.studio.__dict__["_opened"] = (Gallery(ROWS, cells), list(range(len(ROWS))), "fluent", False)
    return found


def values(outcome):
    assert len({line.name for line in outcome.lines}) == len(outcome.lines)
    assert all(line.means and line.count for line in outcome.lines)
    return {line.name: line.values for line in outcome.lines}


def plain(row):
    return compose(Scene("plain", (row,)))


def named(text, language):
    """The picture of the thing whose name a prompt begins with; grey for none."""
    rows = [row for row in ROWS if text.split(",")[0] == row[language]]
    return plain(rows[0]) if rows else np.full((128, 128, 3), 128, np.uint8)


def perfect_mixer(request, bare):
    """The branch knows all things, the backbone all attributes and the things that are not of Chinese culture."""
    if bare:
        thing, _, attribute = request.english.partition(", ")
        row = next(row for row in ROWS if row["en"] == thing)
        row = ROWS[-1] if row["zh_only"] else row
        return compose(Scene(records=(row,), **ATTRIBUTES[attribute])) if attribute else plain(row)
    number = int(request.prompt[1:])
    if request.english == "shaded illustration":
        return plain(OTHER[number])
    if request.english in ATTRIBUTES:
        return compose(Scene(records=(ROWS[number],), **ATTRIBUTES[request.english]))
    second = [row for row in ROWS if row["en"] == request.english]
    return compose(Scene("pair", (ROWS[number], *second))) if second else plain(ROWS[number])


def test_a_model_that_mixes(room):
    room.draw = perfect_mixer
    outcome = mixing.measure(room.studio)
    found = values(outcome)
    nothing = {"chinese_alone", "english_alone", "second_chinese", "second_english"}
    assert found == {name: (0.0, 0.0) if name in nothing else (1.0, 1.0) for name in found}
    assert set(found) >= {"both", "both_held_out", "place_both", "count_both", "style_both", "second_both"}
    assert set(outcome.sheets) == {"mixing", "mixing-second"}


def test_a_model_that_does_not_read_english_mixes_nothing(room):
    room.draw = lambda request, bare: perfect_mixer(request if bare else studio.replace(request, english=""), bare)
    found = values(mixing.measure(room.studio))
    assert found["thing"] == found["second_chinese"] == (1.0, 1.0)
    assert all(found[name] == (0.0, 0.0) for name in found if name.endswith("both") or name == "ground")


def test_a_model_that_draws_another_thing_mixes_nothing(room):
    def draw(request, bare):
        return perfect_mixer(studio.replace(request, prompt="物39") if request.prompt else request, bare)

    room.draw = draw
    found = values(mixing.measure(room.studio))
    assert found["ground"] == (1.0, 1.0) and found["thing"] == found["both"] == found["count_both"] == (0.0, 0.0)


def test_nothing_of_chinese_culture_is_said(room):
    room.studio.__dict__["_opened"][1][:] = range(CULTURE, len(ROWS))
    outcome = mixing.measure(room.studio)
    assert not outcome.lines and "nothing to mix" in outcome.notes[0]


def test_a_model_of_one_concept_has_nothing_to_compose(room):
    free = next(i for i, row in enumerate(ROWS) if not any(held_out(row["id"], name) for name in (*GROUNDS, *PLACES)))
    room.studio.__dict__["_opened"][1][:] = [free]
    assert set(composition.questions(room.studio)) <= {"count"}
    assert not ambiguity.measure(room.studio).lines


def scenes_by_words(studio_):
    return {words_of(scene)["zh"]: scene for scenes in composition.questions(studio_).values() for scene in scenes}


def test_a_model_that_composes(room):
    scenes = scenes_by_words(room.studio)
    room.draw = lambda request, bare: compose(scenes[request.prompt])
    outcome = composition.measure(room.studio)
    found = values(outcome)
    assert len(found) == 16 and set(map(np.mean, found.values())) == {1.0}
    assert outcome.sheets["composition"].ndim == 3


def test_only_pairs_held_out_are_asked(room):
    for name, scenes in composition.questions(room.studio).items():
        assert scenes and len(scenes) <= 12
        for scene in scenes:
            attribute = scene.ground or scene.place or (f"x{scene.count}" if scene.count else None)
            assert name == "sides" or held_out(scene.records[0]["id"], attribute)


def test_a_model_that_draws_things_alone_has_no_attributes(room):
    scenes = scenes_by_words(room.studio)
    room.draw = lambda request, bare: plain(scenes[request.prompt].records[0])
    found = values(composition.measure(room.studio))
    # Half of a picture may by chance look more like the other thing, the other half like this one.
    assert found["ground"] == found["count"] == found["place"] == (0.0, 0.0) and max(found["sides"]) < 0.5
    assert found["ground_and_thing"] == (0.0, 0.0) and found["ground_ceiling"] == (1.0,)


def test_a_model_that_knows_attributes_but_not_things(room):
    scenes = scenes_by_words(room.studio)

    def draw(request, bare):
        scene = scenes[request.prompt]
        others = tuple(ROWS[(int(row["id"], 16) + 7) % len(ROWS)] for row in scene.records)
        return compose(studio.replace(scene, records=others))

    room.draw = draw
    found = values(composition.measure(room.studio))
    assert found["ground"] == found["place"] == (1.0, 1.0)
    assert all(found[f"{name}_and_thing"] == (0.0, 0.0) for name in ("ground", "place", "count", "sides"))


def test_ambiguous_words(room, monkeypatch):
    """The branch knows all words; of the translations, "thing 9" is another thing's name, the others nobody's."""
    listed = {ROWS[i]["id"]: "thing 9" if i == 5 else f"word {i}" for i in (1, 5, 6)}
    monkeypatch.setattr(ambiguity, "words", lambda: listed)
    room.draw = lambda request, bare: named(request.english, "en") if bare else named(request.prompt, "zh")
    outcome = ambiguity.measure(room.studio)
    found = values(outcome)
    assert found["branch"] == found["branch_seen"] == found["english_name_seen"] == (1.0, 1.0)
    assert found["translation"] == found["translation_seen"] == (0.0, 0.0)
    assert {line.name: line.count for line in outcome.lines} == {
        **dict.fromkeys(("branch", "translation"), 3),
        **dict.fromkeys(("branch_seen", "translation_seen", "english_name_seen"), 2),
    }
    word = outcome.details["words"]["物5"]
    assert word["translation"] == "thing 9"
    assert word["right"] == {"branch": 1.0, "translation": 0.0, "English name": 1.0}


def test_the_list_of_ambiguous_words_is_about_the_bundled_set():
    source = records.open_source(EMOJI)
    rows = {row["id"]: row for row in (source[int(i)] for i in captions.concepts(source, "fluent", language="zh"))}
    lines = [line.split("\t") for line in ambiguity.WORDS.read_text("utf-8").splitlines() if not line.startswith("#")]
    assert len(ambiguity.words()) == len(lines) >= 40
    for id_, chinese, translation in lines:
        assert rows[id_]["zh"] == chinese and translation != rows[id_]["en"], chinese
