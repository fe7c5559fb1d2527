"""The way through the steps: batches of requests, a sampler's table, the compiled programs of `denoise`, pixels."""

import itertools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bdm_jax.diffusion import samplers
from bdm_jax.diffusion.samplers import SAMPLERS, SamplerState, Steps
from bdm_jax.diffusion.torch_noise import randn
from bdm_jax.errors import UserError
from bdm_jax.images.decode import resize_to_cover
from bdm_jax.latents.autoencoder import decode, encode
from bdm_jax.models.config import T2IAdapterConfig
from bdm_jax.models.functional import Params, param_dtype
from bdm_jax.models.unet.conditioning import Conditioning
from bdm_jax.plugins.controls import Control, check_sizes, embed
from bdm_jax.sampling.batching import PreparedRequest, batches, load, name_unused, read_jobs
from bdm_jax.sampling.denoiser import (
    BACKBONE,
    BRANCH,
    InpaintState,
    Networks,
    PredictionPlan,
    ResidualNetwork,
    StepCache,
    denoise,
    unit_noise,
)
from bdm_jax.sampling.memory import check_memory
from bdm_jax.sampling.settings import Request, Sampling
from bdm_jax.sampling.steps import Guidance, Segment, chunk, guidance_rows, segments, step_table
from bdm_jax.sampling.texts import BatchTexts, ImageKeys, encode_batch
from bdm_jax.systems.components import Component, in_dtype
from bdm_jax.systems.pipeline import BridgePipeline

Progress = Callable[[int, int], None]
Preview = Callable[[int, np.ndarray], None]


def sampler_options(pipeline: BridgePipeline, settings: Sampling) -> dict[str, Any]:
    """The settings of a sampler that have arguments of its recipe."""
    scale = pipeline.schedule.data_scale
    given = {
        "eta": settings.eta,
        "spacing": settings.timesteps,
        "sigmas": tuple(sigma / scale for sigma in settings.sigmas),
    }
    return {name: value for name, value in given.items() if value}


def sampler_table(pipeline: BridgePipeline, settings: Sampling, strength: float | None) -> Steps:
    """The sampler's steps; below a strength of 1 the last of them only, which may be none."""
    schedule = pipeline.schedule
    more = {"final_sigma_zero": False} if settings.reference else sampler_options(pipeline, settings)
    taken = settings.steps if strength is None else min(int(settings.steps * strength), settings.steps)
    begin = settings.steps - max(taken, 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        table = SAMPLERS[settings.sampler](schedule, settings.steps, begin=begin, **more)
    if not all(np.isfinite(column).all() for column in jax.tree.leaves(table)):
        raise UserError(
            f"{settings.steps} steps are too many for {settings.sampler}: some would fall on one timestep; take fewer"
        )
    if table.clip is None and (getattr(schedule, "clip_sample", False) or getattr(schedule, "thresholding", False)):
        message = f"{settings.sampler} does not clip samples as the model's scheduler_config.json asks"
        warnings.warn(f"{message}: ddim, ddpm and lcm do", stacklevel=1)
    if taken:
        return table
    message = f"strength {strength} of {settings.steps} steps leaves none to take: the image is kept"
    warnings.warn(f"{message}, but for what the autoencoder changes", stacklevel=1)
    return jax.tree.map(lambda column: column[:0], table)


@dataclass(frozen=True)
class _Pass:
    """One way through the steps: from noise, or from an image as it is at the first of them. Without any steps, an
    image goes through the autoencoder only.
    """

    size: tuple[int, int]
    steps: Steps
    strength: float | None  # None is no image


@dataclass(frozen=True)
class _PassInputs:
    """What all calls of `denoise` in a pass share; `texts` are those of a plan for networks of some names."""

    steps: Steps
    guidance: list[Guidance]
    negatives: int  # of the branch's texts
    texts: Callable[[PredictionPlan, tuple[str, ...]], dict[str, Conditioning]]
    seeds: jax.Array
    hints: list[jax.Array]
    features: list[tuple[jax.Array, ...]]
    inpaint: InpaintState | None


@dataclass
class PassRunner:
    """Draws requests batch by batch with networks that are ready for it. One that overflows in float16 is replaced.

    Fields are as the arguments of `generate`; `maps` are its ControlNets and T2I-Adapters.
    """

    pipeline: BridgePipeline
    settings: Sampling
    maps: tuple[Control, ...]
    image_keys: tuple[ImageKeys, ...]
    batch_size: int
    mesh: Mesh
    on_preview: Preview
    preview_every: int

    def images(self, requests: list[Request], progress: Progress) -> Iterator[np.ndarray]:
        """Everything that can fail early does so here; the iterator draws."""
        if self.settings.reference:
            starts = range(0, len(requests), self.batch_size)
            groups = [self._jobs(requests[begin : begin + self.batch_size]) for begin in starts]
        else:
            groups = batches([job for request in requests for job in self._jobs([request])], self.batch_size)
        name_unused(self.pipeline, [job for group in groups for job in group])
        planned = [(batch, self._passes(batch[0])) for batch in groups]
        for batch, passes in planned:
            check_memory(self.pipeline, self.settings, passes[-1].size, len(batch))
        for control, (_, passes) in itertools.product(self.maps, planned):
            check_sizes(control, [one.size for one in passes])
        return self._draw(planned, progress)

    def _draw(self, planned: list[tuple[list[PreparedRequest], list[_Pass]]], progress: Progress):
        largest = max(len(batch) for batch, _ in planned)
        largest = -(-largest // self.mesh.size) * self.mesh.size
        total, done = sum(len(p.steps.t) for _, passes in planned for p in passes), 0
        progress(0, total)
        for batch, passes in planned:
            filled = batch + batch[-1:] * (largest - len(batch))

            def report(steps: int, done: int = done) -> None:
                progress(done + steps, total)

            try:
                images = self._all_passes(len(batch), filled, passes, report)
            except _Overflow:
                warnings.warn("a network overflows in float16: all of them go on in float32", stacklevel=2)
                self.pipeline = self.pipeline.in_dtype("float32")
                self.maps = tuple(replace(one, network=in_dtype(one.network, "float32")) for one in self.maps)
                images = self._all_passes(len(batch), filled, passes, report)
            done += sum(len(stage.steps.t) for stage in passes)
            yield from images[: len(batch)]

    def _all_passes(
        self, count: int, jobs: list[PreparedRequest], passes: list[_Pass], report: Callable[[int], None]
    ) -> np.ndarray:
        networks, params = self._networks()
        texts = encode_batch(self.pipeline, self.settings, jobs, networks, params, self.image_keys, self._split)
        images, done = None, 0
        for stage in passes:

            def of_stage(steps: int, done: int = done) -> None:
                report(done + steps)

            images = self._one_pass(count, jobs, texts, stage, images, of_stage)
            done += len(stage.steps.t)
        return images

    def _decode(self, latents: jax.Array) -> tuple[np.ndarray, np.ndarray]:
        """As `latents.autoencoder.decode`; in float16 beyond its range (SD's autoencoders) from now on in float32."""
        vae, tile = self.pipeline.vae, self.settings.vae_tile
        if _in_float16(self.pipeline.unet) and not np.isfinite(latents).all():
            raise _Overflow
        pixels, finite = decode(vae, latents, tile)
        if finite.all() or vae is None or not _in_float16(vae):
            return pixels, finite
        warnings.warn("the autoencoder overflows in float16: it goes on in float32", stacklevel=2)
        self.pipeline = self.pipeline.replace(vae=in_dtype(vae, "float32"))
        return decode(self.pipeline.vae, latents, tile)

    def _jobs(self, requests: list[Request]) -> list[PreparedRequest]:
        return read_jobs(self.pipeline, self.settings, self.maps, requests, self._counts)

    def _counts(self, request: Request, size: tuple[int, int]) -> list[int]:
        """The rows of each pass of a request, or 1 where it has none."""
        return [max(1, len(stage.steps.t)) for stage in self._passes(PreparedRequest(request, {}, size, {}))]

    def _passes(self, job: PreparedRequest) -> list[_Pass]:
        settings = self.settings
        strength = None if job.request.image is None else settings.strength
        passes = [_Pass(job.size, sampler_table(self.pipeline, settings, strength), strength)]
        if settings.hires > 1:
            factor = self.pipeline.factor
            size = tuple(round(side * settings.hires / factor) * factor for side in job.size)
            strength = settings.hires_strength
            passes.append(_Pass(size, sampler_table(self.pipeline, settings, strength), strength))
        return passes

    def _controls(self, adapters: bool = False) -> list[Control]:
        """The ControlNets, or the T2I-Adapters."""
        return [control for control in self.maps if isinstance(control.network.config, T2IAdapterConfig) == adapters]

    def _networks(self) -> tuple[list[ResidualNetwork], dict[str, Params]]:
        """The residual networks in the order in which they are added, and the parameters of all networks by name."""
        networks, params = [], {"unet": self.pipeline.unet.params}
        if (branch := self.pipeline.branch) is not None:
            networks.append(ResidualNetwork(BRANCH, branch.config, BRANCH))
            params[BRANCH] = branch.params
        for number, control in enumerate(self._controls()):
            networks.append(ResidualNetwork(_control_name(number), control.network.config, BACKBONE))
            params[networks[-1].name] = control.network.params
        return networks, params

    def _one_pass(
        self,
        count: int,
        jobs: list[PreparedRequest],
        texts: BatchTexts,
        stage: _Pass,
        images: np.ndarray | None,
        report: Callable[[int], None],
    ) -> np.ndarray:
        """All steps for one batch, the first `count` jobs of which are not mere filling: images (B,H,W,3) uint8.

        `images` are an earlier pass's.
        """
        pipeline, settings = self.pipeline, self.settings
        factor, scale = pipeline.factor, pipeline.schedule.data_scale
        shape = (stage.size[0] // factor, stage.size[1] // factor, pipeline.unet.config.in_channels)
        seeds = self._split(np.array([job.request.seed for job in jobs], np.uint32))
        noise = self._split(_torch_noise(jobs, count, shape)) if settings.reference else unit_noise(shape, seeds)
        hints, features = (
            [embed(control, resize_to_cover(control.hint, stage.size)) for control in some]
            for some in (self._controls(), self._controls(adapters=True))
        )
        clean = inpaint = masks = originals = None
        if stage.strength is not None:
            loaded = [load(job.request) for job in jobs]
            originals = [image for image, _ in loaded] if images is None else images
            originals = np.stack([resize_to_cover(image, stage.size) for image in originals])
            clean = encode(pipeline.vae, self._split(originals), settings.vae_tile)
            clean = self._split(clean if scale == 1 else clean / scale)
            if jobs[0].request.mask is not None:
                masks = np.stack([resize_to_cover(mask, stage.size) for _, mask in loaded])
                latent_masks = self._split(np.stack([_latent_mask(mask, factor) for mask in masks]))
                inpaint = InpaintState(clean, noise, latent_masks)
        if not len(stage.steps.t):
            return self._pixels(clean, count, jobs, masks, originals)
        has_branch = pipeline.branch is not None
        sources = jobs[0].sources
        guidance = guidance_rows(settings, len(stage.steps.t), texts.one_text, has_branch, sources)
        chosen = cache(partial(texts.chosen, size=stage.size))
        negatives = sources[BRANCH].negatives if has_branch else 1
        inputs = _PassInputs(stage.steps, guidance, negatives, chosen, seeds, hints, features, inpaint)
        # as in diffusers, a strength of 1 forgets the image where there is a mask; else a trace of it is left
        begun_from = None if masks is not None and stage.strength == 1 else clean
        state, step_cache = samplers.start(noise, stage.steps, begun_from), None
        for segment in segments(settings, guidance, self.preview_every, has_branch):
            state, predicted_x0, step_cache = self._run(segment, inputs, state, step_cache)
            report(segment.rows.stop)
            if segment.rows.stop % self.preview_every == 0 and segment.rows.stop < len(guidance):
                self.on_preview(segment.rows.stop, np.asarray(predicted_x0)[:count] * np.float32(scale))
        return self._pixels(state.latents, count, jobs, masks, originals)

    def _pixels(
        self,
        latents: jax.Array,
        count: int,
        jobs: list[PreparedRequest],
        masks: np.ndarray | None,
        originals: np.ndarray | None,
    ) -> np.ndarray:
        """Clean latents (B,h,w,C) -> images (B,H,W,3) uint8, outside of masks (B,H,W) the originals."""
        scale = self.pipeline.schedule.data_scale
        latents = latents if scale == 1 else latents * scale
        pixels, finite = self._decode(latents)
        for job, good in zip(jobs[:count], finite[:count], strict=True):
            if not good:
                raise UserError(
                    f"the picture for {job.request.prompt or job.request.english!r} came out as NaN; "
                    "try less guidance, other prompts, or --dtype float32"
                )
        if masks is not None:
            amount = masks[..., None].astype(np.float32) / 255
            pixels = np.round(amount * pixels + (1 - amount) * originals).astype(np.uint8)
        return pixels

    def _run(
        self, segment: Segment, inputs: _PassInputs, state: SamplerState, step_cache: StepCache | None
    ) -> tuple[SamplerState, jax.Array, StepCache | None]:
        """One call of `denoise`, to its end."""
        pipeline, settings, plan = self.pipeline, self.settings, segment.plan
        networks, params = self._networks()
        networks = tuple(net for net in networks if segment.uses_branch or net.name != BRANCH)
        params = {name: params[name] for name in ("unet", *(net.name for net in networks))}
        compiled_for = Networks(
            pipeline.unet.config, networks, pipeline.schedule, plan.renumbered(), settings.merge_tokens, segment.reuse
        )
        controls, adapters = self._controls(), self._controls(adapters=True)
        what = (settings, inputs.steps, inputs.guidance, plan, networks, controls, adapters)
        table = step_table(*what, inputs.negatives)
        state, predicted_x0, step_cache = denoise(
            compiled_for,
            params,
            SamplerState(self._split(state.latents), self._split(state.memory, axis=1)),
            inputs.seeds,
            jax.tree.map(partial(chunk, rows=segment.rows), table),
            len(segment.rows),
            inputs.texts(plan, tuple(params)),
            {_control_name(number): hint for number, hint in enumerate(inputs.hints)},
            inputs.features,
            np.float32(settings.guidance_rescale),
            inputs.inpaint,
            None if segment.fills_cache or segment.reuse is None else self._split(step_cache),
        )
        jax.block_until_ready(state)
        return state, predicted_x0, step_cache

    def _split(self, tree, axis: int = 0):
        """Arrays laid out over the devices, samples along `axis`."""
        return jax.device_put(tree, NamedSharding(self.mesh, PartitionSpec(*[None] * axis, "data")))


class _Overflow(Exception):
    """Latents came out beyond float16's range."""


def _in_float16(component: Component) -> bool:
    return param_dtype(component.params) == np.float16


def _control_name(number: int) -> str:
    return f"control-{number}"


def _torch_noise(jobs: list[PreparedRequest], count: int, shape: tuple[int, int, int]) -> np.ndarray:
    """The reference's noise: one draw for a batch of `count`, channels first, from the first seed."""
    height, width, channels = shape
    drawn = randn(jobs[0].request.seed, (count, channels, height, width))
    filled = np.concatenate([drawn, np.repeat(drawn[-1:], len(jobs) - count, axis=0)])
    return np.moveaxis(filled, 1, -1)


def _latent_mask(mask: np.ndarray, factor: int) -> np.ndarray:
    """(H,W) uint8 -> (h,w,1) fp32: a latent is repainted as far as the whitest of its pixels."""
    height, width = (side // factor for side in mask.shape)
    cells = mask.reshape(height, factor, width, factor).max(axis=(1, 3))
    return cells[..., None].astype(np.float32) / 255
