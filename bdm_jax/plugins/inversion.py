"""Textual Inversion (Gal et al. 2022, arXiv 2208.01618): new words as trained vectors of a text tower's own table.

An embedding is a token and its vectors. Adding it gives a new tokenizer, which reads the token in a prompt as one id
per vector, and a new tower, with these vectors at the end of its table; windows and weights treat each as a token.
The old ones stay as they are: to unload is to use them again. A tower of another vocabulary size is compiled anew.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from bdm_jax.errors import UserError
from bdm_jax.formats.embeddings import read_embeddings
from bdm_jax.formats.files import shown
from bdm_jax.models.config import CLIPTextConfig, RobertaConfig
from bdm_jax.systems.components import Component
from bdm_jax.text.tokenizer import Tokenizer
from bdm_jax.text.windows import MAX_WINDOWS

TABLES = {
    CLIPTextConfig: "text_model.embeddings.token_embedding.embedding",
    RobertaConfig: "embeddings.word_embeddings.embedding",
}
_FAMILIES = {768: "SD1.x", 1024: "SD2.x or Chinese-CLIP ViT-H", 1280: "SDXL's second tower"}


class Embedding(NamedTuple):
    """A token and what it stands for: vectors (N, D) float32."""

    token: str
    vectors: np.ndarray


def load_embeddings(path: str | Path, token: str | None = None) -> list[Embedding]:
    """The embeddings of a file: one, but for files of several tokens. See `formats.embeddings` for what is read.

    `token` replaces the file's own name for its embedding; a file without any gives its stem. Raises UserError for an
    SDXL embedding, which is for two towers, and for one name for several embeddings; FileError for what no reader
    takes.
    """
    path = Path(path)
    found = read_embeddings(path)
    if token is not None and len(found) > 1:
        names = ", ".join(shown(inversion.name) for inversion in found)
        raise UserError(f"{path}: has {len(found)} embeddings ({names}), which keep their names; give no token")
    if any("clip_g" in inversion.vectors for inversion in found):
        raise UserError(f"{path}: an SDXL embedding, for two text towers; this library has those of SD1.x")
    named = [(inversion.name if token is None else token, *inversion.vectors.values()) for inversion in found]
    return [Embedding(path.stem if name is None else name, vectors) for name, vectors in named]


def add_embeddings(
    tokenizer: Tokenizer, component: Component, embeddings: Sequence[Embedding]
) -> tuple[Tokenizer, Component]:
    """A tokenizer that knows the tokens and a text tower (English or Chinese) that knows their vectors.

    Which tower, its width tells; but an SD2.x embedding is as wide as Chinese-CLIP ViT-H, and nothing in the file says
    which it is. Raises UserError, naming the token, for vectors of another width, empty or not finite, for more of them
    than a prompt holds, for two embeddings of one token, and for what `Tokenizer.with_tokens` refuses.
    """
    if not embeddings:
        return tokenizer, component
    config, params = component
    if type(config) not in TABLES:
        raise UserError(f"embeddings are for text towers, not for a {type(config).__name__}")
    path, most = TABLES[type(config)], MAX_WINDOWS * (tokenizer.length - 2)
    table, rows, tokens = params[path], [], {}
    size = config.vocab_size
    for token, vectors in embeddings:
        rows.append(_rows(token, vectors, table.shape[1], most, table.dtype))
        if token.casefold() in map(str.casefold, tokens):
            raise UserError(f"token {shown(token)}: two embeddings have this name; give one of them another")
        tokens[token] = range(size, size + len(vectors))
        size += len(vectors)
    extended = jnp.concatenate([table, *map(jnp.asarray, rows)])
    larger = Component(replace(config, vocab_size=size), {**params, path: extended})
    return tokenizer.with_tokens(tokens), larger


def _rows(token: str, vectors: np.ndarray, width: int, most: int, dtype: np.dtype) -> np.ndarray:
    """Vectors as rows of a table."""
    name = f"token {shown(token)}"
    if vectors.ndim != 2 or not len(vectors):
        raise UserError(f"{name}: vectors of shape {vectors.shape}; expected (N, {width})")
    if vectors.shape[1] != width:
        family = f" ({_FAMILIES[vectors.shape[1]]})" if vectors.shape[1] in _FAMILIES else ""
        raise UserError(f"{name}: vectors of width {vectors.shape[1]}{family} for a text tower of width {width}")
    if len(vectors) > most:
        raise UserError(f"{name}: {len(vectors)} vectors, but a prompt holds {most} tokens")
    with np.errstate(over="ignore"):
        rows = vectors.astype(dtype)
    if not np.isfinite(rows.astype(np.float32)).all():
        raise UserError(f"{name}: values that are not finite in {np.dtype(dtype).name}")
    return rows
