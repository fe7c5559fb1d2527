"""What a file is, from the names and shapes of its tensors: the networks it holds, their sizes, their family.

A network is named and sized as diffusers' or transformers' config.json would; what weights cannot tell (the number of
attention heads) is taken from the family it belongs to, or from `bdm_jax.*` in the file's metadata, which this library
writes.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from bdm_jax.formats.tables import (
    CHINESE_TEXT,
    CLIP_TEXT,
    CLIP_VISION,
    OLD_VAE,
    PLAIN,
    TAESD,
    KeyTable,
    ldm_controlnet,
    ldm_unet,
    ldm_vae,
    original_t2i_adapter,
)

T = TypeVar("T")
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class NetworkInFile:
    """One network in a file.

    Attributes:
      kind: unet, vae, text_encoder, branch, controlnet, branch_text_encoder, t2i_adapter, image_encoder.
      layout: whose names it has: diffusers, ldm, original, transformers, cn_clip.
      family: SD1.x, SD1.x inpainting, SD2.x, SDXL, ...
      prefix: what its keys begin with in the file; `keys` of the file without it are what `table` renames.
      table: the file's names and ours.
      config: the values of its config.json.
      prediction: epsilon or v_prediction where it can be known, else None.
    """

    kind: str
    layout: str
    family: str
    prefix: str
    table: KeyTable
    config: dict[str, Any]
    prediction: str | None = None

    def of(self, file: Mapping[str, T]) -> dict[str, T]:
        """What of a file (tensors or shapes by name) is this network's, by the name without its prefix."""
        return _below(self.prefix, file)


@dataclass(frozen=True)
class Contents:
    """What a file holds: networks this library reads, and by name what it recognises but does not."""

    parts: tuple[NetworkInFile, ...] = ()
    others: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """In a few words."""
        names = [f"{part.family} {part.kind} ({part.layout})" for part in self.parts] + list(self.others)
        return ", ".join(names) or "unknown"


_T2I = "T2I-Adapter"

# What is recognised by its keys and is no network of ours: (name, pattern that one key must match).
_OTHERS = (
    (
        "LoRA (kohya)",
        r"(lora_(unet|te\d?|branch(_te)?)|lycoris)_.*\.(lora_|hada_|lokr_|dora_|alpha|diff|on_input|w_norm).*",
    ),
    (
        "LoRA (diffusers or peft)",
        r".*\.(lora_[AB]|lora\.(up|down)|lora_linear_layer\.(up|down)|lora_magnitude).*"
        r"|base_model\.model\..*\.(hada_|lokr_|ia3_l).*",
    ),
    ("LoRA (cloneofsimo)", r"(unet|text_encoder)?:?\d+:(up|down)|.*_lora\.(up|down)\.weight"),
    ("Textual Inversion (A1111)", r"string_to_param.*|emb_params"),
    ("Textual Inversion (SDXL)", r"clip_[lg]"),
    ("Textual Inversion", r"<.*>"),
    ("IP-Adapter", r"(ip_adapter|image_proj)\..*"),
    (_T2I, r"(adapter\.)?body\.\d+\.(in_conv|block1|resnets).*"),
    ("Stable Diffusion 3", r"(.*\.)?joint_blocks\.\d+\..*|transformer_blocks\.\d+\.attn\.add_q_proj\..*"),
    ("Flux", r"(.*\.)?double_blocks\.\d+\..*|single_transformer_blocks\.\d+\..*"),
    ("half of a TAESD: give the folder with both files", r"(14|19)\.weight"),
    ("motion module", r".*motion_modules\..*"),
)


def detect(shapes: Shapes, metadata: Mapping[str, str] | None = None) -> Contents:
    """The contents of a file with tensors of these names and shapes (PyTorch's order) and this metadata."""
    parts, others = [], []
    for find in _FINDERS:
        try:
            parts += find(shapes, dict(metadata or {}))
        except (LookupError, ValueError) as error:  # sizes are read from tensors that may be missing or misshaped
            others.append(f"damaged {find.__name__.removeprefix('_find_')} ({error})")
    others += [name for name, pattern in _OTHERS if any(re.fullmatch(pattern, key) for key in shapes)]
    if any(part.kind == "t2i_adapter" for part in parts):
        others.remove(_T2I)  # it is read
    return Contents(tuple(parts), tuple(others))


# ---------------------------------------------------------------------------------------------------------- finders


def _find_unet(shapes: Shapes, metadata: dict[str, str]) -> list[NetworkInFile]:
    for prefix in ("model.diffusion_model.", "", "unet.", "model_ema.diffusion_model."):
        if f"{prefix}input_blocks.0.0.weight" in shapes and f"{prefix}out.2.weight" in shapes:
            table = ldm_unet(*_ldm_structure(shapes, prefix))
            return [_unet_part(_ours(shapes, prefix, table), "ldm", prefix, table, shapes, metadata)]
        if f"{prefix}conv_in.weight" in shapes and f"{prefix}up_blocks.0.resnets.0.conv1.weight" in shapes:
            if f"{prefix}time_embedding.linear_1.weight" in shapes:
                return [_unet_part(_ours(shapes, prefix, PLAIN), "diffusers", prefix, PLAIN, shapes, metadata)]
    return []


def _unet_part(ours: Shapes, layout: str, prefix: str, table: KeyTable, shapes: Shapes, metadata) -> NetworkInFile:
    config = {"_class_name": "UNet2DConditionModel", **_encoder_config(ours), **_noted(metadata, "unet")}
    config["out_channels"] = ours["conv_out.weight"][0]
    config["up_block_types"] = [name.replace("Down", "Up") for name in reversed(config["down_block_types"])]
    width, inputs = config.get("cross_attention_dim"), config["in_channels"]
    family = {768: "SD1.x", 1024: "SD2.x", 2048: "SDXL", 1280: "SDXL refiner"}.get(width, "UNet")
    if "add_embedding.linear_1.weight" in ours or f"{prefix}label_emb.0.0.weight" in shapes:
        family = "SDXL refiner" if width == 1280 else "SDXL"
    family += {9: " inpainting", 8: " instruct-pix2pix"}.get(inputs, "")
    return NetworkInFile("unet", layout, family, prefix, table, config, _prediction(shapes, metadata))


def _find_control(shapes: Shapes, metadata: dict[str, str]) -> list[NetworkInFile]:
    for prefix in ("control_model.", ""):
        if f"{prefix}zero_convs.0.0.weight" in shapes:
            attention, layers = _ldm_structure(shapes, prefix)
            hints = _count(shapes, rf"{prefix}input_hint_block\.(\d+)\.weight") - 2
            table = ldm_controlnet(attention, layers, hints)
            return [_control_part(_ours(shapes, prefix, table), "original", prefix, table, metadata)]
        if f"{prefix}controlnet_mid_block.weight" in shapes:
            return [_control_part(_ours(shapes, prefix, PLAIN), "diffusers", prefix, PLAIN, metadata)]
    return []


def _control_part(ours: Shapes, layout: str, prefix: str, table: KeyTable, metadata: dict[str, str]) -> NetworkInFile:
    hint = "controlnet_cond_embedding."
    kind = "controlnet" if any(key.startswith(hint) for key in ours) else "branch"
    config = {"_class_name": "ControlNetModel", **_encoder_config(ours), **_noted(metadata, kind)}
    if kind == "branch":
        return NetworkInFile(kind, layout, "BDM", prefix, table, {**config, "bdm_branch": True})
    blocks = _count(ours, rf"{re.escape(hint)}blocks\.(\d+)\.weight")
    widths = [ours[f"{hint}conv_in.weight"][0]]
    widths += [ours[f"{hint}blocks.{i}.weight"][0] for i in range(1, blocks, 2)]
    config |= {
        "conditioning_embedding_out_channels": widths,
        "conditioning_channels": ours[f"{hint}conv_in.weight"][1],
    }
    family = {768: "SD1.x", 1024: "SD2.x", 2048: "SDXL"}.get(config.get("cross_attention_dim"), "ControlNet")
    return NetworkInFile(kind, layout, family, prefix, table, config)


def _find_vae(shapes: Shapes, metadata: dict[str, str]) -> list[NetworkInFile]:
    for prefix in ("first_stage_model.", "", "vae."):
        if f"{prefix}decoder.up.0.block.0.conv1.weight" in shapes and f"{prefix}quant_conv.weight" in shapes:
            levels = _count(shapes, rf"{re.escape(prefix)}encoder\.down\.(\d+)\.block\.0\.conv1\.weight")
            layers = _count(shapes, rf"{re.escape(prefix)}encoder\.down\.0\.block\.(\d+)\.conv1\.weight")
            table = ldm_vae(levels, layers)
            return [_vae_part(_ours(shapes, prefix, table), "ldm", prefix, table, metadata)]
        if f"{prefix}decoder.up_blocks.0.resnets.0.conv1.weight" in shapes and f"{prefix}quant_conv.weight" in shapes:
            old = f"{prefix}decoder.mid_block.attentions.0.query.weight" in shapes
            table = OLD_VAE if old else PLAIN
            layout = "diffusers before 0.15" if old else "diffusers"
            return [_vae_part(_ours(shapes, prefix, table), layout, prefix, table, metadata)]
    return []


def _vae_part(ours: Shapes, layout: str, prefix: str, table: KeyTable, metadata: dict[str, str]) -> NetworkInFile:
    levels = _count(ours, r"encoder\.down_blocks\.(\d+)\.resnets\.0\.conv1\.weight")
    config = {
        "_class_name": "AutoencoderKL",
        "in_channels": ours["encoder.conv_in.weight"][1],
        "out_channels": ours["decoder.conv_out.weight"][0],
        "block_out_channels": [ours[f"encoder.down_blocks.{i}.resnets.0.conv1.weight"][0] for i in range(levels)],
        "layers_per_block": _count(ours, r"encoder\.down_blocks\.0\.resnets\.(\d+)\.conv1\.weight"),
        "latent_channels": ours["quant_conv.weight"][0] // 2,
        **_noted(metadata, "vae"),
    }
    family = "SD1.x or SD2.x" if config["latent_channels"] == 4 else f"{config['latent_channels']}-channel"
    return NetworkInFile("vae", layout, family, prefix, table, config)


def _find_taesd(shapes: Shapes, metadata: dict[str, str]) -> list[NetworkInFile]:
    if "encoder.layers.0.weight" in shapes and "decoder.layers.0.weight" in shapes:
        return [_taesd_part("diffusers", PLAIN, shapes)]
    if "taesd_encoder.0.weight" in shapes and "taesd_decoder.1.weight" in shapes:
        return [_taesd_part("original", TAESD, shapes)]
    return []


def _taesd_part(layout: str, table: KeyTable, shapes: Shapes) -> NetworkInFile:
    channels = _ours(shapes, "", table)["decoder.layers.0.weight"][1]
    config = {"_class_name": "AutoencoderTiny", "latent_channels": channels}
    return NetworkInFile("vae", layout, "TAESD", "", table, config)


def _find_clip(shapes: Shapes, metadata: dict[str, str]) -> list[NetworkInFile]:
    for prefix in ("cond_stage_model.transformer.", "text_encoder.", ""):
        for inner in ("text_model.", ""):
            if f"{prefix}{inner}embeddings.token_embedding.weight" in shapes:
                ours = _ours(shapes, prefix, CLIP_TEXT)
                layout = "ldm" if prefix.startswith("cond") else "transformers"
                return [_clip_part(ours, layout, prefix, metadata)]
    return []


def _clip_part(ours: Shapes, layout: str, prefix: str, metadata: dict[str, str]) -> NetworkInFile:
    text = "text_model."
    vocab, width = ours[f"{text}embeddings.token_embedding.weight"]
    config = {
        "model_type": "clip_text_model",
        "vocab_size": vocab,
        "hidden_size": width,
        "intermediate_size": ours[f"{text}encoder.layers.0.mlp.fc1.weight"][0],
        "num_hidden_layers": _count(ours, r"text_model\.encoder\.layers\.(\d+)\.layer_norm1\.weight"),
        "num_attention_heads": max(1, width // 64),
        "max_position_embeddings": ours[f"{text}embeddings.position_embedding.weight"][0],
        "hidden_act": "quick_gelu" if width == 768 else "gelu",
        **_noted(metadata, "text_encoder"),
    }
    family = {768: "CLIP ViT-L/14", 1024: "OpenCLIP ViT-H/14", 1280: "OpenCLIP ViT-bigG/14"}.get(width, "CLIP")
    return NetworkInFile("text_encoder", layout, family, prefix, CLIP_TEXT, config)


def _find_chinese(shapes: Shapes, metadata: dict[str, str]) -> list[NetworkInFile]:
    for inner, layout in (("", "transformers"), ("text_model.", "transformers"), ("bert.", "cn_clip")):
        if f"{inner}embeddings.word_embeddings.weight" not in shapes:
            continue
        ours = _ours(shapes, "", CHINESE_TEXT)
        vocab, width = ours["embeddings.word_embeddings.weight"]
        config = {
            "model_type": "chinese_clip_text_model",
            "vocab_size": vocab,
            "hidden_size": width,
            "intermediate_size": ours["encoder.layer.0.intermediate.dense.weight"][0],
            "num_hidden_layers": _count(ours, r"encoder\.layer\.(\d+)\.output\.dense\.weight"),
            "num_attention_heads": max(1, width // 64),
            "max_position_embeddings": ours["embeddings.position_embeddings.weight"][0],
            "type_vocab_size": ours["embeddings.token_type_embeddings.weight"][0],
            **_noted(metadata, "branch_text_encoder"),
        }
        family = {1024: "Chinese-CLIP ViT-H/14", 768: "Chinese-CLIP ViT-B or L"}.get(width, "BERT")
        return [NetworkInFile("branch_text_encoder", layout, family, "", CHINESE_TEXT, config)]
    return []


def _find_vision(shapes: Shapes, metadata: dict[str, str]) -> list[NetworkInFile]:
    patches = "vision_model.embeddings.patch_embedding.weight"
    if patches not in shapes or any(re.search(r"(token|word)_embeddings?\.weight$", key) for key in shapes):
        return []  # a whole CLIP is read for its text tower
    width, _, patch, _ = shapes[patches]
    positions = shapes["vision_model.embeddings.position_embedding.weight"][0] - 1
    config = {
        "model_type": "clip_vision_model",
        "hidden_size": width,
        "intermediate_size": shapes["vision_model.encoder.layers.0.mlp.fc1.weight"][0],
        "num_hidden_layers": _count(shapes, r"vision_model\.encoder\.layers\.(\d+)\.layer_norm1\.weight"),
        "num_attention_heads": 16 if width > 1024 else max(1, width // 64),
        "image_size": math.isqrt(positions) * patch,
        "patch_size": patch,
        "projection_dim": shapes["visual_projection.weight"][0],
        "hidden_act": "quick_gelu" if width in (768, 1024) else "gelu",
        **_noted(metadata, "image_encoder"),
    }
    families = {768: "CLIP ViT-B", 1024: "CLIP ViT-L", 1280: "OpenCLIP ViT-H", 1664: "OpenCLIP ViT-bigG"}
    return [NetworkInFile("image_encoder", "transformers", families.get(width, "CLIP"), "", CLIP_VISION, config)]


def _find_adapter(shapes: Shapes, metadata: dict[str, str]) -> list[NetworkInFile]:
    """T2I-Adapters. Pixels to a latent, 8 for SD1.x, cannot be told from channels; SDXL's have 16, and 768 inputs."""
    if "adapter.body.0.resnets.0.block1.weight" in shapes:
        table, layout = PLAIN, "diffusers"
    elif "body.0.body.0.block1.weight" in shapes:
        levels, layers = (_count(shapes, pattern) for pattern in (r"body\.(\d+)\..*", r"body\.0\.body\.(\d+)\..*"))
        table, layout = original_t2i_adapter(levels, layers, light=True), "original"
    elif "body.0.block1.weight" in shapes:
        blocks = _count(shapes, r"body\.(\d+)\..*")
        wider = [i for i in range(blocks) if f"body.{i}.in_conv.weight" in shapes]
        layers = wider[0] if wider else 2
        table, layout = original_t2i_adapter(blocks // layers, layers), "original"
    else:
        return []
    ours, body = _ours(shapes, "", table), "adapter.body"
    light = f"{body}.0.out_conv.weight" in ours
    levels = _count(ours, r"adapter\.body\.(\d+)\..*") - light
    inputs = ours[f"{body}.0.in_conv.weight" if light else "adapter.conv_in.weight"][1]
    noted = _noted(metadata, "t2i_adapter")
    factor = noted.get("downscale_factor", 16 if inputs == 768 else 8)
    last = "out_conv" if light else "resnets.0.block1"
    config = {
        "_class_name": "T2IAdapter",
        "adapter_type": "light_adapter" if light else "full_adapter_xl" if inputs == 768 else "full_adapter",
        "channels": [ours[f"{body}.{i}.{last}.weight"][0] for i in range(levels)],
        "num_res_blocks": _count(ours, r"adapter\.body\.0\.resnets\.(\d+)\..*"),
        "downscale_factor": factor,
        "in_channels": inputs // factor**2,
        **noted,
    }
    family = "SDXL" if inputs == 768 else "SD1.x"
    return [NetworkInFile("t2i_adapter", layout, family, "", table, config)]


_FINDERS: tuple[Callable[[Shapes, dict[str, str]], list[NetworkInFile]], ...] = (
    _find_unet,
    _find_control,
    _find_vae,
    _find_taesd,
    _find_clip,
    _find_chinese,
    _find_vision,
    _find_adapter,
)


# ----------------------------------------------------------------------------------------------------------- sizes


def _encoder_config(ours: Shapes) -> dict[str, Any]:
    """Sizes of a UNet's encoder from diffusers' names."""
    levels = _count(ours, r"down_blocks\.(\d+)\.resnets\.0\.conv1\.weight")
    attention = [f"down_blocks.{i}.attentions.0.norm.weight" in ours for i in range(levels)]
    widths = [shape[1] for key, shape in ours.items() if key.endswith("attn2.to_k.weight")]
    depth = _count(ours, r"mid_block\.attentions\.0\.transformer_blocks\.(\d+)\.norm1\.weight")
    linear = len(ours.get("mid_block.attentions.0.proj_in.weight", (1,) * 4)) == 2
    return {
        "in_channels": ours["conv_in.weight"][1],
        "block_out_channels": [ours[f"down_blocks.{i}.resnets.0.conv1.weight"][0] for i in range(levels)],
        "down_block_types": ["CrossAttnDownBlock2D" if has else "DownBlock2D" for has in attention],
        "layers_per_block": _count(ours, r"down_blocks\.0\.resnets\.(\d+)\.conv1\.weight"),
        **({"cross_attention_dim": widths[0]} if widths else {}),
        **({"transformer_layers_per_block": depth} if depth > 1 else {}),
        **({"use_linear_projection": True} if linear else {}),
        "attention_head_dim": 8,
    }


def _ldm_structure(shapes: Shapes, prefix: str) -> tuple[list[bool], int]:
    """Attention per level and layers per level of a UNet or ControlNet in CompVis' names."""
    at = re.escape(prefix)
    blocks = _count(shapes, rf"{at}input_blocks\.(\d+)\..*")
    samplers = [i for i in range(blocks) if f"{prefix}input_blocks.{i}.0.op.weight" in shapes]
    layers = samplers[0] - 1 if samplers else blocks - 1
    starts = range(1, blocks, layers + 1)
    return [f"{prefix}input_blocks.{i}.1.norm.weight" in shapes for i in starts], layers


def _below(prefix: str, file: Mapping[str, T]) -> dict[str, T]:
    return {key.removeprefix(prefix): value for key, value in file.items() if key.startswith(prefix)}


def _ours(shapes: Shapes, prefix: str, table: KeyTable) -> dict[str, tuple[int, ...]]:
    found = ((table.here(key), shape) for key, shape in _below(prefix, shapes).items())
    return {key: shape for key, shape in found if key is not None}


def _count(shapes: Shapes, pattern: str) -> int:
    """How many numbers fit the pattern's group."""
    compiled = re.compile(pattern)
    return len({found[1] for key in shapes if (found := compiled.fullmatch(key))})


def _noted(metadata: Mapping[str, str], kind: str) -> dict[str, Any]:
    """The config.json that this library keeps in the metadata of a file it wrote."""
    try:
        values = json.loads(metadata.get(f"bdm_jax.{kind}", "{}"))
    except (ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _prediction(shapes: Shapes, metadata: Mapping[str, str]) -> str | None:
    """Some files carry a marker; most SD1.x files predict epsilon and say nothing."""
    if "v_pred" in shapes or metadata.get("modelspec.prediction_type") == "v":
        return "v_prediction"
    return {"epsilon": "epsilon"}.get(metadata.get("modelspec.prediction_type", ""))
