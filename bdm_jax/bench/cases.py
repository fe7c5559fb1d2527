"""What is measured, at published sizes: sampling steps, text encoders, the decoder, training steps."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from bdm_jax.bench import openvino, pytorch
from bdm_jax.bench.timing import Problem
from bdm_jax.models.config import (
    BDM_BRANCH,
    CHINESE_CLIP_H_TEXT,
    CLIP_L_TEXT,
    KOLORS_UNET,
    SD15_UNET,
    SD15_VAE,
    SDXL_UNET,
    BranchConfig,
    CLIPTextConfig,
    RobertaConfig,
    UNetConfig,
    VAEConfig,
)
from bdm_jax.models.convolution import prepare
from bdm_jax.models.functional import Params, abstract, bind, cast, init
from bdm_jax.models.linear import activation_dtype
from bdm_jax.models.unet.conditioning import Conditioning
from bdm_jax.models.unet.unet import TimeShifts
from bdm_jax.runtime import costs
from bdm_jax.sampling.memory import prepared

Case = Literal["empty-english", "two-prompts", "clip", "chinese-clip", "vae-decode", "train", "sdxl", "kolors"]
USUAL: tuple[Case, ...] = ("empty-english", "two-prompts", "clip", "chinese-clip", "vae-decode")
CASES: tuple[Case, ...] = (*USUAL, "train", "sdxl", "kolors")
TEXT_CASES: tuple[Case, ...] = ("clip", "chinese-clip")  # of one size, whatever the image's
Other = Literal["diffusers", "openvino"]
_OTHERS = {"diffusers": pytorch, "openvino": openvino}
_ENGLISH, _CHINESE, _KOLORS = 77, 52, 256  # tokens


@dataclass(frozen=True)
class GuidedStep:
    """One guided step of a backbone and its branch."""

    unet: UNetConfig = SD15_UNET
    branch: BranchConfig = BDM_BRANCH

    def beforehand(self, params, t: jax.Array, english: Conditioning, chinese: Conditioning):
        """What all steps share: (shifts of both networks for the timesteps t (N,)), texts with their keys."""
        unet, branch = bind(self.unet, params[0]), bind(self.branch, params[1])
        dtype = english.tokens.dtype
        read = (unet, english), (branch, chinese)
        shifts = tuple(network.time_shifts(t, cond, dtype) for network, cond in read)
        return shifts, unet.with_keys(english), branch.with_keys(chinese)

    def step(
        self, params, latents: jax.Array, times: tuple[jax.Array | TimeShifts, ...], english, chinese
    ) -> jax.Array:
        """Latents (B,h,w,C), texts of B or 2B rows -> predictions (2B,h,w,C)."""
        unet, branch = bind(self.unet, params[0]), bind(self.branch, params[1])
        skips, mid = unet.encode(latents, times[0], english)
        skips, mid = branch(latents, times[1], chinese).add_to(skips, mid)
        return unet.decode(skips, mid, times[0], english)


@dataclass(frozen=True)
class Sizes:
    """The networks that are measured."""

    networks: GuidedStep = GuidedStep()
    clip: CLIPTextConfig = CLIP_L_TEXT
    chinese_clip: RobertaConfig = CHINESE_CLIP_H_TEXT
    vae: VAEConfig = SD15_VAE
    sdxl: UNetConfig = SDXL_UNET
    kolors: UNetConfig = KOLORS_UNET
    dtype: str = "float32"

    def params(self, config) -> Params:
        """Fresh ones."""
        return cast(init(config, 0), jnp.dtype(self.dtype))

    def shapes(self, config) -> Params:
        """Of those, nothing allocated."""
        return jax.eval_shape(partial(cast, dtype=jnp.dtype(self.dtype)), abstract(config))

    def normal(self, *shape: int) -> np.ndarray:
        """Inputs in the same type."""
        return np.random.default_rng(0).standard_normal(shape, np.float32).astype(jnp.dtype(self.dtype))

    def given(self, x: np.ndarray) -> np.ndarray:
        """Inputs as our networks take them."""
        return x.astype(activation_dtype(x.dtype))


SD15 = Sizes()


def make(case: Case, sizes: Sizes, side: int, batch: int, against: tuple[Other, ...] = ()) -> Problem:
    """Compile a case for `batch` images of `side` latents; `against`: with these functions of others."""
    return _CASES[case](sizes, side, batch, against)


def _step(sizes: Sizes, side: int, batch: int, against: tuple[Other, ...], one_english: bool) -> Problem:
    networks, shape = sizes.networks, (side, side)
    configs = networks.unet, networks.branch
    x = sizes.normal(batch, side, side, 4)
    both = np.repeat(x, 2, axis=0)
    chinese = sizes.normal(2 * batch, _CHINESE, networks.branch.cross_attention_dim)
    english = sizes.normal(batch if one_english else 2 * batch, _ENGLISH, networks.unet.cross_attention_dim)
    # One after the other: the plain filters of the first are gone before the second is made.
    params = tuple(prepare(config, sizes.params(config), shape) for config in configs)
    texts = Conditioning(sizes.given(english)), Conditioning(sizes.given(chinese))
    beforehand = jax.jit(networks.beforehand)(params, jnp.full(1, 500.0), *texts)
    full = Conditioning(np.repeat(english, 2, axis=0) if one_english else english)
    times = (np.full(2 * batch, 500.0, np.float32),) * 2
    arguments = *_spec(both), times, full, Conditioning(chinese)
    flops = costs.flops(networks.step, tuple(map(sizes.shapes, configs)), *arguments)
    others = _others(against, "step", configs, both, full.tokens, chinese)
    return _problem(networks.step, (params, sizes.given(x), *beforehand), others, flops)


def _backbone(sizes: Sizes, side: int, batch: int, against: tuple[Other, ...], part: str, length: int) -> Problem:
    """A guided step of a bare backbone with pooled texts and size ids; OpenVINO has no part in it."""
    config = getattr(sizes, part)
    x, tokens = sizes.normal(batch, side, side, 4), sizes.normal(2 * batch, length, config.text_dim)
    pooled = sizes.normal(2 * batch, config.pooled_dim)
    ids = np.tile(np.array([8 * side, 8 * side, 0, 0, 8 * side, 8 * side], np.float32), (2 * batch, 1))
    params = prepared(config, sizes.params(config), (side, side))

    def beforehand(params, t, cond):
        unet = bind(config, params)
        return unet.time_shifts(t, cond, cond.tokens.dtype), unet.with_keys(cond)

    def run(params, latents, times, cond):
        return bind(config, params)(latents, times, cond)

    given = Conditioning(sizes.given(tokens), pooled=sizes.given(pooled), time_ids=ids)
    made = jax.jit(beforehand)(params, jnp.full(1, 500.0), given)
    both, times = np.repeat(x, 2, axis=0), np.full(2 * batch, 500.0, np.float32)
    flops = costs.flops(run, sizes.shapes(config), *_spec(both), times, Conditioning(tokens, None, pooled, ids))
    against = tuple(other for other in against if other == "diffusers")
    return _problem(
        run, (params, sizes.given(x), *made), _others(against, "unet", config, both, tokens, pooled, ids), flops
    )


def _text(sizes: Sizes, side: int, batch: int, against: tuple[Other, ...], part: str) -> Problem:
    config, length = getattr(sizes, part), {"clip": _ENGLISH, "chinese_clip": _CHINESE}[part]
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (2 * batch, length), np.int32)
    params = sizes.params(config)

    def run(params, ids):
        return bind(config, params)(ids)

    flops = costs.flops(run, sizes.shapes(config), *_spec(ids))
    return _problem(run, (params, ids), _others(against, "text", config, ids, sizes.dtype), flops)


def _vae(sizes: Sizes, side: int, batch: int, against: tuple[Other, ...]) -> Problem:
    config = sizes.vae
    x = sizes.normal(batch, side, side, config.latent_channels)
    params = prepare(config, sizes.params(config), (side, side))

    def run(params, x):
        return bind(config, params).decode(x)

    flops = costs.flops(run, sizes.shapes(config), *_spec(x))
    return _problem(run, (params, sizes.given(x)), _others(against, "vae", config, x), flops)


def _train(sizes: Sizes, side: int, batch: int, against: tuple[Other, ...]) -> Problem:
    """Loss and gradients of the branch; the optimizer's share is left out on both sides."""
    networks = sizes.networks
    configs = networks.unet, networks.branch
    x, times = sizes.normal(batch, side, side, 4), (np.full(batch, 500.0, np.float32),) * 2
    english = sizes.normal(batch, _ENGLISH, networks.unet.cross_attention_dim)
    chinese = sizes.normal(batch, _CHINESE, networks.branch.cross_attention_dim)

    def loss(branch, unet):
        # Masters of the branch are fp32, as in a run; the backbone lies in the type of the computation.
        params = unet, cast(branch, jnp.dtype(sizes.dtype))
        texts = Conditioning(sizes.given(english)), Conditioning(sizes.given(chinese))
        return jnp.mean(networks.step(params, sizes.given(x), times, *texts) ** 2)

    unet, branch = sizes.params(configs[0]), init(configs[1], 0)
    step = jax.value_and_grad(loss)
    flops = costs.flops(step, abstract(configs[1]), sizes.shapes(configs[0]))
    against = tuple(other for other in against if other == "diffusers")  # OpenVINO does not train
    return _problem(step, (branch, unet), _others(against, "step", configs, x, english, chinese, train=True), flops)


def _problem(function: Callable, arguments: tuple, others: dict[str, Callable], flops: float) -> Problem:
    return Problem(jax.jit(function).lower(*arguments).compile(), arguments, others, flops)


def _others(against: tuple[Other, ...], name: str, *arguments: Any, **options: Any) -> dict[str, Callable]:
    return {other: partial(getattr(_OTHERS[other], name), *arguments, **options) for other in against}


def _spec(*arrays: np.ndarray) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays]


_CASES: dict[Case, Callable[[Sizes, int, int, tuple[Other, ...]], Problem]] = {
    "empty-english": partial(_step, one_english=True),
    "two-prompts": partial(_step, one_english=False),
    "clip": partial(_text, part="clip"),
    "chinese-clip": partial(_text, part="chinese_clip"),
    "vae-decode": _vae,
    "train": _train,
    "sdxl": partial(_backbone, part="sdxl", length=_ENGLISH),
    "kolors": partial(_backbone, part="kolors", length=_KOLORS),
}
