"""Prompts to pictures.

One compiled program runs a few steps of the sampler; the steps' coefficients, prompts, seeds and guidance are its
arguments, so that changing them, the sampler or the number of steps compiles nothing.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from bdm_jax.diffusion import samplers
from bdm_jax.diffusion.guidance import classifier_free
from bdm_jax.diffusion.samplers import SAMPLERS, SamplerState, Steps
from bdm_jax.diffusion.schedule import Schedule
from bdm_jax.errors import UserError, unknown
from bdm_jax.models.branch import Residuals
from bdm_jax.models.conditioning import Conditioning
from bdm_jax.models.config import BranchConfig, TinyVAEConfig, UNetConfig, VAEConfig
from bdm_jax.models.functional import Params, bind
from bdm_jax.pipeline import BridgePipeline
from bdm_jax.text.encode import Tokens, encode_tokens, read

STEPS_PER_CALL = 5

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Request:
    """What one picture shall show.

    `prompt` and `negative` are the branch's (Chinese), `english` and `english_negative` the backbone's; the paper's way
    is to leave the English ones empty. A bare backbone reads its English prompts or, where they are empty, the others.
    All may hold weights, as in "(red:1.3) lantern" (see `text.grammar`). The seed is in [0, 2**32).
    """

    prompt: str
    negative: str = ""
    english: str = ""
    english_negative: str = ""
    seed: int = 0


def generate(
    pipeline: BridgePipeline,
    requests: Sequence[Request],
    *,
    steps: int = 25,
    guidance: float | None = None,
    sampler: str = "dpmpp-2m",
    size: tuple[int, int] | None = None,
    batch_size: int = 8,
    branch: bool = True,
    reference: bool = False,
    progress: Progress | None = None,
) -> Iterator[np.ndarray]:
    """Pictures in the order of the requests, each (H,W,3) uint8, yielded as soon as their batch is done.

    A picture depends on its own request and the settings only, never on the batch size or its place in a batch (up to
    the rounding of programs of different sizes). A request with more windows of text than its neighbour begins a new
    batch.

    Args:
      steps: sampling steps, from 1 to the schedule's number of timesteps.
      guidance: classifier-free guidance over both prompts, 1 for none; the pipeline's own where None.
      sampler: a name in `diffusion.samplers.SAMPLERS`.
      size: (height, width) in pixels, multiples of the VAE's factor; the size that the UNet was trained at where None.
      branch: False draws with the bare backbone.
      reference: True reads prompts as BDM's reference implementation does (see `text.encode.read`): weights in the
        branch's prompts have no effect, and all prompts of a batch take as many windows as its longest, so that a
        picture then depends on its batch.
      progress: called with (steps done, steps in all) over all batches, first with 0.

    Raises UserError, before anything is computed, for settings that cannot be; and when pictures come out as NaN.
    """
    requests = list(requests)
    guidance = pipeline.guidance if guidance is None else guidance
    size = default_size(pipeline) if size is None else size
    check(pipeline, requests, steps=steps, guidance=guidance, sampler=sampler, size=size, batch_size=batch_size)
    if not branch or pipeline.branch is None:
        pipeline, requests = _bare(pipeline), [_english(request) for request in requests]
    with np.errstate(divide="ignore", invalid="ignore"):
        table = SAMPLERS[sampler](pipeline.schedule, steps)
    if not all(np.isfinite(column).all() for column in jax.tree.leaves(table)):
        raise UserError(f"{steps} steps are too many for {sampler}: some would fall on one timestep; take fewer")
    return _generate(
        pipeline, requests, table, guidance, size, batch_size, reference, progress or (lambda done, total: None)
    )


def default_size(pipeline: BridgePipeline) -> tuple[int, int]:
    """(height, width) in pixels of the pictures that the UNet was trained on."""
    side = pipeline.unet.config.sample_size * pipeline.vae.config.factor
    return side, side


def check(
    pipeline: BridgePipeline,
    requests: Sequence[Request],
    *,
    steps: int,
    guidance: float,
    sampler: str,
    size: tuple[int, int],
    batch_size: int,
) -> None:
    """Raises UserError for the first setting that cannot be."""
    if not requests:
        raise UserError("no prompts: give at least one")
    for request in requests:
        if not 0 <= request.seed < 2**32:
            raise UserError(f"seed {request.seed} is outside 0 .. 2**32 - 1")
    if sampler not in SAMPLERS:
        raise unknown("sampler", sampler, SAMPLERS)
    limit = pipeline.schedule.num_train_timesteps
    if not 1 <= steps <= limit:
        raise UserError(f"steps {steps} is outside 1 .. {limit}, the timesteps that the model knows")
    if not math.isfinite(guidance):
        raise UserError(f"guidance {guidance} is not a finite number")
    if batch_size < 1:
        raise UserError(f"batch size {batch_size} is less than 1")
    factor = pipeline.vae.config.factor
    if any(side < factor or side % factor for side in size):
        nearest = "x".join(str(max(factor, round(side / factor) * factor)) for side in reversed(size))
        raise UserError(
            f"size {size[1]}x{size[0]}: width and height must be multiples of {factor}, the VAE's factor; try {nearest}"
        )


@dataclass(frozen=True)
class _Networks:
    """What the denoising program is compiled for."""

    unet: UNetConfig
    branch: BranchConfig | None
    schedule: Schedule
    one_english: bool  # every picture's English prompts are equal: both guidance halves share the backbone's encoder


@dataclass(frozen=True)
class _Job:
    """A request with its ids and their weights, each (2, windows, length): negative prompt, then positive."""

    request: Request
    english: np.ndarray
    english_weights: np.ndarray
    chinese: np.ndarray | None = None
    chinese_weights: np.ndarray | None = None

    @property
    def windows(self) -> tuple[int, int]:
        return len(self.english[0]), 0 if self.chinese is None else len(self.chinese[0])

    @property
    def one_english(self) -> bool:
        return np.array_equal(*self.english) and np.array_equal(*self.english_weights)


def _bare(pipeline: BridgePipeline) -> BridgePipeline:
    return replace(pipeline, branch=None, branch_text_encoder=None, branch_tokenizer=None)


def _english(request: Request) -> Request:
    english, negative = request.english or request.prompt, request.english_negative or request.negative
    return replace(request, prompt="", negative="", english=english, english_negative=negative)


def _generate(
    pipeline: BridgePipeline,
    requests: list[Request],
    table: Steps,
    guidance: float,
    size: tuple[int, int],
    batch_size: int,
    reference: bool,
    progress: Progress,
) -> Iterator[np.ndarray]:
    if reference:
        starts = range(0, len(requests), batch_size)
        batches = [_jobs(pipeline, requests[begin : begin + batch_size], reference=True) for begin in starts]
    else:
        batches = _batches([_job(pipeline, request) for request in requests], batch_size)
    rows = min(batch_size, len(requests))
    steps = len(table.t)
    progress(0, steps * len(batches))
    for index, batch in enumerate(batches):
        filled = batch + batch[-1:] * (rows - len(batch))
        report = partial(_report, progress, index * steps, steps * len(batches))
        latents = _latents(pipeline, filled, table, guidance, size, report)
        pixels, finite = _decode(pipeline.vae.config, pipeline.vae.params, latents)
        for job, picture, good in zip(batch, np.asarray(pixels), np.asarray(finite), strict=False):
            if not good:
                raise UserError(
                    f"the picture for {job.request.prompt or job.request.english!r} came out as NaN; "
                    "try less guidance, other prompts, or weights in float32"
                )
            yield picture


def _report(progress: Progress, before: int, total: int, done: int) -> None:
    progress(before + done, total)


def _job(pipeline: BridgePipeline, request: Request) -> _Job:
    (job,) = _jobs(pipeline, [request])
    return job


def _jobs(pipeline: BridgePipeline, requests: list[Request], *, reference: bool = False) -> list[_Job]:
    """Jobs whose prompts of one language all take as many windows as the longest."""
    english = [text for request in requests for text in (request.english_negative, request.english)]
    parts = _pairs(read(pipeline.tokenizer, english, reference=reference))
    if pipeline.branch is not None:
        chinese = [text for request in requests for text in (request.negative, request.prompt)]
        parts += _pairs(read(pipeline.branch_tokenizer, chinese, reference=reference))
    return [_Job(request, *pairs) for request, *pairs in zip(requests, *parts, strict=True)]


def _pairs(tokens: Tokens) -> list[np.ndarray]:
    """Ids and weights of 2B prompts, each (B, 2, windows, length)."""
    return [part.reshape(-1, 2, *part.shape[1:]) for part in tokens]


def _batches(jobs: list[_Job], batch_size: int) -> list[list[_Job]]:
    """Neighbours with as many windows go together: the windows of one prompt never change another's picture."""
    groups = [list(group) for _, group in itertools.groupby(jobs, key=lambda job: job.windows)]
    return [group[i : i + batch_size] for group in groups for i in range(0, len(group), batch_size)]


def _latents(
    pipeline: BridgePipeline,
    jobs: list[_Job],
    table: Steps,
    guidance: float,
    size: tuple[int, int],
    report: Callable[[int], None],
) -> jax.Array:
    """All steps for one batch: clean latents (B,h,w,C)."""
    one_english = all(job.one_english for job in jobs)
    networks = _Networks(
        pipeline.unet.config, pipeline.branch and pipeline.branch.config, pipeline.schedule, one_english
    )
    params = {"unet": pipeline.unet.params}
    english = _stack([job.english for job in jobs]), _stack([job.english_weights for job in jobs])
    english = [part[len(jobs) :] for part in english] if one_english else english
    english = encode_tokens(*pipeline.text_encoder, Tokens(*english))
    chinese = None
    if pipeline.branch is not None:
        params["branch"] = pipeline.branch.params
        tokens = Tokens(_stack([job.chinese for job in jobs]), _stack([job.chinese_weights for job in jobs]))
        chinese = encode_tokens(*pipeline.branch_text_encoder, tokens)
    factor = pipeline.vae.config.factor
    shape = (size[0] // factor, size[1] // factor, pipeline.unet.config.in_channels)
    seeds = np.array([job.request.seed for job in jobs], np.uint32)
    state = samplers.start(_noise(shape, seeds), table)
    steps = len(table.t)
    for begin in range(0, steps, STEPS_PER_CALL):
        count = min(STEPS_PER_CALL, steps - begin)
        rows = jax.tree.map(lambda column, begin=begin: _chunk(column, begin), table)
        state = _denoise(networks, params, state, seeds, rows, count, english, chinese, np.float32(guidance))
        jax.block_until_ready(state)
        report(begin + count)
    return state.latents


def _chunk(column: np.ndarray, begin: int) -> np.ndarray:
    """STEPS_PER_CALL rows of a column of the table; after its end, any."""
    return np.resize(column[begin : begin + STEPS_PER_CALL], (STEPS_PER_CALL, *column.shape[1:]))


def _stack(pairs: list[np.ndarray]) -> np.ndarray:
    """B arrays (2, n, L) -> (2B, n, L): all negatives, then all positives."""
    return np.stack(pairs, axis=1).reshape(-1, *pairs[0].shape[1:])


@partial(jax.jit, static_argnums=0)
def _noise(shape: tuple[int, int, int], seeds: jax.Array) -> jax.Array:
    """Seeds (B,) -> unit noise (B,h,w,C) fp32, each sample a function of its own seed."""
    return jax.vmap(lambda seed: jax.random.normal(jax.random.key(seed), shape, jnp.float32))(seeds)


@partial(jax.jit, static_argnums=0)
def _denoise(
    networks: _Networks,
    params: dict[str, Params],
    state: SamplerState,
    seeds: jax.Array,
    rows: Steps,
    count: jax.Array,
    english: Conditioning,
    chinese: Conditioning | None,
    guidance: jax.Array,
) -> SamplerState:
    """The first `count` steps of `rows`. Texts are (2B,S,D), negatives first; `english` is (B,S,D) if one for both."""

    def step(index: jax.Array, state: SamplerState) -> SamplerState:
        row = jax.tree.map(lambda column: column[index], rows)
        prediction = _predict(networks, params, state.latents, row.t, english, chinese)
        negative, positive = jnp.split(prediction.astype(jnp.float32), 2)
        noise = samplers.row_noise(seeds, row.row, state.latents.shape[1:])
        return samplers.advance(state, classifier_free(negative, positive, guidance), row, noise)

    rows = jax.tree.map(jnp.asarray, rows)
    return jax.lax.fori_loop(0, count, step, state)


def _predict(
    networks: _Networks,
    params: dict[str, Params],
    latents: jax.Array,
    t: jax.Array,
    english: Conditioning,
    chinese: Conditioning | None,
) -> jax.Array:
    """Latents (B,h,w,C) at timestep t () -> predictions (2B,h,w,C): for the negative prompts, then the positive."""
    unet = bind(networks.unet, params["unet"])
    latents = latents.astype(params["unet"]["conv_in.kernel"].dtype)
    both, times = _twice(latents), jnp.broadcast_to(t, 2 * len(latents))
    if networks.one_english:
        skips, mid = _twice(unet.encode(latents, times[: len(latents)], english))
        english = _twice(english)
    else:
        skips, mid = unet.encode(both, times, english)
    if networks.branch is not None:
        residuals: Residuals = bind(networks.branch, params["branch"])(both, times, chinese)
        skips, mid = residuals.add_to(skips, mid)
    return unet.decode(skips, mid, times, english)


def _twice(tree):
    """Every array of a tree, (B,...) -> (2B,...)."""
    return jax.tree.map(lambda x: jnp.concatenate([x, x]), tree)


@partial(jax.jit, static_argnums=0)
def _decode(config: VAEConfig | TinyVAEConfig, params: Params, latents: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Latents (B,h,w,C) -> pictures (B,H,W,3) uint8, and whether each has finite values only (B,)."""
    latents = (latents / config.scaling_factor).astype(next(iter(params.values())).dtype)
    images = bind(config, params).decode(latents).astype(jnp.float32)
    finite = jnp.isfinite(images).all(axis=(1, 2, 3))
    return jnp.round(jnp.clip(images, -1.0, 1.0) * 127.5 + 127.5).astype(jnp.uint8), finite
