"""Compatibility: the branch, unchanged, with each plug-in that configs/emoji_*.py trained for its backbone.

For every plug-in two questions, each with figures:

  accuracy  does the branch still draw what the Chinese prompt says? An image is right when the artwork nearest to it,
            among that of the measured concepts in both styles, is its concept's in either style; `kept` is the share
            of the untouched system's accuracy. `among_all` is the same among the artwork of all concepts, `bare` that
            of the backbone alone with English prompts: what the plug-in itself costs.
  effect    does the plug-in do with the branch what it does without? The same on the bare backbone with English
            prompts and on the bridge with Chinese ones, each less what it is without the plug-in; `kept` their ratio.

| plug-in | measure |
|---|---|
| style, lora | cosine to the concept's artwork in the new style less that to its artwork in the old one |
| controlnet | F score of the image's edges and the map's, each found within one pixel |
| dreambooth, inversion | cosine to the subject's image |

For the last two rows the branch reads "" (and the backbone "" or the new word): the demo has one image for a name,
and would draw its edges without a map.

Cosines are of EfficientNet-Lite0's features, as in `bdm_jax.evaluate`, less their mean over the artwork, which is in
every image. Plug-ins that are not trained yet are named and left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from bdm_jax.data.captions import concepts
from bdm_jax.data.records import open_source
from bdm_jax.errors import UserError
from bdm_jax.evaluate.studio import STRIDE, Images, Line, Outcome, Studio, bar
from bdm_jax.formats.files import read_json
from bdm_jax.images.decode import decode_image
from bdm_jax.images.pictures import table
from bdm_jax.plugins.controls import Control
from bdm_jax.plugins.hints import canny
from bdm_jax.plugins.install import with_blend, with_embeddings, with_loras
from bdm_jax.plugins.inversion import load_embeddings
from bdm_jax.plugins.spec import Spec
from bdm_jax.sampling.generate import generate
from bdm_jax.sampling.settings import Request, Sampling
from bdm_jax.systems.components import load_component
from bdm_jax.systems.pipeline import BridgePipeline

FILES = {
    "style": "emoji-style/export",
    "lora": "emoji-lora/export/emoji-lora.safetensors",
    "controlnet": "emoji-controlnet/export/controlnet",
    "dreambooth": "emoji-dreambooth/export",
    "inversion": "emoji-inversion/export/learned_embeds.safetensors",
}
OLD, NEW = "fluent", "noto"
_SHOWN = 12  # columns of a sheet
_TAKES = 8  # images of each subject

Sheet = dict[str, Images]  # heading of a row -> its images


@dataclass(frozen=True)
class Subject:
    """What a plug-in was taught by one image: that of a concept (by id) in a style.

    english: the prompt with the new word; of_class: the same without it.
    """

    id: str
    style: str
    english: str
    of_class: str


SUBJECTS = {
    "dreambooth": Subject("1f436", NEW, "sks dog face", "dog face"),
    "inversion": Subject("1f405", OLD, "<stripes>", "black cat"),
}


class Material:
    """What all measurements read: the untouched bridge, the chosen concepts, all artwork and its features.

    Attributes:
        concepts: the chosen records, in the old style.
        art: style -> artwork of the chosen concepts, in their order.
        first: the seed of the first image, of the sampling at hand.

    Raises UserError if no concept that was trained on is in both styles.
    """

    def __init__(self, studio: Studio):
        self.settings, self.original, self.first = studio.settings, studio.pipeline, studio.settings.seed
        settings, features = studio.settings, studio.features
        source = open_source(settings.data)
        rows = {style: [source[int(i)] for i in concepts(source, style, language="zh")] for style in (OLD, NEW)}
        self._art = {(style, row["id"]): decode_image(row["image"]) for style in rows for row in rows[style]}
        trained = set(read_json(settings.model / "training.json").get("concepts", ()))
        both = {row["id"] for row in rows[NEW]} & trained
        known = [row for row in rows[OLD] if row["id"] in both and not row["zh_only"]]
        if not known:
            raise UserError(f"{settings.model}/training.json: none of its concepts is in both styles")
        rng = np.random.default_rng(settings.seed)
        chosen = sorted(rng.choice(len(known), min(settings.count, len(known)), replace=False))
        self.concepts = [known[i] for i in chosen]
        self.art = {style: [self.artwork(row["id"], style) for row in self.concepts] for style in (OLD, NEW)}
        raw = features(list(self._art.values()))
        self._mean = raw.mean(axis=0)
        self._gallery = _units(raw - self._mean)
        self._network = features

    def features(self, images: Images) -> np.ndarray:
        """(N,D) of length 1, less the mean over all artwork."""
        return _units(self._network(images) - self._mean)

    def artwork(self, id_: str, style: str) -> np.ndarray:
        """Of any concept."""
        return self._art[style, id_]

    def requests(self, language: str) -> list[Request]:
        """One per chosen concept; the seed is the place in the list, whatever draws it."""
        numbered = list(enumerate(self.concepts, self.first))
        if language == "zh":
            return [Request(row["zh"], seed=seed) for seed, row in numbered]
        return [Request("", english=row["en"], seed=seed) for seed, row in numbered]

    def accuracy(self, images: Images) -> tuple[float, float]:
        """Share of the images, one per measured concept, whose nearest artwork is that of their concept: among the
        measured concepts, among all.
        """
        measured = {row["id"] for row in self.concepts}
        rows = np.array([id_ in measured for _, id_ in self._art])
        similar = self.features(images) @ self._gallery.T
        return self._right(np.where(rows, similar, -2.0)), self._right(similar)

    def _right(self, similar: np.ndarray) -> float:
        art = list(self._art.values())
        wanted = [{self._art[style, row["id"]].tobytes() for style in (OLD, NEW)} for row in self.concepts]
        nearest = similar.argmax(axis=1)
        return float(np.mean([art[i].tobytes() in own for i, own in zip(nearest, wanted, strict=True)]))

    def cosines(self, images: Images, others: Images) -> np.ndarray:
        """Of each image's features and its partner's."""
        return (self.features(images) * self.features(others)).sum(axis=1)

    def draw(
        self, pipeline: BridgePipeline, requests: list[Request], controls: Sequence[Control] = (), **settings: Any
    ) -> Images:
        """Images; of requests without a Chinese prompt by the bare backbone, unless said otherwise."""
        own = self.settings
        drawing = Sampling(own.steps, own.sampler, own.guidance, **{"bare": not requests[0].prompt, **settings})
        return list(generate(pipeline, requests, drawing, controls=controls, batch_size=own.batch_size))


def measure(studio: Studio) -> Outcome:
    """Lines `NAME_effect` and `NAME_concepts`, the shares that are kept, of each plug-in found in `--runs`.

    Raises UserError, FileError: no concept in both styles, or a plug-in that does not fit the model.
    """
    runs = studio.settings.runs
    found = {name: runs / path for name, path in FILES.items() if (runs / path).exists()}
    missing = ", ".join(f"emoji-{name}" for name in FILES if name not in found)
    notes = [f"not trained in {runs}, so not measured: {missing} (python train.py NAME)"] if missing else []
    if not found:
        return Outcome([], notes=notes)
    material, figures, sheets = Material(studio), [], {}
    for n in range(studio.settings.seeds):
        material.first = studio.settings.seed + n * STRIDE
        figures.append(_figures(material, found, sheets))
    if len(found) == len(FILES):
        sheets["together"] = _together(material, found)
    count = len(material.concepts)
    lines = [Line("untouched", "concepts right without a plug-in", _each(figures, "untouched", "accuracy"), count)]
    for name in found:
        lines += _lines(name, figures, count)
    return Outcome(
        lines, {f"compatibility-{name}": sheet for name, sheet in sheets.items()}, {"samplings": figures}, notes
    )


def _lines(name: str, figures: list[dict[str, Any]], count: int) -> list[Line]:
    effect, kept = _each(figures, name, "effect_kept"), _each(figures, name, "accuracy_kept")
    lines = []
    if None not in effect:  # it does nothing on the bare backbone
        shown = _TAKES if name in SUBJECTS else count
        lines.append(
            Line(f"{name}_effect", "of its effect on the bare backbone is kept with the branch", effect, shown)
        )
    if None not in kept:
        lines.append(Line(f"{name}_concepts", "of the concepts right without it stay right with it", kept, count))
    return lines


def _each(figures: list[dict[str, Any]], name: str, key: str) -> tuple:
    return tuple(one[name][key] for one in figures)


def _figures(material: Material, found: dict[str, Path], sheets: dict[str, np.ndarray]) -> dict[str, Any]:
    """Of one sampling (plain values); `sheets` gets those that it lacks."""
    base = {language: material.draw(material.original, material.requests(language)) for language in ("en", "zh")}
    untouched = _accuracies(material, base)
    figures: dict[str, Any] = {"untouched": untouched}
    names = [row["zh"] for row in material.concepts]
    for name in bar(found, "plug-ins", len(found)):
        measured = _controlled if name == "controlnet" else _subject if name in SUBJECTS else _styled
        drawn, effect, rows = measured(material, name, found[name], base)
        accuracy = _accuracies(material, drawn)
        figures[name] = {
            **accuracy,
            **{f"{key}_kept": _share(value, untouched[key]) for key, value in accuracy.items()},
            "effect_bare": effect["en"],
            "effect_with_branch": effect["zh"],
            "effect_kept": _share(effect["zh"], effect["en"]),
        }
        if name not in sheets:
            sheets[name] = _sheet(rows, [f"{i}" for i in range(_TAKES)] if name in SUBJECTS else names)
    return figures


def _with(material: Material, name: str, path: Path) -> BridgePipeline:
    """The bridge with one plug-in that changes weights."""
    if name in ("style", "dreambooth"):
        return BridgePipeline.from_pretrained(material.settings.model, backbone=path)
    if name == "lora":
        return with_loras(material.original, [Spec(path, 1.0, 1.0)])
    return with_embeddings(material.original, load_embeddings(path))


def _styled(material: Material, name: str, path: Path, base: dict[str, Images]):
    system = _with(material, name, path)
    drawn = {language: material.draw(system, material.requests(language)) for language in base}

    def shift(images: Images) -> float:
        return float(np.subtract(*(material.cosines(images, material.art[style]).mean() for style in (NEW, OLD))))

    effect = {language: shift(drawn[language]) - shift(base[language]) for language in base}
    rows = {"new style": material.art[NEW], "backbone": drawn["en"], "+ branch": drawn["zh"], "before": base["zh"]}
    return drawn, effect, rows


def _controlled(material: Material, name: str, path: Path, base: dict[str, Images]):
    maps, network = [canny(image) for image in material.art[OLD]], load_component(path, kind="controlnet")
    controls = [[Control(network, hint, 1.0)] for hint in maps]
    wordless = [replace(request, prompt="") for request in material.requests("zh")]

    def draw(requests: list[Request], language: str) -> Images:
        bare = language == "en"
        pairs = zip(requests, controls, strict=True)
        return [material.draw(material.original, [request], control, bare=bare)[0] for request, control in pairs]

    drawn = {language: draw(material.requests(language), language) for language in base}
    by_map = {language: draw(wordless, language) for language in base}
    without = {language: material.draw(material.original, wordless, bare=language == "en") for language in base}

    def agree(images: Images) -> float:
        return float(np.mean(list(map(edge_agreement, images, maps))))

    effect = {language: agree(by_map[language]) - agree(without[language]) for language in base}
    rows = {"map": maps, "backbone": by_map["en"], "+ branch": by_map["zh"], "with words": drawn["zh"]}
    return drawn, effect, rows


def _subject(material: Material, name: str, path: Path, base: dict[str, Images]):
    subject, system = SUBJECTS[name], _with(material, name, path)
    seeds = range(material.first, material.first + _TAKES)
    image = [material.artwork(subject.id, subject.style)] * _TAKES

    def draw(pipeline: BridgePipeline, english: str, language: str) -> Images:
        requests = [Request("", english=english, seed=seed) for seed in seeds]
        return material.draw(pipeline, requests, bare=language == "en")

    drawn = {language: draw(system, subject.english, language) for language in base}
    without = {language: draw(material.original, subject.of_class, language) for language in base}

    def near(images: Images) -> float:
        return float(material.cosines(images, image).mean())

    effect = {language: near(drawn[language]) - near(without[language]) for language in base}
    others = {language: material.draw(system, material.requests(language)) for language in base}
    rows = {"subject": image, "backbone": drawn["en"], "+ branch": drawn["zh"], "before": without["zh"]}
    return others, effect, rows


def _together(material: Material, found: dict[str, Path]) -> np.ndarray:
    """A Chinese prompt under all five, over several seeds: the DreamBooth backbone, three tenths of the way to the
    style, the LoRA at as much, the word of the inversion, the subject's edges. Together they weigh a lot: the
    branch acts at half its strength.
    """
    subject, settings, share = SUBJECTS["dreambooth"], material.settings, 0.3
    system = BridgePipeline.from_pretrained(settings.model, backbone=found["dreambooth"])
    system = with_blend(system, found["style"], share, base=settings.model)
    system = with_loras(system, [Spec(found["lora"], share, share)])
    system = with_embeddings(system, load_embeddings(found["inversion"]))
    edges = canny(material.artwork(subject.id, NEW))
    control = Control(load_component(found["controlnet"], kind="controlnet"), edges, 1.0)
    seeds = range(material.first, material.first + _TAKES)
    words = f"{subject.english}, ({SUBJECTS['inversion'].english}:{share})"
    rows = {
        "map": [edges] * len(seeds),
        "all five": material.draw(
            system, [Request("狗脸", english=words, seed=seed) for seed in seeds], [control], branch_strength=0.5
        ),
        "none": material.draw(material.original, [Request("狗脸", seed=seed) for seed in seeds]),
    }
    return _sheet(rows, [f"{seed}" for seed in seeds])


def edge_agreement(image: np.ndarray, edges: np.ndarray) -> float:
    """F score of an image's edges (H,W,3) and those of a map (H,W,3, white on black), each within one pixel."""
    own, wanted = canny(image)[..., 0] > 0, edges[..., 0] > 0
    if not own.any() or not wanted.any():
        return float(own.any() == wanted.any())
    precision, recall = _dilated(wanted)[own].mean(), _dilated(own)[wanted].mean()
    return float(2 * precision * recall / (precision + recall)) if precision + recall else 0.0


def _dilated(mask: np.ndarray) -> np.ndarray:
    """(H,W) bool: what lies within one pixel of the mask."""
    return cv2.dilate(mask.astype(np.uint8), np.ones((3, 3), np.uint8)) > 0


def _accuracies(material: Material, drawn: dict[str, Images]) -> dict[str, float]:
    accuracy, among_all = material.accuracy(drawn["zh"])
    return {"accuracy": accuracy, "among_all": among_all, "bare": material.accuracy(drawn["en"])[0]}


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole > 0 else None


def _units(features: np.ndarray) -> np.ndarray:
    """(N,regions,channels) -> (N,D) of length 1."""
    flat = features.reshape(len(features), -1).astype(np.float32)
    return flat / np.linalg.norm(flat, axis=1, keepdims=True)


def _sheet(rows: Sheet, names: list[str]) -> np.ndarray:
    return table([images[:_SHOWN] for images in rows.values()], names[:_SHOWN], list(rows))
