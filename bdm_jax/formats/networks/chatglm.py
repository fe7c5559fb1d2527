"""ChatGLM3 as Kolors' text encoder: the names that THUDM's own code and diffusers' have."""

from collections.abc import Mapping

from bdm_jax.formats.networks.network import NetworkInFile, Shapes, count, in_our_names, recorded
from bdm_jax.formats.tables import KeyTable

# The layer that predicts words plays no part in reading them.
CHATGLM = KeyTable(
    accepted=("transformer.",),
    embeddings=r"embedding\.word_embeddings\.weight",
    ignored=(r"(transformer\.)?output_layer\.weight", r"(.*\.)?rotary_pos_emb\.inv_freq"),
)

KINDS = {"chatglm": "text_encoder"}
TABLES = {"chatglm": CHATGLM}
_HEAD = 128  # channels of a head in ChatGLM3-6B


def find_chatglm(shapes: Shapes, metadata: Mapping[str, str]) -> list[NetworkInFile]:
    """The tower of a file, if there is one."""
    if not any(f"{inner}embedding.word_embeddings.weight" in shapes for inner in ("", "transformer.")):
        return []
    ours = in_our_names(shapes, "", CHATGLM)
    vocab, width = ours["embedding.word_embeddings.weight"]
    mixed = ours["encoder.layers.0.self_attention.dense.weight"][1]
    config = {
        "model_type": "chatglm",
        "padded_vocab_size": vocab,
        "hidden_size": width,
        "ffn_hidden_size": ours["encoder.layers.0.mlp.dense_4h_to_h.weight"][1],
        "num_layers": count(ours, r"encoder\.layers\.(\d+)\.self_attention\.dense\.weight"),
        "kv_channels": _HEAD,
        **recorded(metadata, "text_encoder"),
    }
    head = config["kv_channels"]
    config["num_attention_heads"] = max(1, mixed // head)
    fused = ours["encoder.layers.0.self_attention.query_key_value.weight"][0]
    config["multi_query_group_num"] = max(1, (fused - mixed) // (2 * head))
    return [NetworkInFile("text_encoder", "transformers", "ChatGLM3", "", CHATGLM, config)]
