"""LoRA files by name: which network, which module, which part of its change; whose layout the file has does not matter.

Layouts: kohya and LyCORIS (`lora_unet_down_blocks_0_..`, modules also in CompVis' names), ComfyUI
(`diffusion_model.input_blocks.1..`), diffusers before and since peft, peft's folders, and cloneofsimo's, whose modules
have numbers in place of names. peft's keys may carry an adapter's name (`lora_A.ink.weight`), one in a file.
Underscores are never parsed: a module is looked up among all the spellings of those that a network has.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bdm_jax.errors import FileError
from bdm_jax.formats.files import Tensors, read_json, shown
from bdm_jax.formats.networks.unet import ldm_unet
from bdm_jax.formats.pickles import is_checkpoint, read_checkpoint
from bdm_jax.formats.weights import Weights, read_weights

# What a folder's file is called: by peft, by diffusers.
LORA_STEMS = ("adapter_model", "pytorch_lora_weights")
PEFT_CONFIG = "adapter_config.json"

_LYCORIS = "lycoris_"  # the file does not say which network

_WRAPPERS = re.compile(r"(?:module\.|base_model\.model\.)*")  # DataParallel's and peft's

# What keys end with -> the part of a change. peft puts the adapter's name into its own.
_ADAPTER = r"(\.(?P<adapter>(?!weight$|bias$)[^.]+))?"
_OF_PEFT = r"hada_w[12]_[ab]|hada_t[12]|lokr_w[12](_[ab])?|lokr_t2|ia3_l"
_NAMED = r"alpha|dora_scale|diff|diff_b|[wb]_norm|scalar|oft_blocks|rescale|on_input"
_PARTS = tuple(
    (re.compile(rf"(?P<module>.+?)\.{pattern}"), part)
    for pattern, part in (
        (rf"(lora_down|lora_A{_ADAPTER}|(lora\.|lora_linear_layer\.)?down)\.weight", "down"),
        (rf"(lora_up|lora_B{_ADAPTER}|(lora\.|lora_linear_layer\.)?up)\.weight", "up"),
        (r"lora_mid\.weight", "mid"),
        (rf"(lora_up|lora_B{_ADAPTER})\.bias", "up_bias"),
        (rf"lora_magnitude_vector{_ADAPTER}(\.weight)?", "magnitude"),
        (rf"(?P<part>{_OF_PEFT}){_ADAPTER}", None),
        (rf"(?P<part>{_NAMED})(\.default)?", None),
        (r"(?P<part>[ab][12]|bm)\.weight", None),  # GLoRA
        (r"weight", "ia3"),
    )
)
# Kinds that are known by their keys and not read.
_OTHER_KINDS = (
    (r"oft_diag", "OFT as LyCORIS 2.0 wrote it before its release"),
    (r"oft_[RS]\b", "peft's OFT"),
    (r"boft_[RS]\b", "peft's BOFT"),
    (r"lora_embedding_[AB]", "a LoRA of an embedding table"),
    (r"(vera|randlora)_lambda", "VeRA or RandLoRA"),
    (r"hra_u", "HRA"),
    (r"lambda_layer|[pq]_layer", "T-LoRA, which differs from step to step"),
    (r"set_weight|reshape_weight", "a whole weight of ComfyUI's, in place of a change"),
    (r"(ip_adapter|to_[kv]_ip)", "an IP-Adapter"),
)
# The attention of diffusers before 0.18: a LoRA beside it, not in it.
_BESIDE = re.compile(r"(?P<at>.+?)\.(processor\.)?to_(?P<which>q|k|v|out)_lora")
_UNET_PROJECTIONS = {"q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0"}

# Names that only other families' networks have.
_FOREIGN = (
    ("Flux", r".*(double_blocks|single_blocks|single_transformer_blocks)[._].*"),
    ("Stable Diffusion 3 or Flux", r"(.*[._])?joint_blocks[._].*|lora_te3_.*|(lora_)?transformer[._].*"),
    ("SDXL", r"(.*[._])?(label_emb|add_embedding)[._].*"),
    (
        "SDXL",
        r".*(input_blocks|output_blocks|down_blocks|up_blocks|mid_block|middle_block).*transformer_blocks[._][1-9].*",
    ),
)
_CONTEXT_WIDTHS = {1024: "SD2.x", 2048: "SDXL", 1280: "SDXL refiner"}


class LoraKey(NamedTuple):
    """Where one tensor of a file belongs: network (None: not recorded), module in the file's spelling, part."""

    network: str | None
    module: str
    part: str


@dataclass(frozen=True)
class LoraFile:
    """What is in a file.

    Attributes:
      path: the file.
      tensors: where each belongs -> its array, memory-mapped, in PyTorch's layout.
      keys: where each belongs -> its key.
      numbered: network -> number -> part -> array, of a file whose modules have no names.
      tokens: embeddings of words that were trained along, by word.
      unknown: keys that are none of these.
      settings: the peft config of each network (None: of the file).
    """

    path: Path
    tensors: dict[LoraKey, np.ndarray]
    keys: dict[LoraKey, str] = field(default_factory=dict)
    numbered: dict[str, dict[int, dict[str, np.ndarray]]] = field(default_factory=dict)
    tokens: Tensors = field(default_factory=dict)
    unknown: tuple[str, ...] = ()
    settings: dict[str | None, dict[str, Any]] = field(default_factory=dict)

    @property
    def modules(self) -> dict[str, int]:
        """How many modules of each network it changes; where keys do not say which network, their names tell."""
        found = {(part.network or _by_name(part.module), part.module) for part in self.tensors}
        counts = {network: len(modules) for network, modules in self.numbered.items()}
        for network, _ in found:
            counts[network] = counts.get(network, 0) + 1
        return dict(sorted(counts.items()))


def read_lora(path: str | Path, networks: Mapping[str, str]) -> LoraFile:
    """Read the names of a LoRA file or folder; no tensor is copied.

    `networks`: what the keys of a network begin with -> the network (`systems.families.lora_prefixes`).

    Raises FileError for a file that cannot be read, says something twice, holds several adapters, or needs more than
    its tensors to apply.
    """
    path = Path(path)
    settings: dict[str | None, dict[str, Any]] = {}
    config = (path if path.is_dir() else path.parent) / PEFT_CONFIG
    if config.is_file() and (path.is_dir() or path.stem == LORA_STEMS[0]):
        settings[None] = _checked(config, read_json(config))
    if path.is_dir():
        names = [f"{stem}.{kind}" for stem in LORA_STEMS for kind in ("safetensors", "bin")]
        if not (found := [path / name for name in names if (path / name).is_file()]):
            raise FileError(f"{path}: no LoRA in this folder; expected one of {', '.join(names)}")
        path = found[0]
    if is_checkpoint(path) and isinstance(pairs := read_checkpoint(path), list):
        return LoraFile(path, {}, numbered={_network_of(path): _paired(path, pairs)})
    weights = read_weights(path)
    settings |= _diffusers_settings(path, weights.metadata)
    return _sorted(weights, settings, {**networks, _LYCORIS: None})


def module_names(modules: Iterable[str]) -> dict[str, str]:
    """Every spelling that files use for the modules of a network (its names here) -> the module."""
    modules = sorted(modules)
    table = ldm_unet(*_levels(modules)) if any(name.startswith("down_blocks.") for name in modules) else None
    clip = any(name.startswith("text_model.") for name in modules)
    names: dict[str, str] = {}
    for module in modules:
        spellings = [module]
        if table is not None:
            spellings.append(table.to_theirs(module))
        elif clip:
            spellings += [module.removeprefix("text_model.")]
        else:
            spellings += [f"text_model.{module}", f"bert.{module}"]
        for spelling in spellings:
            names[spelling] = names[spelling.replace(".", "_")] = module
    return names


def numbered_modules(modules: Iterable[str]) -> list[str]:
    """The modules of a network in the order in which cloneofsimo's trainer met, and so numbered, them.

    A UNet's: blocks down, up, middle; within one the self-attention, the first linear layer (GEGLU), the
    cross-attention. A text encoder's: k, v, q, out, the order in which transformers declares them; the files themselves
    agree: 0 and 2 of each layer, like 1 and 3, have nearly equal norms, and 3 alone reads another input.
    """
    order = {name: i for i, name in enumerate(("attn1", "ff", "attn2"))}
    inner = {name: i for i, name in enumerate(("to_q", "to_k", "to_v", "to_out", "k_proj", "v_proj", "q_proj"))}
    sides = {"down_blocks": 0, "up_blocks": 1, "mid_block": 2}

    def rank(module: str) -> list[int]:
        return [
            int(word) if word.isdecimal() else sides.get(word, order.get(word, inner.get(word, 9)))
            for word in module.split(".")
        ]

    targets = r".*\.transformer_blocks\.\d+\.(attn[12]\.to_(q|k|v|out\.0)|ff\.net\.0\.proj)"
    targets += r"|.*\.self_attn\.(q|k|v|out)_proj"
    return sorted((module for module in modules if re.fullmatch(targets, module)), key=rank)


def family(modules: Iterable[str], inputs: Mapping[str, int]) -> str | None:
    """The other family that a file's modules belong to, by their names or by how many `inputs` a module has."""
    for name, pattern in _FOREIGN:
        if any(re.fullmatch(pattern, module) for module in modules):
            return name
    widths = (width for module, width in inputs.items() if re.search(r"attn2[._]to_[kv]$", module))
    return next((_CONTEXT_WIDTHS[width] for width in widths if width in _CONTEXT_WIDTHS), None)


def other_kind(key: str) -> str | None:
    """What a key belongs to that is recognised and not read."""
    return next((name for pattern, name in _OTHER_KINDS if re.search(rf"\.({pattern})", key)), None)


def _sorted(weights: Weights, settings, networks: Mapping[str, str | None]) -> LoraFile:
    path, metadata = weights.path, weights.metadata
    parts: dict[LoraKey, np.ndarray] = {}
    keys: dict[LoraKey, str] = {}
    adapters: dict[str, None] = {}
    numbered: dict[str, dict[int, dict[str, np.ndarray]]] = {}
    tokens: Tensors = {}
    unknown, prefixes = [], sorted(networks.items(), key=lambda item: -len(item[0]))
    for key, array in weights.tensors.items():
        named = weights.in_file(key)
        number = re.fullmatch(r"(\w+):(\d{1,5}):(up|down)", key)
        bundled = re.fullmatch(r"bundle_emb\.(.+)\.(string_to_param\.\*|emb_params)", key)
        if number:
            numbered.setdefault(number[1], {}).setdefault(int(number[2]), {})[number[3]] = array
        elif metadata.get(named) == "<embed>" or bundled:
            tokens[bundled[1] if bundled else key] = array
        elif (found := _part(key, prefixes)) is None:
            unknown.append(named)
        else:
            part, adapter = found
            adapters |= {adapter: None} if adapter else {}
            if part in parts and len(adapters) < 2:
                raise FileError(f"{path}: {shown(keys[part])} and {shown(named)} are two names of one thing")
            parts[part], keys[part] = array, named
    if len(adapters) > 1:
        names = ", ".join(map(shown, adapters))
        raise FileError(f"{path}: holds {len(adapters)} adapters ({names}); save one of them with peft and give that")
    for network in numbered:
        if "ResnetBlock2D" in metadata.get(network, ""):
            raise FileError(f"{path}: modules of ResnetBlock2D are numbered, which does not say where they belong")
    return LoraFile(path, parts, keys, numbered, tokens, tuple(unknown), settings)


def _part(key: str, prefixes: Sequence[tuple[str, str | None]]) -> tuple[LoraKey, str | None] | None:
    """Where a tensor belongs, and its adapter's name. `prefixes`: the longer ones first."""
    key = _unwrapped(key)
    prefix, network = next((item for item in prefixes if key.startswith(item[0])), ("", None))
    rest = _unwrapped(key.removeprefix(prefix))
    for pattern, part in _PARTS:
        if found := pattern.fullmatch(rest):
            named = found.groupdict()
            module, part = named["module"], part or named["part"]
            beside = _BESIDE.fullmatch(module)
            if beside and ".self_attn" in module:
                module = f"{beside['at']}.{beside['which']}_proj"
            elif beside:
                module = f"{beside['at']}.{_UNET_PROJECTIONS[beside['which']]}"
            return LoraKey(network, module, part), named.get("adapter")
    return None


def _by_name(module: str) -> str:
    return "text_encoder" if re.search(r"(^|[._])(text_model|self_attn|mlp)[._]", module) else "unet"


def _unwrapped(key: str) -> str:
    return key[_WRAPPERS.match(key).end() :]


def _levels(modules: Iterable[str]) -> tuple[list[bool], int]:
    """Attention per level and layers per level of a UNet's encoder."""
    names = set(modules)
    levels = len({name.split(".")[1] for name in names if name.startswith("down_blocks.")})
    layers = len({name.split(".")[3] for name in names if name.startswith("down_blocks.0.resnets.")})
    return [f"down_blocks.{i}.attentions.0.norm" in names for i in range(levels)], layers


def _network_of(path: Path) -> str:
    """cloneofsimo's trainer writes `NAME.pt` for the UNet and `NAME.text_encoder.pt` for the text encoder."""
    return "text_encoder" if "text_encoder" in path.name else "unet"


def _paired(path: Path, pairs: list[Any]) -> dict[int, dict[str, np.ndarray]]:
    if not pairs or len(pairs) % 2 or not all(isinstance(array, np.ndarray) for array in pairs):
        raise FileError(f"{path}: a list, but not of pairs of tensors (up, down) as cloneofsimo's LoRA has")
    return {i: {"up": pairs[2 * i], "down": pairs[2 * i + 1]} for i in range(len(pairs) // 2)}


def _diffusers_settings(path: Path, metadata: Mapping[str, str]) -> dict[str | None, dict[str, Any]]:
    """diffusers keeps the peft config of every network in the header: {"unet.r": 4, "unet.lora_alpha": 8, ...}."""
    if "lora_adapter_metadata" not in metadata:
        return {}
    try:
        values = json.loads(metadata["lora_adapter_metadata"])
        assert isinstance(values, dict)
    except (ValueError, AssertionError, RecursionError) as error:
        raise FileError(f"{path}: lora_adapter_metadata in its header is not a JSON object") from error
    settings: dict[str | None, dict[str, Any]] = {}
    for key, value in values.items():
        network, _, name = key.partition(".")
        settings.setdefault(network, {})[name] = value
    return {network: _checked(path, values) for network, values in settings.items()}


def _checked(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Refuses what changes the base weights or the forward pass in a way that the tensors do not tell."""
    start = settings.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(("pissa", "olora", "corda", "loftq")):
        raise FileError(f"{path}: init_lora_weights={shown(start)} changed the base weights too; convert it with peft")
    for name in ("use_qalora", "use_bdlora", "alora_invocation_tokens", "fan_in_fan_out", "layer_replication"):
        if settings.get(name):
            raise FileError(f"{path}: {name} in its config is not supported")
    if (kind := settings.get("peft_type", "LORA")) not in ("LORA", "LOHA", "LOKR", "IA3"):
        raise FileError(f"{path}: peft_type {shown(kind)}; supported are LORA, LOHA, LOKR and IA3")
    return settings
