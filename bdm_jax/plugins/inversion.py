"""Textual Inversion (Gal et al. 2022, arXiv 2208.01618): new words as trained vectors of a text encoder's own table.

An embedding is a token and its vectors. Adding it gives a new tokenizer, which reads the token in a prompt as one id
per vector, and a new text encoder, with these vectors at the end of its table; windows and weights treat each as a
token. The old ones stay as they are: to unload is to use them again. A text encoder of another vocabulary size is
recompiled.
"""

import re
import unicodedata
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
from bdm_jax.systems.fetch import local
from bdm_jax.text.tokenizer import Tokenizer

_FAMILIES = {768: "SD1.x", 1024: "SD2.x or Chinese-CLIP ViT-H", 1280: "SDXL's second text encoder"}
_MAX_NAME = 1000
# What trainers call every file of theirs, so that it is no name.
_NAMELESS = re.compile(r"learned_embeds.*", re.IGNORECASE)


class Embedding(NamedTuple):
    """A token and what it stands for: vectors (N, D) float32, or such vectors by text encoder (SDXL's files).

    `aliases`: other names of it. Where one of them is a word of the vocabulary, it is the others and "embedding:WORD".
    """

    token: str
    vectors: np.ndarray | Mapping[str, np.ndarray]
    aliases: tuple[str, ...] = ()


def load_embeddings(path: str | Path, token: str | None = None) -> list[Embedding]:
    """The embeddings of a file: one, but for files of several tokens. See `formats.embeddings` for what is read.

    An embedding is called by the name that the file has for it and by the file's own, as AUTOMATIC1111's interface and
    ComfyUI have it; `token` replaces both. Raises UserError for one name for several embeddings; FileError for what no
    reader accepts.
    """
    path, parts = local(path), families.embedding_names()
    found = read_embeddings(path, tuple(parts))
    if token is not None and len(found) > 1:
        names = ", ".join(shown(inversion.name) for inversion in found)
        raise UserError(f"{path}: has {len(found)} embeddings ({names}), which keep their names; give no token")
    embeddings = []
    for inversion in found:
        vectors = {parts.get(key, key): rows for key, rows in inversion.vectors.items()}
        single = next(iter(vectors.values())) if len(vectors) == 1 else vectors
        name = inversion.name if token is None else token
        by_file = token is None and len(found) == 1 and name is not None and not _NAMELESS.fullmatch(path.stem)
        embeddings.append(Embedding(path.stem if name is None else name, single, (path.stem,) if by_file else ()))
    return embeddings


def for_encoders(embeddings: Sequence[Embedding], encoders: Mapping[str, int]) -> dict[str, list[Embedding]]:
    """The embeddings of each of a text's encoders, whose widths are given by name.

    What a file says of one encoder only goes to the one of that width; of the aliases those are left that a token has
    in every encoder. Raises UserError, naming the token, for an embedding that not every encoder has, and for one of
    other encoders than these.
    """
    found: dict[str, list[Embedding]] = {name: [] for name in encoders}
    for token, vectors, aliases in embeddings:
        if not isinstance(vectors, Mapping):
            names = [name for name, width in encoders.items() if np.shape(vectors)[-1:] == (width,)] or [*encoders][:1]
            vectors = {names[0]: vectors}
        elif strange := [name for name in vectors if name not in encoders]:
            raise UserError(
                f"token {shown(token)}: an SDXL embedding, for {', '.join(vectors)}; here is no {strange[0]}"
            )
        for name, rows in vectors.items():
            found[name].append(Embedding(token, rows, aliases))
    tokens = {name: {embedding.token for embedding in own} for name, own in found.items()}
    for name, own in tokens.items():
        if missing := sorted(set().union(*tokens.values()) - own):
            raise UserError(
                f"token {shown(missing[0])}: has no vectors for the {name}; give the file that has them too"
            )
    aliases = [{(one.token, alias) for one in own for alias in one.aliases} for own in found.values()]
    common = set.intersection(*aliases) if aliases else set()
    return {
        name: [
            one._replace(aliases=tuple(alias for alias in one.aliases if (one.token, alias) in common)) for one in own
        ]
        for name, own in found.items()
    }


def add_embeddings(
    tokenizer: Tokenizer, component: Component, embeddings: Sequence[Embedding]
) -> tuple[Tokenizer, Component]:
    """A tokenizer that knows the tokens and a text encoder (English or Chinese) that knows their vectors.

    Which encoder, its width tells; but an SD2.x embedding is as wide as Chinese-CLIP ViT-H, and nothing in the file
    says which it is. Raises UserError, naming the token, for vectors of another width, empty or not finite, for more of
    them than a prompt holds, for two embeddings of one name, and for what `Tokenizer.with_tokens` refuses.
    """
    if not embeddings:
        return tokenizer, component
    config, params = component
    path, most = token_table(config, params), tokenizer.format.most * tokenizer.format.room
    table, rows, tokens = params[path], [], {}
    taken: set[str] = set()
    size = config.vocab_size
    for token, vectors, aliases in embeddings:
        rows.append(_rows(" or ".join((token, *aliases)), vectors, table.shape[1], most, table.dtype))
        own = {_folded(name): name for name in (*aliases, token)}
        words = {folded for folded, name in own.items() if tokenizer.has_word(name)}
        for folded, name in own.items():
            if len(name) > _MAX_NAME:
                raise UserError(f"token {shown(name)}: {len(name)} characters; give it another name")
            if folded in taken:
                raise UserError(f"token {shown(name)}: two embeddings have this name; give one another: FILE=TOKEN")
            prefix = "embedding:" if folded in words and len(words) < len(own) else ""
            tokens[prefix + name] = range(size, size + len(vectors))
        taken |= own.keys()
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


def _folded(name: str) -> str:
    """What of a name tells it from others."""
    return " ".join(unicodedata.normalize("NFC", name).casefold().split())


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
