"""Textual Inversion (Gal et al., arXiv 2208.01618): a word's vectors are trained, and nothing else."""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from bdm_jax.errors import UserError
from bdm_jax.formats.files import shown, write_safetensors
from bdm_jax.models.config import Config
from bdm_jax.models.functional import bind
from bdm_jax.plugins.install import with_embeddings
from bdm_jax.plugins.inversion import TABLES, Embedding, add_embeddings
from bdm_jax.training.objectives.plugin import LoadedSystem, PluginJob, PluginTask

FILE = "learned_embeds.safetensors"
_TREE, _ROWS = "word", "vectors.embedding"


@dataclass(frozen=True)
class InversionTask(PluginTask):
    """Train the vectors of `token` in the backbone's text tower, or, for target=branch, in the branch's.

    prompts: {} stands for the token. vectors: how many. begin: the word whose vectors they begin as.
    """

    prompts: tuple[str, ...] = ("a photo of {}", "a rendering of {}", "a cropped photo of {}", "a close-up of {}")
    token: str = "<new>"
    vectors: int = 1
    begin: str = "dog"
    target: Literal["backbone", "branch"] = "backbone"

    @property
    def on_branch(self) -> bool:
        return self.target == "branch"

    @property
    def tower(self) -> str:
        """The text tower whose word it is."""
        return "branch_text_encoder" if self.on_branch else "text_encoder"

    def trained_shapes(self, configs: dict[str, Config]) -> dict[str, Any]:
        width = configs[self.tower].hidden_size
        return {_TREE: {_ROWS: jax.ShapeDtypeStruct((self.vectors, width), jnp.float32)}}

    def make(self, ready: LoadedSystem) -> "InversionJob":
        if missing := [prompt for prompt in self.prompts if "{}" not in prompt]:
            raise UserError(f"task.prompts: {shown(missing[0])} lacks {{}}, which stands for the token")
        if self.vectors < 1:
            raise UserError(f"task.vectors={self.vectors}: must be at least 1")
        tokenizer = ready.system.branch_tokenizer if self.on_branch else ready.system.tokenizer
        component = getattr(ready.system, self.tower)
        words = tokenizer.content([self.begin])[0]
        if not words:
            raise UserError(f"task.begin={shown(self.begin)}: no word to begin from")
        table = np.asarray(component.params[TABLES[type(component.config)]], np.float32)
        rows = table[[words[i % len(words)] for i in range(self.vectors)]]
        return InversionJob(self, ready, {_TREE: {_ROWS: jnp.asarray(rows)}})


class InversionJob(PluginJob):
    """`InversionTask` made ready."""

    def __init__(self, task, ready, params):
        super().__init__(task, ready, params)
        named = [Embedding(task.token, np.asarray(params[_TREE][_ROWS]))]
        self.tokenizer, larger = add_embeddings(self.tokenizer, getattr(self.system, task.tower), named)
        self.configs[task.tower] = larger.config

    def texts(self, record, rng):
        prompt = self.task.prompts[int(rng.integers(len(self.task.prompts)))].replace("{}", self.task.token)
        return prompt, prompt

    def name(self, record):
        return self.task.prompts[0].replace("{}", self.task.token)

    def network(self, part, params, frozen):
        if part != self.task.tower:
            return super().network(part, params, frozen)
        config, path = self.configs[part], TABLES[type(self.configs[part])]
        table = jnp.concatenate([frozen[part][path], params[_TREE][_ROWS]])
        return bind(config, {**frozen[part], path: table})

    def pipeline(self, params):
        named = Embedding(self.task.token, np.asarray(params[_TREE][_ROWS], np.float32))
        return with_embeddings(self.system, [named], self.task.tower)

    def export(self, params, folder, metadata):
        """`learned_embeds.safetensors`, as diffusers writes it: the token and its vectors (N,D), fp32."""
        folder.mkdir(parents=True, exist_ok=True)
        vectors = np.asarray(params[_TREE][_ROWS], np.float32)
        write_safetensors(folder / FILE, {self.task.token: vectors}, {"format": "pt", **metadata})
