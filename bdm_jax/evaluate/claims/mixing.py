"""Mixing: a thing of Chinese culture, told the branch in Chinese, with an attribute that only the English prompt tells.

The backbone has seen the attribute, but none of these things (`zh_only`); the branch is not told the attribute. Both
must be in one picture (`bdm_jax.evaluate.recognise` says what is right), against either half alone: the Chinese prompt
without the English one, and the English name with the attribute on the bare backbone. Where it fails is shown too: a
second *thing* in English.
"""

from collections.abc import Sequence

import numpy as np

from bdm_jax.data.captions import STYLE_PHRASES, concepts
from bdm_jax.data.emoji.scenes import COUNTS, GROUNDS, HALF, PAIR, PLACES, Scene, captions, held_out
from bdm_jax.data.records import open_source
from bdm_jax.evaluate import measures, recognise
from bdm_jax.evaluate.gallery import Gallery
from bdm_jax.evaluate.studio import Images, Line, Outcome, Studio, line, shown, some
from bdm_jax.images.pictures import table

_OTHER_STYLE = {"fluent": "noto", "noto": "fluent"}


def measure(studio: Studio) -> Outcome:
    """Lines `both` (thing and ground), `thing`, `ground`, `chinese_alone`, `english_alone`, `both_held_out`; `..._both`
    for places, counts and the other art style; what becomes of a second thing.
    """
    if not studio.chinese:
        return Outcome([], notes=["the model was trained on nothing of Chinese culture: nothing to mix"])
    scenes = _scenes(studio, "ground", [{"ground": ground} for ground in GROUNDS])
    chosen = some(studio, scenes)
    unseen = some(studio, [scene for scene in scenes if held_out(scene.records[0]["id"], scene.ground)])
    mixed, chinese, english = (_draw(studio, chosen, how) for how in ("mixed", "chinese", "english"))
    ground, thing = ([_judge(studio, chosen, images, of) for images in mixed] for of in ("attribute", "thing"))
    lines = [
        line("both", "a thing in Chinese on a ground in English: both right in one picture", _both(ground, thing)),
        line("thing", "of these: the thing is right", thing),
        line("ground", "of these: the ground is right", ground),
        line("chinese_alone", "both right without the English prompt", _judged(studio, chosen, chinese)),
        line(
            "english_alone",
            "both right by the bare backbone, all in English",
            _judged(studio, chosen, english),
        ),
    ]
    if unseen:
        again = _judged(studio, unseen, _draw(studio, unseen, "mixed"))
        lines.append(line("both_held_out", "both, where no training picture had the thing on the ground", again))
    for name, (kind, given) in {
        "place": ("small", [{"place": place} for place in PLACES]),
        "count": ("count", [{"count": count} for count in COUNTS]),
    }.items():
        these = some(studio, _scenes(studio, kind, given))
        right = _judged(studio, these, _draw(studio, these, "mixed"))
        lines.append(line(f"{name}_both", f"the same with a {name} in English", right))
    lines += _style(studio)
    more, second = _second(studio)
    examples = shown(range(len(chosen)))
    rows = {"+ English": mixed[0], "Chinese alone": chinese[0], "English alone": english[0]}
    names = [f"{chosen[i].records[0]['zh']} + {_english(chosen[i])}" for i in examples]
    sheet = table([[images[i] for i in examples] for images in rows.values()], names, list(rows))
    return Outcome(lines + more, {"mixing": sheet, "mixing-second": second})


def _scenes(studio: Studio, kind: str, given: Sequence[dict]) -> list[Scene]:
    return [Scene(kind, (studio.gallery.rows[i],), **one) for i in studio.chinese for one in given]


def _english(scene: Scene) -> str:
    """The attribute alone."""
    if scene.ground:
        return f"{scene.ground} background"
    return scene.place or COUNTS[scene.count].en


def _draw(studio: Studio, scenes: list[Scene], how: str) -> list[Images]:
    requests = []
    for scene in scenes:
        record = scene.records[0]
        row = studio.gallery.row_of(record["id"])
        if how == "english":  # which no training caption was: `captions` has none in English for such a thing
            named = Scene(scene.kind, ({**record, "zh_only": False},), scene.ground)
            requests.append(studio.request(row, english=captions(named)["en"]))
        else:
            english = _english(scene) if how == "mixed" else ""
            requests.append(studio.request(row, chinese=studio.name(row, "zh"), english=english))
    return studio.draw(f"{scenes[0].kind}, {how}", requests, bare=how == "english")


def _judge(studio: Studio, scenes: list[Scene], images: Images, of: str) -> np.ndarray:
    judge = recognise.attributes if of == "attribute" else recognise.things
    return judge(studio.gallery, scenes, images)


def _judged(studio: Studio, scenes: list[Scene], drawn: list[Images]) -> list[np.ndarray]:
    """Attribute and thing, of each sampling."""
    return _both(*([_judge(studio, scenes, images, of) for images in drawn] for of in ("attribute", "thing")))


def _both(one: list[np.ndarray], other: list[np.ndarray]) -> list[np.ndarray]:
    return [a & b for a, b in zip(one, other, strict=True)]


def _style(studio: Studio) -> list[Line]:
    """The other art style, told in English: the artwork in it is the one of the two that is more alike, and nearest
    among all of its style.
    """
    other = _OTHER_STYLE.get(studio.style)
    source = open_source(studio.settings.data)
    rows = [] if other is None else [source[i] for i in concepts(source, other, language="zh")]
    ids = {row["id"] for row in rows}
    wanted = some(studio, [i for i in studio.chinese if studio.gallery.rows[i]["id"] in ids])
    if not wanted:
        return []
    gallery = Gallery(rows, studio.features)
    places = [gallery.row_of(studio.gallery.rows[i]["id"]) for i in wanted]
    english = STYLE_PHRASES[other]["en"]
    requests = [studio.request(i, chinese=studio.gallery.rows[i]["zh"], english=english) for i in wanted]
    pairs = [[gallery.artwork[a], studio.gallery.artwork[b]] for a, b in zip(places, wanted, strict=True)]
    right = [
        (gallery.closest(images, pairs) == 0) & gallery.search(places, images).right
        for images in studio.draw("style, mixed", requests)
    ]
    return [line("style_both", f"the same with the other art style in English ({english})", right)]


def _second(studio: Studio) -> tuple[list[Line], np.ndarray]:
    """A second thing in English, which the backbone knows well."""
    gallery, rng = studio.gallery, np.random.default_rng(studio.settings.seed)
    known = [i for i in studio.known if not gallery.rows[i]["zh_only"]]
    pairs = some(studio, [(i, int(rng.choice(known))) for i in studio.chinese])
    requests = [studio.request(i, chinese=studio.name(i, "zh"), english=studio.name(j, "en")) for i, j in pairs]
    drawn = studio.draw("second thing", requests)
    chinese, english = (list(side) for side in zip(*pairs, strict=True))
    kept = [gallery.search(chinese, images).right for images in drawn]
    taken = [gallery.search(english, images).right for images in drawn]
    both = [_side_by_side(gallery, pairs, images) for images in drawn]
    lines = [
        line("second_both", "a second thing in English: both are there, side by side", both),
        line("second_chinese", "of these: the picture is that of the Chinese thing alone", kept),
        line("second_english", "of these: the picture is that of the English thing alone", taken),
    ]
    examples = shown(range(len(pairs)))
    rows = {
        "Chinese": [gallery.artwork[pairs[i][0]] for i in examples],
        "English": [gallery.artwork[pairs[i][1]] for i in examples],
        "together": [drawn[0][i] for i in examples],
    }
    names = [f"{requests[i].prompt} + {requests[i].english}" for i in examples]
    return lines, table(list(rows.values()), names, list(rows))


def _side_by_side(gallery: Gallery, pairs: list[tuple[int, int]], images: Images) -> np.ndarray:
    halves = [[measures.part(measures.on_white(image), x, y, HALF) for image in images] for x, y in PAIR]
    left, right = (gallery.same[gallery.search([a for a, _ in pairs], half).nearest] for half in halves)
    wanted = [{gallery.same[a], gallery.same[b]} for a, b in pairs]
    return np.array([{a, b} == own for a, b, own in zip(left, right, wanted, strict=True)])
