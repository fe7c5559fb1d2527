"""What a file is, from the names and shapes of its tensors: the networks it holds, their sizes, their family.

A network is named and sized as diffusers' or transformers' config.json would; what weights cannot tell (the number of
attention heads) is taken from the family it belongs to, or from `bdm_jax.*` in the file's metadata, which this library
writes. `formats.networks` knows the networks; here their finders are run and the family is decided.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from bdm_jax.formats.networks import autoencoders, bert, chatglm, clip, clip_vision, openclip, states, t2i_adapter, unet
from bdm_jax.formats.networks.network import NetworkInFile, Shapes
from bdm_jax.formats.tables import PLAIN, KeyTable, ignorable

T = TypeVar("T")

__all__ = ["Contents", "NetworkInFile", "detect", "kind_of", "table_for"]

_FINDERS = (
    unet.find_unet,
    unet.find_control,
    autoencoders.find_vae,
    autoencoders.find_taesd,
    clip.find_clip,
    openclip.find_openclip,
    bert.find_chinese,
    chatglm.find_chatglm,
    clip_vision.find_vision,
    t2i_adapter.find_adapter,
    states.find_states,
)
_NAMED = (unet, autoencoders, clip, bert, chatglm, states, clip_vision, t2i_adapter)
_KINDS: dict[str, str] = {name: kind for network in _NAMED for name, kind in network.KINDS.items()}
_TABLES: dict[str, KeyTable] = {name: table for network in _NAMED for name, table in network.TABLES.items()}


@dataclass(frozen=True)
class Contents:
    """What a file holds: networks this library reads, and by name what it recognises but does not.

    `family` is that of its denoising network, which decides for the others; of its only network otherwise.
    """

    parts: tuple[NetworkInFile, ...] = ()
    others: tuple[str, ...] = ()
    family: str = ""

    @property
    def name(self) -> str:
        """In a few words."""
        names = [f"{part.family} {part.kind} ({part.layout})" for part in self.parts] + list(self.others)
        return ", ".join(names) or "unknown"

    def of(self, part: NetworkInFile, file: Mapping[str, T]) -> dict[str, T]:
        """What of a file (anything by name) is a network's, by the name without its prefix: not what no network needs,
        nor what lies under the longer prefix of another.
        """
        others = tuple(one.prefix for one in self.parts if len(one.prefix) > len(part.prefix))
        return {
            key: value
            for key, value in part.of(file).items()
            if not ignorable(part.prefix + key) and not (part.prefix + key).startswith(others)
        }

    def left(self, keys: Iterable[str]) -> list[str]:
        """The keys of a file that no network here takes and that are not known to carry nothing for one."""
        prefixes = tuple(part.prefix for part in self.parts)
        return [key for key in keys if not key.startswith(prefixes) and not ignorable(key)]


CLONEOFSIMO = "LoRA (cloneofsimo)"
_T2I, _BARE_VAE = "T2I-Adapter", "autoencoder without quant_conv (SD3, Flux)"
_ALSO_READ = {"t2i_adapter": _T2I, "vae": _BARE_VAE}  # by kind, what a network that is read would be called below

# What is recognised by its keys and is no network of ours: (name, pattern that one key must match).
_OTHERS = (
    (
        "LoRA (kohya)",
        r"((lora|oft)_(unet|te\d?|branch(_te\d?)?)|lycoris)_.*"
        r"\.(lora_|hada_|lokr_|dora_|alpha|diff|on_input|w_norm|[ab][12]\.|b?oft_).*",
    ),
    (
        "LoRA (diffusers or peft)",
        r".*\.(lora_[AB]|lora\.(up|down)|lora_linear_layer\.(up|down)|lora_magnitude|to_\w+_lora\.(up|down)).*"
        r"|base_model\.model\..*\.(hada_|lokr_|ia3_l|oft_).*",
    ),
    ("LoRA (CompVis' names)", r"(model\.)?diffusion_model\..*\.(lora_(up|down|mid)|hada_w|lokr_w).*"),
    (CLONEOFSIMO, r"(unet|text_encoder)?:?\d+:(up|down)"),
    ("Textual Inversion (A1111)", r"string_to_param.*|emb_params"),
    ("Textual Inversion (SDXL)", r"clip_[lg]"),
    ("Textual Inversion", r"<.*>"),
    ("IP-Adapter", r"(ip_adapter|image_proj)\..*"),
    (_T2I, r"(adapter\.)?body\.\d+\.(in_conv|block1|resnets).*"),
    ("Stable Diffusion 3", r"(.*\.)?joint_blocks\.\d+\..*|transformer_blocks\.\d+\.attn\.add_q_proj\..*"),
    ("Flux", r"(.*\.)?double_blocks\.\d+\..*|single_transformer_blocks\.\d+\..*"),
    ("half of a TAESD: give the folder with both files", r"(14|19)\.weight"),
    ("motion module", r".*motion_modules\..*"),
    ("text encoder T5", r"(.*\.)?encoder\.block\.\d+\.layer\.\d+\.SelfAttention\..*"),
    (_BARE_VAE, r"(first_stage_model\.|vae\.)?decoder\.(up\.0\.block|up_blocks)\..*"),
)


def detect(shapes: Shapes, metadata: Mapping[str, str] | None = None) -> Contents:
    """The contents of a file with tensors of these names and shapes (PyTorch's order) and this metadata."""
    parts, others = [], []
    for find in _FINDERS:
        try:
            parts += find(shapes, dict(metadata or {}))
        except (LookupError, ValueError) as error:  # sizes are read from tensors that may be missing or misshaped
            others.append(f"damaged {find.__name__.removeprefix('find_')} ({error})")
    others += [name for name, pattern in _OTHERS if any(re.fullmatch(pattern, key) for key in shapes)]
    read = {_ALSO_READ.get(part.kind) for part in parts}
    others = [name for name in others if name not in read]
    return Contents(*_of_one_family(parts, metadata or {}, others))


def kind_of(values: Mapping[str, Any]) -> str | None:
    """What a network is called here, from its config.json's values; None for none of ours."""
    kind = _KINDS.get(_class_of(values))
    return "branch" if kind == "controlnet" and values.get("bdm_branch") else kind


def table_for(config: Mapping[str, Any], keys: Iterable[str] = ()) -> KeyTable:
    """The table of the network that a component's config.json describes, in the layout that the keys are in."""
    if _class_of(config) == "AutoencoderKL" and any(".attentions.0.query." in key for key in keys):
        return autoencoders.OLD_VAE
    if _class_of(config) == "UNet2DConditionModel":
        return unet.diffusers_unet(keys)
    if _class_of(config) in bert.KINDS:
        return bert.table_of(config, tuple(keys))
    return unet.BRANCH if config.get("bdm_branch") else _TABLES.get(_class_of(config), PLAIN)


def _class_of(values: Mapping[str, Any]) -> str:
    return str(values.get("_class_name") or values.get("model_type"))


def _of_one_family(
    parts: list[NetworkInFile], metadata: Mapping[str, str], others: list[str]
) -> tuple[tuple[NetworkInFile, ...], tuple[str, ...], str]:
    """The parts, with what only the family of the denoising network tells of an autoencoder beside it."""
    denoisers = [part for part in parts if "down_block_types" in part.config]
    family = next((part.family for part in (denoisers or parts)), "")
    base = next((name for name in autoencoders.FAMILIES if family.startswith(name)), None)
    settled = [
        autoencoders.of_family(part, base, metadata) if part.kind == "vae" and denoisers and base else part
        for part in parts
    ]
    return tuple(settled), tuple(others), family
