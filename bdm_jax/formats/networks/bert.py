"""The BERT encoder of Chinese-CLIP: transformers' names, the cn_clip package's."""

from collections.abc import Mapping

from bdm_jax.formats.networks.network import NetworkInFile, Shapes, count, in_our_names, recorded
from bdm_jax.formats.tables import KeyTable

# The Chinese tower alone, or as a part of a whole Chinese-CLIP; its pooler and projection play no part in BDM. The
# cn_clip package calls it bert.
CHINESE_TEXT = KeyTable(
    accepted=("text_model.", "bert."),
    embeddings=r"embeddings\.\w+_embeddings\.weight",
    ignored=(
        r"(.*\.)?position_ids",
        r"((text_model|bert)\.)?pooler\..*",
        r"(vision_model|visual_projection|text_projection|visual)(\..*)?|logit_scale",
    ),
)

KINDS = dict.fromkeys(("bert", "chinese_clip", "chinese_clip_text_model"), "branch_text_encoder")
TABLES = dict.fromkeys(KINDS, CHINESE_TEXT)


def find_chinese(shapes: Shapes, metadata: Mapping[str, str]) -> list[NetworkInFile]:
    """The tower of a file, if there is one."""
    for inner, layout in (("", "transformers"), ("text_model.", "transformers"), ("bert.", "cn_clip")):
        if f"{inner}embeddings.word_embeddings.weight" not in shapes:
            continue
        ours = in_our_names(shapes, "", CHINESE_TEXT)
        vocab, width = ours["embeddings.word_embeddings.weight"]
        config = {
            "model_type": "chinese_clip_text_model",
            "vocab_size": vocab,
            "hidden_size": width,
            "intermediate_size": ours["encoder.layer.0.intermediate.dense.weight"][0],
            "num_hidden_layers": count(ours, r"encoder\.layer\.(\d+)\.output\.dense\.weight"),
            "num_attention_heads": max(1, width // 64),
            "max_position_embeddings": ours["embeddings.position_embeddings.weight"][0],
            "type_vocab_size": ours["embeddings.token_type_embeddings.weight"][0],
            **recorded(metadata, "branch_text_encoder"),
        }
        family = {1024: "Chinese-CLIP ViT-H/14", 768: "Chinese-CLIP ViT-B or L"}.get(width, "BERT")
        return [NetworkInFile("branch_text_encoder", layout, family, "", CHINESE_TEXT, config)]
    return []
