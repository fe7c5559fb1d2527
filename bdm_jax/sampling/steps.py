"""What changes from row to row of the sampler's table: guidance, the strengths of residuals, intervals, and how the
rows are cut into calls of the compiled program.

Each kind of guidance is a way of filling a list with one `Guidance` per row: rows with other predictions than their
neighbours become calls of their own, and nothing below knows why.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from bdm_jax.diffusion.guidance import scales
from bdm_jax.diffusion.samplers import Steps
from bdm_jax.plugins.controls import Control
from bdm_jax.sampling.denoiser import BACKBONE, BRANCH, STEPS_PER_CALL, PredictionPlan, ResidualNetwork, StepTable
from bdm_jax.sampling.reading import RowTexts, SourceTexts, shared_weights
from bdm_jax.sampling.settings import Sampling


@dataclass(frozen=True)
class Guidance:
    """What a row combines: predictions, and a weight for each; the weights sum to 1."""

    plan: PredictionPlan
    weights: tuple[float, ...]


@dataclass(frozen=True)
class Segment:
    """Rows that one call of `denoise` takes, and the program for them.

    plan: the predictions that guidance combines.
    uses_branch: whether the branch runs in them.
    reuse: what is reused between rows; a row that `fills_cache` makes it, the others take what the last such row made.
    """

    rows: range
    plan: PredictionPlan
    uses_branch: bool
    reuse: Literal["branch", "deep"] | None = None
    fills_cache: bool = False


def guidance_rows(
    settings: Sampling,
    count: int,
    one_text: bool,
    has_branch: bool,
    sources: Mapping[str, SourceTexts] | None = None,
) -> list[Guidance]:
    """The guidance of `count` rows: of each source's negative and positive texts at that row, 0 and 1 without edits.

    `one_text`: the backbone's texts are all the same and there is but text 0; the languages have one guidance then.
    Rows outside the interval of guidance, and a guidance of exactly 1, take the positive texts alone, as far as their
    weights sum to 1. Of several positive texts with the weights w_i, prediction i counts w_i times as much.
    """
    sources, scale, english = sources or {}, settings.guidance, settings.english_guidance
    rows = {source: own.rows.get(count) or (RowTexts(),) * count for source, own in sources.items()}
    backbone = (RowTexts(0, (0,)),) * count if one_text else rows.get(BACKBONE, (RowTexts(),) * count)
    rows = {BACKBONE: backbone} | ({BRANCH: rows.get(BRANCH, (RowTexts(),) * count)} if has_branch else {})
    weights = shared_weights([*sources.values()])
    within = _within(count, settings.guidance_start, settings.guidance_end) & ({scale, english} - {None} != {1.0})
    found = []
    for i, inside in enumerate(within):
        texts = {source: own[i] for source, own in rows.items()}
        if not inside:
            found.append(_guided(texts, 1.0, weights))
        elif english is not None and has_branch and not one_text:
            (negative, (positive,)), (other, (another,)) = texts[BACKBONE], texts[BRANCH]
            plan = PredictionPlan.of({BACKBONE: (negative, positive, positive), BRANCH: (other, other, another)})
            found.append(Guidance(plan, (1 - english, english - scale, scale)))
        else:
            found.append(_guided(texts, scale, weights, negative=True))
    return found


def _guided(
    texts: Mapping[str, RowTexts], scale: float, weights: tuple[float, ...], negative: bool = False
) -> Guidance:
    """n + scale sum_i w_i (p_i - n); `negative`: also where n has no weight. A single positive text goes with all."""
    rest = 1 - scale * sum(weights) if len(weights) > 1 else 1 - scale
    negative = negative or abs(rest) > 1e-9
    plan = PredictionPlan.of(
        {
            source: (row.negative,) * negative + row.positives * (len(weights) // len(row.positives))
            for source, row in texts.items()
        }
    )
    positive = [scale * weight for weight in weights]
    return Guidance(plan, (rest, *positive) if negative else tuple(positive))


def step_table(
    settings: Sampling,
    steps: Steps,
    guidance: Sequence[Guidance],
    plan: PredictionPlan,
    networks: Sequence[ResidualNetwork],
    controls: Sequence[Control],
    adapters: Sequence[Control] = (),
    negatives: int = 1,
) -> StepTable:
    """The table (N rows) for the rows of one plan, with their guidance, and the strengths of the residual networks
    (those of the ControlNets in their order) and of the T2I-Adapters.

    `negatives`: how many of the branch's texts, the first ones, are of the negative prompt.
    """
    count = len(steps.t)
    unused = (1.0, *[0.0] * (len(plan) - 1))  # rows of other plans
    weights = np.array([row.weights if row.plan == plan else unused for row in guidance])
    of_controls = iter(controls)
    strengths = {}
    for network in networks:
        residuals = len(network.config.skip_channels) + 1
        if network.name == BRANCH:
            strengths[network.name] = _branch_strengths(
                settings, count, plan.used(network.source), residuals, negatives
            )
        else:
            strengths[network.name] = np.tile(_strengths(next(of_controls), count)[:, None, None], (1, 1, residuals))
    acting = [_strengths(adapter, count) for adapter in adapters]
    acting = np.stack(acting, axis=1) if acting else np.zeros((count, 0))
    after = np.append(steps.alpha[1:], 1.0), np.append(steps.sigma[1:], 0.0)
    strengths = {name: column.astype(np.float32) for name, column in strengths.items()}
    return StepTable(
        steps, np.float32(scales(weights)), strengths, *(np.asarray(column, np.float32) for column in (acting, *after))
    )


def segments(
    settings: Sampling, guidance: Sequence[Guidance], preview_every: int, has_branch: bool = True
) -> list[Segment]:
    """How the rows are cut into calls of `denoise`.

    Rows with fewer predictions, and rows without the branch, are less work, but a program of their own. Where something
    is reused for every K rows, the first of each K is a call and a program of its own; a change of predictions or
    branch begins anew.
    """
    count = len(guidance)
    uses_branch = _branch_rows(settings, count) & has_branch
    kinds = [(row.plan, bool(uses)) for row, uses in zip(guidance, uses_branch, strict=True)]
    changes = [0, *(i for i in range(1, count) if kinds[i] != kinds[i - 1]), count]
    stops, refresh_steps = {*range(0, count, STEPS_PER_CALL), *range(0, count, preview_every), *changes}, set()
    for begin, end in itertools.pairwise(changes):
        _, every = _reuse(settings, kinds[begin][1])
        if every > 1:
            refresh_steps |= set(range(begin, end, every))
    stops |= refresh_steps | {min(step + 1, count) for step in refresh_steps}
    found = []
    for begin, end in itertools.pairwise(sorted(stops)):
        plan, uses = kinds[begin]
        found.append(Segment(range(begin, end), plan, uses, _reuse(settings, uses)[0], begin in refresh_steps))
    return found


def chunk(column: np.ndarray, rows: range) -> np.ndarray:
    """STEPS_PER_CALL rows of a column from where `rows` begin; after the column's end, any."""
    return np.resize(column[rows.start : rows.start + STEPS_PER_CALL], (STEPS_PER_CALL, *column.shape[1:]))


def _branch_strengths(
    settings: Sampling, count: int, texts: Sequence[int], residuals: int, negatives: int
) -> np.ndarray:
    """(count, texts, residuals) for the texts of these numbers."""
    factors = settings.branch_strength * np.asarray(settings.residual_strengths or (1.0,) * residuals)
    strengths = np.tile(factors, (count, len(texts), 1))
    if settings.guess:
        strengths *= np.logspace(-1, 0, residuals)
        strengths[:, np.array(texts) < negatives] = 0
    strengths[~_branch_rows(settings, count)] = 0
    return strengths


def _strengths(control: Control, count: int) -> np.ndarray:
    """(count,): a plug-in's strength, 0 outside its interval."""
    return control.strength * _within(count, control.start, control.end)


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
