"""PyTorch's side of the comparison: the same networks by diffusers and transformers.

`step_modules`, `vae_module` and `text_module` make them; `step`, `vae` and `text` give what runs them, a function
without arguments that runs once and brings its result to the host. Raises UserError where PyTorch is missing or cannot
use the accelerator that JAX uses.
"""

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np

from bdm_jax.bench.timing import seconds
from bdm_jax.errors import UserError
from bdm_jax.models.config import BranchConfig, CLIPTextConfig, RobertaConfig, UNetConfig, VAEConfig, to_json


def step(
    configs: tuple[UNetConfig, BranchConfig],
    x: np.ndarray,
    english: np.ndarray,
    chinese: np.ndarray,
    train: bool = False,
) -> Callable[[], Any]:
    """A step of backbone and branch on latents (B,h,w,C) and texts (B,T,D); with `train`, its gradients too."""
    torch, dtype = _torch(), x.dtype.name
    unet, branch = step_modules(configs, x.shape)
    branch.requires_grad_(train)
    t, english, chinese = torch.full((len(x),), 500).to(_device()), _tensor(english), _tensor(chinese)
    unet = _placed(unet, dtype)
    # Masters of a trained branch are fp32 here too.
    branch = _placed(branch, "float32" if train else dtype)
    branch.controlnet_cond_embedding.to(getattr(torch, dtype))

    def run(layout):
        latents = _nchw(x, layout)
        mixed = torch.autocast(_device(), getattr(torch, dtype), enabled=train and dtype != "float32")
        with torch.set_grad_enabled(train), mixed:
            out = predict(unet, branch, latents, t, english, chinese)
            if train:
                branch.zero_grad()
                out.square().mean().backward()
            return out.detach().float().cpu().numpy()

    return _formats((unet, branch), run)


def step_modules(configs: tuple[UNetConfig, BranchConfig], shape: tuple[int, ...]):
    """(backbone, branch) for latents of `shape` (B,h,w,C), in fp32, without gradients."""
    torch = _torch()
    from diffusers import ControlNetModel, UNet2DConditionModel
    from diffusers.utils import logging

    logging.set_verbosity_error()  # it warns of any change of type
    values = {key: value for key, value in to_json(configs[1]).items() if key != "bdm_branch"}
    branch = ControlNetModel.from_config(values).requires_grad_(False)
    # BDM's branch has no image: the embedding of its place must not count.
    branch.controlnet_cond_embedding = _constant(torch.zeros(shape[0], configs[1].block_out_channels[0], *shape[1:3]))
    return UNet2DConditionModel.from_config(to_json(configs[0])).requires_grad_(False), branch


def predict(unet, branch, latents, t, english, chinese):
    """The prediction (B,C,h,w)."""
    image = latents.new_zeros(len(latents), 3, 8 * latents.shape[2], 8 * latents.shape[3])
    skips, mid = branch(latents, t, chinese, image, return_dict=False)
    residuals = {"down_block_additional_residuals": skips, "mid_block_additional_residual": mid}
    return unet(latents, t, english, **residuals, return_dict=False)[0]


def unet(
    config: UNetConfig, x: np.ndarray, tokens: np.ndarray, pooled: np.ndarray, time_ids: np.ndarray
) -> Callable[[], Any]:
    """A backbone that reads pooled texts (B,P) and size ids (B,6) on latents (B,h,w,C) and texts (B,T,D)."""
    torch = _torch()
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        module = UNet2DConditionModel.from_config(to_json(config)).requires_grad_(False).eval()
    # Never in fp32 beside its own type: a network of 10 GB has no room for that.
    module = module.to(getattr(torch, x.dtype.name)).to_empty(device=_device())
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=parameter[0].numel() ** -0.5) if parameter.ndim > 1 else parameter.fill_(1.0)
    module = _placed(module, x.dtype.name)
    t, text = torch.full((len(x),), 500).to(_device()), _tensor(tokens)
    added = {"text_embeds": _tensor(pooled), "time_ids": _tensor(time_ids)}

    def run(layout):
        with torch.inference_mode():
            out = module(_nchw(x, layout), t, text, added_cond_kwargs=added, return_dict=False)[0]
            return out.float().cpu().numpy()

    return _formats((module,), run)


def vae(config: VAEConfig, x: np.ndarray) -> Callable[[], Any]:
    """The decoder on latents (B,h,w,C)."""
    torch = _torch()
    module = vae_module(config).to(_device(), getattr(torch, x.dtype.name))
    decode = torch.compile(module.decode, mode="max-autotune") if _device() == "cuda" else module.decode

    def run(layout):
        with torch.inference_mode():
            return decode(_nchw(x, layout), return_dict=False)[0].float().cpu().numpy()

    return _formats((module,), run)


def vae_module(config: VAEConfig):
    """The autoencoder in fp32."""
    _torch()
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_config(to_json(config)).eval()


def text(config: CLIPTextConfig | RobertaConfig, ids: np.ndarray, dtype: str) -> Callable[[], Any]:
    """A text encoder on ids (B,T)."""
    torch = _torch()
    module = _placed(text_module(config), dtype)
    tokens = torch.from_numpy(ids).long().to(_device())

    def run():
        with torch.inference_mode():
            return module(tokens)[0].float().cpu().numpy()

    return run


def text_module(config: CLIPTextConfig | RobertaConfig):
    """The text encoder in fp32."""
    _torch()
    import transformers

    kind = "ChineseCLIPText" if isinstance(config, RobertaConfig) else "CLIPText"
    values = {k: v for k, v in to_json(config).items() if k not in ("architectures", "model_type")}
    return getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**values)).eval()


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
        trial[layout] = min(seconds(partial(run, layout)) for _ in range(2))
    best = min(trial, key=trial.get)
    for module in modules:
        module.to(memory_format=best)
    return partial(run, best)


def _nchw(x: np.ndarray, layout):
    return _tensor(np.moveaxis(x, -1, 1)).contiguous(memory_format=layout)


def _constant(value):
    """A module that gives `value`, whatever it is called with."""

    class Constant(_torch().nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("value", value)

        def forward(self, _):
            return self.value

    return Constant()
