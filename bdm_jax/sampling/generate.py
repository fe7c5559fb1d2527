"""Prompts to images: what is asked is checked, networks are made ready, and all batches drawn."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from numbers import Integral

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from bdm_jax.diffusion.samplers import check_options, check_sampler, system_sampler
from bdm_jax.errors import UserError
from bdm_jax.plugins import image_prompts
from bdm_jax.plugins.controls import Control
from bdm_jax.plugins.controls import check as check_control
from bdm_jax.plugins.image_prompts import ImagePrompt
from bdm_jax.sampling.batching import as_english, default_size
from bdm_jax.sampling.denoiser import BACKBONE, STEPS_PER_CALL
from bdm_jax.sampling.memory import prepared
from bdm_jax.sampling.passes import PassRunner, Preview, Progress, sampler_options, sampler_table
from bdm_jax.sampling.settings import (
    BRANCH_SETTINGS,
    REFERENCE_SAMPLER,
    Request,
    Sampling,
    own_steps,
    refuse,
    with_seeds,
)
from bdm_jax.sampling.settings import check as check_settings
from bdm_jax.systems.components import Component, in_dtype
from bdm_jax.systems.pipeline import BridgePipeline
from bdm_jax.text import readers


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
    number of devices, over which batches are split (up to rounding, which differs between programs of different sizes
    and, on some processors, between rows of a batch). Only the
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
    settings, requests = settings or Sampling(), with_seeds(requests)
    if not isinstance(batch_size, Integral) or isinstance(batch_size, bool):
        raise UserError(f"batch size {batch_size!r}: expected a whole number")
    if batch_size < 1:
        raise UserError(f"batch size {batch_size} is less than 1")
    if settings.bare or pipeline.branch is None:
        pipeline = pipeline.without_bridge()
        requests = [as_english(request) for request in requests]
    check(pipeline, requests, settings)
    settings = resolve(pipeline, settings)
    check_options(settings.sampler, **sampler_options(pipeline, settings))
    sampler_table(pipeline, settings, None)  # which may be too many steps
    factor = pipeline.factor
    if isinstance(controls, str) or not all(isinstance(control, Control | ImagePrompt) for control in controls):
        raise UserError(f"controls {controls!r:.60}: expected a list of Control and ImagePrompt")
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
    if settings.dtype != "auto":
        pipeline = pipeline.in_dtype(settings.dtype)
        maps = [replace(one, network=in_dtype(one.network, settings.dtype)) for one in maps]
    sampler = PassRunner(
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
    """The settings with the system's own sampler and guidance where they name none, and as many steps as there are own
    timesteps: what an image is drawn with.
    """
    own = REFERENCE_SAMPLER if settings.reference else system_sampler(pipeline.family.sampler, pipeline.schedule)
    steps = own_steps(settings)
    if steps is not None:  # they take the place of the system's spacing
        own = own.removesuffix(f"-{getattr(pipeline.schedule, 'timestep_spacing', '')}")
    guidance = pipeline.guidance if settings.guidance is None else settings.guidance
    return replace(settings, sampler=settings.sampler or own, guidance=guidance, steps=steps or settings.steps)


def check(pipeline: BridgePipeline, requests: Sequence[Request], settings: Sampling) -> None:
    """Raises UserError for the first thing that is not valid."""
    check_settings(settings)
    if pipeline.branch is None:
        refuse(settings, "the model has no branch", BRANCH_SETTINGS)
    if not requests:
        raise UserError("no prompts: give at least one")
    for request in requests:
        if not 0 <= request.seed < 2**32:
            raise UserError(f"seed {request.seed} is outside 0 .. 2**32 - 1 (-1 stands for any)")
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


def _prepare(component: Component | None, size: tuple[int, int], mesh: Mesh) -> Component | None:
    """A network as it draws fastest at latents of `size`: its parameters prepared, and on each of several devices."""
    if component is None:
        return None
    config, params = component
    params = prepared(config, params, size)
    if mesh.size > 1:
        params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    return Component(config, params)


def _residuals(pipeline: BridgePipeline) -> int:
    """How many tensors a branch adds: one for every skip, one for the middle."""
    return len(pipeline.unet.config.skip_channels) + 1
