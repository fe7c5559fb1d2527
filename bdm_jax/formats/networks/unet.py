"""The UNet, the BDM branch and ControlNets: diffusers' names, CompVis' (LDM) and lllyasviel's."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bdm_jax.formats.networks.network import NetworkInFile, Shapes, count, in_our_names, recorded
from bdm_jax.formats.tables import PLAIN, KeyTable

# A branch has no hint network; a ControlNet file used as one may still carry it.
BRANCH = KeyTable(ignored=(r"controlnet_cond_embedding\..*",))

# A UNet of Kolors that diffusers saved with an IP-Adapter in it: the text's projection has another name then, and its
# own is the image's, which is no part of a UNet here.
WITH_IMAGE = KeyTable(
    ignored=(r"encoder_hid_proj\..*", r".*\.processor\.to_[kv]_ip\..*"),
    modules=(("encoder_hid_proj", "text_encoder_hid_proj"),),
)

KINDS = {"UNet2DConditionModel": "unet", "ControlNetModel": "controlnet", "ControlNetModelBDM": "branch"}
TABLES = {"ControlNetModelBDM": BRANCH}

_RESNET = (
    ("norm1", "in_layers.0"),
    ("conv1", "in_layers.2"),
    ("time_emb_proj", "emb_layers.1"),
    ("norm2", "out_layers.0"),
    ("conv2", "out_layers.3"),
    ("conv_shortcut", "skip_connection"),
)
_BY_TEXT_WIDTH = {768: "SD1.x", 1024: "SD2.x", 2048: "SDXL", 1280: "SDXL refiner"}
_BY_INPUTS = {9: " inpainting", 8: " instruct-pix2pix"}
_SIZE_ID = 256  # width of a size id's sinusoids in every published network
_HEAD = 64  # channels of a head in networks with linear projections (SD2.x, SDXL); SD1.x has 8 heads


def ldm_unet(transformer_layers: Sequence[int], layers: int) -> KeyTable:
    """CompVis' names of a UNet (`model.diffusion_model.` removed) whose levels have `layers` layers, each with a
    transformer where `transformer_layers` is not 0.
    """
    return KeyTable(modules=(*_ldm_encoder(transformer_layers, layers), *_ldm_decoder(transformer_layers, layers)))


def ldm_controlnet(transformer_layers: Sequence[int], layers: int, hints: int = 6) -> KeyTable:
    """lllyasviel's names of a ControlNet (`control_model.` removed) whose hint network has `hints` inner layers."""
    hint, levels = "controlnet_cond_embedding", len(transformer_layers)
    pairs = [(f"{hint}.conv_in", "input_hint_block.0"), (f"{hint}.conv_out", f"input_hint_block.{2 * hints + 2}")]
    pairs += [(f"{hint}.blocks.{i}", f"input_hint_block.{2 * i + 2}") for i in range(hints)]
    pairs += [(f"controlnet_down_blocks.{i}", f"zero_convs.{i}.0") for i in range(levels * (layers + 1))]
    encoder = _ldm_encoder(transformer_layers, layers)
    return KeyTable(modules=(*encoder, *pairs, ("controlnet_mid_block", "middle_block_out.0")))


def diffusers_unet(keys: Iterable[str]) -> KeyTable:
    """The table of a UNet in diffusers' names that has these keys."""
    return WITH_IMAGE if any("image_projection_layers." in key or "to_k_ip." in key for key in keys) else PLAIN


def find_unet(shapes: Shapes, metadata: Mapping[str, str]) -> list[NetworkInFile]:
    """The UNet of a file, if there is one."""
    for prefix in ("model.diffusion_model.", "", "unet.", "diffusion_model."):
        if f"{prefix}input_blocks.0.0.weight" in shapes and f"{prefix}out.2.weight" in shapes:
            layout, table = "ldm", ldm_unet(*_ldm_structure(shapes, prefix))
        elif (
            f"{prefix}conv_in.weight" in shapes
            and f"{prefix}up_blocks.0.resnets.0.conv1.weight" in shapes
            and f"{prefix}time_embedding.linear_1.weight" in shapes
        ):
            layout, table = "diffusers", diffusers_unet(key.removeprefix(prefix) for key in shapes)
        else:
            continue
        ours = in_our_names(shapes, prefix, table)
        config = {"_class_name": "UNet2DConditionModel", **_encoder(ours)}
        if "addition_embed_type" in config:
            config["sample_size"] = 128  # of latents at SDXL's and Kolors' 1024 pixels
        config |= recorded(metadata, "unet")
        config["out_channels"] = ours["conv_out.weight"][0]
        config["up_block_types"] = [name.replace("Down", "Up") for name in reversed(config["down_block_types"])]
        family = _family(config, "UNet") + _BY_INPUTS.get(config["in_channels"], "")
        return [NetworkInFile("unet", layout, family, prefix, table, config, _prediction(shapes, metadata))]
    return []


def find_control(shapes: Shapes, metadata: Mapping[str, str]) -> list[NetworkInFile]:
    """The ControlNet or branch of a file, if there is one."""
    for prefix in ("control_model.", ""):
        if f"{prefix}zero_convs.0.0.weight" in shapes:
            hints = count(shapes, rf"{prefix}input_hint_block\.(\d+)\.weight") - 2
            table = ldm_controlnet(*_ldm_structure(shapes, prefix), hints)
            return [_control(in_our_names(shapes, prefix, table), "original", prefix, table, metadata)]
        if f"{prefix}controlnet_mid_block.weight" in shapes:
            return [_control(in_our_names(shapes, prefix, PLAIN), "diffusers", prefix, PLAIN, metadata)]
    return []


def _control(ours: Shapes, layout: str, prefix: str, table: KeyTable, metadata: Mapping[str, str]) -> NetworkInFile:
    hint = "controlnet_cond_embedding."
    kind = "controlnet" if any(key.startswith(hint) for key in ours) else "branch"
    config = {"_class_name": "ControlNetModel", **_encoder(ours), **recorded(metadata, kind)}
    if kind == "branch":
        config |= {"bdm_branch": True, **_projections(ours)}
        return NetworkInFile(kind, layout, "BDM-SDXL" if "is_xl" in config else "BDM", prefix, table, config)
    blocks = count(ours, rf"{re.escape(hint)}blocks\.(\d+)\.weight")
    widths = [ours[f"{hint}conv_in.weight"][0]]
    widths += [ours[f"{hint}blocks.{i}.weight"][0] for i in range(1, blocks, 2)]
    config |= {
        "conditioning_embedding_out_channels": widths,
        "conditioning_channels": ours[f"{hint}conv_in.weight"][1],
    }
    return NetworkInFile(kind, layout, _family(config, "ControlNet"), prefix, table, config)


def _projections(ours: Shapes) -> dict[str, Any]:
    """What BDM-SDXL's two layers before the branch say of its texts."""
    names = ("prompt_embeds", "pooled_prompt_embeds")
    found = {f"{name}_dim": ours[key][1] for name in names if (key := f"{name}_projection.weight") in ours}
    return {"is_xl": True, **found} if found else {}


def _encoder(ours: Shapes) -> dict[str, Any]:
    """Sizes of a UNet's encoder from diffusers' names."""
    levels = count(ours, r"down_blocks\.(\d+)\.resnets\.0\.conv1\.weight")
    depths = [_depth(ours, rf"down_blocks\.{i}\.attentions\.0") for i in range(levels)]
    mid = _depth(ours, r"mid_block\.attentions\.0")
    channels = [ours[f"down_blocks.{i}.resnets.0.conv1.weight"][0] for i in range(levels)]
    texts = [shape[1] for key, shape in ours.items() if key.endswith("attn2.to_k.weight")]
    linear = len(ours.get("mid_block.attentions.0.proj_in.weight", (1,) * 4)) == 2
    config = {
        "in_channels": ours["conv_in.weight"][1],
        "block_out_channels": channels,
        "down_block_types": ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths],
        "layers_per_block": count(ours, r"down_blocks\.0\.resnets\.(\d+)\.conv1\.weight"),
        **({"cross_attention_dim": texts[0]} if texts else {}),
        "attention_head_dim": [max(1, width // _HEAD) for width in channels] if linear else 8,
    }
    if {*depths, mid} - {0, 1}:
        config["transformer_layers_per_block"] = [*(depth or 1 for depth in depths[:-1]), depths[-1] or mid]
    if linear:
        config["use_linear_projection"] = True
    if (added := ours.get("add_embedding.linear_1.weight")) is not None:
        config |= {"addition_embed_type": "text_time", "addition_time_embed_dim": _SIZE_ID}
        config["projection_class_embeddings_input_dim"] = added[1]
    if (projection := ours.get("encoder_hid_proj.weight")) is not None:
        config |= {"encoder_hid_dim_type": "text_proj", "encoder_hid_dim": projection[1]}
    return config


def _depth(ours: Shapes, transformer: str) -> int:
    return count(ours, rf"{transformer}\.transformer_blocks\.(\d+)\.norm1\.weight")


def _family(config: Mapping[str, Any], unknown: str) -> str:
    width = config.get("cross_attention_dim")
    if "addition_embed_type" in config:
        if config.get("encoder_hid_dim"):
            return "Kolors"
        return "SDXL refiner" if width == 1280 else "SDXL"
    return _BY_TEXT_WIDTH.get(width, unknown)


def _prediction(shapes: Shapes, metadata: Mapping[str, str]) -> str | None:
    """Some files carry a marker; most SD1.x files predict epsilon and say nothing."""
    if "v_pred" in shapes or metadata.get("modelspec.prediction_type") == "v":
        return "v_prediction"
    return {"epsilon": "epsilon"}.get(metadata.get("modelspec.prediction_type", ""))


def _ldm_structure(shapes: Shapes, prefix: str) -> tuple[list[int], int]:
    """Attention (1 or 0) per level and layers per level of a UNet or ControlNet in CompVis' names."""
    at = re.escape(prefix)
    blocks = count(shapes, rf"{at}input_blocks\.(\d+)\..*")
    samplers = [i for i in range(blocks) if f"{prefix}input_blocks.{i}.0.op.weight" in shapes]
    layers = samplers[0] - 1 if samplers else blocks - 1
    starts = range(1, blocks, layers + 1)
    return [int(f"{prefix}input_blocks.{i}.1.norm.weight" in shapes) for i in starts], layers


def _ldm_encoder(transformer_layers: Sequence[int], layers: int) -> list[tuple[str, str]]:
    pairs = [("conv_in", "input_blocks.0.0")]
    pairs += [(f"time_embedding.linear_{i}", f"time_embed.{2 * i - 2}") for i in (1, 2)]
    pairs += [(f"add_embedding.linear_{i}", f"label_emb.0.{2 * i - 2}") for i in (1, 2)]
    for level, has in enumerate(transformer_layers):
        for layer in range(layers):
            at = f"input_blocks.{1 + level * (layers + 1) + layer}"
            pairs += _resnet(f"down_blocks.{level}.resnets.{layer}", f"{at}.0")
            pairs += [(f"down_blocks.{level}.attentions.{layer}", f"{at}.1")] if has else []
        at = f"input_blocks.{(level + 1) * (layers + 1)}.0.op"
        pairs += [(f"down_blocks.{level}.downsamplers.0.conv", at)] if level < len(transformer_layers) - 1 else []
    pairs += _resnet("mid_block.resnets.0", "middle_block.0") + _resnet("mid_block.resnets.1", "middle_block.2")
    return [*pairs, ("mid_block.attentions.0", "middle_block.1")]


def _ldm_decoder(transformer_layers: Sequence[int], layers: int) -> list[tuple[str, str]]:
    pairs = [("conv_norm_out", "out.0"), ("conv_out", "out.2")]
    for level, has in enumerate(reversed(transformer_layers)):
        for layer in range(layers + 1):
            at = f"output_blocks.{level * (layers + 1) + layer}"
            pairs += _resnet(f"up_blocks.{level}.resnets.{layer}", f"{at}.0")
            pairs += [(f"up_blocks.{level}.attentions.{layer}", f"{at}.1")] if has else []
        at = f"output_blocks.{level * (layers + 1) + layers}.{2 if has else 1}.conv"
        pairs += [(f"up_blocks.{level}.upsamplers.0.conv", at)] if level < len(transformer_layers) - 1 else []
    return pairs


def _resnet(ours: str, theirs: str) -> list[tuple[str, str]]:
    return [(f"{ours}.{a}", f"{theirs}.{b}") for a, b in _RESNET]
