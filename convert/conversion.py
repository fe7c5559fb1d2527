"""Files and folders from one library's names and layouts to another's: `python -m convert to-jax`, `to-torch`.

What is written is of the kind that was read (file, component folder, pipeline folder), whole or not at all. A file in
this library's layout says so in its header, with the names that its tensors came under, so that the way back is exact.
"""

import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from bdm_jax.errors import FileError, UserError, unknown
from bdm_jax.formats.detect import NetworkInFile, detect
from bdm_jax.formats.files import (
    DIFFUSERS_WEIGHTS,
    JAX_WEIGHTS,
    TRANSFORMERS_WEIGHTS,
    Tensors,
    shown,
    write_json,
    write_safetensors,
)
from bdm_jax.formats.layouts import leaves, tree_from_torch, tree_to_torch
from bdm_jax.formats.networks.autoencoders import ldm_vae
from bdm_jax.formats.networks.clip import CLIP_TEXT
from bdm_jax.formats.networks.openclip import openclip_text
from bdm_jax.formats.networks.unet import ldm_controlnet, ldm_unet
from bdm_jax.formats.open import Found, find
from bdm_jax.formats.tables import KeyTable, ignorable
from bdm_jax.formats.weights import SOURCE_KEYS, FormerName, Weights, names_in_header, read_weights
from bdm_jax.models.config import (
    CLIPTextConfig,
    Config,
    ControlNetConfig,
    UNetConfig,
    VAEConfig,
)
from bdm_jax.models.functional import abstract
from bdm_jax.paths import new_folder
from bdm_jax.systems import families
from bdm_jax.systems.components import DTYPES, as_dtype, config_of, save_component, size_metadata
from bdm_jax.systems.fetch import local
from bdm_jax.systems.folder import bundled_tokenizer, load_schedule, scheduler_values
from bdm_jax.systems.index import INDEX, SCHEDULE, model_index

from .inspection import not_finite

LAYOUTS = ("same", "diffusers", "ldm")
WEIGHT_SUFFIXES = {".safetensors", ".ckpt", ".bin", ".pt", ".pth"}


def to_jax(src: str | Path, dst: str | Path) -> list[Path]:
    """Write `src` in this library's names and layouts; every tensor keeps its dtype and bits. Returns what was written.

    Raises UserError or FileError; then nothing is there under `dst`.
    """
    src = local(src)
    src, dst = checked(src, dst, file=src.is_file())
    if src.is_file():
        return _jax_file(read_weights(src), dst)
    with new_folder(dst) as folder:
        for child, target in _components(src, folder):
            weights = read_weights(child)
            _jax_file(weights, target / JAX_WEIGHTS)
            _copy_rest(child, target)
    return [dst]


def to_torch(src: str | Path, dst: str | Path, layout: str = "same", dtype: str = "same") -> list[Path]:
    """Write `src`, of any layout, as PyTorch libraries read it. Returns what was written.

    Args:
      layout: "same" keeps the names (those that a file had before `to_jax`); "diffusers" writes a component folder, or
        a pipeline folder where there are several networks; "ldm" one safetensors file in CompVis' names.
      dtype: of the weights; "same" keeps each tensor's.

    Raises UserError or FileError; then nothing is there under `dst`.
    """
    if layout not in LAYOUTS:
        raise unknown("layout", layout, LAYOUTS)
    if dtype not in ("same", *DTYPES):
        raise unknown("dtype", dtype, ("same", *DTYPES))
    src = local(src)
    src, dst = checked(src, dst, file=layout == "ldm" or (layout == "same" and src.is_file()))
    if layout == "same" and src.is_file():
        return _same_file(read_weights(src), dst, dtype)
    if layout == "same":
        with new_folder(dst) as folder:
            for child, target in _components(src, folder):
                weights = read_weights(child)
                transformers = (child / "config.json").is_file() and not _is_diffusers(child)
                _same_file(weights, target / (TRANSFORMERS_WEIGHTS if transformers else DIFFUSERS_WEIGHTS), dtype)
                _copy_rest(child, target)
        return [dst]
    networks = _networks(src)
    if layout == "ldm":
        return _ldm_file(networks, dst, dtype, _prediction(src, networks))
    with new_folder(dst) as folder:
        if len(networks) == 1:
            _component_folder(folder, next(iter(networks.values())), dtype)
        else:
            _pipeline_folder(folder, src, networks, dtype)
    return [dst]


def checked(src: Path, dst: str | Path, file: bool) -> tuple[Path, Path]:
    """Both paths. file: whether one is written, in safetensors, and not a folder: the name must not say something else.

    Raises UserError where there is nothing to read, or something in the place of what is to be written.
    """
    dst = Path(dst)
    if not src.exists():
        raise UserError(f"{src}: no such file or folder")
    if dst.exists():
        raise UserError(f"{dst}: is there already; choose another name")
    if not file and dst.suffix.lower() in WEIGHT_SUFFIXES:
        one = "to-torch --layout ldm writes one file" if src.is_dir() else "to-torch without --layout writes a file"
        raise UserError(f"{dst}: a folder is written here, choose a name without {dst.suffix} ({one})")
    if file and dst.suffix.lower() in WEIGHT_SUFFIXES - {".safetensors"}:
        raise UserError(f"{dst}: what is written is safetensors, choose a name that ends in .safetensors")
    return src, dst


def _note_not_finite(path: Path, tensors: Tensors, names: Mapping[str, str]) -> None:
    """Warns of weights that are NaN or infinite, which are converted as they are. names: those of the file."""
    if bad := [names.get(key, key) for key, array in tensors.items() if not_finite(array)]:
        more = f", and in {len(bad) - 1} more" if len(bad) > 1 else ""
        warnings.warn(
            f"{path}: NaN or infinite values in {shown(bad[0])}{more}: converted as they are, no use to draw with",
            stacklevel=3,
        )


# ------------------------------------------------------------------------------------------------ the same, other names


def _jax_file(weights: Weights, path: Path) -> list[Path]:
    contents = detect({key: array.shape for key, array in weights.tensors.items()}, weights.metadata)
    if not contents.parts:
        raise UserError(f"{weights.path}: {contents.name}; no network that this library reads")
    _note_not_finite(weights.path, weights.tensors, weights.keys)
    tensors: Tensors = {}
    names: dict[str, FormerName] = {}
    for key, array in weights.tensors.items():
        before = key if weights.names else weights.in_file(key)
        for ours, part, name in _ours(key, before, array, contents.parts):
            if ours in tensors:
                raise FileError(f"{weights.path}: holds {ours} under two names, {names[ours].key} and {key}")
            tensors[ours], names[ours] = part, name
    metadata = {key: value for key, value in weights.metadata.items() if key != "format"}
    write_safetensors(path, tensors, {**metadata, "format": "jax", SOURCE_KEYS: names_in_header(names)})
    return [path]


def _ours(
    key: str, before: str, array: np.ndarray, parts: tuple[NetworkInFile, ...]
) -> list[tuple[str, np.ndarray, FormerName]]:
    """A tensor's leaves in our names and layouts, below their network's kind where the file holds several; of no
    network as it is. `before`: its name in the file.
    """
    for part in sorted(parts, key=lambda part: -len(part.prefix)):
        name = key.removeprefix(part.prefix)
        if key.startswith(part.prefix) and not ignorable(key) and (found := leaves(name, array, part.table)):
            transposed, below = part.table.keeps_transposed(name), f"{part.kind}." if len(parts) > 1 else ""
            return [
                (below + ours, leaf, FormerName(before, index, len(found), transposed))
                for index, (ours, leaf) in enumerate(found.items())
            ]
    plain = key.rpartition(".")[2] not in ("kernel", "scale", "embedding")
    return [(key if plain else f"{key}:as-it-was", array, FormerName(before))]


def _same_file(weights: Weights, path: Path, dtype: str) -> list[Path]:
    _note_not_finite(weights.path, weights.tensors, weights.keys)
    metadata = {key: value for key, value in weights.metadata.items() if key != SOURCE_KEYS}
    write_safetensors(path, as_dtype(weights.as_before(), dtype, str(weights.path)), {**metadata, "format": "pt"})
    return [path]


def _components(src: Path, target: Path) -> list[tuple[Path, Path]]:
    """The component folders of a pipeline folder, or the folder itself, each with where it goes; copies the rest."""
    if (src / "config.json").is_file():
        return [(src, target)]
    children = [child for child in sorted(src.iterdir()) if (child / "config.json").is_file()]
    if not children:
        raise UserError(f"{src}: neither a component folder (config.json) nor a pipeline folder")
    for child in sorted(set(src.iterdir()) - set(children)):
        if child.is_dir():
            shutil.copytree(child, target / child.name)
        elif child.suffix == ".json":
            shutil.copy(child, target / child.name)
    for child in children:
        (target / child.name).mkdir()
    return [(child, target / child.name) for child in children]


def _copy_rest(src: Path, dst: Path) -> None:
    """Everything of a component folder that is small text: configs, vocabularies."""
    for path in sorted(src.iterdir()):
        if path.is_file() and path.suffix in (".json", ".txt") and ".index" not in path.name:
            shutil.copy(path, dst / path.name)


def _is_diffusers(folder: Path) -> bool:
    return '"_class_name"' in (folder / "config.json").read_text("utf-8")


# ------------------------------------------------------------------------------------------------------ other layouts


def _networks(src: Path) -> dict[str, tuple[Found, Config, Tensors]]:
    """Every network in a file or folder, by kind: where it was, its sizes, its tree as NumPy views."""
    if src.is_file() or (src / "config.json").is_file():
        found = find(src)
    else:
        found = {}
        for child in sorted(child for child in src.iterdir() if (child / "config.json").is_file()):
            found |= {_name(child, part): part for part in find(child).values()}
    networks = {}
    for kind, part in found.items():
        config = config_of(part)
        _note_not_finite(part.path, part.tensors, part.names)
        tree = tree_from_torch(part.tensors, abstract(config), str(part.path), part.table, part.names, part.prefix)
        networks[kind] = part, config, tree
    if not networks:
        raise UserError(f"{src}: neither a component folder (config.json) nor a pipeline folder")
    return networks


def _name(folder: Path, part: Found) -> str:
    """What a network in a component folder is called: as the folder where such a network may stand there."""
    beside = part.kind in {beside.name for beside in families.BESIDE}
    return folder.name if beside or part.kind in families.other_kinds(folder.name) else part.kind


def _component_folder(folder: Path, network: tuple[Found, Config, Tensors], dtype: str) -> None:
    part, config, tree = network
    save_component(folder, config, tree, dtype, {"source": part.path.name})


def _pipeline_folder(folder: Path, src: Path, networks: dict[str, tuple[Found, Config, Tensors]], dtype: str) -> None:
    for kind, network in networks.items():
        _component_folder(folder / kind, network, dtype)
    if src.is_dir():
        tokenizers = {name for family in families.FAMILIES.values() for name in family.tokenizers}
        for name in sorted({*tokenizers, "scheduler"}):
            if (src / name).is_dir():
                shutil.copytree(src / name, folder / name)
        if (src / INDEX).is_file():
            shutil.copy(src / INDEX, folder)
        return
    configs = {name: config for name, (_, config, _) in networks.items()}
    family = families.family_of(networks, configs=configs)
    for tower in family.towers:
        if tower.encoder in networks:
            words, pad = networks[tower.encoder][1].vocab_size, family.parts[tower.tokenizer].pad
            if tokenizer := bundled_tokenizer(words, pad):
                tokenizer.save_pretrained(folder / tower.tokenizer)
    schedule = family.default_schedule(prediction_type=_prediction(src, networks))
    write_json(folder / "scheduler" / SCHEDULE, scheduler_values(family, schedule))
    if "vae" in networks:
        write_json(folder / INDEX, model_index(family, configs))


def _ldm_file(networks: dict[str, tuple[Found, Config, Tensors]], dst: Path, dtype: str, prediction: str) -> list[Path]:
    tensors: Tensors = {}
    metadata = {"format": "pt", "modelspec.prediction_type": {"v_prediction": "v"}.get(prediction, prediction)}
    for name, (part, config, tree) in networks.items():
        prefix, table = _ldm_names(part, name, config, "text_encoder_2" in networks)
        named = {prefix + key: array for key, array in tree_to_torch(tree, table).items()}
        tensors |= as_dtype(named, dtype, str(part.path))
        metadata |= size_metadata(config, name) | {f"source.{name}": part.path.name}
    write_safetensors(dst, tensors, metadata)
    return [dst]


def _prediction(src: Path, networks: dict[str, tuple[Found, Config, Tensors]]) -> str:
    """What the UNet predicts, as its folder or file says; epsilon, as SD1.x does, where it says nothing."""
    if (src / "scheduler").is_dir():
        return load_schedule(src / "scheduler").prediction_type
    return (networks["unet"][0].prediction if "unet" in networks else None) or "epsilon"


def _ldm_names(part: Found, name: str, config: Config, two_towers: bool) -> tuple[str, KeyTable]:
    if isinstance(config, UNetConfig):
        return "model.diffusion_model.", ldm_unet(config.transformer_layers, config.layers_per_block)
    if isinstance(config, VAEConfig):
        return "first_stage_model.", ldm_vae(len(config.block_out_channels), config.layers_per_block)
    if name == "text_encoder_2" and isinstance(config, CLIPTextConfig):
        return "conditioner.embedders.1.model.", openclip_text(config.num_hidden_layers)
    if isinstance(config, CLIPTextConfig):
        return ("conditioner.embedders.0." if two_towers else "cond_stage_model.") + "transformer.", CLIP_TEXT
    if isinstance(config, ControlNetConfig):
        hints = 2 * (len(config.conditioning_embedding_out_channels) - 1)
        return "control_model.", ldm_controlnet(config.transformer_layers, config.layers_per_block, hints)
    raise UserError(f"{part.path}: a {part.kind} has no LDM layout; write --layout diffusers")
