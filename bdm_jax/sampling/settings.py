"""What an image shall show and how it is drawn. Knows no network and no JAX: a command line can be checked first."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from bdm_jax.errors import UserError

REFERENCE_SAMPLER = "dpmpp-2m"
ImageSource = str | Path | np.ndarray  # a file, or (H,W,3) uint8; as a mask (H,W) uint8, 255 where it is repainted


@dataclass(frozen=True)
class Request:
    """What one image shall show.

    `prompt` and `negative` are the branch's (Chinese), `english` and `english_negative` the backbone's; the paper's way
    is to leave the English ones empty. A bare backbone reads its English prompts or, where they are empty, the others.
    All may hold weights, as in "(red:1.3) lantern" (see `text.grammar`). The seed is in [0, 2**32).

    `image` is an image to begin from; with a `mask` of its size, only what is white there is repainted (inpainting).
    """

    prompt: str
    negative: str = ""
    english: str = ""
    english_negative: str = ""
    seed: int = 0
    image: ImageSource | None = None
    mask: ImageSource | None = None


def parse_size(text: str) -> tuple[int, int]:
    """`512x768` (width, height) -> (768, 512), (height, width) as arrays have it. Raises ValueError."""
    width, x, height = text.lower().partition("x")
    if not (x and width.isdecimal() and height.isdecimal() and len(text) < 20):
        raise ValueError(f"{text}: write it as WIDTHxHEIGHT, for example 512x512")
    return int(height), int(width)


_SIZE = tyro.constructors.PrimitiveConstructorSpec(
    nargs=1,
    metavar="WIDTHxHEIGHT",
    instance_from_str=lambda texts: parse_size(texts[0]),
    is_instance=lambda value: value is None or isinstance(value, tuple),
    str_from_instance=lambda size: ["None" if size is None else f"{size[1]}x{size[0]}"],
)


@dataclass(frozen=True)
class Sampling:
    """How images are drawn. Fractions count the sampler's evaluations: 0 before the first, 1 after the last."""

    steps: int = 25
    """Sampling steps."""
    sampler: str | None = None
    """Sampler, by default the model's own; an unknown name shows those there are."""
    guidance: float | None = None
    """Classifier-free guidance, 1 for none; by default the model's own."""
    english_guidance: float | None = None
    """Guidance of the English prompts alone, --guidance then being that of the branch's."""
    guidance_start: float = 0.0
    """Fraction of the steps before which there is no guidance."""
    guidance_end: float = 1.0
    """Fraction of the steps after which there is no guidance."""
    guidance_rescale: float = 0.0
    """From 0 to 1: how much of the contrast that guidance adds is removed (0.7 suits v-prediction)."""
    size: Annotated[tuple[int, int] | None, _SIZE] = None
    """Size in pixels; by default that of the image, or what the model was trained at."""
    branch_strength: float = 1.0
    """What the branch's residuals are multiplied with."""
    branch_start: float = 0.0
    """Fraction of the steps before which the branch is inactive."""
    branch_end: float = 1.0
    """Fraction of the steps after which the branch is inactive."""
    residual_strengths: tuple[float, ...] = ()
    """One more factor for each residual of the branch, from the finest skip to the middle (13 for SD1.5)."""
    guess: bool = False
    """The branch acts on the positive half only, its fine residuals faintly (ControlNet's guess mode)."""
    branch_every: int = 1
    """Approximation: run the branch at every K-th evaluation only; in between its residuals stay."""
    cache_every: int = 1
    """Approximation: run all at every K-th evaluation only, in between the backbone's first level alone (DeepCache)."""
    merge_tokens: float = 0.0
    """Approximation: merge this share of the first level's tokens, up to 0.75, for self-attention (token merging)."""
    vae_tile: int = 0
    """Approximation: larger images go through the autoencoder in tiles of this many pixels a side; 0 for whole ones."""
    clip_skip: int = 1
    """Which layer of the backbone's text encoder is read: 1 the model's own, 2 the one before it."""
    strength: float = 0.75
    """How much of the schedule an image is redrawn with (denoising strength): 0 keeps it, 1 ignores it."""
    hires: float = 1.0
    """Draw, enlarge by this factor, and draw over that (hires fix): large images without repeated subjects."""
    hires_strength: float = 0.5
    """Denoising strength over the enlarged image."""
    masked: bool | None = None
    """Hide padding from the branch, for branches trained so; by default the model's own."""
    reference: bool = False
    """As the reference implementation, quirks included (see docs/sampling.md)."""
    bare: bool = False
    """Draw with the backbone alone, which reads English."""


def check(settings: Sampling) -> None:
    """What can be known without a model. Raises UserError for the first setting that is not valid."""
    finite = ("guidance", "english_guidance", "branch_strength")
    for name in finite:
        value = getattr(settings, name)
        if value is not None and not math.isfinite(value):
            raise UserError(f"{_words(name)} {value} is not a finite number")
    if not all(map(math.isfinite, settings.residual_strengths)):
        raise UserError(f"residual strengths {settings.residual_strengths} are not all finite numbers")
    fractions = ("guidance_start", "guidance_end", "guidance_rescale", "branch_start", "branch_end")
    for name in (*fractions, "strength", "hires_strength"):
        value = getattr(settings, name)
        if not 0.0 <= value <= 1.0:
            raise UserError(f"{_words(name)} {value} is outside 0 .. 1")
    for name in ("guidance", "branch"):
        start, end = getattr(settings, f"{name}_start"), getattr(settings, f"{name}_end")
        if start >= end:
            raise UserError(f"{name} start {start} is not before {name} end {end}")
    if not 1.0 <= settings.hires <= 8.0:
        raise UserError(f"hires {settings.hires} is outside 1 .. 8")
    if settings.steps < 1:
        raise UserError(f"steps {settings.steps} is less than 1")
    for name in ("branch_every", "cache_every"):
        if getattr(settings, name) < 1:
            raise UserError(f"{_words(name)} {getattr(settings, name)} is less than 1")
    if min(settings.branch_every, settings.cache_every) > 1:
        why = f"cache every {settings.cache_every} leaves it out between its own steps"
        raise UserError(f"branch every {settings.branch_every} has no effect: {why}")
    if settings.vae_tile < 0:
        raise UserError(f"VAE tile {settings.vae_tile} is less than 0")
    if not 0.0 <= settings.merge_tokens <= 0.75:
        raise UserError(f"merge tokens {settings.merge_tokens} is outside 0 .. 0.75")
    if settings.clip_skip < 1:
        raise UserError(f"clip skip {settings.clip_skip} is less than 1")
    if settings.bare:
        _refuse(settings, "a bare backbone has no branch", _BRANCH_SETTINGS)
    if settings.reference:
        why = "the reference has no such setting"
        if settings.sampler not in (None, REFERENCE_SAMPLER):
            raise UserError(f"sampler {settings.sampler} has no effect: {why}")
        _refuse(settings, why, _BEYOND_THE_REFERENCE)


_BRANCH_SETTINGS = (
    "branch_strength",
    "branch_start",
    "branch_end",
    "residual_strengths",
    "guess",
    "branch_every",
    "masked",
    "reference",
    "english_guidance",
)
_BEYOND_THE_REFERENCE = (
    "english_guidance",
    "guidance_start",
    "guidance_end",
    "guidance_rescale",
    "residual_strengths",
    "branch_every",
    "cache_every",
    "merge_tokens",
    "vae_tile",
    "clip_skip",
    "hires",
    "masked",
)


def _refuse(settings: Sampling, why: str, names: tuple[str, ...]) -> None:
    for name in names:
        if getattr(settings, name) != getattr(Sampling, name):
            raise UserError(f"{_words(name)} {getattr(settings, name)} has no effect: {why}")


def _words(name: str) -> str:
    return name.replace("_", " ")
