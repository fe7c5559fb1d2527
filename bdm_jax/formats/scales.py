"""Weights that come with a scale: 8-bit floats as ComfyUI and its kin save them, `W = weight * scale`.

| key beside `MODULE.weight` | content |
|---|---|
| `MODULE.scale_weight` (older), `MODULE.weight_scale` | the scale: one number, or one for each row |
| `MODULE.scale_input`, `MODULE.input_scale` | of activations, for products in 8 bits: not needed |
| `MODULE.comfy_quant` | JSON `{"format": ...}` |
| `scaled_fp8` | marks a file; carries nothing |

Where one 8-bit float weight of a network has a scale, all have; layers in wider floats have none. Other programs'
quantised weights, and integers in the place of weights, are recognised and refused.
"""

import json
import re
from pathlib import Path

import ml_dtypes
import numpy as np

from bdm_jax.errors import FileError
from bdm_jax.formats.files import Tensors, is_float, shown
from bdm_jax.formats.tables import ignorable

_SCALE = re.compile(r"(.*\.)?(scale_weight|weight_scale)")
_UNUSED = re.compile(r"(.*\.)?(scaled_fp8|scale_input|input_scale|comfy_quant)")
# Weights by their names, whatever the network; what a file that holds several networks calls one that is not its UNet.
_WEIGHT = re.compile(r"(.*[._])?(weight|bias|class_embedding|positional_embedding|text_projection)")
_NETWORK = re.compile(
    r"(first_stage_model|vae|cond_stage_model|conditioner\.embedders\.\d+|text_encoders\.\w+|control_model)\."
)
_FORMATS = ("float8_e4m3fn", "float8_e5m2")
_EIGHT_BITS = tuple(map(np.dtype, (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2)))
_FOREIGN = (
    ("bitsandbytes", r".*\.(absmax|quant_map|quant_state\..*|SCB)"),
    ("optimum-quanto", r".*\.(_data|_scale|_shift)"),
    ("ComfyUI in 4 bits or blocks", r"(.*\.)?weight_scale_2"),
    ("GPTQ or AWQ", r".*\.(qweight|qzeros)"),
)


def scaled(path: Path, tensors: Tensors) -> Tensors:
    """The tensors of a file; those that have a scale multiplied by it, in float32, and without the scales.

    Raises FileError for a scale that fits no weight, for a weight that lacks its scale, and by name for quantised
    weights that are not read.
    """
    plain = _multiplied(path, tensors)
    for key, array in plain.items():
        if not is_float(array.dtype) and _WEIGHT.fullmatch(key) and not ignorable(key):
            what = f"{shown(key)} is {array.dtype.name} where floats are expected"
            raise FileError(f"{path}: quantised weights, which are not read: {what}")
    return plain


def _multiplied(path: Path, tensors: Tensors) -> Tensors:
    for name, pattern in _FOREIGN:
        if found := next((key for key in tensors if re.fullmatch(pattern, key)), None):
            raise FileError(f"{path}: weights quantised by {name} ({shown(found)}), which are not read")
    scales = {key: array for key, array in tensors.items() if _SCALE.fullmatch(key)}
    unused = {key: array for key, array in tensors.items() if _UNUSED.fullmatch(key)}
    if not (scales or unused):
        return tensors
    for key, array in unused.items():
        if key.rpartition(".")[2] == "comfy_quant" and (kind := _format(array)) not in _FORMATS:
            raise FileError(f"{path}: {shown(key)} is {shown(kind)}; read are {', '.join(_FORMATS)}")
    plain = {key: array for key, array in tensors.items() if key not in scales and key not in unused}
    for key, scale in scales.items():
        weight = key.removesuffix(key.rpartition(".")[2]) + "weight"
        if weight not in plain:
            raise FileError(f"{path}: {shown(key)} is the scale of a weight that is not there")
        plain[weight] = _times(path, key, plain[weight], scale)
    networks = {_network(key) for key in scales}
    for key, array in plain.items():
        if array.dtype in _EIGHT_BITS and key.endswith("weight") and _network(key) in networks:
            raise FileError(f"{path}: {shown(key)} is {array.dtype.name} without a scale, which others here have")
    return plain


def _network(key: str) -> str:
    found = _NETWORK.match(key)
    return found[0] if found else ""


def _times(path: Path, key: str, weight: np.ndarray, scale: np.ndarray) -> np.ndarray:
    rows = len(weight) if weight.ndim else 1
    if not (is_float(weight.dtype) and is_float(scale.dtype)) or scale.size not in (1, rows):
        what = f"{scale.dtype} {scale.shape}, the weight {weight.dtype} {weight.shape}"
        raise FileError(f"{path}: {shown(key)} is {what}; expected one scale, or one for each row, of floats")
    shape = (-1, *[1] * (weight.ndim - 1)) if scale.size > 1 else ()
    return weight.astype(np.float32) * scale.astype(np.float32).reshape(shape)


def _format(array: np.ndarray) -> str:
    try:
        return str(json.loads(array.tobytes()[:4096])["format"])
    except (ValueError, LookupError, TypeError, RecursionError):
        return "damaged"
