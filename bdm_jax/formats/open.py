"""Networks in files and folders, found but not yet in memory: diffusers', transformers' and original layouts.

Community files are untrusted: what is found here is names, shapes and memory-mapped arrays. What a network is made of
its config says (`systems.components` loads it).
"""

import json
import re
import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from bdm_jax.errors import UserError
from bdm_jax.formats.detect import Contents, NetworkInFile, detect, kind_of, table_for
from bdm_jax.formats.files import few, read_json
from bdm_jax.formats.networks import bert
from bdm_jax.formats.tables import KeyTable, ignorable
from bdm_jax.formats.weights import Weights, is_taesd, read_weights

_PROJECTED = "CLIPTextModelWithProjection"
_TEXT_PLACE = re.compile(r"(.*\.)?(cond_stage_model|conditioner|text_encoders?(_\d)?)\.")

# Recognised, and other networks than those here.
_FAMILIES_REFUSED = ("SD2", "SDXL refiner")


@dataclass(frozen=True)
class Found:
    """A network that was found, not yet read into memory.

    Attributes:
      path, kind: where, and what it is called here.
      values: its config.json's.
      tensors: by the names that `table` renames.
      prediction: what a UNet predicts, where that is known.
      names: what the tensors that are called otherwise here are called in the file.
      prefix: what the names of all its tensors begin with in the file.
      refused: what it is, where this library has no such network.
    """

    path: Path
    kind: str
    values: dict[str, Any]
    tensors: Mapping[str, np.ndarray]
    table: KeyTable
    prediction: str | None = None
    names: Mapping[str, str] = field(default_factory=dict)
    prefix: str = ""
    refused: str = ""

    def check(self) -> None:
        """Raises UserError, by name, for a network of a kind that this library does not have."""
        if self.refused:
            raise UserError(f"{self.path}: {self.refused}; this library has no such network")


def find(path: str | Path, variant: str | None = None, whole: bool = False) -> dict[str, Found]:
    """The networks in a file, or in a component folder, by kind; `variant` chooses among a folder's files ("fp16").

    What a file holds besides, and no network takes, is named in a warning. `whole`: all that it holds is wanted, so
    that a network of which this library has no such kind, or a text encoder that is not understood, is an error.

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
    found = {part.kind: _part(weights, contents, part) for part in contents.parts}
    for part in found.values():
        if whole or all(part.refused for part in found.values()):
            part.check()
    if left := [weights.in_file(key) for key in contents.left(weights.tensors)]:
        if whole and (texts := [key for key in left if _TEXT_PLACE.match(key)]):
            raise UserError(f"{path}: its text encoder is of no kind that is read here: {few(texts)}")
        known = "".join(f" ({name})" for name in contents.others)
        warnings.warn(f"{path}: left out, being of no network that is read here{known}: {few(left)}", stacklevel=2)
    return found


def contents_of(path: str | Path, variant: str | None = None) -> tuple[Weights, Contents]:
    """What is in a file or component folder, by its tensors; what they cannot tell, by a folder's config.json."""
    weights, config = _without_ema(read_weights(path, variant), variant), Path(path) / "config.json"
    metadata = dict(weights.metadata)
    if config.is_file():
        for kind, values in _configs(read_json(config), weights.tensors).items():
            metadata[f"bdm_jax.{kind}"] = json.dumps(values)
    found = detect({key: array.shape for key, array in weights.tensors.items()}, metadata)
    parts = tuple(replace(part, table=_tabled(part.config, part.table)) for part in found.parts)
    return weights, replace(found, parts=parts)


def names_in_file(weights: Weights, part: NetworkInFile, keys: Collection[str]) -> tuple[dict[str, str], str]:
    """What the keys of a network are called in the file, and what they begin with there."""
    names = {key: weights.in_file(part.prefix + key) for key in keys}
    fronts = (name.removesuffix(key) for key, name in names.items() if name.endswith(key))
    return names, next(fronts, part.prefix)


def pick_network(found: Mapping[str, Found], path: str | Path, name: str | None, kinds: Collection[str] = ()) -> Found:
    """The network of that name, or the only one of these other kinds; where no name is given, the only one.

    Raises UserError that says what there is instead.
    """
    if name is None and len(found) == 1:
        return next(iter(found.values()))
    for kind in (name, *kinds):
        if kind in found:
            part = found[kind]
            part.check()
            return part if kind == name else _as_branch(part) if kind == "controlnet" else replace(part, kind=name)
    raise UserError(f"{path}: holds {', '.join(found)}, not {name or 'a single network'}")


def with_projection(part: Found, wanted: bool) -> Found:
    """A Chinese-CLIP's text tower with the projection of its pooled text, where its file has one, or without; other
    networks as they are.
    """
    if part.values.get("model_type") not in bert.KINDS:
        return part
    shapes = {key: array.shape for key, array in part.tensors.items()}
    values = bert.projected(part.values, wanted, shapes)
    return replace(part, values=values, table=bert.table_of(values, shapes))


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
    tensors, keys = {key: array for key, array in weights.tensors.items() if key not in averaged}, dict(weights.keys)
    unet = "model.diffusion_model."
    if variant == "ema" or not any(key.startswith(unet) for key in tensors):
        tensors = {key: array for key, array in tensors.items() if not key.startswith(unet)}
        prefix = "model_ema.diffusion_model"
        for key, array in averaged.items():
            if key.startswith(prefix):
                try:
                    name = unet + ldm_name(key.removeprefix(prefix))
                except ValueError:
                    continue  # counters, which are no weights
                tensors[name], keys[name] = array, weights.in_file(key)
    return replace(weights, tensors=tensors, keys=keys)


def _in_folder(folder: Path, variant: str | None) -> dict[str, Found]:
    values = read_json(folder / "config.json")
    kind = kind_of(values)
    if kind is None:
        name = values.get("_class_name") or values.get("model_type")
        raise UserError(f"{folder}: config.json: {name!r} is not a network this library has")
    weights = read_weights(folder, variant)
    tensors = {key: array for key, array in weights.tensors.items() if not ignorable(key)}
    return {
        kind: Found(
            weights.path, kind, values, tensors, _tabled(values, table_for(values, tensors)), None, weights.keys
        )
        for kind, values in _configs(values, tensors).items()
    }


def _part(weights: Weights, contents: Contents, part: NetworkInFile) -> Found:
    refused = part.family.startswith(_FAMILIES_REFUSED) or "inpainting" in part.family or "pix2pix" in part.family
    tensors = contents.of(part, weights.tensors)
    names, prefix = names_in_file(weights, part, tensors)
    title = f"{part.family} {part.kind}" if refused else ""
    return Found(weights.path, part.kind, part.config, tensors, part.table, part.prediction, names, prefix, title)


def _tabled(values: Mapping[str, Any], table: KeyTable) -> KeyTable:
    """The table of a network's file; a CLIP text tower whose config has no projection leaves out that of its file."""
    text = str(values.get("model_type")).startswith("clip") and values["model_type"] != "clip_vision_model"
    if not text or _PROJECTED in (values.get("architectures") or ()):
        return table
    return replace(table, outside=KeyTable.outside, ignored=(*table.ignored, r"text_projection(\.weight)?"))


def _configs(values: dict[str, Any], tensors: Collection[str]) -> dict[str, dict[str, Any]]:
    """What config.json says of the networks in its folder, by kind: of one, or of both towers of a whole CLIP."""
    text = kind_of(values)
    if text is None:
        return {}
    if values.get("model_type") != "clip" or not isinstance(values.get("text_config"), dict):
        return {text: values}
    projected = {"projection_dim": values["projection_dim"]} if "projection_dim" in values else {}
    architectures = [_PROJECTED] if "text_projection.weight" in tensors else []
    text_values = {"model_type": "clip_text_model", "architectures": architectures}
    towers = {text: {**values["text_config"], **projected, **text_values}}
    vision = values.get("vision_config")
    if isinstance(vision, dict) and any(key.startswith("vision_model.") for key in tensors):
        towers["image_encoder"] = {**vision, **projected, "model_type": "clip_vision_model"}
    return towers
