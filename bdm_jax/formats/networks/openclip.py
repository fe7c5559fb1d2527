"""OpenCLIP's text towers (ViT-H/14 of SD2.x, ViT-bigG/14 of SDXL) in its own names, as single files have them."""

import re
from collections.abc import Mapping

from bdm_jax.formats.networks import clip
from bdm_jax.formats.networks.network import NetworkInFile, Shapes, count, in_our_names
from bdm_jax.formats.tables import KeyTable

# Where a file has the tower, with the part that it is there; SDXL's refiner has no other.
_PLACES = (
    ("conditioner.embedders.1.model.", "text_encoder_2"),
    ("conditioner.embedders.0.model.", "text_encoder_2"),
    ("cond_stage_model.model.", "text_encoder"),
    ("", ""),
)
_LAYER = (
    ("layer_norm1", "ln_1"),
    ("self_attn.out_proj", "attn.out_proj"),
    ("layer_norm2", "ln_2"),
    ("mlp.fc1", "mlp.c_fc"),
    ("mlp.fc2", "mlp.c_proj"),
)


def openclip_text(layers: int) -> KeyTable:
    """OpenCLIP's names of a text tower of N layers, query, key and value in one tensor."""
    text = "text_model"
    pairs = [
        (f"{text}.embeddings.token_embedding", "token_embedding"),
        (f"{text}.embeddings.position_embedding.weight", "positional_embedding"),
        (f"{text}.final_layer_norm", "ln_final"),
        ("text_projection.weight", "text_projection"),
    ]
    splits = []
    for i in range(layers):
        ours, theirs = f"{text}.encoder.layers.{i}", f"transformer.resblocks.{i}"
        pairs += [(f"{ours}.{a}", f"{theirs}.{b}") for a, b in _LAYER]
        for leaf in ("weight", "bias"):
            names = tuple(f"{ours}.self_attn.{x}_proj.{leaf}" for x in "qkv")
            splits.append((names, f"{theirs}.attn.in_proj_{leaf}"))
    return KeyTable(
        modules=tuple(pairs),
        splits=tuple(splits),
        ignored=(r"visual\..*", "logit_scale", "logit_bias", "attn_mask"),
        embeddings=clip.CLIP_TEXT.embeddings,
        transposed=r"text_projection\.weight",
    )


def find_openclip(shapes: Shapes, metadata: Mapping[str, str]) -> list[NetworkInFile]:
    """OpenCLIP's text tower of a file, if there is one."""
    for prefix, kind in _PLACES:
        if f"{prefix}transformer.resblocks.0.attn.in_proj_weight" in shapes and f"{prefix}ln_final.weight" in shapes:
            table = openclip_text(count(shapes, rf"{re.escape(prefix)}transformer\.resblocks\.(\d+)\.ln_1\.weight"))
            config = clip.text_tower(in_our_names(shapes, prefix, table), metadata, kind)
            return [clip.network(kind, "openclip", prefix, table, config)]
    return []
