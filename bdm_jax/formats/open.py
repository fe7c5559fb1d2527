"""Networks in files and folders, found but not yet in memory: diffusers', transformers' and original layouts.

Community files are untrusted: what is found here is names, shapes and memory-mapped arrays. What a network is made of
its config says (`systems.components` loads it).
"""

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from bdm_jax.errors import UserError
from bdm_jax.formats.detect import Contents, NetworkInFile, detect, kind_of, table_for
from bdm_jax.formats.files import read_json
from bdm_jax.formats.tables import KeyTable
from bdm_jax.formats.weights import Weights, is_taesd, read_weights

# Recognised, and other networks than those here.
_FAMILIES_REFUSED = ("SD2", "SDXL refiner")


@dataclass(frozen=True)
class Found:
    """A network that was found, not yet read into memory: where, its config.json's values, its keys and arrays."""

    path: Path
    kind: str
    values: dict[str, Any]
    tensors: Mapping[str, np.ndarray]
    table: KeyTable
    prediction: str | None = None


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
    metadata = dict(weights.metadata)
    if config.is_file():
        values = read_json(config)
        if kind := kind_of(values):
            metadata[f"bdm_jax.{kind}"] = json.dumps(values)
    return weights, detect({key: array.shape for key, array in weights.tensors.items()}, metadata)


def pick_network(found: Mapping[str, Found], path: str | Path, name: str | None, kinds: Collection[str] = ()) -> Found:
    """The network of that name, or the only one of these other kinds; where no name is given, the only one.

    Raises UserError that says what there is instead.
    """
    if name is None and len(found) == 1:
        return next(iter(found.values()))
    if name in found:
        return found[name]
    for kind in kinds:
        if kind in found:
            part = found[kind]
            return _as_branch(part) if kind == "controlnet" else replace(part, kind=name)
    raise UserError(f"{path}: holds {', '.join(found)}, not a {name or 'single network'}")


def ldm_name(dotless: str) -> str:
    """The name of a UNet's weight in CompVis' layout from the one that its average has, which has lost its dots.

    Raises ValueError for what is no such name.
    """
    pieces = _LDM_PIECE.findall(dotless)
    if "".join("".join(piece) for piece in pieces) != dotless:
        raise ValueError(f"{dotless!r} is no weight of a UNet")
    return ".".join(part for piece in pieces for part in piece if part)


# Pieces of CompVis' names, each with the numbers that follow it: blocks have two, of which the second has one digit.
_LDM_PIECE = re.compile(
    r"(input_blocks|output_blocks)(\d+)(\d)"
    r"|(transformer_blocks|middle_block|time_embed|label_emb|in_layers|emb_layers|out_layers|to_out|net|out)(\d+)"
    r"|(skip_connection|proj_in|proj_out|to_[qkv]|attn[12]|norm[123]?|ff|op|conv|proj|weight|bias)"
)


def _as_branch(part: Found) -> Found:
    """360's branch, which calls itself a ControlNet, without the hint network that it may carry."""
    table = replace(part.table, ignored=(*part.table.ignored, r"controlnet_cond_embedding\..*"))
    return replace(part, kind="branch", values={**part.values, "bdm_branch": True}, table=table, prediction=None)


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
        tensors = {key: array for key, array in tensors.items() if not key.startswith(unet)}
        prefix = "model_ema.diffusion_model"
        for key, array in averaged.items():
            if key.startswith(prefix):
                try:
                    tensors[unet + ldm_name(key.removeprefix(prefix))] = array
                except ValueError:
                    continue  # counters, which are no weights
    return replace(weights, tensors=tensors)


def _in_folder(folder: Path, variant: str | None) -> dict[str, Found]:
    values = read_json(folder / "config.json")
    kind = kind_of(values)
    if kind is None:
        name = values.get("_class_name") or values.get("model_type")
        raise UserError(f"{folder}: config.json: {name!r} is not a network this library has")
    weights = read_weights(folder, variant)
    return {kind: Found(weights.path, kind, values, weights.tensors, table_for(values, weights.tensors))}


def _part(weights: Weights, part: NetworkInFile) -> Found:
    if part.family.startswith(_FAMILIES_REFUSED) or "inpainting" in part.family or "pix2pix" in part.family:
        raise UserError(f"{weights.path}: {part.family} {part.kind}; this library has no such network")
    tensors = part.of(weights.tensors)
    return Found(weights.path, part.kind, part.config, tensors, part.table, part.prediction)
