"""The demo's branch, unchanged, with each plug-in trained by configs/emoji_*.py: `python -m bdm_jax.showcase`.

For every plug-in two questions, each with figures:

  accuracy  does the branch still draw what the Chinese prompt says? As in `bdm_jax.evaluate`: nearest artwork among all
            concepts of the style drawn; `kept` is the share of the untouched system's accuracy.
  effect    does the plug-in do with the branch what it does without? The same on the bare backbone with English
            prompts and on the bridge with Chinese ones, each less what it is without the plug-in; `kept` their ratio.

| plug-in | measure |
|---|---|
| style, lora | cosine to the concept's artwork in the new style less that to its artwork in the old one |
| controlnet | F score of the picture's edges and the map's, each found within one pixel |
| dreambooth, inversion | cosine to the subject's picture |

Cosines are of EfficientNet-Lite0's features, as in `bdm_jax.evaluate`, less their mean over the artwork, which is in
every picture. Plug-ins that are not trained yet are named and left out.
"""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import tyro
from PIL import Image
from rich.progress import track

from bdm_jax.components import load_component
from bdm_jax.data.captions import concepts
from bdm_jax.data.records import open_source
from bdm_jax.errors import UserError
from bdm_jax.evaluate import Features, Gallery, efficientnet_lite0
from bdm_jax.generate import generate
from bdm_jax.paths import DEMO, EMOJI
from bdm_jax.pipeline import BridgePipeline
from bdm_jax.plugins.controls import Control
from bdm_jax.plugins.hints import canny
from bdm_jax.plugins.inversion import load_embeddings
from bdm_jax.plugins.spec import Spec
from bdm_jax.settings import Request
from bdm_jax.settings import Settings as Drawing
from convert.files import FileError, atomic_file, read_json, write_json

FILES = {
    "style": "emoji-style/export",
    "lora": "emoji-lora/export/emoji-lora.safetensors",
    "controlnet": "emoji-controlnet/export/controlnet",
    "dreambooth": "emoji-dreambooth/export",
    "inversion": "emoji-inversion/export/learned_embeds.safetensors",
}
OLD, NEW = "fluent", "noto"
# id of the subject's concept, its art style, the English prompt, that of its class, the Chinese prompt beside it
SUBJECTS = {
    "dreambooth": ("1f436", NEW, "sks dog face", "dog face", "狗脸"),
    "inversion": ("1f405", OLD, "<stripes>", "black cat", ""),
}


@dataclass(frozen=True)
class Settings:
    """Measure the demo's branch with every plug-in that was trained for its backbone."""

    model: Path = DEMO
    """the bridge, with its training.json"""
    runs: Path = Path("runs")
    """folder of the training runs"""
    out: Path = Path("out/showcase")
    """folder for figures.json and the sheets of pictures"""
    count: int = 60
    """concepts, at random among those trained on in both languages and drawn in both styles"""
    seeds: int = 8
    """pictures of each subject"""
    seed: int = 0
    """of the choice and of the noise"""
    steps: int = 20
    lora_strength: float = 1.0
    control_strength: float = 1.0


@dataclass(frozen=True)
class Material:
    """What all measurements read. rows, artwork: per style, in the same order of concepts."""

    settings: Settings
    original: BridgePipeline
    galleries: dict[str, Gallery]
    rows: dict[str, list[int]]
    features: Callable[[Sequence[np.ndarray]], np.ndarray]

    def art(self, style: str) -> list[np.ndarray]:
        """Artwork of the chosen concepts."""
        return [self.galleries[style].artwork[i] for i in self.rows[style]]

    def requests(self, language: str) -> list[Request]:
        """One per chosen concept; the seed is the concept's, whatever draws it."""
        rows = [self.galleries[OLD].rows[i] for i in self.rows[OLD]]
        seeds = [self.settings.seed + i for i in self.rows[OLD]]
        if language == "zh":
            return [Request(row["zh"], seed=seed) for row, seed in zip(rows, seeds, strict=True)]
        return [Request("", english=row["en"], seed=seed) for row, seed in zip(rows, seeds, strict=True)]


def show(settings: Settings, features: Features | None = None) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """All figures (plain values) and a sheet of pictures (H,W,3) for each plug-in.

    Raises:
        UserError, FileError: no model, no plug-in at all, or one that does not fit the model.
    """
    found = {name: settings.runs / path for name, path in FILES.items() if (settings.runs / path).exists()}
    if not found:
        raise UserError(f"{settings.runs}: no plug-in was trained there: python train.py emoji-style, emoji-lora, ...")
    material = _material(settings, features or efficientnet_lite0())
    base = {language: _draw(material, material.original, material.requests(language), f"untouched {language}")
            for language in ("zh", "en")}  # fmt: skip
    figures: dict[str, Any] = {"untouched": {"accuracy": _accuracy(material, base["zh"], OLD)}}
    sheets = {"untouched": _sheet([material.art(OLD), base["en"], base["zh"]])}
    for name, path in found.items():
        system = _with(material, name, path)
        measure = _controlled if name == "controlnet" else _subject if name in SUBJECTS else _styled
        accuracy, effect, columns = measure(material, name, path, system, base)
        untouched = figures["untouched"]["accuracy"]
        figures[name] = {
            "accuracy": accuracy,
            "accuracy_kept": accuracy / untouched if untouched else None,
            "effect_bare": effect["en"],
            "effect_with_branch": effect["zh"],
            "effect_kept": effect["zh"] / effect["en"] if effect["en"] > 0 else None,
        }
        sheets[name] = _sheet(columns)
    if len(found) == len(FILES):
        sheets["together"] = _together(material, found)
    missing = [f"emoji-{name}" for name in FILES if name not in found]
    return {"concepts": len(material.rows[OLD]), "figures": figures, "not_trained_yet": missing}, sheets


def main(args: Sequence[str] | None = None) -> int:
    """Print the figures, write them and the sheets; 2 for bad input."""
    try:
        settings = tyro.cli(Settings, args=args, prog="python -m bdm_jax.showcase")
        report, sheets = show(settings)
        settings.out.mkdir(parents=True, exist_ok=True)
        write_json(settings.out / "figures.json", report)
        for name, sheet in sheets.items():
            with atomic_file(settings.out / f"{name}.png") as file:
                Image.fromarray(sheet).save(file, "PNG")
    except (UserError, FileError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"untouched: accuracy {report['figures']['untouched']['accuracy']:.1%} of {report['concepts']} concepts")
    percent = lambda value: "-" if value is None else f"{value:.0%}"  # noqa: E731
    for name, figure in report["figures"].items():
        if name != "untouched":
            print(
                f"{name:11} accuracy {figure['accuracy']:.1%} ({percent(figure['accuracy_kept'])} kept); effect bare "
                f"{figure['effect_bare']:.3f}, with the branch {figure['effect_with_branch']:.3f} "
                f"({percent(figure['effect_kept'])} kept)"
            )
    if report["not_trained_yet"]:
        print(f"not trained yet: {', '.join(report['not_trained_yet'])}")
    return 0


def _material(settings: Settings, features: Features) -> Material:
    trained = set(read_json(settings.model / "training.json").get("concepts", ()))
    source = open_source(EMOJI)
    galleries = {style: Gallery([source[int(i)] for i in concepts(source, style, language="zh")], features)
                 for style in (OLD, NEW)}  # fmt: skip
    where = {style: {row["id"]: i for i, row in enumerate(gallery.rows)} for style, gallery in galleries.items()}
    known = [row["id"] for row in galleries[OLD].rows if row["id"] in trained and not row["zh_only"]]
    known = sorted(id_ for id_ in known if id_ in where[NEW])
    if not known:
        raise UserError(f"{settings.model}/training.json: none of its concepts is in both styles")
    rng = np.random.default_rng(settings.seed)
    chosen = sorted(rng.choice(known, min(settings.count, len(known)), replace=False).tolist())
    mean = np.concatenate([features(gallery.artwork) for gallery in galleries.values()]).mean(axis=0)
    centred = lambda pictures: features(pictures) - mean  # noqa: E731
    rows = {style: [where[style][id_] for id_ in chosen] for style in (OLD, NEW)}
    return Material(settings, BridgePipeline.from_pretrained(settings.model), galleries, rows, centred)


def _with(material: Material, name: str, path: Path) -> BridgePipeline:
    """The bridge with one plug-in; a ControlNet stands beside it."""
    if name in ("style", "dreambooth"):
        return BridgePipeline.from_pretrained(material.settings.model, backbone=path)
    if name == "lora":
        strength = material.settings.lora_strength
        return material.original.with_loras([Spec(path, strength, strength)])
    if name == "inversion":
        return material.original.with_embeddings(load_embeddings(path))
    return material.original


def _styled(material, name, path, system, base):
    drawn = {language: _draw(material, system, material.requests(language), f"{name} {language}") for language in base}
    shift = lambda pictures: float(np.mean(_cosine(material, pictures, NEW) - _cosine(material, pictures, OLD)))  # noqa: E731
    effect = {language: shift(drawn[language]) - shift(base[language]) for language in base}
    return _accuracy(material, drawn["zh"], NEW), effect, [material.art(NEW), drawn["en"], drawn["zh"]]


def _controlled(material, name, path, system, base):
    maps, network = [canny(picture) for picture in material.art(OLD)], load_component(path, kind="controlnet")
    strength, drawn = material.settings.control_strength, {}
    for language in base:
        requests = material.requests(language)
        drawn[language] = [
            _draw(material, system, [request], "", [Control(network, hint, strength)])[0]
            for request, hint in track(list(zip(requests, maps, strict=True)), description=f"{name} {language}")
        ]
    agree = lambda pictures: float(np.mean([edge_agreement(p, m) for p, m in zip(pictures, maps, strict=True)]))  # noqa: E731
    effect = {language: agree(drawn[language]) - agree(base[language]) for language in base}
    return _accuracy(material, drawn["zh"], OLD), effect, [maps, drawn["en"], drawn["zh"]]


def _subject(material, name, path, system, base):
    id_, style, english, of_class, chinese = SUBJECTS[name]
    gallery = material.galleries[style]
    picture = next(art for row, art in zip(gallery.rows, gallery.artwork, strict=True) if row["id"] == id_)
    seeds = range(material.settings.seed, material.settings.seed + material.settings.seeds)
    words = {"en": ("", english), "zh": (chinese, english)}
    plain = {"en": ("", of_class), "zh": (chinese, of_class)}
    make = lambda pipeline, texts, language: _draw(  # noqa: E731
        material,
        pipeline,
        [Request(texts[language][0], english=texts[language][1], seed=seed) for seed in seeds],
        f"{name} {language}",
        bare=language == "en",
    )
    drawn = {language: make(system, words, language) for language in base}
    without = {language: make(material.original, plain, language) for language in base}
    near = lambda pictures: float(np.mean(_cosines(material.features(pictures), material.features([picture]))))  # noqa: E731
    effect = {language: near(drawn[language]) - near(without[language]) for language in base}
    kept = _accuracy(material, _draw(material, system, material.requests("zh"), f"{name} accuracy"), OLD)
    return kept, effect, [[picture] * len(seeds), without["en"], drawn["en"], without["zh"], drawn["zh"]]


def _together(material: Material, found: dict[str, Path]) -> np.ndarray:
    """Artwork, and one request drawn by the untouched bridge and with all five plug-ins at half their strengths."""
    id_, _, english, _, chinese = SUBJECTS["dreambooth"]
    gallery, settings = material.galleries[OLD], material.settings
    art = next(art for row, art in zip(gallery.rows, gallery.artwork, strict=True) if row["id"] == id_)
    request = Request(chinese, english=f"{english}, <stripes>", seed=settings.seed)
    system = BridgePipeline.from_pretrained(settings.model, backbone=found["dreambooth"])
    system = system.with_blend(found["style"], 0.5, base=settings.model)
    system = system.with_loras([Spec(found["lora"], 0.5, 0.5)]).with_embeddings(load_embeddings(found["inversion"]))
    control = Control(load_component(found["controlnet"], kind="controlnet"), canny(art), settings.control_strength)
    (all_five,) = _draw(material, system, [request], "together", [control])
    (plain,) = _draw(material, material.original, [replace(request, english="")], "together")
    return _sheet([[art], [plain], [all_five]])


def _draw(material, pipeline, requests, told: str, controls=(), bare: bool | None = None) -> list[np.ndarray]:
    """Pictures; of requests without a Chinese prompt by the bare backbone, unless said otherwise."""
    bare = not requests[0].prompt if bare is None else bare
    drawing = Drawing(material.settings.steps, bare=bare)
    pictures = generate(pipeline, requests, drawing, controls=controls)
    return list(track(pictures, description=f"{told:20}", total=len(requests)) if told else pictures)


def _accuracy(material: Material, pictures: list[np.ndarray], style: str) -> float:
    return float(material.galleries[style].search(material.rows[style], pictures).right.mean())


def _cosine(material: Material, pictures: list[np.ndarray], style: str) -> np.ndarray:
    """Of each picture and its concept's artwork in a style."""
    return _cosines(material.features(pictures), material.features(material.art(style)))


def _cosines(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    one, other = (x.reshape(len(x), -1) for x in (one, other))
    return (one * other).sum(axis=1) / (np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1))


def edge_agreement(picture: np.ndarray, edges: np.ndarray) -> float:
    """F score of a picture's edges (H,W,3) and those of a map (H,W,3, white on black), each within one pixel."""
    own, wanted = canny(picture)[..., 0] > 0, edges[..., 0] > 0
    if not own.any() or not wanted.any():
        return float(own.any() == wanted.any())
    near = lambda mask: cv2.dilate(mask.astype(np.uint8), np.ones((3, 3), np.uint8)) > 0  # noqa: E731
    precision, recall = near(wanted)[own].mean(), near(own)[wanted].mean()
    return float(2 * precision * recall / (precision + recall)) if precision + recall else 0.0


def _sheet(columns: list[list[np.ndarray]]) -> np.ndarray:
    """Columns of pictures beside each other, at most sixteen rows."""
    return np.concatenate([np.concatenate(column[:16], axis=0) for column in columns], axis=1)


if __name__ == "__main__":
    sys.exit(main())
