"""Prompts to images: texts, noise, the sampler's table, the compiled programs of `denoise`, pixels."""

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from bdm_jax.diffusion import samplers
from bdm_jax.diffusion.samplers import SAMPLERS, SamplerState, Steps, check_sampler, system_sampler
from bdm_jax.diffusion.torch_noise import randn
from bdm_jax.errors import UserError
from bdm_jax.images.decode import resize_to_cover
from bdm_jax.latents.autoencoder import decode, encode
from bdm_jax.models.config import EncoderConfig, T2IAdapterConfig, VAEConfig
from bdm_jax.models.convolution import prepare
from bdm_jax.models.functional import Params
from bdm_jax.models.unet.conditioning import Conditioning
from bdm_jax.plugins import image_prompts
from bdm_jax.plugins.controls import Control, check_size, embed
from bdm_jax.plugins.controls import check as check_control
from bdm_jax.plugins.image_prompts import ImagePrompt
from bdm_jax.sampling.batching import PreparedRequest, as_english, batches, default_size, load, read_jobs
from bdm_jax.sampling.denoiser import (
    BACKBONE,
    BRANCH,
    STEPS_PER_CALL,
    InpaintState,
    Networks,
    PredictionPlan,
    ResidualNetwork,
    StepCache,
    denoise,
    unit_noise,
)
from bdm_jax.sampling.settings import REFERENCE_SAMPLER, Request, Sampling
from bdm_jax.sampling.settings import check as check_settings
from bdm_jax.sampling.steps import Guidance, Segment, chunk, guidance_rows, segments, step_table
from bdm_jax.sampling.texts import BatchTexts, ImageKeys, encode_batch
from bdm_jax.systems.components import Component
from bdm_jax.systems.pipeline import BridgePipeline
from bdm_jax.text import readers

Progress = Callable[[int, int], None]
Preview = Callable[[int, np.ndarray], None]


def generate(
    pipeline: BridgePipeline,
    requests: Sequence[Request],
    settings: Sampling | None = None,
    *,
    controls: Sequence[Control | ImagePrompt] = (),
    batch_size: int = 8,
    progress: Progress | None = None,
    on_preview: Preview | None = None,
    preview_every: int = STEPS_PER_CALL,
) -> Iterator[np.ndarray]:
    """Images in the order of the requests, each (H,W,3) uint8, yielded as soon as their batch is done.

    An image depends on its own request and the settings only, never on the batch size, its place in a batch, or the
    number of devices, over which batches are split (up to the rounding of programs of different sizes). Only the
    reference mode is different: there all prompts of a batch take as many windows as its longest, and the noise of the
    batch comes from its first seed.

    A request with more windows of text than its neighbour, or another size, begins a new batch.

    Args:
      settings: how to draw; `Sampling()` where None.
      controls: ControlNets and T2I-Adapters, each with its map, and IP-Adapters, each with its image, beside the
        branch or the bare backbone.
      batch_size: images at a time, on all devices of this process together.
      progress: called with (steps done, steps in all) over all batches, first with 0.
      on_preview: called every `preview_every` steps with the steps done in the batch, and the clean latents (B,h,w,C)
        that the networks predict.

    Raises UserError, before anything is computed, for settings that are not valid and files that cannot be read; and
    when images come out as NaN.
    """
    settings, requests = settings or Sampling(), list(requests)
    if batch_size < 1:
        raise UserError(f"batch size {batch_size} is less than 1")
    if settings.bare or pipeline.branch is None:
        pipeline = pipeline.without_bridge()
        requests = [as_english(request) for request in requests]
    check(pipeline, requests, settings)
    settings = resolve(pipeline, settings)
    factor = pipeline.factor
    maps = [control for control in controls if isinstance(control, Control)]
    prompts = [control for control in controls if isinstance(control, ImagePrompt)]
    for control in maps:
        check_control(control, pipeline.unet.config, factor)
    for prompt in prompts:
        image_prompts.read(prompt, pipeline.unet.config)
    prompts = [prompt for prompt in prompts if prompt.strength]  # 0 is without: both halves may be one text again
    mesh = Mesh(np.array(jax.local_devices()), ("data",), axis_types=(AxisType.Auto,))
    size = tuple(side // factor for side in settings.size or default_size(pipeline, maps))
    ready = partial(_prepare, size=size, mesh=mesh)
    sampler = _Sampler(
        pipeline.replace(**{name: ready(component) for name, component in pipeline.networks.items()}),
        settings,
        tuple(replace(control, network=ready(control.network)) for control in maps),
        tuple(image_prompts.keys(prompt, pipeline.unet) for prompt in prompts),
        batch_size,
        mesh,
        on_preview or (lambda done, predicted_x0: None),
        preview_every,
    )
    return sampler.images(requests, progress or (lambda done, total: None))


def resolve(pipeline: BridgePipeline, settings: Sampling) -> Sampling:
    """The settings with the system's own sampler and guidance where they name none: what an image is drawn with."""
    own = REFERENCE_SAMPLER if settings.reference else system_sampler(pipeline.family.sampler, pipeline.schedule)
    guidance = pipeline.guidance if settings.guidance is None else settings.guidance
    return replace(settings, sampler=settings.sampler or own, guidance=guidance)


def check(pipeline: BridgePipeline, requests: Sequence[Request], settings: Sampling) -> None:
    """Raises UserError for the first thing that is not valid."""
    check_settings(settings)
    if not requests:
        raise UserError("no prompts: give at least one")
    for request in requests:
        if not 0 <= request.seed < 2**32:
            raise UserError(f"seed {request.seed} is outside 0 .. 2**32 - 1")
        if request.mask is not None and request.image is None:
            raise UserError("a mask without an image: give the image that it is the mask of")
    check_sampler(settings.sampler)
    factor = pipeline.factor
    if settings.size is not None and any(side < factor or side % factor for side in settings.size):
        height, width = (max(factor, round(side / factor) * factor) for side in settings.size)
        raise UserError(
            f"size {settings.size[1]}x{settings.size[0]}: width and height must be multiples of {factor}, the VAE's "
            f"factor; try {width}x{height}"
        )
    layers = readers.layers(pipeline.readers[BACKBONE], pipeline.parts)
    if settings.clip_skip > layers:
        raise UserError(f"clip skip {settings.clip_skip} is outside 1 .. {layers}, the text encoder's layers")
    if settings.vae_tile % (4 * factor):
        nearest = max(1, round(settings.vae_tile / (4 * factor))) * 4 * factor
        raise UserError(f"VAE tile {settings.vae_tile} is no multiple of {4 * factor} pixels; try {nearest}")
    if settings.merge_tokens and not pipeline.unet.config.transformer_layers[0]:
        raise UserError(f"merge tokens {settings.merge_tokens} has no effect: the first level has no self-attention")
    given = len(settings.residual_strengths)
    if given and given != _residuals(pipeline):
        raise UserError(f"{given} residual strengths: the branch has {_residuals(pipeline)} residuals")


@dataclass(frozen=True)
class _Pass:
    """One way through the steps: from noise, or from an image as it is at the first of them."""

    size: tuple[int, int]
    steps: Steps
    from_image: bool


@dataclass(frozen=True)
class _PassInputs:
    """What all calls of `denoise` in a pass share; `texts` are those of a plan for networks of some names."""

    steps: Steps
    guidance: list[Guidance]
    texts: Callable[[PredictionPlan, tuple[str, ...]], dict[str, Conditioning]]
    seeds: jax.Array
    hints: list[jax.Array]
    features: list[tuple[jax.Array, ...]]
    inpaint: InpaintState | None


@dataclass(frozen=True)
class _Sampler:
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
        planned = [(batch, self._passes(batch[0])) for batch in groups]
        for control, (batch, _) in itertools.product(self.maps, planned):
            check_size(control, batch[0].size)
        return self._draw(planned, progress)

    def _draw(self, planned: list[tuple[list[PreparedRequest], list[_Pass]]], progress: Progress):
        largest = max(len(batch) for batch, _ in planned)
        largest = -(-largest // self.mesh.size) * self.mesh.size
        total, done = sum(len(p.steps.t) for _, passes in planned for p in passes), 0
        progress(0, total)
        for batch, passes in planned:
            filled = batch + batch[-1:] * (largest - len(batch))
            networks, params = self._networks()
            texts = encode_batch(self.pipeline, self.settings, filled, networks, params, self.image_keys, self._split)
            images = None
            for stage in passes:

                def report(steps: int, done: int = done) -> None:
                    progress(done + steps, total)

                images = self._one_pass(len(batch), filled, texts, stage, images, report)
                done += len(stage.steps.t)
            yield from images[: len(batch)]

    def _jobs(self, requests: list[Request]) -> list[PreparedRequest]:
        return read_jobs(self.pipeline, self.settings, self.maps, requests)

    def _passes(self, job: PreparedRequest) -> list[_Pass]:
        settings, from_image = self.settings, job.request.image is not None
        passes = [_Pass(job.size, self._table(settings.strength if from_image else 1.0), from_image)]
        if settings.hires > 1:
            factor = self.pipeline.factor
            size = tuple(round(side * settings.hires / factor) * factor for side in job.size)
            passes.append(_Pass(size, self._table(settings.hires_strength), True))
        return passes

    def _table(self, strength: float) -> Steps:
        """The sampler's steps; below a strength of 1 the last of them only."""
        settings, schedule = self.settings, self.pipeline.schedule
        more = {"final_sigma_zero": False} if settings.reference else {}
        begin = settings.steps - min(int(settings.steps * strength), settings.steps)
        if begin == settings.steps:
            raise UserError(f"strength {strength} of {settings.steps} steps leaves none to take: take more of either")
        with np.errstate(divide="ignore", invalid="ignore"):
            table = SAMPLERS[settings.sampler](schedule, settings.steps, begin=begin, **more)
        if not all(np.isfinite(column).all() for column in jax.tree.leaves(table)):
            raise UserError(
                f"{settings.steps} steps are too many for {settings.sampler}: some would fall on one timestep; "
                "take fewer"
            )
        return table

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
        if stage.from_image:
            loaded = [load(job.request) for job in jobs]
            originals = [image for image, _ in loaded] if images is None else images
            originals = np.stack([resize_to_cover(image, stage.size) for image in originals])
            clean = encode(pipeline.vae, self._split(originals), settings.vae_tile)
            clean = self._split(clean if scale == 1 else clean / scale)
            if jobs[0].request.mask is not None:
                masks = np.stack([resize_to_cover(mask, stage.size) for _, mask in loaded])
                latent_masks = self._split(np.stack([_latent_mask(mask, factor) for mask in masks]))
                inpaint = InpaintState(clean, noise, latent_masks)
        has_branch = pipeline.branch is not None
        guidance = guidance_rows(settings, len(stage.steps.t), texts.one_text, has_branch)
        chosen = cache(partial(texts.chosen, size=stage.size))
        inputs = _PassInputs(stage.steps, guidance, chosen, seeds, hints, features, inpaint)
        state, step_cache = samplers.start(noise, stage.steps, clean), None
        for segment in segments(settings, guidance, self.preview_every, has_branch):
            state, predicted_x0, step_cache = self._run(segment, inputs, state, step_cache)
            report(segment.rows.stop)
            if segment.rows.stop % self.preview_every == 0 and segment.rows.stop < len(guidance):
                self.on_preview(segment.rows.stop, np.asarray(predicted_x0)[:count] * np.float32(scale))
        latents = state.latents if scale == 1 else state.latents * scale
        pixels, finite = decode(pipeline.vae, latents, settings.vae_tile)
        for job, good in zip(jobs[:count], finite[:count], strict=True):
            if not good:
                raise UserError(
                    f"the picture for {job.request.prompt or job.request.english!r} came out as NaN; "
                    "try less guidance, other prompts, or weights in float32"
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
        table = step_table(settings, inputs.steps, inputs.guidance, plan, networks, controls, adapters)
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


def _prepare(component: Component | None, size: tuple[int, int], mesh: Mesh) -> Component | None:
    """A network as it draws fastest at latents of `size`: its parameters prepared, and on each of several devices.

    Prepared filters take memory, up to as much as the network: it should have a third of the machine's at most.
    """
    if component is None:
        return None
    config, params = component
    if isinstance(config, EncoderConfig | VAEConfig) and 3 * sum(x.nbytes for x in params.values()) < _memory():
        params = prepare(config, params, size)
    if mesh.size > 1:
        params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    return Component(config, params)


def _control_name(number: int) -> str:
    return f"control-{number}"


def _memory() -> int:
    """Bytes of the machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0


def _residuals(pipeline: BridgePipeline) -> int:
    """How many tensors a branch adds: one for every skip, one for the middle."""
    return len(pipeline.unet.config.skip_channels) + 1


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
