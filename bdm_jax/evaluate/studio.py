"""What all claims share: the pipeline, the artwork that it was trained on, pictures drawn in several samplings."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, TypeVar

import numpy as np
import tyro
from rich.progress import track

from bdm_jax.command_line import ModelPath, progress_console
from bdm_jax.data import captions
from bdm_jax.errors import UserError
from bdm_jax.evaluate.features import Features, efficientnet_lite0
from bdm_jax.evaluate.gallery import Gallery, choose, open_gallery
from bdm_jax.paths import DEMO, EMOJI
from bdm_jax.sampling.generate import generate
from bdm_jax.sampling.settings import Request, Sampling, any_seed
from bdm_jax.systems.fetch import local
from bdm_jax.systems.pipeline import BridgePipeline

STRIDE = 10_000  # between the seeds of two samplings: more than there are concepts
_SHOWN = 12  # columns of a sheet

Images = list[np.ndarray]
T = TypeVar("T")


@dataclass(frozen=True)
class EvaluateArgs:
    """Measure what a trained bridge can do, claim by claim, on the bundled set."""

    claim: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="NAME[,...]")] = ()
    """what to measure (again for more); by default all: native, mixing, ambiguity, composition, compatibility"""
    model: ModelPath = DEMO
    """pipeline folder with training.json beside its components"""
    data: Path = EMOJI
    """prepared data set"""
    style: str | None = None
    """art style to draw and to search in; as trained where left out"""
    count: int = 40
    """random concepts, or pairs of concept and attribute, for each figure"""
    seeds: int = 3
    """samplings: everything is drawn so many times, from other noise"""
    seed: int = 0
    """of the choice of concepts and of the first noise; -1 for any"""
    steps: int = 15
    guidance: float | None = None
    """the pipeline's own where left out"""
    sampler: str = "dpmpp-2m"
    batch_size: int = 8
    runs: Path = Path("runs")
    """folder of the training runs, where compatibility finds the plug-ins"""
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """write the figures and what was found in the pictures here"""
    sheets: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None
    """write contact sheets into this folder (PNG)"""


@dataclass(frozen=True)
class Line:
    """One figure of a claim.

    Attributes:
        name: what is counted.
        means: the same as a sentence.
        values: of each sampling: shares from 0 to 1, or decibels.
        count: pictures in each sampling.
        decibels: whether the values are.
    """

    name: str
    means: str
    values: tuple[float, ...]
    count: int
    decibels: bool = False

    def shown(self, value: float) -> str:
        """A value as a table has it."""
        return f"{value:.1f} dB" if self.decibels else f"{value:.1%}"


@dataclass(frozen=True)
class Outcome:
    """What measuring a claim gives: its figures, contact sheets (H,W,3) by name, plain values for the JSON, notes."""

    lines: list[Line]
    sheets: dict[str, np.ndarray] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


class Studio:
    """Draws for the claims and recognises what was drawn. Networks and artwork are loaded when first used.

    Args:
        settings: what to measure.
        features: images (H,W,3) uint8 -> (N, regions, channels); EfficientNet-Lite0 where None.

    Raises:
        UserError, FileError: a count below 1; later no such model, one without a branch or training.json, an unknown
        style, or no feature network.
    """

    def __init__(self, settings: EvaluateArgs, features: Features | None = None):
        for name in ("count", "seeds", "steps", "batch_size"):
            if getattr(settings, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} {getattr(settings, name)} is less than 1")
        self.settings = replace(settings, model=local(settings.model), seed=any_seed(settings.seed))
        self._features = features
        self._drawn: dict[tuple[Request, bool], np.ndarray] = {}

    @cached_property
    def features(self) -> Features:
        """The network that recognises."""
        return self._features or efficientnet_lite0()

    @cached_property
    def pipeline(self) -> BridgePipeline:
        """The bridge."""
        pipeline = BridgePipeline.from_pretrained(self.settings.model)
        if pipeline.branch is None:
            raise UserError(f"{self.settings.model} has no branch: there is nothing to compare")
        return pipeline

    @cached_property
    def _opened(self) -> tuple[Gallery, list[int], str, bool]:
        _ = self.pipeline  # what is wrong with the model is said before the artwork is read
        return open_gallery(self.settings.model, self.settings.data, self.settings.style, self.features)

    @property
    def gallery(self) -> Gallery:
        """The artwork of all concepts in the style."""
        return self._opened[0]

    @property
    def known(self) -> list[int]:
        """Rows of the gallery that the model was trained on."""
        return self._opened[1]

    @property
    def style(self) -> str:
        """The art style that is drawn and searched in."""
        return self._opened[2]

    @property
    def chinese(self) -> list[int]:
        """Those of Chinese culture (`zh_only`), which no English caption was ever about."""
        return [i for i in self.known if self.gallery.rows[i]["zh_only"]]

    def chosen(self) -> list[int]:
        """`--count` of the known rows, at random."""
        return choose(self.known, self.settings.count, self.settings.seed)

    def name(self, row: int, language: str) -> str:
        """The prompt for a concept alone."""
        return captions.name(self.gallery.rows[row], language, style=self._opened[3])

    def request(self, row: int, chinese: str = "", english: str = "") -> Request:
        """What asks for a picture of a concept; the noise is the concept's, whatever the words are."""
        return Request(chinese, english=english, seed=self.settings.seed + row)

    def draw(self, name: str, requests: Sequence[Request], bare: bool = False) -> list[Images]:
        """Of each sampling the images of the requests, in order; what was drawn before is not drawn again.

        Args:
            name: of the progress bar.
            requests: what to draw; in the n-th sampling from other noise.
            bare: by the backbone alone.
        """
        settings = self.settings
        every = [[replace(r, seed=r.seed + n * STRIDE) for r in requests] for n in range(settings.seeds)]
        asked = dict.fromkeys(request for sampling in every for request in sampling)
        new = [request for request in asked if (request, bare) not in self._drawn]
        if new:
            drawing = Sampling(settings.steps, settings.sampler, settings.guidance, bare=bare)
            images: Iterable[np.ndarray] = generate(self.pipeline, new, drawing, batch_size=settings.batch_size)
            shown = bar(images, f"{name:24}", len(new))
            self._drawn |= {(request, bare): image for request, image in zip(new, shown, strict=True)}
        return [[self._drawn[request, bare] for request in sampling] for sampling in every]


def bar(items: Iterable[T], doing: str, total: int) -> Iterable[T]:
    """The items with a progress bar on stderr: stdout is for the figures."""
    return track(items, doing, total, console=progress_console())


def line(name: str, means: str, right: Sequence[np.ndarray]) -> Line:
    """A figure from what is right in each sampling, (N,) bool."""
    return Line(name, means, tuple(float(np.mean(one)) for one in right), len(right[0]))


def some(studio: Studio, items: list) -> list:
    """`--count` of the items, at random, in their order; with a larger count the same ones and more."""
    order = np.random.default_rng(studio.settings.seed).permutation(len(items))[: studio.settings.count]
    return [items[i] for i in sorted(order)]


def shown(items: Sequence) -> Sequence:
    """As many as a sheet has columns, spread over all."""
    return [items[i * len(items) // _SHOWN] for i in range(_SHOWN)] if len(items) > _SHOWN else items
