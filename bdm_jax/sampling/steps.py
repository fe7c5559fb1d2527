"""What steers a picture on its way, row by row of the sampler's table: guidance, the branch's strengths, intervals."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from bdm_jax.diffusion.samplers import Steps
from bdm_jax.plugins.controls import Control
from bdm_jax.sampling.denoiser import STEPS_PER_CALL, PredictionPlan, StepTable
from bdm_jax.sampling.settings import Sampling


@dataclass(frozen=True)
class Segment:
    """Rows that one call of `denoise` takes, and the program for them.

    parts:  the predictions that guidance takes.
    uses_branch: whether the branch runs in them.
    reuse:  what is reused between rows; a `key` row makes it, the others take what the last key row made.
    """

    rows: range
    parts: PredictionPlan
    uses_branch: bool
    reuse: Literal["branch", "deep"] | None = None
    key: bool = False


POSITIVE = PredictionPlan((0,), (0,))  # no guidance: one prediction, for the positive prompts


def guided_parts(settings: Sampling, one_english: bool, has_branch: bool) -> PredictionPlan:
    """The predictions that guidance takes, by the texts that they read: negative and positive, in both languages.

    `one_english`: negative and positive English prompt are the same; the languages have but one guidance then.
    """
    if settings.english_guidance is not None and has_branch and not one_english:
        return PredictionPlan((0, 1, 1), (0, 0, 1))
    return PredictionPlan((0, 0) if one_english else (0, 1), (0, 1))


def rows(
    settings: Sampling,
    table: Steps,
    parts: PredictionPlan,
    residuals: int,
    controls: Sequence[Control],
    adapters: Sequence[Control] = (),
) -> StepTable:
    """The table (N rows), with the guidance and the strengths of the branch's `residuals`, of the ControlNets and of
    the T2I-Adapters.
    """
    count, texts = len(table.t), len(set(parts.chinese))
    scales = {1: (), 2: (settings.guidance,), 3: (settings.english_guidance, settings.guidance)}[len(parts.english)]
    factors = settings.branch_strength * np.asarray(settings.residual_strengths or (1.0,) * residuals)
    strengths = np.tile(factors, (count, texts, 1))
    if settings.guess:
        strengths *= np.logspace(-1, 0, residuals)
        strengths[:, : texts - 1] = 0
    strengths[~_branch_rows(settings, count)] = 0
    acting = [_acting(controls, count), _acting(adapters, count)]
    after = np.append(table.alpha[1:], 1.0), np.append(table.sigma[1:], 0.0)
    columns = (np.tile(scales, (count, 1)), strengths, *acting, *after)
    return StepTable(table, *(np.asarray(column, np.float32) for column in columns))


def calls(
    settings: Sampling, count: int, guided: PredictionPlan, watch_every: int, has_branch: bool = True
) -> list[Segment]:
    """How `count` rows are cut into calls of `denoise`.

    Rows without guidance take one prediction, and rows whose branch is silent no branch: less work, but a program of
    its own. A guidance of exactly 1 is none. Where something is reused for every K rows, the first of each K is a call
    and a program of its own; a change of guidance or branch begins anew.
    """
    scales = {settings.guidance, settings.english_guidance} - {None}
    with_guidance = _within(count, settings.guidance_start, settings.guidance_end) & (scales != {1.0})
    uses_branch = _branch_rows(settings, count) & has_branch
    kinds = list(zip(with_guidance.tolist(), uses_branch.tolist(), strict=True))
    changes = [0, *(i for i in range(1, count) if kinds[i] != kinds[i - 1]), count]
    stops, keys = {*range(0, count, STEPS_PER_CALL), *range(0, count, watch_every), *changes}, set()
    for begin, end in itertools.pairwise(changes):
        _, every = _reuse(settings, kinds[begin][1])
        if every > 1:
            keys |= set(range(begin, end, every))
    stops |= keys | {min(key + 1, count) for key in keys}
    cut = [range(begin, end) for begin, end in itertools.pairwise(sorted(stops))]
    found = []
    for part in cut:
        guides, spoken = kinds[part[0]]
        parts = guided if guides else POSITIVE
        found.append(Segment(part, parts, spoken, _reuse(settings, spoken)[0], part[0] in keys))
    return found


def chunk(column: np.ndarray, part: range) -> np.ndarray:
    """STEPS_PER_CALL rows of a column from where `part` begins; after the column's end, any."""
    return np.resize(column[part.start : part.start + STEPS_PER_CALL], (STEPS_PER_CALL, *column.shape[1:]))


def _acting(controls: Sequence[Control], count: int) -> np.ndarray:
    """(count,K): each control's strength, 0 outside its interval."""
    acting = [control.strength * _within(count, control.start, control.end) for control in controls]
    return np.stack(acting, axis=1) if acting else np.zeros((count, 0))


def _reuse(settings: Sampling, uses_branch: bool) -> tuple[Literal["branch", "deep"] | None, int]:
    """What is reused with the branch and without, and for how many rows, the first included."""
    if settings.cache_every > 1:
        return "deep", settings.cache_every
    if settings.branch_every > 1 and uses_branch:
        return "branch", settings.branch_every
    return None, 1


def _branch_rows(settings: Sampling, count: int) -> np.ndarray:
    return _within(count, settings.branch_start, settings.branch_end)


def _within(count: int, start: float, end: float) -> np.ndarray:
    """(count,) bool: which rows lie between two fractions of them (by the rule of diffusers' pipelines)."""
    numbers = np.arange(count)
    return (numbers / count >= start) & ((numbers + 1) / count <= end)
