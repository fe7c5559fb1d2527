"""Textual Inversion (Gal et al., arXiv 2208.01618): a word's vectors are trained, and nothing else."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from bdm_jax.command_line import OptionalModelPath
from bdm_jax.errors import UserError
from bdm_jax.formats.files import shown, write_safetensors
from bdm_jax.models.functional import bind
from bdm_jax.plugins.install import with_embeddings
from bdm_jax.plugins.inversion import Embedding, add_embeddings, load_embeddings, token_table
from bdm_jax.systems.pipeline import BridgePipeline
from bdm_jax.training.inputs import of_params
from bdm_jax.training.objectives.captions import Captions
from bdm_jax.training.objectives.objective import Sizes, Training, Trees
from bdm_jax.training.objectives.plugin import (
    PREVIEWS,
    PluginTask,
    load_system,
    loaded_objective,
    system_objective,
)
from bdm_jax.training.objectives.preview import draw_records
from bdm_jax.training.objectives.sample import Sample, read_moments
from bdm_jax.training.objectives.starting import FRESH, Start, is_there
from bdm_jax.training.objectives.system import SystemObjective
from bdm_jax.training.sets import Sets

FILE = "learned_embeds.safetensors"
_TREE, _ROWS = "word", "vectors.embedding"


@dataclass(frozen=True)
class InversionTask(PluginTask):
    """Train the vectors of `token` in the backbone's text encoder, or, for target=branch, in the branch's.

    prompts: {} stands for the token. vectors: how many. begin: the word whose vectors they begin as. start_from: a file
    of such vectors to train on, in place of that word's.
    """

    prompts: tuple[str, ...] = ("a photo of {}", "a rendering of {}", "a cropped photo of {}", "a close-up of {}")
    token: str = "<new>"
    vectors: int = 1
    begin: str = "dog"
    target: Literal["backbone", "branch"] = "backbone"
    start_from: OptionalModelPath = None

    @property
    def on_branch(self) -> bool:
        return self.target == "branch"

    def objective(self, sizes: Sizes) -> SystemObjective:
        """The loss."""
        name = self._encoder
        rows = jax.ShapeDtypeStruct((self.vectors, sizes[name].hidden_size), jnp.float32)
        return system_objective(self, sizes, {_TREE: {_ROWS: rows}}, NetworksWithWord(sizes, name))

    def start(self, sets: Sets, run: Path, seed: int, dtype: jnp.dtype) -> Training:
        """The vectors begin as those of another word, or of the file; all networks are loaded and frozen."""
        ready = load_system(self, sets, run, dtype)
        if missing := [prompt for prompt in self.prompts if "{}" not in prompt]:
            raise UserError(f"task.prompts: {shown(missing[0])} lacks {{}}, which stands for the token")
        if self.vectors < 1:
            raise UserError(f"task.vectors={self.vectors}: must be at least 1")
        name, (tokenizer,) = self._encoder, ready.tokenizers(self.source)
        component = ready.system.networks[name]
        words = tokenizer.content([self.begin])[0]
        if not words:
            raise UserError(f"task.begin={shown(self.begin)}: no word to begin from")
        table = np.asarray(component.params[token_table(*component)], np.float32)
        begun = self._begun(table.shape[1], run)
        of_word = table[[words[i % len(words)] for i in range(self.vectors)]]
        rows = begun.params[_TREE][_ROWS] if begun.params else of_word
        tokenizer, _ = add_embeddings(tokenizer, component, [Embedding(self.token, rows)])
        texts = Captions(tokenizer, self.language, self.caption_dropout, prompts=self.prompts, word=self.token)
        pipeline = partial(_pipeline, ready.drawing({}), self.source, self.token)
        return Training(
            loaded_objective(self.objective(ready.sizes), ready),
            {_TREE: {_ROWS: jnp.asarray(rows)}},
            ready.frozen,
            ready.parts,
            Sample(read_moments, texts, self.source),
            partial(_export, self.token),
            partial(draw_records, pipeline, texts, batch_size=PREVIEWS),
            {**ready.inputs, **begun.inputs},
        )

    @property
    def _encoder(self) -> str:
        """The text encoder whose word it is. Raises UserError where several read a text."""
        if len(self.encoders) > 1:
            names = " and ".join(self.encoders)
            raise UserError(
                f"{self.model}: {self.row.title} reads with {names}; a word is trained for one text encoder"
            )
        return self.encoders[0]

    def _begun(self, width: int, run: Path) -> Start:
        """The vectors of the file. Raises UserError for several words in it, and for vectors of another shape."""
        path = self.start_from
        if not is_there(path, run):
            return FRESH
        word, *others = load_embeddings(path)
        shape = np.shape(word.vectors)  # () of one that has vectors for several text encoders
        if others or shape != (self.vectors, width):
            raise UserError(
                f"{path}: holds {1 + len(others)} words, the first of shape {shape}; one of {self.vectors} vectors "
                f"(task.vectors) of width {width} is wanted"
            )
        params = {_TREE: {_ROWS: np.asarray(word.vectors, np.float32)}}
        return Start(params, {"start_from": of_params(params[_TREE], path)})


@dataclass(frozen=True)
class NetworksWithWord:
    """Frozen networks, of which the text encoder's table ends with the rows that are trained."""

    sizes: Sizes
    text_encoder: str

    def __call__(self, name: str, params: Trees, frozen: dict) -> nnx.Module:
        """See `Binding`."""
        config, tree = self.sizes[name], frozen[name]
        if name != self.text_encoder:
            return bind(config, tree)
        path, rows = token_table(config, tree), params[_TREE][_ROWS]
        table = jnp.concatenate([tree[path], rows])
        return bind(replace(config, vocab_size=len(table)), {**tree, path: table})


def _pipeline(system: BridgePipeline, source: str, token: str, params: Trees) -> BridgePipeline:
    word = Embedding(token, np.asarray(params[_TREE][_ROWS], np.float32))
    return with_embeddings(system, [word], source)


def _export(token: str, params: Trees, folder: Path, metadata: dict[str, str]) -> None:
    """`learned_embeds.safetensors`, as diffusers writes it: the token and its vectors (N,D), fp32."""
    folder.mkdir(parents=True, exist_ok=True)
    vectors = np.asarray(params[_TREE][_ROWS], np.float32)
    write_safetensors(folder / FILE, {token: vectors}, {"format": "pt", **metadata})
