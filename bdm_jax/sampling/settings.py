"""What an image shall show and how it is drawn. Knows no network and no JAX: a command line can be checked first."""

import itertools
import math
import random
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from bdm_jax.errors import UserError, unknown

ANY_SEED = -1
DTYPES = ("auto", "float32", "bfloat16", "float16")
_SHOWN_SEEDS = 10
REFERENCE_SAMPLER = "dpmpp-2m"
ImageSource = str | Path | np.ndarray  # a file, or (H,W,3) uint8; as a mask (H,W) uint8, 255 where it is repainted


@dataclass(frozen=True)
class Request:
    """What one image shall show.

    `prompt` and `negative` are the branch's (Chinese), `english` and `english_negative` the backbone's; the paper's way
    is to leave the English ones empty. A bare backbone reads its English prompts or, where they are empty, the others.
    All may hold weights, as in "(red:1.3) lantern" (see `text.grammar`), and change from step to step (`text.editing`).
    The seed is in [0, 2**32), or -1 for any.

    `image` is an image to begin from; with a `mask` of its size, only what is white there is repainted (inpainting).
    """

    prompt: str
    negative: str = ""
    english: str = ""
    english_negative: str = ""
    seed: int = 0
    image: ImageSource | None = None
    mask: ImageSource | None = None


def with_seeds(requests: Sequence[Request], chooser: random.Random | None = None) -> list[Request]:
    """The requests; each whose seed is -1 gets one of its own, below 2**31, chosen at random and noted.

    `chooser`: whom to ask, for processes that must agree.

    Raises UserError for what is no request.
    """
    if not isinstance(requests, Sequence) or not all(isinstance(request, Request) for request in requests):
        raise UserError(f"requests {requests!r:.60}: expected a list of Request, as [Request('红灯笼')]")
    chooser = chooser or random.SystemRandom()
    found = [replace(r, seed=chooser.randrange(2**31)) if r.seed == ANY_SEED else r for r in requests]
    chosen = [new.seed for old, new in zip(requests, found, strict=True) if old.seed == ANY_SEED]
    if chosen:
        more = ", ..." if len(chosen) > _SHOWN_SEEDS else ""
        shown = ", ".join(map(str, chosen[:_SHOWN_SEEDS])) + more
        warnings.warn(f"seed -1 is any: {shown} chosen", stacklevel=2)
    return found


def any_seed(seed: int) -> int:
    """A seed as it is; for -1 one chosen and noted, as `with_seeds` does. Raises UserError for other negative ones."""
    if seed < ANY_SEED:
        raise UserError(f"seed {seed} is negative; -1 stands for any")
    return with_seeds([Request("", seed=seed)])[0].seed


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
    """Denoising strength, how much of the schedule an image is redrawn with: 0 keeps it, 1 leaves only a trace of it,
    of what is under a mask nothing."""
    hires: float = 1.0
    """Draw, enlarge by this factor, and draw over that (hires fix): large images without repeated subjects."""
    hires_strength: float = 0.5
    """Denoising strength over the enlarged image."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Type of weights and computation, by default bfloat16 where the hardware multiplies it (also CPUs with AVX512_BF16
    or AMX), else float32 on a CPU and float16 on a GPU."""
    masked: bool | None = None
    """Hide padding from the branch, for branches trained so; by default the model's own."""
    reference: bool = False
    """As the reference implementation, quirks included (see docs/sampling.md)."""
    bare: bool = False
    """Draw with the backbone alone, which reads English."""
    eta: float = 0.0
    """Of ddim: how much of ddpm's fresh noise each step adds, from 0 to 1."""
    timesteps: tuple[int, ...] = ()
    """Own timesteps, falling, in place of --steps: 999 749 499 249, for example."""
    sigmas: tuple[float, ...] = ()
    """Own noise levels (sigma / alpha), falling, in place of --steps; the last, usually 0, is where sampling ends."""


def check(settings: Sampling) -> None:
    """What can be known without a model. Raises UserError for the first setting that is not valid."""
    for field in fields(settings):
        _check_kind(field.name, getattr(settings, field.name))
    finite = ("guidance", "english_guidance", "branch_strength")
    for name in finite:
        value = getattr(settings, name)
        if value is not None and not math.isfinite(value):
            raise UserError(f"{_words(name)} {value} is not a finite number")
    if not all(map(math.isfinite, settings.residual_strengths)):
        raise UserError(f"residual strengths {settings.residual_strengths} are not all finite numbers")
    fractions = ("eta", "guidance_start", "guidance_end", "guidance_rescale", "branch_start", "branch_end")
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
    _check_own_steps(settings)
    for name in ("branch_every", "cache_every"):
        if getattr(settings, name) < 1:
            raise UserError(f"{_words(name)} {getattr(settings, name)} is less than 1")
    if min(settings.branch_every, settings.cache_every) > 1:
        why = f"cache every {settings.cache_every} leaves it out between its own steps"
        raise UserError(f"branch every {settings.branch_every} has no effect: {why}")
    if settings.dtype not in DTYPES:
        raise unknown("dtype", str(settings.dtype), DTYPES)
    if settings.vae_tile < 0:
        raise UserError(f"VAE tile {settings.vae_tile} is less than 0")
    if not 0.0 <= settings.merge_tokens <= 0.75:
        raise UserError(f"merge tokens {settings.merge_tokens} is outside 0 .. 0.75")
    if settings.clip_skip < 1:
        raise UserError(f"clip skip {settings.clip_skip} is less than 1")
    if settings.bare:
        refuse(settings, "a bare backbone has no branch", BRANCH_SETTINGS)
    if settings.reference:
        why = "the reference has no such setting"
        if settings.sampler not in (None, REFERENCE_SAMPLER):
            raise UserError(f"sampler {settings.sampler} has no effect: {why}")
        refuse(settings, why, _BEYOND_THE_REFERENCE)


BRANCH_SETTINGS = (
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
    "eta",
    "timesteps",
    "sigmas",
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


def refuse(settings: Sampling, why: str, names: tuple[str, ...]) -> None:
    """Raises UserError for the first of these settings that is not as by default."""
    for name in names:
        if getattr(settings, name) != getattr(Sampling, name):
            raise UserError(f"{_words(name)} {getattr(settings, name)} has no effect: {why}")


def own_steps(settings: Sampling) -> int | None:
    """How many steps own timesteps or noise levels are; None where there are none."""
    return len(settings.timesteps) or (len(settings.sigmas) - 1 if settings.sigmas else None)


def _check_own_steps(settings: Sampling) -> None:
    if settings.timesteps and settings.sigmas:
        raise UserError("timesteps and sigmas: give one of them")
    name, values = ("timesteps", settings.timesteps) if settings.timesteps else ("sigmas", settings.sigmas)
    if not values:
        return
    falling = all(a > b for a, b in itertools.pairwise(values))
    if not falling or values[-1] < 0 or not all(map(math.isfinite, values)) or own_steps(settings) < 1:
        example = "999 749 499 249" if name == "timesteps" else "14.6 3.1 0.7 0"
        raise UserError(f"{name} {' '.join(map(str, values))}: expected falling numbers, as {example}")
    if settings.steps not in (Sampling.steps, own_steps(settings)):
        raise UserError(f"steps {settings.steps} has no effect: {name} are {own_steps(settings)} steps")


_KINDS = {
    bool: (bool | np.bool_, "true or false"),
    int: (Integral, "a whole number"),
    float: (Real, "a number"),
    str: (str, "a text"),
}
KIND_OF = {"sampler": str, "masked": bool, "timesteps": int}  # of others, the default's, or a number


def _check_kind(name: str, value: Any) -> None:
    default = getattr(Sampling, name)
    if value is None and default is None:
        return
    if name == "size":
        if not (isinstance(value, tuple | list) and len(value) == 2 and all(map(_is_whole, value))):
            raise UserError(f"size {value!r}: expected (height, width) in pixels, two whole numbers")
        return
    several = isinstance(default, tuple)
    kind, word = _KINDS[KIND_OF.get(name, float if default is None or several else type(default))]
    if several and not isinstance(value, tuple | list):
        raise UserError(f"{_words(name)} {value!r}: expected a tuple, each {word}")
    for one in value if several else [value]:
        if not isinstance(one, kind) or (kind in (Integral, Real) and isinstance(one, bool)):
            raise UserError(f"{_words(name)} {one!r}: expected {word}")


def _is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _words(name: str) -> str:
    return name.replace("_", " ")
