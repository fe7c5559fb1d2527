"""One network in memory: loaded from what `formats.open` found, saved as diffusers or transformers reads it."""

import json
import os
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bdm_jax.errors import UserError, unknown
from bdm_jax.formats.files import (
    DIFFUSERS_WEIGHTS,
    TRANSFORMERS_WEIGHTS,
    Tensors,
    read_json,
    write_json,
    write_safetensors,
)
from bdm_jax.formats.layouts import tree_from_torch, tree_to_torch
from bdm_jax.formats.networks import bert
from bdm_jax.formats.open import Found, find, pick_network, with_projection
from bdm_jax.models.config import BranchConfig, Config, from_json, to_json
from bdm_jax.models.functional import Params, abstract, is_float, is_int8
from bdm_jax.runtime.programs import instructions
from bdm_jax.systems import families
from bdm_jax.systems.fetch import local

DTYPES = ("float32", "bfloat16", "float16")
_BF16_INSTRUCTIONS = {"avx512_bf16", "amx_bf16"}


class Component(NamedTuple):
    """One network: its sizes and its weights."""

    config: Config
    params: Params


def config_of(found: Found) -> Config:
    """The sizes of a network that was found. Raises UserError for what these networks do not implement."""
    found.check()
    try:
        return from_json(found.values)
    except (TypeError, ValueError) as error:
        raise UserError(f"{found.path}: {error}") from error


def load_found(
    found: Found, dtype: str | None = None, each: Callable[[str, jax.Array], Any] = lambda path, value: value
) -> Component:
    """Read a network that was found, tensor by tensor, as `dtype` (see `load_component`); `each` makes of a path and
    its value what is kept.

    Raises FileError that names missing, unknown and misshaped weights.
    """
    config, target = config_of(found), _dtype(dtype or default_dtype())
    if isinstance(config, BranchConfig) and any("cond_embedding" in key for key in found.tensors):
        warnings.warn(f"{found.path}: a branch has no hint image: the hint network in it is left out", stacklevel=2)
    tree = tree_from_torch(found.tensors, abstract(config), str(found.path), found.table, found.names, found.prefix)
    types = {key: target if is_float(value) else value.dtype for key, value in tree.items()}
    params = {key: each(key, jax.device_put(np.array(x, types[key], order="C"))) for key, x in tree.items()}
    return Component(config, params)


def find_part(path: Path, name: str | None = None, variant: str | None = None) -> Found:
    """The network in a component folder or a file that may stand in the place of a system's part.

    `name` of the part, needed where a file holds several. Of a whole Chinese-CLIP the projection belongs to the part
    where its pooled text is read (`families.is_pooled`). Raises UserError or FileError that says what there is instead.
    """
    found = pick_network(find(path, variant), path, name, families.other_kinds(name))
    return found if name is None else with_projection(found, families.is_pooled(name))


def config_in(folder: Path, name: str) -> Config:
    """The sizes of a system's part in its component folder, by config.json alone (see `find_part`). Raises FileError or
    ValueError for what these networks do not implement.
    """
    return from_json(bert.projected(read_json(folder / "config.json"), families.is_pooled(name)))


def load_component(path: str | Path, dtype: str | None = None, kind: str | None = None) -> Component:
    """Read one network from a component folder or a file, which may also be named on a hub (see `systems.fetch`).

    Weights come as `dtype`, by default `default_dtype`'s, on JAX's default device.
    `kind` is needed where a file holds several networks. Raises UserError or FileError that names what is missing,
    unknown or misshaped.
    """
    path = local(path, kind)
    return load_found(find_part(path, kind), dtype)


def save_component(
    folder: str | Path,
    config: Config,
    params: Params,
    dtype: str = "float16",
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write one network's folder as diffusers or transformers reads it, weights first, config.json last.

    `dtype` "same" keeps every weight's. `metadata` goes into the header of the weights file. Raises UserError when
    `params` are not those of `config`, or when a finite weight is too large for `dtype`.
    """
    folder = Path(folder)
    if wrong := sorted(abstract(config).keys() ^ params.keys()):
        raise UserError(f"{folder}: weights do not fit the config: {', '.join(wrong[:3])} ({len(wrong)} in all)")
    values, name = to_json(config), DIFFUSERS_WEIGHTS
    if "model_type" in values:  # transformers'
        written = next(iter(params.values())).dtype.name if dtype == "same" else dtype
        values, name = {**values, "dtype": written}, TRANSFORMERS_WEIGHTS
    tensors = as_dtype(tree_to_torch(params), dtype, str(folder))
    write_safetensors(folder / name, tensors, {"format": "pt", **(metadata or {})})
    write_json(folder / "config.json", values)


def default_dtype() -> str:
    """The type of weights and computation unless asked: bfloat16 on an accelerator or a CPU that multiplies it in
    hardware (AVX512_BF16, AMX), else float32 on a CPU and float16 on a GPU (NVIDIA's before compute capability 8, as
    T4 and V100). BDM_JAX_DTYPE names another.

    Raises UserError when that is not a type.
    """
    if asked := os.environ.get("BDM_JAX_DTYPE"):
        if asked not in DTYPES:
            raise unknown("BDM_JAX_DTYPE", asked, DTYPES)
        return asked
    if jax.default_backend() == "cpu":
        return "float32" if _BF16_INSTRUCTIONS.isdisjoint(instructions().split()) else "bfloat16"
    capability = getattr(jax.local_devices()[0], "compute_capability", None)  # of NVIDIA's: "7.5"
    old = re.fullmatch(r"(\d+)\.\d+", str(capability))
    return "float16" if old and int(old[1]) < 8 else "bfloat16"


def in_dtype(component: Component, dtype: str) -> Component:
    """The network with its weights in another type, but for those in int8; itself where they are of it."""
    config, params = component
    target = _dtype(dtype)
    other = {key for key, x in params.items() if not is_int8(x) and is_float(x) and x.dtype != target}
    if not other:
        return component
    return Component(config, {key: x.astype(target) if key in other else x for key, x in params.items()})


def as_dtype(tensors: Tensors, dtype: str, name: str) -> Tensors:
    """Floating-point tensors in another type ("same": as they are), the others as they are.

    Raises UserError, with `name` and the key, when a finite value would become infinite.
    """
    if dtype == "same":
        return tensors
    target = _dtype(dtype)
    floats = {key for key, array in tensors.items() if is_float(array)}
    return {key: _narrow(f"{name}: {key}", a, target) if key in floats else a for key, a in tensors.items()}


def _narrow(name: str, array: np.ndarray, target: np.dtype) -> np.ndarray:
    with np.errstate(over="ignore"):
        result = array.astype(target)
    if not np.isfinite(result.astype(np.float32)).all() and np.isfinite(array.astype(np.float32)).all():
        raise UserError(f"{name} has values beyond {target.name}'s range; save as bfloat16 or float32")
    return result


def _dtype(name: str) -> np.dtype:
    if name not in DTYPES:
        raise unknown("dtype", name, DTYPES)
    return jnp.dtype(name)


def size_metadata(config: Config, kind: str | None = None) -> dict[str, str]:
    """Metadata from which `bdm_jax.formats.detect` finds what weights cannot tell of the sizes of such a network."""
    values = to_json(config)
    names = ("attention_head_dim", "norm_num_groups", "sample_size", "scaling_factor", "num_attention_heads")
    names += ("hidden_act", "bos_token_id", "eos_token_id", "pad_token_id", "norm_eps", "layer_norm_eps")
    names += ("addition_time_embed_dim", "kv_channels")
    return {
        f"bdm_jax.{kind or families.kind_of(config)}": json.dumps({key: values[key] for key in names if key in values})
    }
