"""Prompts to pictures: texts, noise, the sampler's table, the compiled programs of `denoise`, pixels."""

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from bdm_jax.diffusion import samplers
from bdm_jax.diffusion.samplers import SAMPLERS, SamplerState, Steps
from bdm_jax.diffusion.torch_noise import randn
from bdm_jax.errors import UserError, unknown
from bdm_jax.images.decode import resize_to_cover
from bdm_jax.latents.autoencoder import decode, encode
from bdm_jax.models.config import EncoderConfig, T2IAdapterConfig, VAEConfig
from bdm_jax.models.convolution import prepare
from bdm_jax.models.unet.conditioning import Conditioning
from bdm_jax.plugins import image_prompts
from bdm_jax.plugins.controls import Control, check_size, embed
from bdm_jax.plugins.controls import check as check_control
from bdm_jax.plugins.image_prompts import ImagePrompt
from bdm_jax.sampling.batching import PreparedRequest, as_english, batches, default_size, load, read_jobs, stack
from bdm_jax.sampling.denoiser import (
    STEPS_PER_CALL,
    Conditionings,
    InpaintState,
    Networks,
    PredictionPlan,
    denoise,
    unit_noise,
    with_keys,
)
from bdm_jax.sampling.settings import Request, Sampling
from bdm_jax.sampling.settings import check as check_settings
from bdm_jax.sampling.steps import POSITIVE, calls, chunk, guided_parts, rows
from bdm_jax.systems.components import Component
from bdm_jax.systems.pipeline import NETWORKS, BridgePipeline
from bdm_jax.text.encode import encode_tokens

Progress = Callable[[int, int], None]
Watch = Callable[[int, np.ndarray], None]


def generate(
    pipeline: BridgePipeline,
    requests: Sequence[Request],
    settings: Sampling | None = None,
    *,
    controls: Sequence[Control | ImagePrompt] = (),
    batch_size: int = 8,
    progress: Progress | None = None,
    watch: Watch | None = None,
    watch_every: int = STEPS_PER_CALL,
) -> Iterator[np.ndarray]:
    """Pictures in the order of the requests, each (H,W,3) uint8, yielded as soon as their batch is done.

    A picture depends on its own request and the settings only, never on the batch size, its place in a batch, or the
    number of devices, over which batches are split (up to the rounding of programs of different sizes). Only the
    reference mode is different: there all prompts of a batch take as many windows as its longest, and the noise of the
    batch comes from its first seed.

    A request with more windows of text than its neighbour, or another size, begins a new batch.

    Args:
      settings: how to draw; `Settings()` where None.
      controls: ControlNets and T2I-Adapters, each with its map, and IP-Adapters, each with its picture, beside the
        branch or the bare backbone.
      batch_size: pictures at a time, on all devices of this process together.
      progress: called with (steps done, steps in all) over all batches, first with 0.
      watch: called every `watch_every` steps with the steps done in the batch, and the clean latents (B,h,w,C) that
        the networks foresee.

    Raises UserError, before anything is computed, for settings that cannot be and files that cannot be read; and when
    pictures come out as NaN.
    """
    settings, requests = settings or Sampling(), list(requests)
    if batch_size < 1:
        raise UserError(f"batch size {batch_size} is less than 1")
    if settings.bare or pipeline.branch is None:
        pipeline = replace(pipeline, branch=None, branch_text_encoder=None, branch_tokenizer=None)
        requests = [as_english(request) for request in requests]
    check(pipeline, requests, settings)
    factor = pipeline.vae.config.factor
    maps = [control for control in controls if isinstance(control, Control)]
    prompts = [control for control in controls if isinstance(control, ImagePrompt)]
    for control in maps:
        check_control(control, pipeline.unet.config, factor)
    for prompt in prompts:
        image_prompts.read(prompt, pipeline.unet.config)
    prompts = [prompt for prompt in prompts if prompt.strength]  # 0 is without: both halves may be one text again
    settings = replace(settings, guidance=pipeline.guidance if settings.guidance is None else settings.guidance)
    mesh = Mesh(np.array(jax.local_devices()), ("data",), axis_types=(AxisType.Auto,))
    size = tuple(side // factor for side in settings.size or default_size(pipeline, maps))
    ready = partial(_prepare, size=size, mesh=mesh)
    drawing = _Sampler(
        replace(pipeline, **{name: ready(getattr(pipeline, name)) for name in NETWORKS}),
        settings,
        tuple(replace(control, network=ready(control.network)) for control in maps),
        tuple(image_prompts.keys(prompt, pipeline.unet) for prompt in prompts),
        batch_size,
        mesh,
        watch or (lambda done, clean: None),
        watch_every,
    )
    return drawing.pictures(requests, progress or (lambda done, total: None))


def check(pipeline: BridgePipeline, requests: Sequence[Request], settings: Sampling) -> None:
    """Raises UserError for the first thing that cannot be."""
    check_settings(settings)
    if not requests:
        raise UserError("no prompts: give at least one")
    for request in requests:
        if not 0 <= request.seed < 2**32:
            raise UserError(f"seed {request.seed} is outside 0 .. 2**32 - 1")
        if request.mask is not None and request.image is None:
            raise UserError("a mask without an image: give the image that it is the mask of")
    if settings.sampler not in SAMPLERS:
        raise unknown("sampler", settings.sampler, SAMPLERS)
    limit = pipeline.schedule.num_train_timesteps
    if settings.steps > limit:
        raise UserError(f"steps {settings.steps} is outside 1 .. {limit}, the timesteps that the model knows")
    factor = pipeline.vae.config.factor
    if settings.size is not None and any(side < factor or side % factor for side in settings.size):
        height, width = (max(factor, round(side / factor) * factor) for side in settings.size)
        raise UserError(
            f"size {settings.size[1]}x{settings.size[0]}: width and height must be multiples of {factor}, the VAE's "
            f"factor; try {width}x{height}"
        )
    layers = pipeline.text_encoder.config.num_hidden_layers
    if settings.clip_skip > layers:
        raise UserError(f"clip skip {settings.clip_skip}: the English tower has {layers} layers")
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
    """One way through the steps: from noise, or from a picture as it is at the first of them."""

    size: tuple[int, int]
    steps: Steps
    from_picture: bool


@dataclass(frozen=True)
class _Sampler:
    pipeline: BridgePipeline
    settings: Sampling
    maps: tuple[Control, ...]
    images: tuple[dict[str, tuple[jax.Array, jax.Array]], ...]  # of image prompts: keys and values by transformer
    batch_size: int
    mesh: Mesh
    watch: Watch
    watch_every: int

    def pictures(self, requests: list[Request], progress: Progress) -> Iterator[np.ndarray]:
        """Everything that can fail early does so here; the iterator draws."""
        if self.settings.reference:
            starts = range(0, len(requests), self.batch_size)
            groups = [self._jobs(requests[begin : begin + self.batch_size]) for begin in starts]
        else:
            groups = batches([job for request in requests for job in self._jobs([request])], self.batch_size)
        plan = [(batch, self._passes(batch[0])) for batch in groups]
        for control, (batch, _) in itertools.product(self.maps, plan):
            check_size(control, batch[0].size)
        return self._draw(plan, progress)

    def _draw(self, plan: list[tuple[list[PreparedRequest], list[_Pass]]], progress: Progress) -> Iterator[np.ndarray]:
        largest = max(len(batch) for batch, _ in plan)
        largest = -(-largest // self.mesh.size) * self.mesh.size
        total, done = sum(len(p.steps.t) for _, passes in plan for p in passes), 0
        progress(0, total)
        for batch, passes in plan:
            filled = batch + batch[-1:] * (largest - len(batch))
            texts = self._texts(filled)
            images = None
            for way in passes:
                report = lambda steps, done=done: progress(done + steps, total)  # noqa: E731
                images = self._one_pass(len(batch), filled, texts, way, images, report)
                done += len(way.steps.t)
            yield from images[: len(batch)]

    def _jobs(self, requests: list[Request]) -> list[PreparedRequest]:
        return read_jobs(self.pipeline, self.settings, self.maps, requests)

    def _passes(self, job: PreparedRequest) -> list[_Pass]:
        settings, from_picture = self.settings, job.request.image is not None
        passes = [_Pass(job.size, self._table(settings.strength if from_picture else 1.0), from_picture)]
        if settings.hires > 1:
            factor = self.pipeline.vae.config.factor
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

    def _texts(self, jobs: list[PreparedRequest]) -> dict[PredictionPlan, Conditionings]:
        """Both languages' texts for the rows with guidance (first) and for those without."""
        pipeline, settings = self.pipeline, self.settings
        tower = partial(encode_tokens, reference=settings.reference)
        one_english = all(job.one_english for job in jobs) and not self.images
        english = [job.english for job in jobs]
        pair = tower(
            *pipeline.text_encoder, self._split(stack(english, slice(one_english, 2))), layer=settings.clip_skip
        )
        chinese = None
        if pipeline.branch is not None:
            chinese = tower(*pipeline.branch_text_encoder, self._split(stack([job.chinese for job in jobs])))
            chinese = with_keys(*pipeline.branch, chinese)
        controls = [with_keys(*control.network, pair) for control in self._nets()]
        guided = Conditionings(self._with_images(with_keys(*pipeline.unet, pair), len(jobs)), chinese, controls)
        english, controls = (x if one_english else _positive_half(x) for x in (guided.english, controls))
        positive = Conditionings(english, _positive_half(chinese), controls)
        return {guided_parts(settings, one_english, chinese is not None): guided, POSITIVE: positive}

    def _with_images(self, english: Conditioning, count: int) -> Conditioning:
        """The English text of `count` samples, negative and positive, with the image prompts' keys beside its own."""
        if not self.images:
            return english
        of_all = lambda x: self._split(jnp.tile(x, (count, 1, 1, 1)))  # noqa: E731
        paths = self.images[0]
        keys = {path: [jax.tree.map(of_all, image[path]) for image in self.images] for path in paths}
        return replace(english, image_keys=keys)

    def _nets(self, adapters: bool = False) -> list[Control]:
        """The ControlNets, or the T2I-Adapters."""
        return [control for control in self.maps if isinstance(control.network.config, T2IAdapterConfig) == adapters]

    def _one_pass(
        self,
        count: int,
        jobs: list[PreparedRequest],
        texts: dict[PredictionPlan, Conditionings],
        way: _Pass,
        images: np.ndarray | None,
        report: Callable[[int], None],
    ) -> np.ndarray:
        """All steps for one batch, the first `count` jobs of which are not mere filling: pictures (B,H,W,3) uint8.

        `images` are an earlier pass's pictures.
        """
        pipeline = self.pipeline
        factor = pipeline.vae.config.factor
        shape = (way.size[0] // factor, way.size[1] // factor, pipeline.unet.config.in_channels)
        seeds = self._split(np.array([job.request.seed for job in jobs], np.uint32))
        noise = self._split(_torch_noise(jobs, count, shape)) if self.settings.reference else unit_noise(shape, seeds)
        guided = next(iter(texts))
        nets, adapters = self._nets(), self._nets(adapters=True)
        hints, features = ([embed(c, resize_to_cover(c.hint, way.size)) for c in some] for some in (nets, adapters))
        clean = kept = masks = None
        if way.from_picture:
            loaded = [load(job.request) for job in jobs]
            originals = [image for image, _ in loaded] if images is None else images
            originals = np.stack([resize_to_cover(image, way.size) for image in originals])
            clean = self._split(encode(pipeline.vae, self._split(originals), self.settings.vae_tile))
            if jobs[0].request.mask is not None:
                masks = np.stack([resize_to_cover(mask, way.size) for _, mask in loaded])
                kept = InpaintState(clean, noise, self._split(np.stack([_latent_mask(mask, factor) for mask in masks])))
        state = samplers.start(noise, way.steps, clean)
        reused = None
        for call in calls(self.settings, len(way.steps.t), guided, self.watch_every, pipeline.branch is not None):
            part, branch, text = call.rows, pipeline.branch if call.uses_branch else None, texts[call.parts]
            text = text if branch else replace(text, chinese=None)
            configs = tuple(control.network.config for control in nets)
            compiled_for = pipeline.unet.config, branch and branch.config, pipeline.schedule, call.parts, configs
            networks = Networks(*compiled_for, self.settings.merge_tokens, call.reuse)
            params = {"unet": pipeline.unet.params, "controls": [control.network.params for control in nets]}
            params |= {"branch": branch.params} if branch else {}
            table = rows(self.settings, way.steps, call.parts, _residuals(pipeline), nets, adapters)
            own = jax.tree.map(partial(chunk, part=part), table)
            rescaling = np.float32(self.settings.guidance_rescale)
            state = SamplerState(self._split(state.latents), self._split(state.memory, axis=1))
            earlier = None if call.key or call.reuse is None else self._split(reused)
            given = text, hints, features, rescaling, kept, earlier
            state, foreseen, reused = denoise(networks, params, state, seeds, own, len(part), *given)
            jax.block_until_ready(state)
            report(part.stop)
            if part.stop % self.watch_every == 0 and part.stop < len(way.steps.t):
                self.watch(part.stop, np.asarray(foreseen)[:count])
        pixels, finite = decode(pipeline.vae, state.latents, self.settings.vae_tile)
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


def _memory() -> int:
    """Bytes of the machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0


def _residuals(pipeline: BridgePipeline) -> int:
    """How many tensors a branch adds: one for every skip, one for the middle."""
    return len(pipeline.unet.config.skip_channels) + 1


def _positive_half(pair):
    """The positive of two texts: arrays (B*2,...) -> (B,...)."""
    return jax.tree.map(lambda x: x.reshape(-1, 2, *x.shape[1:])[:, 1], pair)


def _torch_noise(jobs: list[PreparedRequest], count: int, shape: tuple[int, int, int]) -> np.ndarray:
    """The reference's noise: one draw for a batch of `count`, channels first, from the first seed."""
    height, width, channels = shape
    drawn = randn(jobs[0].request.seed, (count, channels, height, width))
    filled = np.concatenate([drawn, np.repeat(drawn[-1:], len(jobs) - count, axis=0)])
    return np.moveaxis(filled, 1, -1)


def _latent_mask(mask: np.ndarray, factor: int) -> np.ndarray:
    """(H,W) uint8 -> (h,w,1) fp32: a latent is drawn anew as far as the whitest of its pixels."""
    height, width = (side // factor for side in mask.shape)
    cells = mask.reshape(height, factor, width, factor).max(axis=(1, 3))
    return cells[..., None].astype(np.float32) / 255
