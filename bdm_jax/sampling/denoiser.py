"""The compiled programs of drawing: noise, texts' keys, a few steps of the sampler.

Whatever may differ from picture to picture (prompts, seeds, the sampler's coefficients, guidance, strengths) is an
argument of a program; what it is compiled for are the networks, the sizes, how many predictions guidance takes, and
which approximations were asked for.
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from bdm_jax.diffusion import samplers
from bdm_jax.diffusion.guidance import guide, rescale
from bdm_jax.diffusion.samplers import SamplerState, Steps
from bdm_jax.diffusion.schedule import Schedule
from bdm_jax.models.config import (
    BranchConfig,
    ControlNetConfig,
    EncoderConfig,
    UNetConfig,
)
from bdm_jax.models.functional import Params, bind
from bdm_jax.models.unet.branch import Residuals, add_repeating
from bdm_jax.models.unet.conditioning import Conditioning
from bdm_jax.models.unet.layers import repeat
from bdm_jax.runtime.programs import program

STEPS_PER_CALL = 5


@dataclass(frozen=True)
class PredictionPlan:
    """The P predictions that guidance takes, by which of its language's U texts each of them reads.

    Negative and positive prompt are (0, 1) in both languages. One English prompt for both is (0, 0): U is 1 then, and
    the backbone's encoder, which sees nothing else that differs, runs once for both.
    """

    english: tuple[int, ...]
    chinese: tuple[int, ...]


@dataclass(frozen=True)
class Networks:
    """What the denoising program is compiled for."""

    unet: UNetConfig
    branch: BranchConfig | None
    schedule: Schedule
    parts: PredictionPlan
    controls: tuple[ControlNetConfig, ...] = ()
    merge: float = 0.0  # the share of the first level's tokens that UNet and branch merge (`models.merging`)
    reuse: Literal["branch", "deep"] | None = None  # what rows take over from an earlier one


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Conditionings:
    """Both languages' texts, sample by sample: (B*U,S,D) each, with a U of their own; with keys for each network."""

    english: Conditioning
    chinese: Conditioning | None
    controls: list[Conditioning]  # the English text once more, with the ControlNets' keys


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepTable:
    """The sampler's table, and what else changes from row to row; N rows."""

    steps: Steps
    guidance: jax.Array  # (N,P-1): the scales of `guidance.guide`
    strengths: jax.Array  # (N,U,R): of the branch's R residuals, for each Chinese text
    controls: jax.Array  # (N,K): strengths of the ControlNets
    adapters: jax.Array  # (N,A): of the T2I-Adapters
    alpha_after: jax.Array  # (N,): the latents after the row are alpha x0 + sigma noise
    sigma_after: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class InpaintState:
    """What inpainting holds fast: clean latents and their noise (B,h,w,C), mask (B,h,w,1), 1 where it is drawn anew."""

    clean: jax.Array
    noise: jax.Array
    mask: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepCache:
    """What one row leaves to those after it. Residuals as the networks made them: strengths are the later row's own.

    With reuse "branch", all of the branch's residuals. With "deep", those of branch and ControlNets to the first skips,
    and what enters the UNet's last block, (B*P,h,w,C).
    """

    branch: list[jax.Array] | None
    controls: list[list[jax.Array]]
    deep: jax.Array | None


@program
def unit_noise(shape: tuple[int, int, int], seeds: jax.Array) -> jax.Array:
    """Seeds (B,) -> unit noise (B,h,w,C) fp32, each sample a function of its own seed."""
    return jax.vmap(lambda seed: jax.random.normal(jax.random.key(seed), shape, jnp.float32))(seeds)


@program
def with_keys(config: EncoderConfig, params: Params, cond: Conditioning) -> Conditioning:
    """A text with the keys and values that a network's cross-attentions make of it, once per picture."""
    return bind(config, params).with_keys(cond)


@program
def denoise(
    networks: Networks,
    params: dict[str, Params | list[Params]],
    state: SamplerState,
    seeds: jax.Array,
    rows: StepTable,
    count: jax.Array,
    texts: Conditionings,
    hints: list[jax.Array],
    features: list[tuple[jax.Array, ...]],
    rescaling: jax.Array,
    kept: InpaintState | None,
    earlier: StepCache | None = None,
) -> tuple[SamplerState, jax.Array, StepCache | None]:
    """The first `count` of the rows. Returns the state and the clean latents (B,h,w,C) that the last one predicted.

    Where `networks.reuse` asks for it, rows take over what an `earlier` one left. Where there is none, the first row is
    computed alone and in full, and what it leaves is returned too.

    `params` has the UNet's, the branch's, and those of the K ControlNets, whose embedded maps are `hints` (1,h,w,C);
    `features` (1,h,w,C) are those of A T2I-Adapters, level by level.
    """
    rows = jax.tree.map(jnp.asarray, rows)
    nets = {name: _bound(networks, params, name) for name in params}
    dtype = params["unet"]["conv_in.bias"].dtype
    shifts = jax.tree.map(lambda net: net.time_shifts(rows.steps.t, dtype), nets, is_leaf=callable)

    def step(index: int | jax.Array, before: SamplerState) -> tuple[SamplerState, jax.Array, StepCache | None]:
        row = jax.tree.map(lambda column: column[index], rows)
        added = _added(features, row.adapters)
        here = jax.tree.map(lambda column: column[index][None], shifts)
        given = before.latents.astype(dtype), here, texts, hints, added, row
        predictions, left = _predict(networks, nets, *given, earlier)
        guided = rescale(guide(predictions, row.guidance), predictions[-1], rescaling)
        noise = samplers.row_noise(seeds, row.steps.row, before.latents.shape[1:])
        state = samplers.advance(before, guided, row.steps, noise)
        if kept is not None:
            old = row.alpha_after * kept.clean + row.sigma_after * kept.noise
            state = SamplerState(kept.mask * state.latents + (1 - kept.mask) * old, state.memory)
        return state, networks.schedule.to_x0(guided, before.latents, row.steps.alpha, row.steps.sigma), left

    if networks.reuse and earlier is None:
        return step(0, state)
    carry = state, jnp.zeros_like(state.latents)
    return *jax.lax.fori_loop(0, count, lambda index, carry: step(index, carry[0])[:2], carry), earlier


def _bound(networks: Networks, params: dict[str, Params | list[Params]], name: str):
    config = getattr(networks, name)
    if name != "controls":
        return bind(config, params[name])
    return [bind(one, own) for one, own in zip(config, params[name], strict=True)]


def _added(features: list[tuple[jax.Array, ...]], strengths: jax.Array) -> list[jax.Array] | None:
    """What T2I-Adapters add together at each level, at one row."""
    scaled = [[s.astype(x.dtype) * x for x in one] for one, s in zip(features, strengths, strict=True)]
    return [sum(level[1:], level[0]) for level in zip(*scaled, strict=True)] or None


def _predict(
    networks: Networks,
    nets: dict,
    latents: jax.Array,
    shifts: dict,
    texts: Conditionings,
    hints: list[jax.Array],
    added: list[jax.Array] | None,
    row: StepTable,
    earlier: StepCache | None,
) -> tuple[list[jax.Array], StepCache | None]:
    """Latents (B,h,w,C) at one row -> the P predictions, each (B,h,w,C) fp32, and what the row leaves to later ones;
    `added` inside the UNet's encoder.

    The networks' encoders take each sample once and its texts one after the other (`UNetEncoder.encode`): what comes
    before the first text, and all of a backbone with one English text, is computed once for all parts.
    """
    unet, parts, merge = nets["unet"], networks.parts, networks.merge
    deep = None if earlier is None else earlier.deep
    given = latents, shifts["unet"], texts.english
    if deep is None:
        skips, mid = unet.encode(*given, features=added, merge=merge)
        tensors = [*skips, mid]
    else:
        tensors = unet.encode_first(*given, features=added, merge=merge)
    tensors = select_texts(tensors, parts.english)
    branch, controls = _residuals(nets, latents, shifts, texts, hints, merge, earlier)
    if branch is not None:
        tensors = _add(tensors, select_texts(_scaled(branch, row.strengths), parts.chinese))
    for residuals, strength in zip(controls, row.controls, strict=True):
        tensors = _add(tensors, select_texts([strength.astype(x.dtype) * x for x in residuals], parts.english))
    tensors = [repeat(x, len(parts.english) * len(latents)) for x in tensors]
    english = select_texts(texts.english, parts.english)
    if deep is None:
        deep = unet.decode_deep(tensors[:-1], tensors[-1], shifts["unet"], english)
    first = tensors[: unet.first_skips]
    predictions = unet.decode_last(first, deep, shifts["unet"], english, merge).astype(jnp.float32)
    predictions = predictions.reshape(len(latents), -1, *latents.shape[1:])
    left = _left(networks, branch, controls, deep, len(first))
    return [predictions[:, part] for part in range(predictions.shape[1])], left


def _residuals(nets, latents, shifts, texts, hints, merge, earlier) -> tuple[list[jax.Array] | None, list]:
    """Of the branch, if there is one, and of each ControlNet: new ones, or those that an earlier row left."""
    branch = None
    if earlier is not None:
        branch = earlier.branch
    elif "branch" in nets:
        branch = _tensors(nets["branch"](latents, shifts["branch"], texts.chinese, merge))
    if earlier is not None and earlier.deep is not None:
        return branch, earlier.controls
    each = zip(nets["controls"], shifts["controls"], texts.controls, hints, strict=True)
    return branch, [_tensors(net.residuals(latents, shift, text, hint)) for net, shift, text, hint in each]


def _left(networks: Networks, branch, controls, deep: jax.Array, first: int) -> StepCache | None:
    """Of a row's tensors those that `networks.reuse` asks for."""
    if networks.reuse == "branch":
        return StepCache(branch, [], None)
    if networks.reuse == "deep":
        return StepCache(branch and branch[:first], [residuals[:first] for residuals in controls], deep)
    return None


def _tensors(residuals: Residuals) -> list[jax.Array]:
    return [*residuals.skips, residuals.mid]


def _add(tensors: list[jax.Array], residuals: list[jax.Array]) -> list[jax.Array]:
    return [add_repeating(x, residual) for x, residual in zip(tensors, residuals, strict=True)]


def select_texts(tree, numbers: tuple[int, ...]):
    """Arrays (B*U,...), U texts of each sample -> (B*P,...), where part p of a sample is text `numbers[p]`.

    Where there is but one text, it stays one: the networks take fewer rows, each for several.
    """
    texts = len(set(numbers))
    if texts == 1 or numbers == tuple(range(texts)):
        return tree
    take = lambda x: x.reshape(-1, texts, *x.shape[1:])[:, np.array(numbers)].reshape(-1, *x.shape[1:])  # noqa: E731
    return jax.tree.map(take, tree)


def _scaled(residuals: list[jax.Array], strengths: jax.Array) -> list[jax.Array]:
    """All or the first of R residuals (B*U,...), times the strengths (U,R); the R-th is the middle's."""
    texts = len(strengths)
    return [
        (x.reshape(-1, texts, *x.shape[1:]) * factor[:, None, None, None].astype(x.dtype)).reshape(x.shape)
        for x, factor in zip(residuals, strengths.T, strict=False)
    ]
