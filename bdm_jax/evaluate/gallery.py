"""The artwork of the concepts that a model was trained on, searched by what it draws."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from bdm_jax.data import captions, records
from bdm_jax.errors import UserError
from bdm_jax.evaluate.features import Features, efficientnet_lite0
from bdm_jax.formats.files import read_json
from bdm_jax.images.decode import decode_image
from bdm_jax.images.pictures import drawable, font
from bdm_jax.paths import EMOJI
from bdm_jax.sampling.settings import Request


@dataclass(frozen=True)
class SearchResult:
    """One figure: which concepts were drawn, the images, and what was found nearest to them.

    Attributes:
        wanted, nearest: (N,) rows of the gallery.
        right, pooled: (N,) bool, by 3x3 features and by pooled ones.
    """

    wanted: np.ndarray
    images: list[np.ndarray]
    nearest: np.ndarray
    right: np.ndarray
    pooled: np.ndarray


class Gallery:
    """The artwork of all concepts of one style, to be searched by images.

    `same[i]` is the first row whose artwork equals that of row i bit for bit: such rows count as one concept.
    """

    def __init__(self, rows: list[dict], features: Features):
        self.rows, self._features = rows, features
        self.artwork = [decode_image(row["image"], name=row["id"]) for row in rows]
        first: dict[bytes, int] = {}
        self.same = np.array([first.setdefault(art.tobytes(), i) for i, art in enumerate(self.artwork)])
        self._known = features(self.artwork)
        self._row_of = {row["id"]: i for i, row in enumerate(rows)}

    def row_of(self, id_: str) -> int:
        """The row of a concept."""
        return self._row_of[id_]

    @property
    def duplicates(self) -> list[list[str]]:
        """Chinese names of the concepts that share their artwork."""
        shared = [np.flatnonzero(self.same == i) for i in np.unique(self.same)]
        return [[self.rows[i]["zh"] for i in group] for group in shared if len(group) > 1]

    def search(
        self, wanted: Sequence[int], images: list[np.ndarray], among: Sequence[int] | None = None
    ) -> SearchResult:
        """Find each image's nearest artwork and compare it with the wanted one.

        among: search these rows and the wanted one only; all where None.
        """
        wanted = np.asarray(wanted, np.int64)
        allowed = None
        if among is not None:
            allowed = np.zeros((len(wanted), len(self.rows)), bool)
            allowed[:, among] = allowed[np.arange(len(wanted)), wanted] = True
        found = self._features(images)
        nearest = _nearest(found, self._known, allowed)
        pooled = _nearest(found.mean(1, keepdims=True), self._known.mean(1, keepdims=True), allowed)
        right, pooled = (self.same[rows] == self.same[wanted] for rows in (nearest, pooled))
        return SearchResult(wanted, images, nearest, right, pooled)

    def closest(self, images: list[np.ndarray], candidates: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
        """(N,) int: which of its own candidates (each (H,W,3), as many for every image) each image looks most like."""
        found = self._features(images)
        known = self._features([candidate for own in candidates for candidate in own])
        known = known.reshape(len(images), -1, *known.shape[1:])
        return np.array([_nearest(a[None], b)[0] for a, b in zip(found, known, strict=True)])


def open_gallery(
    model: Path, data: Path = EMOJI, style: str | None = None, features: Features | None = None
) -> tuple[Gallery, list[int], str, bool]:
    """The artwork, the rows of it that the model was trained on, its style, and whether prompts name the style.

    Args:
      model: a pipeline folder with training.json.
      data: a prepared data set.
      style: art style to search in; as trained where None.
      features: `efficientnet_lite0` where None.

    Raises UserError or FileError for a folder without training.json, an unknown style, a missing feature network.
    """
    trained, style, phrased = _trained_on(model, style)
    source = records.open_source(data)
    rows = [source[i] for i in captions.concepts(source, style, language="zh")]
    gallery = Gallery(rows, features or efficientnet_lite0())
    known = [i for i, row in enumerate(gallery.rows) if row["id"] in trained]
    if not known:
        raise UserError(f"{data}: none of the concepts of {model}/training.json are in style {style}")
    return gallery, known, style, phrased


def choose(known: Sequence[int], count: int, seed: int) -> list[int]:
    """`count` of the rows, at random."""
    rng = np.random.default_rng(seed)
    return sorted(rng.choice(known, min(count, len(known)), replace=False).tolist())


def request(row: dict, language: str, phrased: bool, seed: int) -> Request:
    """What asks for a row's concept in Chinese, or of the bare backbone in English."""
    text = captions.name(row, language, style=phrased)
    return Request(text, seed=seed) if language == "zh" else Request("", english=text, seed=seed)


def results_sheet(results: dict[str, SearchResult], gallery: Gallery, columns: int = 10, side: int = 80) -> np.ndarray:
    """(H,W,3): per figure a heading and cells of artwork, image, Chinese name; in red, what a wrong one shows."""
    heading, caption = font(20), font(12)
    width, height = 2 * side + 16, side + 24
    lines = {name: -(-len(result.wanted) // columns) for name, result in results.items()}
    sheet = Image.new("RGB", (columns * width, sum(lines.values()) * height + len(lines) * 40), "white")
    pen, top = ImageDraw.Draw(sheet), 0
    for name, result in results.items():
        pen.text((8, top + 8), f"{name}: {result.right.mean():.1%} of {len(result.right)}", "black", heading)
        top += 40
        cells = zip(result.wanted, result.images, result.nearest, result.right, strict=True)
        for place, (wanted, image, nearest, right) in enumerate(cells):
            x, y = place % columns * width + 8, top + place // columns * height
            for left, shown in ((x, gallery.artwork[wanted]), (x + side, image)):
                sheet.paste(Image.fromarray(shown).resize((side, side), Image.Resampling.LANCZOS), (left, y))
            text = gallery.rows[wanted]["zh"] + ("" if right else f" ≠ {gallery.rows[nearest]['zh']}")
            pen.text((x, y + side), drawable(text)[:16], "black" if right else "red", caption)
        top += lines[name] * height
    return np.asarray(sheet)


def _trained_on(model: Path, style: str | None) -> tuple[set[str], str, bool]:
    """Ids of the concepts, the style to draw, and whether captions name it (as after training on several)."""
    path = model / "training.json"
    training = read_json(path)
    if not isinstance(training.get("concepts"), list):
        raise UserError(f"{path}: the list `concepts` (ids of the concepts trained on) is missing")
    trained_style = training.get("style")
    style = style or trained_style
    if style is None:
        raise UserError(f"{model} was trained on all styles: choose one with --style")
    if trained_style not in (None, style):
        raise UserError(f"{model} was trained on the style {trained_style!r}, not on {style!r}")
    return set(training["concepts"]), style, bool(training.get("style_in_caption"))


def _nearest(found: np.ndarray, known: np.ndarray, allowed: np.ndarray | None = None) -> np.ndarray:
    """Rows of `known` (M,R,C) with the greatest cosine to each of `found` (N,R,C), among those `allowed` (N,M)."""
    found, known = (x.reshape(len(x), -1).astype(np.float32) for x in (found, known))
    known = known / np.linalg.norm(known, axis=1, keepdims=True)
    similar = found @ known.T
    return np.argmax(similar if allowed is None else np.where(allowed, similar, -np.inf), axis=1)
