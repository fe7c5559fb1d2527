"""Does the model draw what the prompt says? `python -m bdm_jax.evaluate --model assets/demo --count 200`.

The paper's claim (arXiv 2309.00952, section 4) measured at the scale of the bundled set: each image is searched for
among the artwork of all concepts of one style, by the cosine of EfficientNet-Lite0 features; it is right when the
nearest artwork is that of its prompt. Five figures:

  branch            Chinese prompt, English prompt "", random concepts of those trained on
  branch_zh_only    the same for the concepts of Chinese culture, which the backbone never saw
  backbone_zh_only  these with the English name and the bare backbone
  backbone          English names and the bare backbone, for the others among the random concepts
  ceiling           the artwork itself, through the VAE and back

Features are the network's last 7 x 7 map averaged over 3 x 3 regions, so that the arrangement counts too ("where is the
hand of the clock"); the accuracy with features pooled over the whole map is reported beside it (`pooled`).
"""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track

from bdm_jax import command_line
from bdm_jax.errors import UserError
from bdm_jax.evaluate.features import Features
from bdm_jax.evaluate.gallery import Gallery, SearchResult, choose, open_gallery, request, results_sheet
from bdm_jax.formats.files import write_json
from bdm_jax.latents.moments import round_trip
from bdm_jax.paths import DEMO, EMOJI, atomic_file
from bdm_jax.sampling.generate import generate
from bdm_jax.sampling.settings import Request, Sampling
from bdm_jax.systems.pipeline import BridgePipeline


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
    """write the figures and every image's nearest concepts here"""
    sheet: Path | None = None
    """write a contact sheet here (PNG): artwork, image, Chinese name"""


def evaluate(
    settings: EvaluateArgs, features: Features | None = None
) -> tuple[dict[str, Any], dict[str, SearchResult], Gallery]:
    """The figures above; those without a concept (as where none of Chinese culture was trained on) are left out.

    Args:
        settings: what to measure.
        features: images (H,W,3) uint8 -> (N, regions, channels); EfficientNet-Lite0 where None.

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
    gallery, known, style, phrased = open_gallery(settings.model, settings.data, settings.style, features)
    chosen = choose(known, settings.count, settings.seed)
    chinese = [i for i in known if gallery.rows[i]["zh_only"]]
    others = [i for i in chosen if not gallery.rows[i]["zh_only"]]

    def draw(name: str, wanted: list[int], language: str) -> SearchResult:
        requests = [request(gallery.rows[i], language, phrased, settings.seed + i) for i in wanted]
        return gallery.search(wanted, _draw(pipeline, requests, settings, name, branch=language == "zh"))

    results = {"ceiling": gallery.search(chosen, round_trip(pipeline.vae, [gallery.artwork[i] for i in chosen]))}
    drawn = {"branch": (chosen, "zh"), "branch_zh_only": (chinese, "zh")}
    drawn |= {"backbone_zh_only": (chinese, "en"), "backbone": (others, "en")}
    results |= {name: draw(name, wanted, language) for name, (wanted, language) in drawn.items() if wanted}
    return _report(settings, style, pipeline.guidance, results, gallery), results, gallery


def main(args: Sequence[str] | None = None) -> int:
    """Print the figures, write what was asked for; 2 for bad input."""

    def command() -> None:
        settings = command_line.parse(EvaluateArgs, args, prog="python -m bdm_jax.evaluate")
        for path in (settings.json, settings.sheet):
            _check_writable(path)
        report, results, gallery = evaluate(settings)
        if settings.json:
            write_json(settings.json, report)
        if settings.sheet:
            with atomic_file(settings.sheet) as file:
                file.write(results_sheet(results, gallery))
        for name, figure in report["figures"].items():
            right, pooled = f"{figure['accuracy']:6.1%}", f"{figure['pooled']:.1%}"
            print(f"{name:17} {right} of {figure['count']:3} right   (pooled {pooled})")
        print(f"searched among {report['gallery']} concepts; {len(report['same_artwork'])} groups share one artwork")

    return command_line.run(command)


def _draw(
    pipeline: BridgePipeline, requests: list[Request], settings: EvaluateArgs, name: str, branch: bool
) -> list[np.ndarray]:
    drawing = Sampling(settings.steps, settings.sampler, settings.guidance, bare=not branch)
    images: Iterable[np.ndarray] = generate(pipeline, requests, drawing, batch_size=settings.batch_size)
    return list(track(images, description=f"{name:17}", total=len(requests)))


def _report(
    settings: EvaluateArgs, style: str, guidance: float, results: dict[str, SearchResult], gallery: Gallery
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
