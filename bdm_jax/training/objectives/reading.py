"""A source's texts inside a loss: token ids through the text encoders that read them, joined as `text.readers` does."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from bdm_jax.models.config import ChatGLMConfig, Config, EncoderConfig, RobertaConfig, TextStatesConfig
from bdm_jax.models.unet.conditioning import Conditioning
from bdm_jax.text.readers import joined, with_zeros
from bdm_jax.text.tokenizer import Tokenizer
from bdm_jax.text.towers import Reader, Tower
from bdm_jax.text.windows import WindowFormat

# Windows of text encoders whose tokenizer is not here and whose positions do not tell their length.
_USUAL = {
    RobertaConfig: WindowFormat(52, (101,), (102,), 0),
    ChatGLMConfig: WindowFormat(256, (64790, 64792), (), 0, left=True),
}


@dataclass(frozen=True)
class Reading:
    """Who reads a source's texts, of one window each, and how.

    reader: the text encoders, and how their states are joined. windows: what the ids of each of the reader's tokenizers
    look like, all of one length. masked: whether padding is hidden, where it is a token of its own.
    """

    reader: Reader
    windows: tuple[WindowFormat, ...]
    masked: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a text's ids: (S,), or (T,S) of several tokenizers."""
        lengths = tuple(window.length for window in self.windows)
        return lengths if len(lengths) == 1 else (len(lengths), lengths[0])

    def __call__(self, encoder: Callable[[str], nnx.Module], ids: jax.Array, dtype: jnp.dtype) -> Conditioning:
        """Ids (B,S) or (B,T,S) -> states (B,S,D) and, where a tower gives it, the pooled text (B,P), in this type.

        encoder: the text encoder of a name, bound to its parameters.
        """
        rows = [ids] if len(self.windows) == 1 else [ids[:, i] for i in range(len(self.windows))]
        own = dict(zip(self.reader.tokenizers, zip(self.windows, rows, strict=True), strict=True))
        conds = [
            self._read(tower, encoder(tower.encoder), *own[tower.tokenizer], dtype) for tower in self.reader.towers
        ]
        return conds[0] if len(conds) == 1 else joined(conds, self.reader.join)

    def _read(
        self, tower: Tower, encoder: nnx.Module, window: WindowFormat, ids: jax.Array, dtype: jnp.dtype
    ) -> Conditioning:
        hidden = self.masked and window.pad not in window.end
        mask = more = (_content(window, ids),) if hidden else ()
        if window.left:
            content = _content(window, ids)
            more = content, jnp.maximum(jnp.cumsum(content, axis=1) - 1, 0)
        how = {} if tower.final_norm else {"final_norm": False}
        if tower.layer > 1:
            how["layer"] = tower.layer
        if tower.pooled == "raw" and hasattr(encoder, "text_projection"):
            del encoder.text_projection
        if tower.pooled:
            states, pooled = encoder.outputs(ids, *more, **how)
            cond = Conditioning(states.astype(dtype), *mask, pooled=pooled.astype(dtype))
        else:
            cond = Conditioning(encoder(ids, *more, **how).astype(dtype), *mask)
        if self.reader.zero_empty:
            cond = with_zeros(cond, (ids == jnp.asarray(window.fill([], 1)[0])).all(axis=1))
        return cond


def reading_of(reader: Reader, config: EncoderConfig, sizes: Mapping[str, Config]) -> Reading:
    """How a network of these sizes reads texts, by the sizes of the text encoders alone: with usual windows.

    Where the network adds a pooled text and the row takes none, as of a family that it is not of, it is the last
    tower's.
    """
    if config.has_addition and not any(tower.pooled for tower in reader.towers):
        *others, last = reader.towers
        reader = replace(reader, towers=(*others, replace(last, pooled=True)))
    encoders = {tower.tokenizer: tower.encoder for tower in reversed(reader.towers)}
    return Reading(reader, tuple(_window(sizes[encoders[name]]) for name in reader.tokenizers))


def of_tokenizers(reading: Reading, tokenizers: Mapping[str, Tokenizer], masked: bool = False) -> Reading:
    """The reading with the windows of the tokenizers, by name."""
    windows = tuple(tokenizers[name].format for name in reading.reader.tokenizers)
    return replace(reading, windows=windows, masked=masked)


def _content(window: WindowFormat, ids: jax.Array) -> jax.Array:
    """Where ids (B,S) are not the padding around a text."""
    return jnp.cumsum(ids != window.pad, axis=1) > 0 if window.left else ids != window.pad


def _window(config: Any) -> WindowFormat:
    if (usual := _USUAL.get(type(config))) is not None:
        return usual
    if isinstance(config, TextStatesConfig):
        return WindowFormat(config.length, (), (), 0)
    ids = config.bos_token_id, config.eos_token_id, config.pad_token_id
    return WindowFormat(config.max_position_embeddings, ids[:1], ids[1:2], ids[2])
