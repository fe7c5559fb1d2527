"""The BERT encoder of Chinese-CLIP: transformers' names, the cn_clip package's."""

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from bdm_jax.formats.networks.network import NetworkInFile, Shapes, count, in_our_names, recorded
from bdm_jax.formats.tables import KeyTable

# The Chinese tower alone, or as a part of a whole Chinese-CLIP, whose projection plays no part in SD1.5's BDM; nor has
# its pooler one anywhere. The cn_clip package calls it bert.
CHINESE_TEXT = KeyTable(
    accepted=("text_model.", "bert."),
    embeddings=r"embeddings\.\w+_embeddings\.weight",
    ignored=(
        r"(.*\.)?position_ids",
        r"((text_model|bert)\.)?pooler\..*",
        r"(vision_model|visual_projection|text_projection|visual)(\..*)?|logit_scale",
    ),
)

# The tower with the projection of its pooled text into CLIP's joint space; as cn_clip has it, a matrix (in, out).
PROJECTED_TEXT = replace(
    CHINESE_TEXT,
    outside=r"text_projection\.weight",
    ignored=(*CHINESE_TEXT.ignored[:-1], r"(vision_model|visual_projection|visual)(\..*)?|logit_scale"),
)
_MATRIX = replace(
    PROJECTED_TEXT,
    outside=r"text_projection(\.weight)?",
    modules=(("text_projection.weight", "text_projection"),),
    transposed=r"text_projection\.weight",
)

_WHOLE, _TOWER = "chinese_clip", "chinese_clip_text_model"
KINDS = dict.fromkeys(("bert", _WHOLE, _TOWER), "branch_text_encoder")
TABLES = dict.fromkeys(KINDS, CHINESE_TEXT)


def table_of(values: Mapping[str, Any], keys: Collection[str]) -> KeyTable:
    """The table of a tower in a file with these keys, by its config.json's values."""
    if values.get("model_type") == _WHOLE or values.get("projection_dim") is None:
        return CHINESE_TEXT
    return _MATRIX if "text_projection" in keys else PROJECTED_TEXT


def projected(values: Mapping[str, Any], wanted: bool, shapes: Shapes | None = None) -> dict[str, Any]:
    """config.json's values of a tower, or of a whole CLIP, as a tower with its projection, where it has one, or without
    it; those of other networks as they are. shapes: of its file's tensors, where they are known.
    """
    if values.get("model_type") not in KINDS:
        return {**values}
    whole = values["model_type"] == _WHOLE and isinstance(values.get("text_config"), dict)
    if not wanted:
        return {key: value for key, value in values.items() if whole or key != "projection_dim"}
    if whole:
        values = {**values["text_config"], "model_type": _TOWER, "projection_dim": values.get("projection_dim")}
    width = _projected_to(shapes or {})
    return {**values, **({} if width is None else {"projection_dim": width})}


def find_chinese(shapes: Shapes, metadata: Mapping[str, str]) -> list[NetworkInFile]:
    """The tower of a file, if there is one."""
    for inner, layout in (("", "transformers"), ("text_model.", "transformers"), ("bert.", "cn_clip")):
        if f"{inner}embeddings.word_embeddings.weight" not in shapes:
            continue
        ours = in_our_names(shapes, "", CHINESE_TEXT)
        vocab, width = ours["embeddings.word_embeddings.weight"]
        config = {
            "model_type": _TOWER,
            "vocab_size": vocab,
            "hidden_size": width,
            "intermediate_size": ours["encoder.layer.0.intermediate.dense.weight"][0],
            "num_hidden_layers": count(ours, r"encoder\.layer\.(\d+)\.output\.dense\.weight"),
            "num_attention_heads": max(1, width // 64),
            "max_position_embeddings": ours["embeddings.position_embeddings.weight"][0],
            "type_vocab_size": ours["embeddings.token_type_embeddings.weight"][0],
            **recorded(metadata, "branch_text_encoder"),
        }
        if not any(key.startswith(("vision_model.", "visual")) for key in shapes):  # else a whole Chinese-CLIP
            config = projected(config, True, shapes)
        family = {1024: "Chinese-CLIP ViT-H/14", 768: "Chinese-CLIP ViT-B or L"}.get(width, "BERT")
        return [NetworkInFile("branch_text_encoder", layout, family, "", table_of(config, shapes), config)]
    return []


def _projected_to(shapes: Shapes) -> int | None:
    """The width of a file's joint space; None where it has no projection."""
    for key, axis in (("text_projection.weight", 0), ("text_projection", 1)):
        if len(shapes.get(key, ())) == 2:
            return shapes[key][axis]
    return None
