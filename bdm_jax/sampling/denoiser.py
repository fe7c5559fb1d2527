"""The compiled programs of sampling: noise, the texts' keys, a few steps of the sampler.

Whatever may differ from image to image (prompts, seeds, the sampler's coefficients, guidance, strengths) is an argument
of a program; what it is compiled for are the networks, the sizes, which predictions guidance combines, and which
approximations were asked for.

A source is where a text comes from ("backbone", "branch": the system's readers, by name), a network reads the texts of
one source, and a plan says which text of each source every prediction reads. One loop does for all of them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from bdm_jax.diffusion import samplers
from bdm_jax.diffusion.guidance import guide, rescale
from bdm_jax.diffusion.samplers import SamplerState, Steps
from bdm_jax.diffusion.schedule import Schedule
from bdm_jax.models.config import EncoderConfig, UNetConfig
from bdm_jax.models.functional import Params, bind, input_dtype
from bdm_jax.models.unet.branch import Residuals, add_repeating
from bdm_jax.models.unet.conditioning import Conditioning
from bdm_jax.models.unet.layers import repeat
from bdm_jax.runtime.programs import program

STEPS_PER_CALL = 5
BACKBONE, BRANCH = "backbone", "branch"  # sources of text; "unet" reads the first, the network "branch" the second


@dataclass(frozen=True)
class PredictionPlan:
    """The P predictions that guidance combines: for each source, which of its texts each of them reads.

    Negative and positive prompt are texts 0 and 1. Where a source has one text for both, (0, 0), its networks' encoders
    run once for both. The last prediction is the one that reads all of the request.
    """

    texts: tuple[tuple[str, tuple[int, ...]], ...]  # by source, sorted

    @classmethod
    def of(cls, texts: Mapping[str, tuple[int, ...]]) -> "PredictionPlan":
        """A plan from {source: P numbers}."""
        return cls(tuple(sorted(texts.items())))

    def __getitem__(self, source: str) -> tuple[int, ...]:
        return dict(self.texts)[source]

    def __len__(self) -> int:
        return len(self.texts[0][1])

    def used(self, source: str) -> tuple[int, ...]:
        """The texts of a source that any prediction reads, rising."""
        return tuple(sorted(set(self[source])))

    def renumbered(self) -> "PredictionPlan":
        """The plan where the texts that no prediction reads are left out: what `denoise` is compiled for."""
        return PredictionPlan.of({source: tuple(map(self.used(source).index, read)) for source, read in self.texts})


@dataclass(frozen=True)
class ResidualNetwork:
    """A network whose residuals are added to the backbone: its name among the parameters, and whose texts it reads."""

    name: str
    config: EncoderConfig  # of a branch or a ControlNet
    source: str


@dataclass(frozen=True)
class Networks:
    """What the denoising program is compiled for."""

    unet: UNetConfig
    residuals: tuple[ResidualNetwork, ...]  # in the order in which they are added
    schedule: Schedule
    plan: PredictionPlan
    merge: float = 0.0  # the share of the first level's tokens that are merged (`models.unet.merging`)
    reuse: Literal["branch", "deep"] | None = None  # what rows take over from an earlier one


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepTable:
    """The sampler's table, and what else changes from row to row; N rows."""

    steps: Steps
    guidance: jax.Array  # (N,P-1): the scales of `guidance.guide`
    strengths: dict[str, jax.Array]  # by residual network (N,U,R): of its R residuals, for each of its source's texts
    adapters: jax.Array  # (N,A): of the T2I-Adapters
    alpha_after: jax.Array  # (N,): the latents after the row are alpha x0 + sigma noise
    sigma_after: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class InpaintState:
    """What inpainting preserves: clean latents and their noise (B,h,w,C), mask (B,h,w,1), 1 where it is repainted."""

    clean: jax.Array
    noise: jax.Array
    mask: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class StepCache:
    """What one row hands to those after it. Residuals as the networks made them: strengths are the later row's own.

    With reuse "branch", all of the branch's residuals. With "deep", those of every network to the first skips, and what
    enters the UNet's last block, (B*P,h,w,C).
    """

    residuals: dict[str, list[jax.Array]]
    deep: jax.Array | None


@program
def unit_noise(shape: tuple[int, int, int], seeds: jax.Array) -> jax.Array:
    """Seeds (B,) -> unit noise (B,h,w,C) fp32, each sample a function of its own seed."""
    return jax.vmap(lambda seed: jax.random.normal(jax.random.key(seed), shape, jnp.float32))(seeds)


@program
def with_keys(config: EncoderConfig, params: Params, cond: Conditioning) -> Conditioning:
    """A text with the keys and values that a network's cross-attentions make of it, once per image."""
    return bind(config, params).with_keys(cond)


@program
def denoise(
    networks: Networks,
    params: dict[str, Params],
    state: SamplerState,
    seeds: jax.Array,
    rows: StepTable,
    count: jax.Array,
    texts: dict[str, Conditioning],
    hints: dict[str, jax.Array],
    features: list[tuple[jax.Array, ...]],
    rescaling: jax.Array,
    inpaint: InpaintState | None,
    cache: StepCache | None = None,
) -> tuple[SamplerState, jax.Array, StepCache | None]:
    """The first `count` of the rows. Returns the state and the clean latents (B,h,w,C) that the last one predicted.

    Where `networks.reuse` asks for it, rows take over what an earlier one left in `cache`. Without a cache, the first
    row alone is computed, in full, and what it leaves is returned too.

    Args, by the network's name ("unet" or a residual network's):
      params: the parameters.
      texts: U texts of each sample, sample by sample, (B*U,S,D) with the network's keys; U is its source's own.
      hints: of ControlNets, the embedded maps (1,h,w,C).
      features: of T2I-Adapters, level by level, (1,h,w,C).
    """
    rows = jax.tree.map(jnp.asarray, rows)
    configs = {"unet": networks.unet, **{net.name: net.config for net in networks.residuals}}
    nets = {name: bind(config, params[name]) for name, config in configs.items()}
    dtype = input_dtype(params["unet"])
    shifts = {name: net.time_shift_rows(rows.steps.t, texts[name], dtype) for name, net in nets.items()}

    def step(index: int | jax.Array, before: SamplerState) -> tuple[SamplerState, jax.Array, StepCache | None]:
        row, shifts_t = jax.tree.map(lambda column: column[index], (rows, shifts))
        latents = before.latents.astype(dtype)
        residuals = _residuals(networks, nets, latents, shifts_t, texts, hints, cache)
        predictions, left = _predict(networks, nets["unet"], latents, shifts_t, texts, residuals, features, row, cache)
        guided = rescale(guide(predictions, row.guidance), predictions[-1], rescaling)
        noise = samplers.row_noise(seeds, row.steps.row, before.latents.shape[1:])

        def predicted_x0() -> jax.Array:
            return networks.schedule.to_x0(guided, before.latents, row.steps.alpha, row.steps.sigma)

        def clipped() -> jax.Array:
            return networks.schedule.clipped(predicted_x0()) - predicted_x0()

        state = samplers.advance(before, guided, row.steps, noise, clipped)
        if inpaint is not None:
            old = row.alpha_after * inpaint.clean + row.sigma_after * inpaint.noise
            state = SamplerState(inpaint.mask * state.latents + (1 - inpaint.mask) * old, state.memory)
        return state, predicted_x0(), left

    if networks.reuse and cache is None:
        return step(0, state)
    carry = state, jnp.zeros_like(state.latents)
    return *jax.lax.fori_loop(0, count, lambda index, carry: step(index, carry[0])[:2], carry), cache


def select_texts(tree, numbers: tuple[int, ...]):
    """Arrays (B*U,...), U texts of each sample -> (B*P,...), where prediction p of a sample reads text `numbers[p]`.

    Where there is but one text, it stays one: the networks take fewer rows, each for several.
    """
    texts = len(set(numbers))
    if texts == 1 or numbers == tuple(range(texts)):
        return tree

    def take(x: jax.Array) -> jax.Array:
        return x.reshape(-1, texts, *x.shape[1:])[:, np.array(numbers)].reshape(-1, *x.shape[1:])

    return jax.tree.map(take, tree)


def _residuals(networks: Networks, nets, latents, shifts, texts, hints, cache) -> dict[str, list[jax.Array]]:
    """Each residual network's tensors (B*U,...), skips first, then the middle: new ones, or those of the cache."""
    found = {} if cache is None else dict(cache.residuals)
    for name in (net.name for net in networks.residuals if net.name not in found):
        merge = 0.0 if name in hints else networks.merge
        found[name] = _tensors(nets[name].residuals(latents, shifts[name], texts[name], hints.get(name), merge))
    return found


def _predict(
    networks: Networks,
    unet,
    latents: jax.Array,
    shifts: dict[str, dict[str, jax.Array]],
    texts: dict[str, Conditioning],
    residuals: dict[str, list[jax.Array]],
    features: list[tuple[jax.Array, ...]],
    row: StepTable,
    cache: StepCache | None,
) -> tuple[list[jax.Array], StepCache | None]:
    """Latents (B,h,w,C) at one row -> the P predictions, each (B,h,w,C) fp32, and what the row leaves to later ones.

    The networks' encoders take each sample once and its texts one after the other (`UNetEncoder.encode`): what comes
    before the first text, and all of a backbone with one text, is computed once for all predictions.
    """
    plan, merge, deep = networks.plan, networks.merge, None if cache is None else cache.deep
    inputs, added = (latents, shifts["unet"], texts["unet"]), _added(features, row.adapters)
    if deep is None:
        skips, mid = unet.encode(*inputs, features=added, merge=merge)
        tensors = [*skips, mid]
    else:
        tensors = unet.encode_first(*inputs, features=added, merge=merge)
    tensors = select_texts(tensors, plan[BACKBONE])
    for net in networks.residuals:
        scaled = _scaled(residuals[net.name], row.strengths[net.name])
        selected = select_texts(scaled, plan[net.source])
        tensors = [add_repeating(x, residual) for x, residual in zip(tensors, selected, strict=True)]
    tensors = [repeat(x, len(plan) * len(latents)) for x in tensors]
    text, shifts_t = select_texts(texts["unet"], plan[BACKBONE]), shifts["unet"]
    if unet.config.has_addition:  # its time embedding contains the text
        shifts_t = select_texts(shifts_t, plan[BACKBONE])
    if deep is None:
        deep = unet.decode_deep(tensors[:-1], tensors[-1], shifts_t, text)
    first = tensors[: unet.first_skips]
    predictions = unet.decode_last(first, deep, shifts_t, text, merge).astype(jnp.float32)
    predictions = predictions.reshape(len(latents), -1, *latents.shape[1:])
    left = _left(networks.reuse, residuals, deep, len(first))
    return [predictions[:, p] for p in range(predictions.shape[1])], left


def _left(reuse: str | None, residuals: dict[str, list[jax.Array]], deep: jax.Array, first: int) -> StepCache | None:
    """Of a row's tensors those that later ones reuse."""
    if reuse == "branch":
        return StepCache({BRANCH: residuals[BRANCH]}, None)
    if reuse == "deep":
        return StepCache({name: tensors[:first] for name, tensors in residuals.items()}, deep)
    return None


def _added(features: list[tuple[jax.Array, ...]], strengths: jax.Array) -> list[jax.Array] | None:
    """What T2I-Adapters add together at each level, at one row."""
    scaled = [[s.astype(x.dtype) * x for x in one] for one, s in zip(features, strengths, strict=True)]
    return [sum(level[1:], level[0]) for level in zip(*scaled, strict=True)] or None


def _tensors(residuals: Residuals) -> list[jax.Array]:
    return [*residuals.skips, residuals.mid]


def _scaled(residuals: list[jax.Array], strengths: jax.Array) -> list[jax.Array]:
    """All or the first of R residuals (B*U,...), times the strengths (U,R); the R-th is the middle's."""
    texts = len(strengths)
    return [
        (x.reshape(-1, texts, *x.shape[1:]) * factor[:, None, None, None].astype(x.dtype)).reshape(x.shape)
        for x, factor in zip(residuals, strengths.T, strict=False)
    ]
