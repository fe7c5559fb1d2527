"""CLIP's vision tower with its projection: transformers' names."""

import math
import re
from collections.abc import Mapping

from bdm_jax.formats.networks.network import NetworkInFile, Shapes, count, recorded
from bdm_jax.formats.tables import KeyTable

CLIP_VISION = KeyTable(
    ignored=(r"(.*\.)?position_ids", r"(text_model|text_projection)(\..*)?|logit_scale"),
    embeddings=r"vision_model\.embeddings\.position_embedding\.weight",
)

_IS_TEXT = re.compile(r"(text_model\.)?embeddings\.(token|word)_embeddings?\.weight").fullmatch

KINDS = {"clip_vision_model": "image_encoder"}
TABLES = {"clip_vision_model": CLIP_VISION}


def find_vision(shapes: Shapes, metadata: Mapping[str, str]) -> list[NetworkInFile]:
    """The tower of a file, if there is one."""
    patches = "vision_model.embeddings.patch_embedding.weight"
    if patches not in shapes or ("visual_projection.weight" not in shapes and any(map(_IS_TEXT, shapes))):
        return []
    width, _, patch, _ = shapes[patches]
    positions = shapes["vision_model.embeddings.position_embedding.weight"][0] - 1
    config = {
        "model_type": "clip_vision_model",
        "hidden_size": width,
        "intermediate_size": shapes["vision_model.encoder.layers.0.mlp.fc1.weight"][0],
        "num_hidden_layers": count(shapes, r"vision_model\.encoder\.layers\.(\d+)\.layer_norm1\.weight"),
        "num_attention_heads": 16 if width > 1024 else max(1, width // 64),
        "image_size": math.isqrt(positions) * patch,
        "patch_size": patch,
        "projection_dim": shapes["visual_projection.weight"][0],
        "hidden_act": "quick_gelu" if width in (768, 1024) else "gelu",
        **recorded(metadata, "image_encoder"),
    }
    families = {768: "CLIP ViT-B", 1024: "CLIP ViT-L", 1280: "OpenCLIP ViT-H", 1664: "OpenCLIP ViT-bigG"}
    return [NetworkInFile("image_encoder", "transformers", families.get(width, "CLIP"), "", CLIP_VISION, config)]
