"""What all makers of plug-ins share: a ready system, pictures of any size, prompts, one loss.

A plug-in's job says which networks a step works with (`network`); whatever it trains, the loss is that of the whole
system: the words through their tower, perhaps through the branch and a ControlNet, the UNet's error at a random step.
"""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from bdm_jax.data.captions import caption, name
from bdm_jax.data.loader import MixturePart
from bdm_jax.errors import UserError
from bdm_jax.models.config import Config
from bdm_jax.models.functional import abstract, cast
from bdm_jax.models.unet.conditioning import Conditioning
from bdm_jax.sampling.batching import default_size
from bdm_jax.systems.components import Component, find, pick_network
from bdm_jax.systems.pipeline import BridgePipeline
from bdm_jax.text.encode import encode
from bdm_jax.training.objectives.denoising import DiffusionJob
from bdm_jax.training.objectives.job import Batch, Shapes, TimestepBias, Trees
from bdm_jax.training.objectives.remat import Remat, network
from bdm_jax.training.sets import Sets

BACKBONE, BRIDGE = ("unet", "text_encoder"), ("unet", "branch", "branch_text_encoder")


@dataclass(frozen=True)
class PluginTask:
    """Fields of every plug-in's task.

    model: a pipeline folder or single file; what is not trained of it stays as it is. prompts: one at random for each
    sample, {} in it standing for the record's caption. only: ids of concepts or file names, () takes all records.
    The others as in `BackboneTask`.
    """

    model: Path = Path("models/stable-diffusion-v1-5")
    prompts: tuple[str, ...] = ("{}",)
    only: tuple[str, ...] = ()
    timestep_bias: TimestepBias = "none"
    min_snr: float | None = None
    offset_noise: float = 0.0
    remat: Remat = "none"
    caption_dropout: float = 0.0

    on_branch: ClassVar[bool] = False
    reads_pictures: ClassVar[bool] = False  # also those whose latents it has

    @property
    def language(self) -> str:
        """Of the captions."""
        return "zh" if self.on_branch else "en"

    @property
    def parts(self) -> tuple[str, ...]:
        """The networks of the system that a step works with."""
        return BRIDGE if self.on_branch else BACKBONE

    def shapes(self) -> Shapes:
        """Of what is trained and of what is left alone; the networks' sizes are read, no weights."""
        configs = {part: part_config(self.model, part) for part in self.parts}
        trained = self.trained_shapes(configs)
        return trained, {part: abstract(configs[part]) for part in configs if part not in trained}

    def trained_shapes(self, configs: dict[str, Config]) -> dict[str, Any]:
        """Trees of ShapeDtypeStruct of what is trained, for networks of these sizes."""
        raise NotImplementedError

    def make(self, ready: "LoadedSystem") -> "PluginJob":
        """The job, on a system that is ready."""
        raise NotImplementedError

    def start(self, sets: Sets, run: Path, seed: int, dtype: jnp.dtype) -> "PluginJob":
        """What is trained begins anew or as a copy of the model's; everything else is loaded and only used."""
        if not self.prompts or not all(self.prompts):
            raise UserError("task.prompts: give at least one, none of them empty; {} stands for the caption")
        if not 0.0 <= self.caption_dropout <= 1.0:
            raise UserError(f"task.caption_dropout={self.caption_dropout}: must be between 0 and 1")
        system = BridgePipeline.from_pretrained(self.model, "float32")
        if not self.on_branch:
            system = replace(system, branch=None, branch_text_encoder=None, branch_tokenizer=None)
        elif system.branch is None:
            raise UserError(f"{self.model} has no branch, which task.target=branch is to change")
        parts = sets.latents(system.vae, run, default_size(system), self.reads_pictures)
        return self.make(LoadedSystem(system, parts, run, seed, dtype))


@dataclass(frozen=True)
class LoadedSystem:
    """What a job is made of. system: all networks in fp32. parts: of the run's records, with their moments."""

    system: BridgePipeline
    parts: list[MixturePart]
    run: Path
    seed: int
    dtype: jnp.dtype


class PluginJob(DiffusionJob):
    """A plug-in's task made ready. Subclasses give `params`, and say what they make of the system."""

    at_once = 4

    def __init__(self, task: PluginTask, ready: LoadedSystem, params: Trees):
        bridge, self.dtype = task.on_branch, ready.dtype
        tokenizer = ready.system.branch_tokenizer if bridge else ready.system.tokenizer
        super().__init__(task, params, ready.system.vae, tokenizer, ready.system.schedule, ready.parts)
        self.configs = {part: getattr(ready.system, part).config for part in task.parts}
        untouched = {
            part: Component(self.configs[part], cast(getattr(ready.system, part).params, ready.dtype))
            for part in task.parts
            if part not in params
        }
        self.system = replace(ready.system, **untouched)
        self.frozen: dict[str, Any] = {part: component.params for part, component in untouched.items()}
        if bridge:
            empty = encode(ready.system.tokenizer, *ready.system.text_encoder, [""])
            self.frozen["english"] = replace(empty, tokens=empty.tokens.astype(ready.dtype))

    def texts(self, record, rng):
        prompt = self.task.prompts[int(rng.integers(len(self.task.prompts)))]
        if "{}" not in prompt:
            return prompt, prompt
        longer, shorter = caption(record, self.task.language, rng), name(record, self.task.language)
        return prompt.replace("{}", longer), prompt.replace("{}", shorter)

    def name(self, record):
        prompt = self.task.prompts[0]
        return prompt.replace("{}", name(record, self.task.language)) if "{}" in prompt else prompt

    def network(self, part: str, params: Trees, frozen: dict) -> nnx.Module:
        """The network of that name, with what is trained in its place."""
        tree = params[part] if part in params else frozen[part]
        return network(self.configs[part], tree, self.task.remat)

    def predict(self, params: Trees, frozen: dict, batch: Batch, x: jax.Array, t: jax.Array) -> jax.Array:
        """Noisy latents (B,h,w,C) fp32 at t (B,) with the batch's words -> what the UNet predicts."""
        bound = lambda part: self.network(part, params, frozen)  # noqa: E731
        dtype = next(iter((params["unet"] if "unet" in params else frozen["unet"]).values())).dtype
        x, ids = x.astype(dtype), batch["ids"]
        if not self.task.on_branch:
            text = Conditioning(bound("text_encoder")(ids).astype(dtype))
            return bound("unet")(x, t, text, self.residuals(params, frozen, batch, x, t, text))
        mask = (ids != self.tokenizer.pad,) if self.system.masked else ()
        text = Conditioning(bound("branch_text_encoder")(ids, *mask).astype(dtype), *mask)
        english = jax.tree.map(lambda states: jnp.broadcast_to(states, (len(x), *states.shape[1:])), frozen["english"])
        return bound("unet")(x, t, english, bound("branch")(x, t, text))

    def component(self, part: str, params: Trees) -> Component:
        """A network that is trained, in the type that the others are in, to draw with."""
        return Component(self.configs[part], cast(jax.tree.map(jnp.asarray, params[part]), self.dtype))

    def residuals(self, params: Trees, frozen: dict, batch: Batch, x: jax.Array, t: jax.Array, text: Conditioning):
        """What is added to the bare backbone's skips and middle; None for nothing."""
        return None

    def loss(self, params, frozen, batch, key):
        x, t, target = self.noised(batch, key)
        return self.error(self.predict(params, frozen, batch, x, t), target, t), {}

    def export_system(self, params: Trees, folder: Path, metadata: dict[str, str]) -> None:
        """A whole backbone with what was trained in it; the others file by file as they came, where they did so."""
        model = self.task.model
        whole = BridgePipeline.from_pretrained(model, "float32")
        whole = replace(whole, branch=None, branch_text_encoder=None, branch_tokenizer=None)
        trained = {part: Component(self.configs[part], params[part]) for part in params}
        replace(whole, **trained).save_pretrained(folder, metadata=metadata)
        for part in ("unet", "vae", "text_encoder", "tokenizer", "scheduler"):
            if part not in trained and (model / part).is_dir():
                shutil.rmtree(folder / part)
                shutil.copytree(model / part, folder / part)


def part_config(model: Path, part: str) -> Config:
    """The sizes of one network of a pipeline folder or single file. Raises UserError where it has none."""
    if not model.exists():
        raise UserError(f"{model}: no such model folder")
    return pick_network(find(model / part if model.is_dir() else model), model, part).config()
