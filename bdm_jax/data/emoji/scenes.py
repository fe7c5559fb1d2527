"""Scenes: pictures composed of cut-outs (artwork with transparency) by seed and number, with captions in two languages.

    plain    one thing, 128 px on white                          "red lantern"
    ground   on one of eight colours                             "red lantern, blue background"
    small    half as large, at one of four places                "a small red lantern on the left"
    count    two or three of it                                  "two red lanterns"
    pair     with another thing, left and right                  "red lantern on the left, panda on the right"

A white ground is never told, every other is. One (concept, attribute) pair in ten is held out (`held_out`), so that
what a model does with pairs that it has never seen can be measured.
"""

import hashlib
import io
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from bdm_jax.data.captions import LANGUAGES, STYLE_PHRASES, is_written_in
from bdm_jax.data.emoji.patches import Patches
from bdm_jax.data.emoji.plurals import is_plural, plural
from bdm_jax.data.source import Source
from bdm_jax.errors import BadRecord, UserError, unknown
from bdm_jax.images.decode import check_cutout

Record = Mapping[str, Any]


class Ground(NamedTuple):
    """A colour: its Chinese word and its RGB in 0 .. 255."""

    zh: str
    rgb: tuple[int, int, int]


class Place(NamedTuple):
    """Where a small thing lies: the Chinese word, its left and top edge, in pixels of a scene of 128."""

    zh: str
    x: int
    y: int


class Count(NamedTuple):
    """How several of a thing lie: words, side of each, left and top edges, in pixels of a scene of 128."""

    en: str
    zh: str
    side: int
    spots: tuple[tuple[int, int], ...]


SIZE = 128
GROUNDS = {
    "red": Ground("红色", (236, 112, 99)),
    "orange": Ground("橙色", (245, 166, 80)),
    "yellow": Ground("黄色", (248, 220, 110)),
    "green": Ground("绿色", (130, 200, 130)),
    "blue": Ground("蓝色", (120, 170, 230)),
    "purple": Ground("紫色", (175, 140, 215)),
    "pink": Ground("粉色", (245, 175, 200)),
    "gray": Ground("灰色", (165, 165, 170)),
}
PLACES = {
    "on the left": Place("左边", 4, 32),
    "on the right": Place("右边", 60, 32),
    "at the top": Place("上边", 32, 4),
    "at the bottom": Place("下边", 32, 60),
}
COUNTS = {
    2: Count("two", "两个", 64, ((0, 32), (64, 32))),
    3: Count("three", "三个", 42, ((1, 43), (43, 43), (85, 43))),
}
PAIR = ((0, 32), (64, 32))
HALF = 64
KINDS = {"plain": 0.5, "ground": 0.16, "small": 0.12, "count": 0.11, "pair": 0.11}
STYLES = {"fluent": 0.65, "noto": 0.35}
STYLE_TOLD = {"fluent": 0.5}  # how often; other styles always, so that a prompt without a style draws this one
ALSO_GROUND = 0.25  # share of small, count and pair that lie on a colour too
GROUND_ONLY = 0.12  # share of the kind ground whose caption tells the ground alone
CULTURE = 0.1  # share drawn among the things of Chinese culture, in addition to those drawn by chance
_SHIFT, _SHADE = 3, 3.0  # small things are moved by up to 3 pixels, a ground's RGB varies by this standard deviation

_SEPARATORS = {"zh": "，", "en": ", "}
_ARTICLE = {
    "en": re.compile(r"(?:an?|the) (?=\w)", re.IGNORECASE),
    "zh": re.compile("一[个只条张件朵把辆盏枚块片颗座位头匹棵幅](?=.)"),
}
_PATCHES = Patches(320 << 20)  # bytes: the bundled set at its three sides


@dataclass(frozen=True)
class Scene:
    """What is seen and what is told. `compose` draws it, `captions` words it.

    kind: a key of `KINDS`. records: the things, of which only "pair" has two, left and right: records of the bundled
    set, or with `image`, `zh` and `en` (None where it has no name in a language); words may do without `image`.
    ground, place: keys of `GROUNDS` and `PLACES`; place is of "small" only. count: a key of `COUNTS`, of "count" only.
    style: the phrase of the art style is told. ground_only: nothing but the ground is told. keywords: told after the
    name, by language. shade: added to the ground's RGB. shift: added to the place, in pixels of a scene of 128.

    Raises UserError for a kind that does not go with the others.
    """

    kind: str
    records: tuple[Record, ...]
    ground: str | None = None
    place: str | None = None
    count: int | None = None
    style: bool = False
    ground_only: bool = False
    keywords: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    shade: tuple[float, float, float] = (0.0, 0.0, 0.0)
    shift: tuple[int, int] = (0, 0)

    def __post_init__(self):
        if self.kind not in KINDS:
            raise unknown("kind of scene", self.kind, KINDS)
        things = 2 if self.kind == "pair" else 1
        if len(self.records) != things:
            raise UserError(f"a scene of the kind {self.kind} has {things} things, not {len(self.records)}")
        given = {
            "ground": (self.ground, GROUNDS, self.kind == "ground"),
            "place": (self.place, PLACES, self.kind == "small"),
            "count": (self.count, COUNTS, self.kind == "count"),
        }
        for name, (value, known, needed) in given.items():
            if value is not None and value not in known:
                raise unknown(name, str(value), map(str, known))
            if needed and value is None or (value is not None and not needed and name != "ground"):
                raise UserError(f"a scene of the kind {self.kind} with {name}={value}")


def held_out(concept: str, attribute: str) -> bool:
    """Whether a pair is never trained on: one in ten, by CRC-32.

    Args:
        concept: `concept_of` a record.
        attribute: a key of `GROUNDS`, a key of `PLACES`, "x2" or "x3". What lies left and right of each other is not
            held out.
    """
    return zlib.crc32(f"{concept}/{attribute}".encode()) % 10 == 0


def concept_of(record: Record) -> str:
    """The id of a record of the bundled set, the key of any other."""
    return str(record["id"] if "id" in record else record["key"])


def compose(scene: Scene, size: int = SIZE) -> np.ndarray:
    """The picture, uint8 (size, size, 3).

    A thing is brought to its side by averaging over areas, in premultiplied colours; what is not square is centred.

    Raises:
        BadRecord: an image that cannot be read or has no transparency.
    """
    canvas = np.full((size, size, 3), 255, np.float32)
    if scene.ground is not None:
        canvas[:] = np.clip(np.add(GROUNDS[scene.ground].rgb, scene.shade), 0, 255)
    for record, side, x, y in _layout(scene):
        side, x, y = (round(value * size / SIZE) for value in (side, x, y))
        x, y = (min(max(value, 0), size - side) for value in (x, y))
        patch = _PATCHES.get(record["image"], side, concept_of(record))
        part = canvas[y : y + side, x : x + side]
        part *= 1 - patch[..., 3:] * np.float32(1 / 255)
        part += patch[..., :3]
    return (canvas + np.float32(0.5)).astype(np.uint8)


def captions(scene: Scene) -> dict[str, str | None]:
    """The captions by language; None where a thing has no name in it, and in English with a `zh_only` thing."""
    return {
        language: _caption(scene, language) if all(_is_named(record, language) for record in scene.records) else None
        for language in LANGUAGES
    }


class Cutouts:
    """The things that scenes are composed of: every record of a source is read once, and kept without its image.

    Args:
        source: records of the bundled set, or with captions in Chinese, English or both.
        indices: those that are used; None for all.
        captions: whether a caption is needed.

    Attributes:
        faults: why records cannot be used, by index: their image cannot be read or is no cut-out (`check_cutout`; the
            bundled set, whose icons were cut out when it was made, may have icons that fill their picture), or they
            have no caption in either language.
    """

    def __init__(self, source: Source, indices: Iterable[int] | None = None, *, captions: bool = True):
        self.source, self.faults = source, {}
        self._things: dict[int, dict[str, Any]] = {}
        for index in map(int, range(len(source)) if indices is None else indices):
            try:
                self._things[index] = _thing(source[index], captions)
            except BadRecord as error:
                self.faults[index] = error
        repeats = getattr(source, "repeats", None)
        self._pools: dict[str | None, list[int]] = {}
        for index, thing in self._things.items():
            times = 1 if repeats is None else int(repeats[index])
            self._pools.setdefault(thing.get("style"), []).extend([index] * times)
        self._culture = {
            style: [index for index in pool if self._things[index].get("zh_only")]
            for style, pool in self._pools.items()
        }
        self._shares = {style: STYLES.get(style, 1.0) for style in sorted(self._pools, key=str)}

    @property
    def indices(self) -> list[int]:
        """Of the records that are used."""
        return list(self._things)

    def complete(self, language: str) -> bool:
        """Whether every scene has a caption in the language."""
        return all(_is_named(thing, language) for thing in self._things.values())

    def draw(self, rng: np.random.Generator) -> tuple[str | None, int]:
        """An art style, and the index of a thing in it. Raises UserError if there are no things."""
        if not self._things:
            first = next(iter(self.faults.values()), "it is empty")
            raise UserError(f"{self.source!r} holds nothing that scenes can be composed of: {first}")
        style = _pick(rng, self._shares)
        culture = self._culture[style]
        pool = culture if culture and rng.random() < CULTURE else self._pools[style]
        return style, pool[int(rng.integers(len(pool)))]

    def another(self, rng: np.random.Generator, style: str | None, than: int) -> int | None:
        """The index of a different thing in the style; None if there is none."""
        pool = self._pools[style]
        found = pool[int(rng.integers(len(pool)))]
        if found != than:
            return found
        others = [index for index in pool if index != than]
        return others[int(rng.integers(len(others)))] if others else None

    def record(self, index: int, image: bool = True) -> dict[str, Any]:
        """A thing, with its image or without."""
        thing = self._things[index]
        return {**thing, "image": self.source[index]["image"]} if image else dict(thing)


def random_scene(cutouts: Cutouts, seed: int, number: int, images: bool = True) -> Scene:
    """Scene `number` of the set with this seed, whatever was drawn before. Pairs that are held out do not appear.

    Args:
        images: with the things' images; without, the scene can be worded, but not composed.
    """
    rng = np.random.default_rng([seed, number])
    style, index = cutouts.draw(rng)
    kind, indices = _pick(rng, KINDS), [index]
    if kind == "pair":
        other = cutouts.another(rng, style, index)
        kind, indices = ("plain", indices) if other is None else (kind, [index, other])
    records = tuple(_worded(cutouts.record(index, images), rng) for index in indices)
    place = count = ground = None
    if kind == "small":
        place = _allowed(rng, records, {name: name for name in PLACES})
        kind = "plain" if place is None else kind
    elif kind == "count":
        count = _allowed(rng, records, {number: f"x{number}" for number in COUNTS})
        kind = "plain" if count is None else kind
    if kind == "ground" or (kind != "plain" and rng.random() < ALSO_GROUND):
        ground = _allowed(rng, records, {name: name for name in GROUNDS})
        kind = "plain" if kind == "ground" and ground is None else kind
    shift = tuple(int(value) for value in rng.integers(-_SHIFT, _SHIFT + 1, 2)) if kind == "small" else (0, 0)
    shade = tuple(float(value) for value in rng.normal(0, _SHADE, 3)) if ground is not None else (0.0, 0.0, 0.0)
    return Scene(
        kind,
        records,
        ground,
        place,
        count,
        rng.random() < STYLE_TOLD.get(style, 1.0),
        kind == "ground" and rng.random() < GROUND_ONLY,
        {language: _keywords(records[0], language, rng) for language in LANGUAGES}
        if kind in ("plain", "ground")
        else {},
        shade,
        shift,
    )


def _is_named(record: Record, language: str) -> bool:
    return record.get(language) is not None and not (language == "en" and record.get("zh_only"))


def _pick(rng: np.random.Generator, shares: Mapping[Any, float]) -> Any:
    """A key, by its share of the sum."""
    at = rng.random() * sum(shares.values())
    for key, share in shares.items():
        at -= share
        if at < 0:
            return key
    return key


def _allowed(rng: np.random.Generator, records: Sequence[Record], attributes: Mapping[Any, str]) -> Any | None:
    """One of the keys whose attribute is held out with none of the things; None if there is none."""
    concepts = [concept_of(record) for record in records]
    free = [key for key, name in attributes.items() if not any(held_out(concept, name) for concept in concepts)]
    return free[int(rng.integers(len(free)))] if free else None


def _thing(record: dict[str, Any], captions: bool) -> dict[str, Any]:
    """A record without its image. Raises BadRecord for one that scenes cannot be composed of."""
    name = concept_of(record)
    check_cutout(record["image"], name, full="style" in record)
    kept = {key: value for key, value in record.items() if key != "image"}
    if kept.get("captions"):
        texts = {
            language: [text for text in kept["captions"] if is_written_in(text, language)] for language in LANGUAGES
        }
        kept |= {language: found or None for language, found in texts.items()}
    if captions and all(kept.get(language) is None for language in LANGUAGES):
        raise BadRecord(name, "no caption", "scenes need its name, as a caption in Chinese, in English or in both")
    return {"zh": None, "en": None, "zh_only": False, **kept}


def _worded(record: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """With one of its captions in each language, where it has several."""
    lists = {language: record[language] for language in LANGUAGES if isinstance(record[language], list)}
    return {**record, **{language: texts[int(rng.integers(len(texts)))] for language, texts in lists.items()}}


def _keywords(record: Record, language: str, rng: np.random.Generator) -> tuple[str, ...]:
    """Half of the time one or two of them, as in `captions.caption`."""
    words = record.get(f"{language}_keywords", ())
    if not len(words) or rng.random() >= 0.5:
        return ()
    return tuple(words[i] for i in rng.permutation(len(words))[: int(rng.integers(1, 3))])


def _layout(scene: Scene) -> list[tuple[Record, int, int, int]]:
    """Each thing with its side, left and top edge, in pixels of a scene of 128."""
    if scene.kind == "small":
        place = PLACES[scene.place]
        return [(scene.records[0], HALF, place.x + scene.shift[0], place.y + scene.shift[1])]
    if scene.kind == "count":
        count = COUNTS[scene.count]
        return [(scene.records[0], count.side, x, y) for x, y in count.spots]
    if scene.kind == "pair":
        return [(record, HALF, x, y) for record, (x, y) in zip(scene.records, PAIR, strict=True)]
    return [(scene.records[0], SIZE, 0, 0)]


def _caption(scene: Scene, language: str) -> str:
    names = [record[language] for record in scene.records]
    parts = [names[0], *scene.keywords.get(language, ())]
    if scene.kind not in ("plain", "ground"):
        bare = [_without_article(record, language) for record in scene.records]
        parts = [_composed(scene, names, bare, language)]
    if scene.ground is not None:
        told = f"{GROUNDS[scene.ground].zh}背景" if language == "zh" else f"{scene.ground} background"
        parts = [told] if scene.ground_only else [*parts, told]
    phrases = STYLE_PHRASES.get(scene.records[0].get("style"))
    if scene.style and phrases:
        parts.append(phrases[language])
    return _SEPARATORS[language].join(parts)


def _composed(scene: Scene, names: Sequence[str], bare: Sequence[str], language: str) -> str:
    if scene.kind == "pair":
        (one, two), (left, right) = names, ("on the left", "on the right")
        if language == "en":
            return f"{one} {left}, {two} {right}"
        return f"{PLACES[left].zh}{one}，{PLACES[right].zh}{two}"
    if scene.kind == "count":
        count = COUNTS[scene.count]
        return f"{count.en} {plural(bare[0])}" if language == "en" else f"{count.zh}{bare[0]}"
    if language == "en":
        return f"{'' if is_plural(bare[0]) else 'a '}small {bare[0]} {scene.place}"
    return f"{PLACES[scene.place].zh}的小{bare[0]}"


def _without_article(record: Record, language: str) -> str:
    """The name, of captions without "a" or 一个 before it; names of the bundled set have none ("A button" is one)."""
    text = record[language]
    return (
        _ARTICLE[language].sub("", text, count=1) if record.get("captions") and _ARTICLE[language].match(text) else text
    )


class Scenes:
    """A `Source` of scenes, which is trained on as any set.

    Its records hold `zh` and `en` (None where the scene has no caption in the language), `image` as BMP bytes, which
    cost nothing to write.

    Args:
        cutouts: what they are composed of.
        count: number of scenes.
        seed: other scenes.
        size: side of the pictures in pixels.

    Raises UserError for a count or size that is not positive.
    """

    def __init__(self, cutouts: Cutouts, count: int, seed: int = 0, size: int = SIZE):
        if count < 1 or size < 1:
            raise UserError(f"{count} scenes of {size} pixels: both must be at least 1")
        self._cutouts, self._count, self._seed, self._size = cutouts, count, seed, size
        self.fingerprint = self._digest(cutouts.source.fingerprint)[:16]

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, Any]:
        scene, picture = self.scene(index), io.BytesIO()
        Image.fromarray(compose(scene, self._size)).save(picture, "BMP")
        return {**_told(index, scene), "image": picture.getvalue()}

    def words(self, index: int) -> dict[str, Any]:
        """A record without its image."""
        return _told(index, self.scene(index, images=False))

    def scene(self, index: int, images: bool = True) -> Scene:
        """See `random_scene`."""
        if not 0 <= index < self._count:
            raise IndexError(index)
        return random_scene(self._cutouts, self._seed, int(index), images)

    def of_language(self, language: str) -> np.ndarray:
        """Indices (int64, ascending) of the scenes that have a caption in the language."""
        if self._cutouts.complete(language):
            return np.arange(self._count, dtype=np.int64)
        scenes = (self.scene(index, images=False) for index in range(self._count))
        return np.flatnonzero([all(_is_named(record, language) for record in scene.records) for scene in scenes])

    def contents(self) -> str:
        """See `Source`."""
        return self._digest(self._cutouts.source.contents())

    def _digest(self, artwork: str) -> str:
        rules = (GROUNDS, PLACES, COUNTS, PAIR, KINDS, STYLES, STYLE_TOLD, ALSO_GROUND, GROUND_ONLY, CULTURE)
        told = repr((artwork, self._count, self._seed, self._size, self._cutouts.indices, rules))
        return hashlib.sha256(told.encode()).hexdigest()[:32]

    def __repr__(self) -> str:
        return f"Scenes({self._cutouts.source!r}, {self._count} scenes)"


def _told(index: int, scene: Scene) -> dict[str, Any]:
    found = captions(scene)
    keywords = {f"{language}_keywords": [] for language in LANGUAGES}  # they are in the captions
    return {"key": f"scene {int(index)}", "captions": [], **found, **keywords, "zh_only": found["en"] is None}
