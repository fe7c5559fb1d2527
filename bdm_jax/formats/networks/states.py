"""Texts that were read before (`models.towers.states`), as this library alone writes them: their own names."""

from collections.abc import Mapping

from bdm_jax.formats.networks.network import NetworkInFile, Shapes, recorded
from bdm_jax.formats.tables import PLAIN

KINDS = {"bdm_text_states": "text_states"}
TABLES = {"bdm_text_states": PLAIN}


def find_states(shapes: Shapes, metadata: Mapping[str, str]) -> list[NetworkInFile]:
    """The states of a file. What read them, and its vocabulary, is in config.json alone."""
    ranks = {name: len(shape) for name, shape in shapes.items()}
    if ranks not in ({"texts": 2, "states": 3}, {"texts": 2, "states": 3, "pooled": 2}):
        return []
    texts, length, width = shapes["states"]
    config = {
        "model_type": "bdm_text_states",
        "texts": texts,
        "length": length,
        "hidden_size": width,
        "vocab_size": 1,
        "projection_dim": shapes["pooled"][1] if "pooled" in shapes else None,
        **recorded(metadata, "text_states"),
    }
    return [NetworkInFile("text_states", "bdm_jax", "any system's", "", PLAIN, config)]
