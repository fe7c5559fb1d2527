"""OpenVINO's side of the comparison: diffusers' and transformers' modules, converted for this CPU.

As in `pytorch`, each function returns one that runs once. Shapes are fixed, which is OpenVINO's fastest form; backbone
and branch are one model. bfloat16 is OpenVINO's own choice on a CPU that has it in hardware, float32 elsewhere.
"""

import warnings
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from bdm_jax.bench import pytorch
from bdm_jax.errors import UserError
from bdm_jax.models.config import BranchConfig, CLIPTextConfig, RobertaConfig, UNetConfig, VAEConfig

_PRECISIONS = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}


def step(
    configs: tuple[UNetConfig, BranchConfig], x: np.ndarray, english: np.ndarray, chinese: np.ndarray
) -> Callable[[], Any]:
    """A step of backbone and branch on latents (B,h,w,C) and texts (B,T,D)."""
    unet, branch = pytorch.step_modules(configs, x.shape)
    inputs = _nchw(x), np.int64(500), *(np.asarray(text, np.float32) for text in (english, chinese))
    return _compiled(lambda *given: pytorch.predict(unet, branch, *given), (unet, branch), inputs, x.dtype.name)


def vae(config: VAEConfig, x: np.ndarray) -> Callable[[], Any]:
    """The decoder on latents (B,h,w,C)."""
    module = pytorch.vae_module(config)
    return _compiled(lambda z: module.decode(z, return_dict=False)[0], (module,), (_nchw(x),), x.dtype.name)


def text(config: CLIPTextConfig | RobertaConfig, ids: np.ndarray, dtype: str) -> Callable[[], Any]:
    """A text encoder on ids (B,T)."""
    module = pytorch.text_module(config)
    return _compiled(lambda tokens: module(tokens)[0], (module,), (ids.astype(np.int64),), dtype)


def _compiled(function: Callable, modules: tuple, inputs: tuple[np.ndarray, ...], dtype: str) -> Callable[[], Any]:
    if jax.default_backend() != "cpu":
        raise UserError("the comparison with OpenVINO is one of CPUs")
    try:
        import openvino
    except ImportError as error:
        raise UserError(f'the comparison needs {error.name}: pip install -e ".[bench]"') from error
    import torch

    class Whole(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = torch.nn.ModuleList(modules)

        def forward(self, *given):
            return function(*given)

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the tracer, about diffusers' sources
        model = openvino.convert_model(Whole().eval(), example_input=tuple(map(torch.as_tensor, inputs)))
    model.reshape({index: list(x.shape) for index, x in enumerate(inputs)})
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": _PRECISIONS[dtype]}
    request = openvino.Core().compile_model(model, "CPU", settings).create_infer_request()
    return lambda: request.infer(list(inputs))[0]


def _nchw(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(np.moveaxis(np.asarray(x, np.float32), -1, 1))
