"""The compiled programs of drawing: noise, a few steps of the sampler, pictures into latents and back.

Whatever may differ from picture to picture (prompts, seeds, the sampler's coefficients, guidance, strengths) is an
argument of a program; what it is compiled for are the networks, the sizes, and how many predictions guidance takes.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from bdm_jax.components import Component
from bdm_jax.diffusion import samplers
from bdm_jax.diffusion.guidance import guide, rescale
from bdm_jax.diffusion.samplers import SamplerState, Steps
from bdm_jax.diffusion.schedule import Schedule
from bdm_jax.models.branch import Residuals
from bdm_jax.models.conditioning import Conditioning
from bdm_jax.models.config import (
    BranchConfig,
    ControlNetConfig,
    EncoderConfig,
    TinyVAEConfig,
    UNetConfig,
    VAEConfig,
)
from bdm_jax.models.functional import Params, bind
from bdm_jax.models.layers import repeat

STEPS_PER_CALL = 5


@dataclass(frozen=True)
class Parts:
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
    parts: Parts
    controls: tuple[ControlNetConfig, ...] = ()


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Texts:
    """Both languages' texts, sample by sample: (B*U,S,D) each, with a U of their own; with keys for each network."""

    english: Conditioning
    chinese: Conditioning | None
    controls: list[Conditioning]  # the English text once more, with the ControlNets' keys


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rows:
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
class Kept:
    """What inpainting holds fast: clean latents and their noise (B,h,w,C), mask (B,h,w,1), 1 where it is drawn anew."""

    clean: jax.Array
    noise: jax.Array
    mask: jax.Array


@partial(jax.jit, static_argnums=0)
def unit_noise(shape: tuple[int, int, int], seeds: jax.Array) -> jax.Array:
    """Seeds (B,) -> unit noise (B,h,w,C) fp32, each sample a function of its own seed."""
    return jax.vmap(lambda seed: jax.random.normal(jax.random.key(seed), shape, jnp.float32))(seeds)


@partial(jax.jit, static_argnums=0)
def with_keys(config: EncoderConfig, params: Params, cond: Conditioning) -> Conditioning:
    """A text with the keys and values that a network's cross-attentions make of it, once per picture."""
    return bind(config, params).with_keys(cond)


@partial(jax.jit, static_argnums=0)
def denoise(
    networks: Networks,
    params: dict[str, Params | list[Params]],
    state: SamplerState,
    seeds: jax.Array,
    rows: Rows,
    count: jax.Array,
    texts: Texts,
    hints: list[jax.Array],
    features: list[tuple[jax.Array, ...]],
    rescaling: jax.Array,
    kept: Kept | None,
) -> tuple[SamplerState, jax.Array]:
    """The first `count` of the rows. Returns the state and the clean latents (B,h,w,C) that the last one predicted.

    `params` has the UNet's, the branch's, and those of the K ControlNets, whose embedded maps are `hints` (1,h,w,C);
    `features` (1,h,w,C) are those of A T2I-Adapters, level by level.
    """
    rows = jax.tree.map(jnp.asarray, rows)
    nets = {name: _bound(networks, params, name) for name in params}
    dtype = params["unet"]["conv_in.bias"].dtype
    shifts = jax.tree.map(lambda net: net.time_shifts(rows.steps.t, dtype), nets, is_leaf=callable)

    def step(index: jax.Array, carry: tuple[SamplerState, jax.Array]) -> tuple[SamplerState, jax.Array]:
        before, _ = carry
        row = jax.tree.map(lambda column: column[index], rows)
        added = _added(features, row.adapters)
        here = jax.tree.map(lambda column: column[index][None], shifts)
        predictions = _predict(networks.parts, nets, before.latents.astype(dtype), here, texts, hints, added, row)
        guided = rescale(guide(predictions, row.guidance), predictions[-1], rescaling)
        noise = samplers.row_noise(seeds, row.steps.row, before.latents.shape[1:])
        state = samplers.advance(before, guided, row.steps, noise)
        if kept is not None:
            old = row.alpha_after * kept.clean + row.sigma_after * kept.noise
            state = SamplerState(kept.mask * state.latents + (1 - kept.mask) * old, state.memory)
        return state, networks.schedule.to_x0(guided, before.latents, row.steps.alpha, row.steps.sigma)

    return jax.lax.fori_loop(0, count, step, (state, jnp.zeros_like(state.latents)))


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
    parts: Parts,
    nets: dict,
    latents: jax.Array,
    shifts: dict,
    texts: Texts,
    hints: list[jax.Array],
    added: list[jax.Array] | None,
    row: Rows,
) -> list[jax.Array]:
    """Latents (B,h,w,C) at one row -> the P predictions, each (B,h,w,C) fp32; `added` inside the UNet's encoder.

    The networks' encoders take each sample once and its texts one after the other (`UNetEncoder.encode`): what comes
    before the first text, and all of a backbone with one English text, is computed once for all parts.
    """
    unet = nets["unet"]
    encoded = unet.encode(latents, shifts["unet"], texts.english, features=added)
    skips, mid = spread(encoded, parts.english)
    if "branch" in nets:
        residuals: Residuals = nets["branch"](latents, shifts["branch"], texts.chinese)
        skips, mid = spread(_scaled(residuals, row.strengths), parts.chinese).add_to(skips, mid)
    for number, (hint, strength) in enumerate(zip(hints, row.controls, strict=True)):
        given = latents, shifts["controls"][number], texts.controls[number], hint
        residuals = nets["controls"][number].residuals(*given)
        residuals = jax.tree.map(lambda x, strength=strength: strength.astype(x.dtype) * x, residuals)
        skips, mid = spread(residuals, parts.english).add_to(skips, mid)
    skips, mid = jax.tree.map(lambda x: repeat(x, len(parts.english) * len(latents)), (skips, mid))
    predictions = unet.decode(skips, mid, shifts["unet"], spread(texts.english, parts.english)).astype(jnp.float32)
    predictions = predictions.reshape(len(latents), -1, *latents.shape[1:])
    return [predictions[:, part] for part in range(predictions.shape[1])]


def spread(tree, numbers: tuple[int, ...]):
    """Arrays (B*U,...), U texts of each sample -> (B*P,...), where part p of a sample is text `numbers[p]`.

    Where there is but one text, it stays one: the networks take fewer rows, each for several.
    """
    texts = len(set(numbers))
    if texts == 1 or numbers == tuple(range(texts)):
        return tree
    take = lambda x: x.reshape(-1, texts, *x.shape[1:])[:, np.array(numbers)].reshape(-1, *x.shape[1:])  # noqa: E731
    return jax.tree.map(take, tree)


def _scaled(residuals: Residuals, strengths: jax.Array) -> Residuals:
    """Residuals (B*U,...) times the strengths (U,R); the last is the middle's."""
    tensors = [*residuals.skips, residuals.mid]
    texts = len(strengths)
    scaled = [
        (x.reshape(-1, texts, *x.shape[1:]) * factor[:, None, None, None].astype(x.dtype)).reshape(x.shape)
        for x, factor in zip(tensors, strengths.T, strict=True)
    ]
    return Residuals(tuple(scaled[:-1]), scaled[-1])


def encode(vae: Component, pictures: jax.Array) -> jax.Array:
    """Pictures (B,H,W,3) uint8 -> clean latents (B,h,w,C) fp32: the mean of the autoencoder's, scaled."""
    return _encode(vae.config, vae.params, pictures)


def decode(vae: Component, latents: jax.Array) -> tuple[np.ndarray, np.ndarray]:
    """Latents (B,h,w,C) -> pictures (B,H,W,3) uint8, and whether each has finite values only (B,)."""
    return tuple(map(np.asarray, _decode(vae.config, vae.params, latents)))


@partial(jax.jit, static_argnums=0)
def _encode(config: VAEConfig | TinyVAEConfig, params: Params, pictures: jax.Array) -> jax.Array:
    images = (pictures.astype(jnp.float32) / 127.5 - 1.0).astype(next(iter(params.values())).dtype)
    mean, _ = bind(config, params).encode(images)
    return mean.astype(jnp.float32) * config.scaling_factor


@partial(jax.jit, static_argnums=0)
def _decode(config: VAEConfig | TinyVAEConfig, params: Params, latents: jax.Array) -> tuple[jax.Array, jax.Array]:
    latents = (latents / config.scaling_factor).astype(next(iter(params.values())).dtype)
    images = bind(config, params).decode(latents).astype(jnp.float32)
    finite = jnp.isfinite(images).all(axis=(1, 2, 3))
    return jnp.round(jnp.clip(images, -1.0, 1.0) * 127.5 + 127.5).astype(jnp.uint8), finite
