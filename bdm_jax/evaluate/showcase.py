"""The demo's branch, unchanged, with each plug-in trained by configs/emoji_*.py: `python -m bdm_jax.evaluate.showcase`.

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

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image
from rich.progress import track

from bdm_jax import command_line
from bdm_jax.data.captions import concepts
from bdm_jax.data.records import open_source
from bdm_jax.errors import UserError
from bdm_jax.evaluate.features import Features, efficientnet_lite0
from bdm_jax.formats.files import read_json, write_json
from bdm_jax.images.decode import decode_image
from bdm_jax.images.pictures import table
from bdm_jax.paths import DEMO, EMOJI, atomic_file
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

Images = list[np.ndarray]
Sheet = dict[str, Images]  # heading of a row -> its images


@dataclass(frozen=True)
class ShowcaseArgs:
    """Measure the demo's branch with every plug-in that was trained for its backbone."""

    model: Path = DEMO
    """the bridge, with its training.json"""
    runs: Path = Path("runs")
    """folder of the training runs"""
    out: Path = Path("out/showcase")
    """folder for figures.json and the sheets of images"""
    count: int = 100
    """concepts, at random among those trained on in both languages and drawn in both styles"""
    seeds: int = 8
    """images of each subject"""
    seed: int = 0
    """of the choice and of the noise"""
    steps: int = 20
    lora_strength: float = 1.0
    control_strength: float = 1.0


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
    """

    def __init__(self, settings: ShowcaseArgs, features: Features):
        self.settings, self.original = settings, BridgePipeline.from_pretrained(settings.model)
        source = open_source(EMOJI)
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
        numbered = list(enumerate(self.concepts, self.settings.seed))
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
        drawing = Sampling(self.settings.steps, **{"bare": not requests[0].prompt, **settings})
        return list(generate(pipeline, requests, drawing, controls=controls, batch_size=8))


def show(settings: ShowcaseArgs, features: Features | None = None) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """All figures (plain values) and a sheet of images (H,W,3) for each plug-in.

    Raises:
        UserError, FileError: no model, no plug-in at all, or one that does not fit the model.
    """
    found = {name: settings.runs / path for name, path in FILES.items() if (settings.runs / path).exists()}
    if not found:
        raise UserError(f"{settings.runs}: no plug-in was trained there: python train.py emoji-style, emoji-lora, ...")
    material = Material(settings, features or efficientnet_lite0())
    base = {language: material.draw(material.original, material.requests(language)) for language in ("en", "zh")}
    untouched = _accuracies(material, base)
    figures: dict[str, Any] = {"untouched": untouched}
    names = [row["zh"] for row in material.concepts]
    sheets = {
        "untouched": _sheet({"artwork": material.art[OLD], "backbone": base["en"], "+ branch": base["zh"]}, names)
    }
    for name in track(found, description="plug-ins"):
        measure = _controlled if name == "controlnet" else _subject if name in SUBJECTS else _styled
        drawn, effect, rows = measure(material, name, found[name], base)
        accuracy = _accuracies(material, drawn)
        figures[name] = {
            **accuracy,
            **{f"{key}_kept": _share(value, untouched[key]) for key, value in accuracy.items()},
            "effect_bare": effect["en"],
            "effect_with_branch": effect["zh"],
            "effect_kept": _share(effect["zh"], effect["en"]),
        }
        sheets[name] = _sheet(rows, [f"{i}" for i in range(settings.seeds)] if name in SUBJECTS else names)
    if len(found) == len(FILES):
        sheets["together"] = _together(material, found)
    missing = [f"emoji-{name}" for name in FILES if name not in found]
    return {"concepts": len(names), "figures": figures, "not_trained_yet": missing}, sheets


def main(args: Sequence[str] | None = None) -> int:
    """Print the figures, write them and the sheets; 2 for bad input."""

    def command() -> None:
        settings = command_line.parse(ShowcaseArgs, args, prog="python -m bdm_jax.evaluate.showcase")
        report, sheets = show(settings)
        settings.out.mkdir(parents=True, exist_ok=True)
        write_json(settings.out / "figures.json", report)
        for name, sheet in sheets.items():
            with atomic_file(settings.out / f"{name}.png") as file:
                Image.fromarray(sheet).save(file, "PNG")
        _print(report)

    return command_line.run(command)


def _print(report: dict[str, Any]) -> None:
    figures = report["figures"]
    print(f"accuracy of {report['concepts']} concepts, in brackets the share of the untouched system's")
    print("             with the branch   among all   bare, in English   effect bare   with the branch")
    for name, figure in figures.items():
        cells = [
            f"{figure[key]:.0%}" + (f" ({_percent(figure[f'{key}_kept'])})" if name != "untouched" else "")
            for key in ("accuracy", "among_all", "bare")
        ]
        if name != "untouched":
            cells += [f"{figure['effect_bare']:.3f}"]
            cells += [f"{figure['effect_with_branch']:.3f} ({_percent(figure['effect_kept'])})"]
        print(f"{name:12} {cells[0]:>15} {cells[1]:>11} {cells[2]:>18}" + "".join(f" {cell:>14}" for cell in cells[3:]))
    if report["not_trained_yet"]:
        print(f"not trained yet: {', '.join(report['not_trained_yet'])}")


def _with(material: Material, name: str, path: Path) -> BridgePipeline:
    """The bridge with one plug-in that changes weights."""
    if name in ("style", "dreambooth"):
        return BridgePipeline.from_pretrained(material.settings.model, backbone=path)
    if name == "lora":
        strength = material.settings.lora_strength
        return with_loras(material.original, [Spec(path, strength, strength)])
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
    controls = [[Control(network, hint, material.settings.control_strength)] for hint in maps]
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
    subject, system, settings = SUBJECTS[name], _with(material, name, path), material.settings
    seeds = range(settings.seed, settings.seed + settings.seeds)
    image = [material.artwork(subject.id, subject.style)] * settings.seeds

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
    control = Control(load_component(found["controlnet"], kind="controlnet"), edges, settings.control_strength)
    seeds = range(settings.seed, settings.seed + settings.seeds)
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


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _share(part: float, whole: float) -> float | None:
    return part / whole if whole > 0 else None


def _units(features: np.ndarray) -> np.ndarray:
    """(N,regions,channels) -> (N,D) of length 1."""
    flat = features.reshape(len(features), -1).astype(np.float32)
    return flat / np.linalg.norm(flat, axis=1, keepdims=True)


def _sheet(rows: Sheet, names: list[str]) -> np.ndarray:
    return table([images[:_SHOWN] for images in rows.values()], names[:_SHOWN], list(rows))


if __name__ == "__main__":
    sys.exit(main())
