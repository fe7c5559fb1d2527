"""Textual Inversion (Gal et al. 2022, arXiv 2208.01618): new words as trained vectors of a text encoder's own table.

An embedding is a token and its vectors. Adding it gives a new tokenizer, which reads the token in a prompt as one id
per vector, and a new text encoder, with these vectors at the end of its table; windows and weights treat each as a
token. The old ones stay as they are: to unload is to use them again. A text encoder of another vocabulary size is
recompiled.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from bdm_jax.errors import UserError
from bdm_jax.formats.embeddings import read_embeddings
from bdm_jax.formats.files import shown
from bdm_jax.models.functional import Params
from bdm_jax.systems import families
from bdm_jax.systems.components import Component
from bdm_jax.text.tokenizer import Tokenizer

_FAMILIES = {768: "SD1.x", 1024: "SD2.x or Chinese-CLIP ViT-H", 1280: "SDXL's second text encoder"}


class Embedding(NamedTuple):
    """A token and what it stands for: vectors (N, D) float32, or such vectors by text encoder (SDXL's files)."""

    token: str
    vectors: np.ndarray | Mapping[str, np.ndarray]


def load_embeddings(path: str | Path, token: str | None = None) -> list[Embedding]:
    """The embeddings of a file: one, but for files of several tokens. See `formats.embeddings` for what is read.

    `token` replaces the file's own name for its embedding; a file without any gives its stem. Raises UserError for one
    name for several embeddings; FileError for what no reader accepts.
    """
    path, parts = Path(path), families.embedding_names()
    found = read_embeddings(path, tuple(parts))
    if token is not None and len(found) > 1:
        names = ", ".join(shown(inversion.name) for inversion in found)
        raise UserError(f"{path}: has {len(found)} embeddings ({names}), which keep their names; give no token")
    embeddings = []
    for inversion in found:
        name = inversion.name if token is None else token
        vectors = {parts.get(key, key): rows for key, rows in inversion.vectors.items()}
        single = next(iter(vectors.values())) if len(vectors) == 1 else vectors
        embeddings.append(Embedding(path.stem if name is None else name, single))
    return embeddings


def for_encoders(embeddings: Sequence[Embedding], encoders: Mapping[str, int]) -> dict[str, list[Embedding]]:
    """The embeddings of each of a text's encoders, whose widths are given by name.

    What a file says of one encoder only goes to the one of that width. Raises UserError, naming the token, for an
    embedding that not every encoder has, and for one of other encoders than these.
    """
    found: dict[str, list[Embedding]] = {name: [] for name in encoders}
    for token, vectors in embeddings:
        if not isinstance(vectors, Mapping):
            names = [name for name, width in encoders.items() if np.shape(vectors)[-1:] == (width,)] or [*encoders][:1]
            vectors = {names[0]: vectors}
        elif strange := [name for name in vectors if name not in encoders]:
            raise UserError(
                f"token {shown(token)}: an SDXL embedding, for {', '.join(vectors)}; here is no {strange[0]}"
            )
        for name, rows in vectors.items():
            found[name].append(Embedding(token, rows))
    tokens = {name: {embedding.token for embedding in own} for name, own in found.items()}
    for name, own in tokens.items():
        if missing := sorted(set().union(*tokens.values()) - own):
            raise UserError(
                f"token {shown(missing[0])}: has no vectors for the {name}; give the file that has them too"
            )
    return found


def add_embeddings(
    tokenizer: Tokenizer, component: Component, embeddings: Sequence[Embedding]
) -> tuple[Tokenizer, Component]:
    """A tokenizer that knows the tokens and a text encoder (English or Chinese) that knows their vectors.

    Which encoder, its width tells; but an SD2.x embedding is as wide as Chinese-CLIP ViT-H, and nothing in the file
    says which it is. Raises UserError, naming the token, for vectors of another width, empty or not finite, for more of
    them than a prompt holds, for two embeddings of one token, and for what `Tokenizer.with_tokens` refuses.
    """
    if not embeddings:
        return tokenizer, component
    config, params = component
    path, most = token_table(config, params), tokenizer.format.most * tokenizer.format.room
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


def token_table(config, params: Params) -> str:
    """The path of a text encoder's table of embeddings, a row for each token. Raises UserError for other networks."""
    size = getattr(config, "vocab_size", None)
    for path, value in params.items():
        if path.endswith(("token_embedding.embedding", "word_embeddings.embedding", "shared.embedding")):
            if value.shape[0] == size:
                return path
    raise UserError(f"embeddings are for text encoders, not for a {type(config).__name__}")


def _rows(token: str, vectors: np.ndarray, width: int, most: int, dtype: np.dtype) -> np.ndarray:
    """Vectors as rows of a table."""
    name = f"token {shown(token)}"
    if vectors.ndim != 2 or not len(vectors):
        raise UserError(f"{name}: vectors of shape {vectors.shape}; expected (N, {width})")
    if vectors.shape[1] != width:
        family = f" ({_FAMILIES[vectors.shape[1]]})" if vectors.shape[1] in _FAMILIES else ""
        raise UserError(f"{name}: vectors of width {vectors.shape[1]}{family} for a text encoder of width {width}")
    if len(vectors) > most:
        raise UserError(f"{name}: {len(vectors)} vectors, but a prompt holds {most} tokens")
    with np.errstate(over="ignore"):
        rows = vectors.astype(dtype)
    if not np.isfinite(rows.astype(np.float32)).all():
        raise UserError(f"{name}: values that are not finite in {np.dtype(dtype).name}")
    return rows
