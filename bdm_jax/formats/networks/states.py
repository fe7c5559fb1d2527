"""Texts that were read before (`models.towers.states`), as this library alone writes them: their own names."""

from bdm_jax.formats.tables import PLAIN

KINDS = {"bdm_text_states": "text_states"}
TABLES = {"bdm_text_states": PLAIN}
