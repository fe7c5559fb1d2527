"""One network of a system, from whatever file or folder holds it: diffusers', transformers' and original layouts."""

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bdm_jax.errors import UserError, unknown
from bdm_jax.formats.detect import Contents, NetworkInFile, detect
from bdm_jax.formats.files import (
    DIFFUSERS_WEIGHTS,
    TRANSFORMERS_WEIGHTS,
    Tensors,
    read_json,
    write_json,
    write_safetensors,
)
from bdm_jax.formats.layouts import tree_from_torch, tree_to_torch
from bdm_jax.formats.tables import KeyTable, ldm_unet, table_for
from bdm_jax.formats.weights import Weights, is_taesd, read_weights
from bdm_jax.models.config import (
    SD15_UNET,
    BranchConfig,
    CLIPTextConfig,
    CLIPVisionConfig,
    Config,
    ControlNetConfig,
    RobertaConfig,
    T2IAdapterConfig,
    TinyVAEConfig,
    UNetConfig,
    VAEConfig,
    from_json,
    to_json,
)
from bdm_jax.models.functional import Params, abstract

DTYPES = ("float32", "bfloat16", "float16")

# The networks of a system, and those beside it, with the configs that may stand in their place.
KINDS: dict[str, tuple[type, ...]] = {
    "unet": (UNetConfig,),
    "vae": (VAEConfig, TinyVAEConfig),
    "text_encoder": (CLIPTextConfig,),
    "branch": (BranchConfig,),
    "branch_text_encoder": (RobertaConfig,),
    "controlnet": (ControlNetConfig,),
    "t2i_adapter": (T2IAdapterConfig,),
    "image_encoder": (CLIPVisionConfig,),
}
# Recognised, and other networks than those here.
_FAMILIES_REFUSED = ("SD2", "SDXL")


class Component(NamedTuple):
    """One network: its sizes and its weights."""

    config: Config
    params: Params


@dataclass(frozen=True)
class Found:
    """A network that was found, not yet read into memory: where, its config.json's values, its keys and arrays."""

    path: Path
    kind: str
    values: dict[str, Any]
    tensors: Mapping[str, np.ndarray]
    table: KeyTable
    prediction: str | None = None

    def config(self) -> Config:
        """Its sizes. Raises UserError for what these networks do not implement."""
        return _config(self.path, self.values)

    def load(self, dtype: str | None = None) -> Component:
        """Read it, tensor by tensor. Raises FileError that names missing, unknown and misshaped weights."""
        config, target = self.config(), _dtype(dtype or default_dtype())
        if isinstance(config, BranchConfig) and any("cond_embedding" in key for key in self.tensors):
            warnings.warn(f"{self.path}: a branch sees no picture: the hint network in it is left out", stacklevel=2)
        tree = tree_from_torch(self.tensors, abstract(config), str(self.path), self.table)
        params = {key: jax.device_put(np.array(value, target, order="C")) for key, value in tree.items()}
        return Component(config, params)


def find(path: str | Path, variant: str | None = None) -> dict[str, Found]:
    """The networks in a file, or in a component folder, by kind; `variant` chooses among a folder's files ("fp16").

    Raises UserError or FileError that names the file and says what it is, if no network of ours is in it.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file or component folder")
    if path.is_dir() and not is_taesd(path):
        return _in_folder(path, variant)
    weights, contents = contents_of(path, variant)
    if not contents.parts:
        raise UserError(f"{path}: {contents.name}; no network that this library reads")
    return {part.kind: _part(weights, part) for part in contents.parts}


def contents_of(path: str | Path, variant: str | None = None) -> tuple[Weights, Contents]:
    """What is in a file or component folder, by its tensors; what they cannot tell, by a folder's config.json."""
    weights, config = _without_ema(read_weights(path, variant), variant), Path(path) / "config.json"
    told = json.dumps(read_json(config)) if config.is_file() else None
    metadata = {**weights.metadata, **({f"bdm_jax.{kind}": told for kind in KINDS} if told else {})}
    return weights, detect({key: array.shape for key, array in weights.tensors.items()}, metadata)


def load_component(path: str | Path, dtype: str | None = None, kind: str | None = None) -> Component:
    """Read one network from a component folder or a file.

    Weights come as `dtype`, by default float32 on a CPU and bfloat16 on an accelerator, on JAX's default device.
    `kind` is needed where a file holds several networks. Raises UserError or FileError that names what is missing,
    unknown or misshaped.
    """
    return pick_network(find(path), path, kind).load(dtype)


def pick_network(found: Mapping[str, Found], path: str | Path, kind: str | None) -> Found:
    """The network of that kind, or the only one. Raises UserError that says what there is instead."""
    if kind is None and len(found) == 1:
        return next(iter(found.values()))
    if kind == "branch" and kind not in found and "controlnet" in found:  # 360's branch calls itself a ControlNet
        part = found["controlnet"]
        table = KeyTable(modules=part.table.modules, ignored=(*part.table.ignored, r"controlnet_cond_embedding\..*"))
        return Found(part.path, kind, {**part.values, "bdm_branch": True}, part.tensors, table)
    if kind not in found:
        raise UserError(f"{path}: holds {', '.join(found)}, not a {kind or 'single network'}")
    return found[kind]


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
    if isinstance(config, CLIPTextConfig | CLIPVisionConfig | RobertaConfig):
        written = next(iter(params.values())).dtype.name if dtype == "same" else dtype
        values, name = {**values, "dtype": written}, TRANSFORMERS_WEIGHTS
    tensors = as_dtype(tree_to_torch(params), dtype, str(folder))
    write_safetensors(folder / name, tensors, {"format": "pt", **(metadata or {})})
    write_json(folder / "config.json", values)


def default_dtype() -> str:
    """The type of weights and computation unless asked: float32 on a CPU, bfloat16 on an accelerator."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def as_dtype(tensors: Tensors, dtype: str, name: str) -> Tensors:
    """Floating-point tensors in another type ("same": as they are), the others as they are.

    Raises UserError, with `name` and the key, when a finite value would become infinite.
    """
    if dtype == "same":
        return tensors
    target = _dtype(dtype)
    floats = {key for key, array in tensors.items() if jnp.issubdtype(array.dtype, jnp.floating)}
    return {key: _narrow(f"{name}: {key}", a, target) if key in floats else a for key, a in tensors.items()}


def _narrow(name: str, array: np.ndarray, target: np.dtype) -> np.ndarray:
    with np.errstate(over="ignore"):
        result = array.astype(target)
    if not np.isfinite(result.astype(np.float32)).all() and np.isfinite(array.astype(np.float32)).all():
        raise UserError(f"{name} has values beyond {target.name}'s range; save as bfloat16 or float32")
    return result


def _without_ema(weights: Weights, variant: str | None) -> Weights:
    """A file that trained with an average (LDM's `model_ema`, whose names have lost their dots), with one UNet in it.

    The average takes the place of the UNet where the file has no other, or where the variant "ema" is asked for.
    """
    averaged = {key: array for key, array in weights.tensors.items() if key.startswith("model_ema.")}
    if not averaged:
        return weights
    tensors = {key: array for key, array in weights.tensors.items() if key not in averaged}
    unet = "model.diffusion_model."
    if variant == "ema" or not any(key.startswith(unet) for key in tensors):
        shapes = {key: np.broadcast_to(0, leaf.shape) for key, leaf in abstract(SD15_UNET).items()}
        names = tree_to_torch(shapes, ldm_unet(SD15_UNET.attention_levels, SD15_UNET.layers_per_block))
        dotless = {f"model_ema.{(unet.removeprefix('model.') + name).replace('.', '')}": unet + name for name in names}
        tensors = {key: array for key, array in tensors.items() if not key.startswith(unet)}
        tensors |= {dotless[key]: array for key, array in averaged.items() if key in dotless}
    return replace(weights, tensors=tensors)


def _in_folder(folder: Path, variant: str | None) -> dict[str, Found]:
    values = read_json(folder / "config.json")
    kind = _kind(_config(folder, values))
    weights = read_weights(folder, variant)
    return {kind: Found(weights.path, kind, values, weights.tensors, table_for(values, weights.tensors))}


def _config(path: Path, values: dict[str, Any]) -> Config:
    try:
        return from_json(values)
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: {error}") from error


def _kind(config: Config) -> str:
    return next(kind for kind, classes in KINDS.items() if isinstance(config, classes))


def _part(weights: Weights, part: NetworkInFile) -> Found:
    if part.family.startswith(_FAMILIES_REFUSED) or "inpainting" in part.family or "pix2pix" in part.family:
        raise UserError(f"{weights.path}: {part.family} {part.kind}; this library has the networks of SD1.x")
    tensors = part.of(weights.tensors)
    return Found(weights.path, part.kind, part.config, tensors, part.table, part.prediction)


def _dtype(name: str) -> np.dtype:
    if name not in DTYPES:
        raise unknown("dtype", name, DTYPES)
    return jnp.dtype(name)


def size_metadata(config: Config) -> dict[str, str]:
    """Metadata from which `bdm_jax.formats.detect` finds what weights cannot tell of these sizes."""
    values = to_json(config)
    told = ("attention_head_dim", "norm_num_groups", "sample_size", "scaling_factor", "num_attention_heads")
    told += ("hidden_act", "bos_token_id", "eos_token_id", "pad_token_id", "norm_eps", "layer_norm_eps")
    return {f"bdm_jax.{_kind(config)}": json.dumps({key: values[key] for key in told if key in values})}
