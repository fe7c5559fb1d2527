"""Plug-ins of the LoRA family: files that change the weights of a UNet, a text encoder or a branch a little.

    lora = load_lora("style.safetensors", networks)             # networks: name -> flat tree of parameters or shapes
    changed = apply(networks, [(lora, 0.8, 0.5)])               # new trees; `networks` are what they were

A file stays apart from the networks: it is its factors, and `apply` merges them into copies of the original weights.
Other strengths, another order, one plug-in less: merge again from the originals, which nothing has touched. The trees
keep their shapes, so that no program is compiled again. Inside a compiled program `apply` may itself be traced, with
plug-ins and strengths as arguments: then no merged copy outlives the call, and gradients reach the factors.
"""

import math
import re
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bdm_jax.errors import FileError, UserError, unknown
from bdm_jax.formats.files import Tensors, shown
from bdm_jax.formats.layouts import to_jax, to_torch
from bdm_jax.formats.lora import LoraFile, LoraKey, family, module_names, numbered_modules, other_kind, read_lora
from bdm_jax.models.functional import Params
from bdm_jax.plugins.deltas import Delta, change, is_nothing, make, make_ia3
from bdm_jax.systems import families
from bdm_jax.systems.fetch import local


@partial(jax.tree_util.register_dataclass, data_fields=["deltas", "tokens"], meta_fields=["path", "left_out"])
@dataclass(frozen=True)
class LoRA:
    """One plug-in, checked against the networks that it is for.

    Attributes:
      deltas: network -> parameter path -> change; the factors in the file's dtypes, memory-mapped.
      tokens: embeddings that were trained along with it, by word (see plugins/inversion.py).
      path: the file.
      left_out: what of a UNet's plug-in the branch has no module for.
    """

    deltas: Mapping[str, Mapping[str, Delta]]
    tokens: Tensors
    path: str
    left_out: tuple[str, ...] = ()


def load_lora(path: str | Path, networks: Mapping[str, Mapping[str, Any]], target: str | None = None) -> LoRA:
    """Read a plug-in of any layout (`formats.lora`) and kind (`deltas`) and find the weight that each part changes.

    Args:
      path: a safetensors, .bin or .pt file, a peft folder, or a folder with `pytorch_lora_weights`; also a name on a
        hub, or a link (see `systems.fetch`).
      networks: those of `families.lora_networks()` that there are: parameter path -> array, or anything with a shape
        (`functional.abstract`), in our names and layouts.
      target: "branch" has what was made for the UNet and its text encoder change the branch and its own; modules that
        a branch lacks (a UNet's decoder, an English text encoder) are left out with a warning that counts them.

    Modules of rank 0 are left out with a warning too. Raises UserError or FileError in one line: a key that belongs to
    nothing here or has another shape, parts that are missing, doubled or not finite, or the family that the file is
    for, if another.
    """
    path = local(path)
    if not path.exists():
        raise UserError(f"{path}: no such LoRA file or folder")
    denoisers = ("unet", families.mirror("unet"))
    if target not in (None, *denoisers):
        raise unknown("LoRA target", target, denoisers)
    targets = families.lora_networks()
    if strange := [name for name in networks if name not in targets]:
        raise unknown("network for a LoRA", strange[0], targets)
    names = {name: module_names({key.rpartition(".")[0] for key in tree}) for name, tree in networks.items()}
    file = read_lora(path, families.lora_prefixes())
    found, left_out = _resolved(file, names, networks, target)
    deltas: dict[str, dict[str, Delta]] = defaultdict(dict)
    misfits, empty = [], []
    for (network, module), (spelling, parts, keys) in found.items():
        for part, array in parts.items():
            with np.errstate(over="ignore"):
                finite = np.isfinite(np.asarray(array, np.float32)).all()
            if not finite:
                raise FileError(f"{path}: {shown(keys[part])} holds values that are not finite")
        if is_nothing(parts):
            empty.append(next(iter(keys.values())))
            continue
        settings = _settings(file, network, spelling)
        try:
            deltas[network] |= _changes(parts, module, networks[network], settings)
        except ValueError as error:
            misfits.append(f"{next(iter(keys.values()))}: {error}")
    if misfits:
        _refuse_family(file, networks)
        raise FileError(f"{path}: does not fit: {_few(misfits)}")
    if empty:
        warnings.warn(f"{path}: {len(empty)} modules of rank 0 change nothing: {_few(empty)}", stacklevel=2)
    if left_out:
        warnings.warn(f"{path}: left out {len(left_out)} modules that the branch lacks", stacklevel=2)
    if not deltas and not empty:
        raise FileError(f"{path}: no LoRA is in it")
    return LoRA(dict(deltas), file.tokens, str(file.path), tuple(left_out))


def apply(
    networks: Mapping[str, Params], uses: Sequence[tuple[LoRA, float | jax.Array, float | jax.Array]]
) -> dict[str, Params]:
    """The networks with plug-ins, each (plug-in, strength, strength in the text encoders), as new trees.

    All changes are taken from the original weights and summed in fp32, in an order of the plug-ins' own, so that theirs
    in `uses` makes no difference; the sum is rounded to the weight's dtype once and lies where the weight lay. A weight
    that nothing changes, strength 0 included, is the same array. Raises UserError where a sum has no finite value in
    the weight's dtype, or a strength is not finite.
    """
    for lora, *strengths in uses:
        if not all(isinstance(value, jax.core.Tracer) or math.isfinite(value) for value in strengths):
            raise UserError(f"{lora.path}: strength {strengths} is not finite")
    ordered = sorted(uses, key=lambda use: (use[0].path, *(str(value) for value in use[1:])))
    result = dict(networks)
    for network, tree in networks.items():
        changes: dict[str, list[tuple[Delta, Any]]] = defaultdict(list)
        for lora, strength, text_strength in ordered:
            value = text_strength if families.tokenizer_of(network) else strength
            if isinstance(value, jax.core.Tracer) or value != 0:
                for key, delta in lora.deltas.get(network, {}).items():
                    changes[key].append((delta, value))
        if missing := sorted(changes.keys() - tree.keys()):
            raise UserError(f"{network}: has no {missing[0]}, which a LoRA for other networks changes")
        if changes:
            result[network] = {**tree, **{key: _changed(key, tree[key], parts) for key, parts in changes.items()}}
    return result


def _changed(key: str, weight: Any, changes: list[tuple[Delta, Any]]) -> Any:
    """One weight with its changes, of the same type and place."""
    traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((weight, changes)))
    xp = jnp if traced else np
    name, original = to_torch(key, xp.asarray(weight))
    original = xp.asarray(original, np.float32)
    with jax.default_matmul_precision("highest"):  # for compiled programs: a TPU would take bfloat16
        result, *others = (change(delta, original, strength, xp) for delta, strength in changes)
    for value in (*others, original):
        result += value  # in place on the host: new pages are what a merge waits for
    result = to_jax(name, result, embedding=key.endswith(".embedding"))[1]
    if traced:
        return result.astype(weight.dtype)
    with np.errstate(over="ignore"):
        result = result.astype(weight.dtype, order="C", copy=False)
    if not np.isfinite(result).all():
        raise UserError(f"{key}: with these LoRAs has values beyond {weight.dtype}'s range")
    return jax.device_put(result, weight.sharding) if isinstance(weight, jax.Array) else result


# What a file has for one module: (network, module here) -> the file's spelling, part -> array, part -> its key.
_Found = dict[tuple[str, str], tuple[str, dict[str, np.ndarray], dict[str, str]]]


def _resolved(file: LoraFile, names, networks, target: str | None) -> tuple[_Found, list[str]]:
    """The parts by network and module here; what a branch has no place for."""
    found: _Found = {}
    left_out: list[str] = []
    strangers = list(file.unknown)
    parts = [(part, file.keys[part], array) for part, array in file.tensors.items()]
    for network, modules in file.numbered.items():
        order = numbered_modules(set(names.get(network, {}).values()))
        if network in names and sorted(modules) != list(range(len(order))):
            raise FileError(f"{file.path}: {len(modules)} numbered modules for the {len(order)} of this {network}")
        for number, halves in modules.items():
            spelling = order[number] if network in names else f"{network}:{number}"
            parts += [
                (LoraKey(network, spelling, part), f"{network}:{number}:{part}", array)
                for part, array in halves.items()
            ]
    for (named, spelling, part), key, array in parts:
        targets = families.lora_networks()
        made_for = named or next((name for name in targets if spelling in names.get(name, {})), targets[0])
        network = families.mirror(made_for) if target == "branch" else made_for
        if network not in names:
            _refuse_family(file, networks)
            if network not in families.family_of(networks).parts:
                titles = [family.title for family in families.FAMILIES.values() if network in family.parts]
                raise FileError(f"{file.path}: a LoRA for {' or '.join(titles)}, which this system is not")
            raise FileError(f"{file.path}: changes a {network}, which is not here")
        if module := names[network].get(spelling):
            _, known, keys = found.setdefault((network, module), (spelling, {}, {}))
            if part in known:
                raise FileError(f"{file.path}: holds {part} of {module} under two names: {keys[part]} and {key}")
            known[part], keys[part] = array, key
        elif network != made_for and spelling in names.get(made_for, {}):
            left_out += [f"{made_for} {spelling}"] if f"{made_for} {spelling}" not in left_out else []
        else:
            strangers.append(key)
    if strangers:
        _refuse_family(file, networks)
        if known := next(((key, kind) for key in strangers if (kind := other_kind(key))), None):
            raise FileError(f"{file.path}: {shown(known[0])} is of {known[1]}, which cannot be merged here")
        raise FileError(f"{file.path}: {len(strangers)} keys belong to nothing here: {_few(strangers)}")
    return found, left_out


def _changes(parts: Mapping[str, np.ndarray], module: str, tree: Mapping[str, Any], settings) -> dict[str, Delta]:
    """Parameter path -> change, of one module. Raises ValueError that says what of the module is wrong."""
    parts = dict(parts)
    paths = [path for leaf in ("kernel", "scale", "embedding") if (path := f"{module}.{leaf}") in tree]
    path, bias = paths[0] if paths else "", f"{module}.bias"
    shape = to_torch(path, np.broadcast_to(0, tree[path].shape))[1].shape if path else ()
    width = shape[:1] if bias in tree else None
    result = {}
    of_bias = {name: parts.pop(name) for name in ("diff_b", "b_norm", "up_bias") if name in parts}
    if of_bias and width is None:
        raise ValueError(f"has {next(iter(of_bias))}, where there is no bias")
    if "w_norm" in parts:
        parts["diff"] = parts.pop("w_norm")
    if "ia3" in parts and "on_input" not in parts:
        raise ValueError("has a whole weight, in place of a change")
    if path and ("ia3" in parts or "ia3_l" in parts):
        peft = "ia3_l" in parts
        vector = parts.pop("ia3_l" if peft else "ia3")
        flag = None if peft else parts.pop("on_input")
        if flag is not None and flag.size != 1:
            raise ValueError(f"has on_input of shape {flag.shape}")
        on_input = settings.get("on_input") if flag is None else bool(flag.any())
        result[path] = make_ia3(vector, shape, on_input, one=peft)
        if peft and width is not None and result[path].axis == 0:  # peft scales what the layer gives, bias included
            result[bias] = make_ia3(vector.reshape(-1), width, None, one=True)
        if parts or of_bias:
            raise ValueError(f"has {next(iter({**parts, **of_bias}))} beside IA3's values")
    elif parts:
        if not path:
            raise ValueError(f"has {next(iter(parts))}, where there is no weight")
        result[path] = make(parts, shape, settings)
    if of_bias:
        scale = result[path].scale if "up_bias" in of_bias and path in result else 1.0
        changes = [make({"diff": array}, width) for array in of_bias.values()]
        if len(changes) > 1:
            raise ValueError(f"has {' and '.join(of_bias)}")
        result[bias] = Delta("full", changes[0].parts, scale)
    return result


def _settings(file: LoraFile, network: str, module: str) -> dict[str, Any]:
    """Of a peft config, what holds for one module: alpha, r, use_rslora. Raises FileError."""
    config = file.settings.get(network, file.settings.get(None))
    if not config:
        return {}
    alpha = config.get("lora_alpha" if config.get("peft_type", "LORA") == "LORA" else "alpha")
    values = {
        "alpha": _of_module(file, config.get("alpha_pattern"), module, alpha),
        "r": _of_module(file, config.get("rank_pattern"), module, config.get("r")),
    }
    for name, value in values.items():
        number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9
        if value is not None and not (number and (name == "alpha" or value > 0)):
            raise FileError(f"{file.path}: {name} {shown(value)} in its config is not a number of use")
    if config.get("peft_type") == "IA3":
        values["on_input"] = _means(file, config.get("feedforward_modules"), module)
    return {**values, "use_rslora": config.get("use_rslora") is True}


def _of_module(file: LoraFile, patterns: Any, module: str, otherwise: Any) -> Any:
    """The value of the first pattern that fits the module's name, as peft chooses it."""
    if not patterns:
        return otherwise
    if not isinstance(patterns, dict):
        raise FileError(f"{file.path}: a pattern in its config is not a table")
    return next((value for key, value in patterns.items() if _matches(file, key, module, r"(.*\.)?")), otherwise)


def _means(file: LoraFile, names: Any, module: str) -> bool:
    """Whether a list of modules in a peft config, or the expression in its place, means this one."""
    if isinstance(names, str):
        return _matches(file, names, module)
    return isinstance(names, list) and any(module.endswith(str(name)) for name in names)


def _matches(file: LoraFile, pattern: str, module: str, before: str = "") -> bool:
    """Whether an expression fits a name. From a file, one may take for ever: groups repeat nothing, little repeats."""
    plain, repeats = re.subn(r"(\.|\\d|\\w)[*+]", "", pattern.replace("\\.", ""))
    if repeats > 3 or len(pattern) > 300 or not re.fullmatch(r"[\w.|()^$-]*", plain):
        raise FileError(f"{file.path}: pattern {shown(pattern)} in its config is not a plain module name")
    try:
        return re.fullmatch(rf"{before}({pattern})", module) is not None
    except re.error as error:
        raise FileError(f"{file.path}: pattern {shown(pattern)} in its config: {error}") from error


def _refuse_family(file: LoraFile, networks: Mapping[str, Mapping[str, Any]]) -> None:
    """What does not fit is most often made for another model: say which."""
    modules = {part.module for part in file.tensors}
    factors = {part.module: a for part, a in file.tensors.items() if part.part in ("down", "hada_w1_b") and a.ndim > 1}
    ours = {leaf.shape[0] for tree in networks.values() for key, leaf in tree.items() if "attn2.to_k." in key}
    inputs = {module: array.shape[1] for module, array in factors.items() if array.shape[1] not in ours}
    if name := family([*modules, *file.unknown], inputs):
        raise FileError(f"{file.path}: a LoRA for {name}, which this system is not")


def _few(items: Sequence[str], few: int = 3) -> str:
    more = f" and {len(items) - few} more" if len(items) > few else ""
    return ", ".join(map(shown, items[:few])) + more
