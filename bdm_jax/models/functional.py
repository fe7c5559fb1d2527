"""Networks as `(config, params)` and pure functions: the only file that touches nnx.split and nnx.merge.

Parameters are a flat dict: dotted path -> array. A path equals the diffusers or transformers key, with kernel, scale or
embedding in place of weight.
"""

import math
import re
import zlib
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bdm_jax.models.autoencoders.taesd import TinyVAE
from bdm_jax.models.autoencoders.vae import VAE
from bdm_jax.models.config import (
    BranchConfig,
    ChatGLMConfig,
    CLIPTextConfig,
    CLIPVisionConfig,
    Config,
    ControlNetConfig,
    ImageProjectionConfig,
    ResamplerConfig,
    RobertaConfig,
    T2IAdapterConfig,
    TextStatesConfig,
    TinyVAEConfig,
    UNetConfig,
    VAEConfig,
)
from bdm_jax.models.linear import activation_dtype
from bdm_jax.models.towers.chatglm import ChatGLM
from bdm_jax.models.towers.clip import CLIPText, CLIPVision
from bdm_jax.models.towers.roberta import Roberta
from bdm_jax.models.towers.states import TextStates
from bdm_jax.models.unet.branch import Branch, ControlNet
from bdm_jax.models.unet.ip_adapter import ImageProjection, Resampler
from bdm_jax.models.unet.t2i_adapter import T2IAdapter
from bdm_jax.models.unet.unet import UNet

Params = dict[str, jax.Array]

_NETWORKS = {
    UNetConfig: UNet,
    BranchConfig: Branch,
    ControlNetConfig: ControlNet,
    VAEConfig: VAE,
    TinyVAEConfig: TinyVAE,
    CLIPTextConfig: CLIPText,
    CLIPVisionConfig: CLIPVision,
    RobertaConfig: Roberta,
    ChatGLMConfig: ChatGLM,
    TextStatesConfig: TextStates,
    T2IAdapterConfig: T2IAdapter,
    ImageProjectionConfig: ImageProjection,
    ResamplerConfig: Resampler,
}

_ZERO_CONVOLUTIONS = re.compile(r"controlnet_(down_blocks|mid_block|cond_embedding\.conv_out)\.")


def init(config: Config, seed: int) -> Params:
    """Fresh fp32 parameters; the same for the same seed, on any device.

    Kernels are normal with variance 1 / fan-in (in BERT's post-norm layers with deviation 0.02, as BERT starts),
    embeddings with deviation 0.02, norms the identity, biases and zero convolutions zero. Drawn on the host: as a
    compiled program, a UNet's draws take XLA a minute whatever its size.
    """
    small = isinstance(config, RobertaConfig)
    return {path: jnp.asarray(_draw(path, leaf.shape, seed, small)) for path, leaf in abstract(config).items()}


def abstract(config: Config) -> dict[str, jax.ShapeDtypeStruct]:
    """Path -> shape and dtype of every parameter; nothing is allocated."""
    return {path: jax.ShapeDtypeStruct(shape, dtype) for path, (shape, dtype) in _structure(config)[1].items()}


def bind(config: Config, params: Params) -> nnx.Module:
    """The network with these parameters, to be called inside a pure function.

    Raises:
        KeyError: a parameter is missing (named).
    """
    graph, shapes, paths = _structure(config)
    if missing := [path for path in shapes if path not in params]:
        raise KeyError(f"{type(config).__name__}: missing parameters {missing[:3]} ({len(missing)} in all)")
    state = nnx.from_flat_state({key: nnx.Param(_dense(params[path])) for path, key in paths.items()})
    return nnx.merge(graph, state)


def is_int8(value: Any) -> bool:
    """Whether a parameter is kept in int8 (`bdm_jax.systems.int8`)."""
    return hasattr(value, "qvalue")


def cast(params: Params, dtype: jnp.dtype) -> Params:
    """The parameters in another floating-point type, but for whole numbers."""
    return {path: value.astype(dtype) if is_float(value) else value for path, value in params.items()}


def is_float(value: Any) -> bool:
    """Whether an array, or its shape and type, is of floating-point numbers."""
    return jnp.issubdtype(value.dtype, jnp.floating)


def param_dtype(params: Params) -> jnp.dtype:
    """The type of a network's floating-point parameters."""
    return next(value.dtype for value in params.values() if is_int8(value) or is_float(value))


def input_dtype(params: Params) -> jnp.dtype:
    """The type that a network's inputs must have, and its outputs have."""
    return activation_dtype(param_dtype(params))


def count(params: Params) -> int:
    """Number of parameters."""
    return sum(int(np.prod(value.shape)) for value in params.values())


def _dense(value):
    if not is_int8(value):
        return value
    import qwix  # an extra, which made it

    return qwix.dequantize(value)


class _NoKeys:
    """Stands in for nnx.Rngs where only shapes are wanted: a real one's counter makes tracing quadratic in the
    layers.
    """

    def __init__(self):
        self.key = jax.random.key(0)

    def params(self):
        return self.key


@lru_cache(maxsize=32)
def _structure(config: Config):
    keys = _NoKeys()
    graph, state = nnx.split(nnx.eval_shape(lambda: _NETWORKS[type(config)](config, keys)))
    leaves = {".".join(map(str, key)): (key, leaf) for key, leaf in nnx.to_flat_state(state)}
    shapes = {path: (leaf.get_value().shape, leaf.get_value().dtype) for path, (_, leaf) in sorted(leaves.items())}
    return graph, shapes, {path: key for path, (key, _) in leaves.items()}


def _draw(path: str, shape: tuple[int, ...], seed: int, small: bool) -> np.ndarray:
    leaf = path.rpartition(".")[2]
    if leaf == "scale":
        return np.ones(shape, np.float32)
    if leaf == "bias" or _ZERO_CONVOLUTIONS.match(path):
        return np.zeros(shape, np.float32)
    deviation = 0.02 if leaf == "embedding" or small else math.prod(shape[:-1]) ** -0.5
    generator = np.random.default_rng([seed, zlib.crc32(path.encode())])
    return generator.standard_normal(shape, np.float32) * np.float32(deviation)
