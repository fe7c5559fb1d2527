"""CLIP's text tower: transformers' names, alone, in CompVis' (LDM) files and in Stability's of SDXL."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from bdm_jax.formats.networks.network import NetworkInFile, Shapes, count, in_our_names, recorded
from bdm_jax.formats.tables import KeyTable

# transformers 5 writes CLIP text keys without their prefix and reads both; earlier ones kept position_ids as a buffer.
# A tower with a projection has it beside that prefix.
CLIP_TEXT = KeyTable(
    prefix="text_model.",
    accepted=("",),
    outside=r"text_projection\.weight",
    ignored=(r"(.*\.)?position_ids", r"(vision_model|visual_projection)\..*|logit_scale"),
    embeddings=r"text_model\.embeddings\.\w+_embedding\.weight",
)
# The projection as OpenAI has it, a matrix (in, out).
_MATRIX = replace(
    CLIP_TEXT,
    outside=r"text_projection(\.weight)?",
    modules=(("text_projection.weight", "text_projection"),),
    transposed=r"text_projection\.weight",
)

KINDS = {"clip": "text_encoder", "clip_text_model": "text_encoder"}
TABLES = dict.fromkeys(KINDS, CLIP_TEXT)

# Where a file has the tower, with the part that it is there: Stability's and CompVis' places, those of ComfyUI and
# Forge, diffusers' folders.
_PLACES = (
    ("conditioner.embedders.0.transformer.", "text_encoder"),
    ("cond_stage_model.transformer.", "text_encoder"),
    ("cond_stage_model.clip_l.transformer.", "text_encoder"),
    ("cond_stage_model.clip_g.transformer.", "text_encoder_2"),
    ("cond_stage_model.clip_h.transformer.", "text_encoder"),
    ("text_encoders.clip_l.transformer.", "text_encoder"),
    ("text_encoders.clip_g.transformer.", "text_encoder_2"),
    ("text_encoders.clip_h.transformer.", "text_encoder"),
    ("text_encoder.", "text_encoder"),
    ("text_encoder_2.", "text_encoder_2"),
    ("", ""),
)
_OF_SD2 = ("cond_stage_model.model.", "cond_stage_model.clip_h.transformer.", "text_encoders.clip_h.transformer.")
_FAMILIES = {768: "CLIP ViT-L/14", 1024: "OpenCLIP ViT-H/14", 1280: "OpenCLIP ViT-bigG/14"}


def find_clip(shapes: Shapes, metadata: Mapping[str, str]) -> list[NetworkInFile]:
    """The text towers of a file, one for each place."""
    parts = []
    for prefix, kind in _PLACES:
        names = (f"{prefix}{inner}embeddings.token_embedding.weight" for inner in ("text_model.", ""))
        if (prefix or not parts) and any(name in shapes for name in names):
            table = _MATRIX if len(shapes.get(f"{prefix}text_projection", ())) == 2 else CLIP_TEXT
            layout = "ldm" if prefix.startswith(("cond", "text_encoders.")) else "transformers"
            config = text_tower(in_our_names(shapes, prefix, table), metadata, kind)
            if not any(part.kind == kind for part in parts):
                parts.append(network(kind, layout, prefix, table, config))
    return parts


def network(kind: str, layout: str, prefix: str, table: KeyTable, config: dict[str, Any]) -> NetworkInFile:
    """A text tower found in a file; "" stands for a kind that only its width tells."""
    width = config["hidden_size"]
    kind = kind or ("text_encoder_2" if width == 1280 else "text_encoder")
    family = ("SD2.x " if prefix in _OF_SD2 else "") + _FAMILIES.get(width, "CLIP")
    return NetworkInFile(kind, layout, family, prefix, table, config)


def text_tower(ours: Shapes, metadata: Mapping[str, str], kind: str) -> dict[str, Any]:
    """config.json of a tower by the shapes of its tensors, in transformers' names."""
    text = "text_model."
    vocab, width = ours[f"{text}embeddings.token_embedding.weight"]
    config = {
        "model_type": "clip_text_model",
        "vocab_size": vocab,
        "hidden_size": width,
        "intermediate_size": ours[f"{text}encoder.layers.0.mlp.fc1.weight"][0],
        "num_hidden_layers": count(ours, r"text_model\.encoder\.layers\.(\d+)\.layer_norm1\.weight"),
        "num_attention_heads": max(1, width // 64),
        "max_position_embeddings": ours[f"{text}embeddings.position_embedding.weight"][0],
        "hidden_act": "quick_gelu" if width == 768 else "gelu",
    }
    if width == 1280:
        config["pad_token_id"] = 0  # OpenCLIP pads with zeros
    if (projection := ours.get("text_projection.weight")) is not None:
        projected = projection[0] if projection[1] == width else projection[1]  # OpenCLIP has it the other way round
        config |= {"architectures": ["CLIPTextModelWithProjection"], "projection_dim": projected}
    for name in (kind,) if kind else ("text_encoder", "text_encoder_2"):
        config |= recorded(metadata, name)
    return config
