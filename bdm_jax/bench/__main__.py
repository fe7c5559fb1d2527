"""How fast is it, and how fast is PyTorch on the same machine? `python -m bdm_jax.bench --against diffusers`.

Random weights of SD1.5's and BDM's sizes, in fp32 on a CPU and bf16 elsewhere. Both sides run in turn within one
process and `ratio` is that of the medians, ours / theirs; PyTorch runs in its faster memory format, with as many
threads as there are cores; on a GPU compiled with max-autotune. What is counted as work (TFLOP/s, share of the peak) is
the plain form's, whatever is saved. Memory is what our compiled program asks for: weights, inputs, outputs and
everything in between.
"""

import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from PIL import Image

from bdm_jax.errors import UserError
from bdm_jax.formats.files import write_json
from bdm_jax.images.chart import bars
from bdm_jax.models.config import (
    BDM_BRANCH,
    CHINESE_CLIP_H_TEXT,
    CLIP_L_TEXT,
    SD15_UNET,
    SD15_VAE,
    BranchConfig,
    CLIPTextConfig,
    RobertaConfig,
    UNetConfig,
    VAEConfig,
    to_json,
)
from bdm_jax.models.convolution import prepare
from bdm_jax.models.functional import Params, abstract, bind, cast, init
from bdm_jax.models.unet.conditioning import Conditioning
from bdm_jax.models.unet.unet import TimeShifts
from bdm_jax.paths import atomic_file
from bdm_jax.runtime import compile_cache, costs
from bdm_jax.systems.components import default_dtype

Case = Literal["empty-english", "two-prompts", "clip", "chinese-clip", "vae-decode", "train"]
CASES: tuple[Case, ...] = ("empty-english", "two-prompts", "clip", "chinese-clip", "vae-decode", "train")
_ENGLISH, _CHINESE = 77, 52


@dataclass(frozen=True)
class BenchArgs:
    """Measure sampling steps (with guidance), text towers, the autoencoder's decoder and training steps."""

    cases: tuple[Case, ...] = CASES[:-1]
    size: tuple[int, ...] = (512, 256)
    """pixels a side"""
    batch: tuple[int, ...] = (1,)
    """pictures at a time; a guided step computes two predictions of each"""
    against: Literal["diffusers"] | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """of weights and computation on both sides; float32 on a CPU and bfloat16 elsewhere where None"""
    repeats: int = 5
    json: Path | None = None
    """write all figures here"""
    chart: Path | None = None
    """write a chart of all seconds here (PNG)"""


@dataclass(frozen=True)
class Networks:
    """One guided step of a backbone and its branch."""

    unet: UNetConfig = SD15_UNET
    branch: BranchConfig = BDM_BRANCH

    def beforehand(self, params, t: jax.Array, english: Conditioning, chinese: Conditioning):
        """What all steps share: (shifts of both networks for the timesteps t (N,)), texts with their keys."""
        unet, branch = bind(self.unet, params[0]), bind(self.branch, params[1])
        dtype = english.tokens.dtype
        shifts = tuple(network.time_shifts(t, dtype) for network in (unet, branch))
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

    networks: Networks = Networks()
    clip: CLIPTextConfig = CLIP_L_TEXT
    chinese_clip: RobertaConfig = CHINESE_CLIP_H_TEXT
    vae: VAEConfig = SD15_VAE
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


@dataclass(frozen=True)
class Problem:
    """One measurement: our compiled program and its arguments, PyTorch's function (where there is a comparison), the
    FLOPs of one call.
    """

    program: jax.stages.Compiled
    arguments: tuple
    theirs: Callable[[], Any] | None
    flops: float

    def ours(self) -> Any:
        """One call."""
        return self.program(*self.arguments)

    @property
    def memory(self) -> int:
        """Bytes on the device while it runs."""
        told = self.program.memory_analysis()
        parts = told.argument_size_in_bytes, told.temp_size_in_bytes, told.output_size_in_bytes
        return sum(parts) - told.alias_size_in_bytes


def bench(settings: BenchArgs, sizes: Sizes = Sizes()) -> dict[str, Any]:
    """All figures. Raises UserError for settings that cannot be."""
    factor = sizes.vae.factor
    if min(settings.repeats, *settings.batch) < 1 or any(size < factor or size % factor for size in settings.size):
        raise UserError(f"repeats and batch must be positive, sizes multiples of {factor}")
    sizes = replace(sizes, dtype=settings.dtype or default_dtype())
    build = {
        "empty-english": partial(_step, one_english=True),
        "two-prompts": partial(_step, one_english=False),
        "clip": partial(_text, part="clip"),
        "chinese-clip": partial(_text, part="chinese_clip"),
        "vae-decode": _vae,
        "train": _train,
    }
    peak = matmul_peak()
    rows = []
    for case in settings.cases:
        for size in settings.size if case not in ("clip", "chinese-clip") else settings.size[:1]:
            for batch in settings.batch:
                # Held by no name here: one problem's weights are gone before the next one's are made.
                make = partial(build[case], sizes, size // factor, batch, bool(settings.against))
                rows.append({"case": case, "size": size, "batch": batch} | _timed(make, batch, settings.repeats, peak))
                print(_line(rows[-1]), flush=True)
    settings = replace(settings, dtype=sizes.dtype)
    values = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(settings).items()}
    machine = {"device": jax.devices()[0].device_kind, "processor": _processor(), "cores": os.cpu_count()}
    machine |= {name: version(name) for name in ("jax", *(("torch", "diffusers") if settings.against else ()))}
    return {"settings": values, "machine": machine, "peak_tflops": peak / 1e12, "rows": rows}


def matmul_peak(side: int = 2048) -> float:
    """FLOP/s of a square matrix product, the best of ten: in bf16, in fp32 on a CPU."""
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    x = jnp.ones((side, side), dtype)
    product = jax.jit(jnp.matmul)
    return 2 * side**3 / min(_seconds(lambda: product(x, x)) for _ in range(11))


def main(args: Sequence[str] | None = None) -> int:
    """Print a line for each measurement, write what was asked for; 2 for bad input."""
    compile_cache.enable()
    try:
        settings = tyro.cli(BenchArgs, args=args, prog="python -m bdm_jax.bench")
        report = bench(settings)
        if settings.json:
            write_json(settings.json, report)
        if settings.chart:
            with atomic_file(settings.chart) as file:
                Image.fromarray(bars(_bars(report["rows"]), "s")).save(file, "PNG")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _timed(make: Callable[[], Problem], batch: int, repeats: int, peak: float) -> dict[str, Any]:
    """Make a problem, which compiles it, and time both sides in turn; their first calls do not count."""
    began = time.perf_counter()
    problem = make()
    made = time.perf_counter() - began
    sides = [side for side in (problem.ours, problem.theirs) if side]
    for side in sides:
        _seconds(side)
    times = [[_seconds(side) for side in sides] for _ in range(repeats)]
    ours, *theirs = (statistics.median(column) for column in zip(*times, strict=True))
    rate = problem.flops / ours
    row = {"made_in": made, "seconds": ours, "per_second": batch / ours, "tflop": problem.flops / 1e12}
    row |= {"tflops": rate / 1e12, "share_of_peak": rate / peak, "memory": problem.memory, "times": times}
    return row | ({"diffusers": theirs[0], "ratio": ours / theirs[0]} if theirs else {})


def _bars(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """What is measured -> side -> seconds."""
    name = lambda row: f"{row['case']}, {row['size']} px x {row['batch']}"  # noqa: E731
    sides = {"bdm_jax": "seconds", "diffusers": "diffusers"}
    return {name(row): {side: row[key] for side, key in sides.items() if key in row} for row in rows}


def _line(row: dict[str, Any]) -> str:
    against = f"  diffusers {row['diffusers']:8.3f} s  ratio {row['ratio']:.2f}" if "ratio" in row else ""
    return (
        f"{row['case']:14} {row['size']:4} px x {row['batch']}  {row['seconds']:8.3f} s  {row['per_second']:7.2f}/s  "
        f"{row['tflops']:6.2f} TFLOP/s ({row['share_of_peak']:.0%} of the peak)  "
        f"{row['memory'] / 1e9:.2f} GB{against}"
    )


def _processor() -> str:
    """Its name, where this system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())


def _seconds(function: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - begin


def _spec(*arrays: np.ndarray) -> list[jax.ShapeDtypeStruct]:
    return [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays]


def _step(sizes: Sizes, side: int, batch: int, against: bool, one_english: bool) -> Problem:
    networks, shape = sizes.networks, (side, side)
    configs = networks.unet, networks.branch
    x = sizes.normal(batch, side, side, 4)
    both = np.repeat(x, 2, axis=0)
    chinese = sizes.normal(2 * batch, _CHINESE, networks.branch.cross_attention_dim)
    english = sizes.normal(batch if one_english else 2 * batch, _ENGLISH, networks.unet.cross_attention_dim)
    # One after the other: the plain filters of the first are gone before the second is made.
    params = tuple(prepare(config, sizes.params(config), shape) for config in configs)
    beforehand = jax.jit(networks.beforehand)(params, jnp.full(1, 500.0), Conditioning(english), Conditioning(chinese))
    full = Conditioning(np.repeat(english, 2, axis=0) if one_english else english)
    times = (np.full(2 * batch, 500.0, np.float32),) * 2
    arguments = *_spec(both), times, full, Conditioning(chinese)
    flops = costs.flops(networks.step, tuple(map(sizes.shapes, configs)), *arguments)
    theirs = _torch_step(configs, both, full.tokens, chinese) if against else None
    return _problem(networks.step, (params, x, *beforehand), theirs, flops)


def _text(sizes: Sizes, side: int, batch: int, against: bool, part: str) -> Problem:
    config, length = getattr(sizes, part), {"clip": _ENGLISH, "chinese_clip": _CHINESE}[part]
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (2 * batch, length), np.int32)
    params = sizes.params(config)
    run = lambda params, ids: bind(config, params)(ids)  # noqa: E731
    flops = costs.flops(run, sizes.shapes(config), *_spec(ids))
    return _problem(run, (params, ids), _torch_text(config, ids, sizes.dtype) if against else None, flops)


def _vae(sizes: Sizes, side: int, batch: int, against: bool) -> Problem:
    config = sizes.vae
    x = sizes.normal(batch, side, side, config.latent_channels)
    params = prepare(config, sizes.params(config), (side, side))
    run = lambda params, x: bind(config, params).decode(x)  # noqa: E731
    flops = costs.flops(run, sizes.shapes(config), *_spec(x))
    return _problem(run, (params, x), _torch_vae(config, x) if against else None, flops)


def _train(sizes: Sizes, side: int, batch: int, against: bool) -> Problem:
    """Loss and gradients of the branch; the optimizer's share is left out on both sides."""
    networks = sizes.networks
    configs = networks.unet, networks.branch
    x, times = sizes.normal(batch, side, side, 4), (np.full(batch, 500.0, np.float32),) * 2
    english = sizes.normal(batch, _ENGLISH, networks.unet.cross_attention_dim)
    chinese = sizes.normal(batch, _CHINESE, networks.branch.cross_attention_dim)

    def loss(branch, unet):
        # Masters of the branch are fp32, as in a run; the backbone lies in the type of the computation.
        params = unet, cast(branch, jnp.dtype(sizes.dtype))
        return jnp.mean(networks.step(params, x, times, Conditioning(english), Conditioning(chinese)) ** 2)

    unet, branch = sizes.params(configs[0]), init(configs[1], 0)
    step = jax.value_and_grad(loss)
    flops = costs.flops(step, abstract(configs[1]), sizes.shapes(configs[0]))
    theirs = _torch_step(configs, x, english, chinese, train=True) if against else None
    return _problem(step, (branch, unet), theirs, flops)


def _problem(function: Callable, arguments: tuple, theirs: Callable[[], Any] | None, flops: float) -> Problem:
    return Problem(jax.jit(function).lower(*arguments).compile(), arguments, theirs, flops)


# ------------------------------------------------------------------------------------------------------------ PyTorch


def _torch():
    try:
        import torch
    except ImportError as error:
        raise UserError(f'the comparison needs {error.name}: pip install -e ".[test]"') from error
    torch.set_num_threads(os.cpu_count())
    return torch


def _device() -> str:
    """Where PyTorch is to run: where JAX does."""
    if jax.default_backend() == "cpu":
        return "cpu"
    if not _torch().cuda.is_available():
        raise UserError(f"the comparison on a {jax.default_backend()} needs a PyTorch that can use it")
    return "cuda"


def _placed(module, dtype: str):
    """A module where it is to run, in the type of the computation; on a GPU to be compiled at its first call."""
    torch = _torch()
    module = module.to(_device(), getattr(torch, dtype))
    return torch.compile(module, mode="max-autotune") if _device() == "cuda" else module


def _tensor(x: np.ndarray):
    """In JAX's type, which NumPy and PyTorch share for fp32 only."""
    return _torch().from_numpy(np.ascontiguousarray(x, np.float32)).to(_device(), getattr(_torch(), x.dtype.name))


def _formats(modules, run) -> Callable[[], Any]:
    """The modules' call in the faster of both memory formats, found by trial."""
    torch = _torch()
    trial = {}
    for layout in (torch.contiguous_format, torch.channels_last):
        for module in modules:
            module.to(memory_format=layout)
        run(layout)
        trial[layout] = min(_seconds(partial(run, layout)) for _ in range(2))
    best = min(trial, key=trial.get)
    for module in modules:
        module.to(memory_format=best)
    return partial(run, best)


def _nchw(x: np.ndarray, layout):
    return _tensor(np.moveaxis(x, -1, 1)).contiguous(memory_format=layout)


def _torch_step(configs, x, english, chinese, train: bool = False):
    torch, dtype = _torch(), x.dtype.name
    from diffusers import ControlNetModel, UNet2DConditionModel
    from diffusers.utils import logging

    logging.set_verbosity_error()  # it warns of any change of type
    values = {key: value for key, value in to_json(configs[1]).items() if key != "bdm_branch"}
    branch = ControlNetModel.from_config(values).requires_grad_(train)
    t, english, chinese = torch.full((len(x),), 500).to(_device()), _tensor(english), _tensor(chinese)
    picture = _tensor(np.zeros((len(x), 3, 8 * x.shape[1], 8 * x.shape[2]), x.dtype))
    # BDM's branch has no picture: the embedding of its place must not count.
    hint = _tensor(np.zeros((len(x), configs[1].block_out_channels[0], *x.shape[1:3]), x.dtype))
    branch.controlnet_cond_embedding = _Constant(torch, hint)
    unet = _placed(UNet2DConditionModel.from_config(to_json(configs[0])).requires_grad_(False), dtype)
    # Masters of a trained branch are fp32 here too.
    branch = _placed(branch, "float32" if train else dtype)

    def run(layout):
        latents = _nchw(x, layout)
        mixed = torch.autocast(_device(), getattr(torch, dtype), enabled=train and dtype != "float32")
        with torch.set_grad_enabled(train), mixed:
            skips, mid = branch(latents, t, chinese, picture, return_dict=False)
            out = unet(latents, t, english, down_block_additional_residuals=skips, mid_block_additional_residual=mid)
            if train:
                branch.zero_grad()
                out.sample.square().mean().backward()
            return out.sample.detach().float().cpu().numpy()

    return _formats((unet, branch), run)


def _Constant(torch, value):  # noqa: N802
    class Constant(torch.nn.Module):
        def forward(self, _):
            return value

    return Constant()


def _torch_vae(config: VAEConfig, x: np.ndarray):
    torch = _torch()
    from diffusers import AutoencoderKL

    module = AutoencoderKL.from_config(to_json(config)).eval().to(_device(), getattr(torch, x.dtype.name))
    decode = torch.compile(module.decode, mode="max-autotune") if _device() == "cuda" else module.decode

    def run(layout):
        with torch.inference_mode():
            return decode(_nchw(x, layout), return_dict=False)[0].float().cpu().numpy()

    return _formats((module,), run)


def _torch_text(config, ids: np.ndarray, dtype: str):
    torch = _torch()
    import transformers

    kind = "ChineseCLIPText" if isinstance(config, RobertaConfig) else "CLIPText"
    values = {k: v for k, v in to_json(config).items() if k not in ("architectures", "model_type")}
    module = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**values)).eval()
    module = _placed(module, dtype)
    tokens = torch.from_numpy(ids).long().to(_device())

    def run():
        with torch.inference_mode():
            return module(tokens)[0].float().cpu().numpy()

    return run


if __name__ == "__main__":
    sys.exit(main())
