"""Prompts through a model's text encoders once, kept as networks of their own that stand in the encoders' place."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from bdm_jax.app.prompts import read_prompts
from bdm_jax.command_line import ModelPath
from bdm_jax.errors import UserError
from bdm_jax.models.config import TextStatesConfig
from bdm_jax.paths import new_folder
from bdm_jax.sampling.batching import as_english
from bdm_jax.sampling.denoiser import BACKBONE
from bdm_jax.sampling.reading import source_texts
from bdm_jax.sampling.settings import Request
from bdm_jax.systems.components import Component, load_found, save_component
from bdm_jax.systems.fetch import local
from bdm_jax.systems.folder import find_system, load_tokenizer
from bdm_jax.systems.int8 import quantised
from bdm_jax.text import readers
from bdm_jax.text.encode import EncoderCall, Tokens, encode_windows
from bdm_jax.text.towers import Tower

from .conversion import checked

_ROWS = 8  # windows of text through an encoder at a time


@dataclass(frozen=True)
class ReadTexts:
    """Read prompts with a model's text encoders, and keep what these make of them: folders that stand in the text
    encoders' place (sample.py --text-encoder DST/text_encoder), so that a large one need not be in memory.
    """

    model: Annotated[ModelPath, tyro.conf.Positional]
    """a pipeline folder, of which the text encoders alone are loaded"""
    dst: Annotated[Path, tyro.conf.Positional]
    """a folder that gets one for each text encoder, and the tokenizers"""
    prompt: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="PROMPT ...")] = ()
    """what is to be drawn, as sample.py will be given it"""
    negative: str = ""
    """negative prompt; the empty prompt is always among the texts"""
    prompts: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """prompts from a .txt, .csv or .jsonl file, with their negative ones"""
    source: Literal["backbone", "branch"] = "backbone"
    """whose prompts they are"""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """type to write"""
    text_weights: Literal["int8"] | None = None
    """read with the text encoders' matrices in int8"""


Subcommand = Annotated[ReadTexts, tyro.conf.subcommand("text-states")]


def text_states(
    model: str | Path,
    dst: str | Path,
    prompt: Sequence[str] = (),
    *,
    negative: str = "",
    prompts: Path | None = None,
    source: str = BACKBONE,
    dtype: str = "float32",
    text_weights: str | None = None,
) -> list[Path]:
    """Write to `dst` a folder for each text encoder that reads `source`, with its tokenizer beside it; returns `dst`.

    One text encoder at a time is in memory, and nothing else of the model. `text_weights` "int8" reads with its
    matrices in int8.

    Raises:
        UserError: no prompts, prompts that change from step to step, a model without such a reader or without its
            text encoders.
    """
    requests = [Request(text, negative) for text in prompt]
    requests += [row.request for row in read_prompts(prompts, Request("", negative))] if prompts else []
    if not requests:
        raise UserError('no prompts: give at least one, or --prompts FILE, as in: text-states MODEL DST "红灯笼"')
    texts = _texts(requests, source)
    model, dst = checked(local(model), dst, file=False)
    found = find_system(model)
    reader = next((reader for reader in found.family.readers if reader.source == source), None)
    if reader is None:
        raise UserError(f"--source {source}: a {found.family.title} system reads no such prompts")
    if missing := [tower.encoder for tower in reader.towers if tower.encoder not in found.networks]:
        raise UserError(f"{model}: lacks {', '.join(missing)}")
    tokenizers = {tower.tokenizer: load_tokenizer(model, found, tower) for tower in reader.towers}
    with new_folder(dst) as folder:
        for tower, tokens in zip(reader.towers, readers.read(reader, tokenizers, texts), strict=True):
            part = found.networks[tower.encoder]
            component = load_found(part, each=quantised) if text_weights else load_found(part)
            _save(folder / tower.encoder, tower, component, tokens, dtype)
            del component  # before the next is read
        for name, tokenizer in tokenizers.items():
            tokenizer.save_pretrained(folder / name)
    return [dst]


def _texts(requests: Sequence[Request], source: str) -> list[str]:
    """Every text that these requests are drawn with, the empty one first."""
    found = {"": None}
    for request in requests:
        asked = as_english(request) if source == BACKBONE else request
        pair = (asked.english_negative, asked.english) if source == BACKBONE else (asked.negative, asked.prompt)
        read = source_texts(*pair, lambda: ()).texts
        if not read:
            raise UserError(f"the prompt {pair[1]!r} changes from step to step: its text cannot be read beforehand")
        found |= dict.fromkeys(read)
    return list(found)


def _save(folder: Path, tower: Tower, component: Component, tokens: Tokens, dtype: str) -> None:
    """A text encoder's states of every window that is not there twice."""
    length = tokens.ids.shape[-1]
    ids, first = np.unique(tokens.ids.reshape(-1, length), axis=0, return_index=True)
    positions = None if tokens.positions is None else tokens.positions.reshape(-1, length)[first]
    made: list[Any] = []
    config = readers.as_pooled(tower, component.config)
    for begin in range(0, len(ids), _ROWS):
        rows = slice(begin, begin + _ROWS)
        call = EncoderCall(config, tower.layer, tower.final_norm, bool(tower.pooled), start=0, end=0)
        placed = None if positions is None else positions[rows, None]
        made.append(encode_windows(call, component.params, ids[rows, None], None, placed))
    params = {"texts": ids, "states": np.concatenate([np.asarray(cond.tokens, np.float32) for cond in made])}
    if tower.pooled:
        params["pooled"] = np.concatenate([np.asarray(cond.pooled, np.float32) for cond in made])
    config = TextStatesConfig(
        texts=len(ids),
        length=length,
        hidden_size=component.config.hidden_size,
        vocab_size=component.config.vocab_size,
        num_hidden_layers=tower.layer,
        projection_dim=params["pooled"].shape[1] if tower.pooled else None,
    )
    save_component(folder, config, params, dtype)
