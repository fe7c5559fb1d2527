"""What a training run is: one frozen dataclass, written out in full beside its checkpoints."""

import dataclasses
import hashlib
import json
import math
import tempfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp

from bdm_jax.errors import UserError
from bdm_jax.formats.files import read_json, write_json
from bdm_jax.models.config import RobertaConfig
from bdm_jax.runtime.processes import is_first
from bdm_jax.systems.fetch import written
from bdm_jax.training.inputs import has_checkpoints
from bdm_jax.training.objectives.autoencoder import VAETask
from bdm_jax.training.objectives.backbone import BackboneTask
from bdm_jax.training.objectives.branch import BranchTask
from bdm_jax.training.objectives.controlnet import ControlNetTask
from bdm_jax.training.objectives.dreambooth import DreamBoothTask
from bdm_jax.training.objectives.finetune import FinetuneTask
from bdm_jax.training.objectives.inversion import InversionTask
from bdm_jax.training.objectives.lora import LoRATask
from bdm_jax.training.objectives.starting import fetched, settled
from bdm_jax.training.objectives.text_tower import TextTask
from bdm_jax.training.profiling import parse_steps
from bdm_jax.training.sets import DataConfig
from bdm_jax.training.wandb import check_wandb

# May differ between the sessions of one run: how it is watched, when it pauses, on which devices and in which folder.
_FREE_TO_CHANGE = {
    "minutes",
    "export_only",
    "log_every",
    "sample_every",
    "checkpoint_every",
    "steps_per_call",
    "keep",
    "run",
    "mesh",
    "profile_steps",
    "wandb",
}
_FREE_IN_PARTS = {"remat", "skip_rate", "on_device"}
# Settings of parts that runs of older versions do not have: with these values they compute what they did.
_LATER_IN_PARTS = {
    "scenes": None,
    "scene_size": 128,
    "start_from": None,
    "family": "sd15",
    "captions": None,
    "text_encoder_2": None,
    "towers": None,
    "context": None,
    "fresh": False,
    "schedule": None,
    "projection_dim": None,
    "balance": None,
    "num_train_timesteps": 1000,
    "beta_end": 0.012,
}


@dataclass(frozen=True)
class OptimizerConfig:
    """What turns gradients into updates: warm-up, then constant or a cosine decay to zero at the last step.

    name: adafactor keeps a fraction of the memory of adamw, lion half of it; adafactor does not read b1 and b2.
    copied_factor: of the learning rate, for a branch's copied weights; its zero convolutions and the keys and values of
    its text, which are initialised, get the whole. So it is too where a branch starts from trained weights
    (task.start_from): 1 trains all of it at one rate.
    """

    name: Literal["adamw", "adafactor", "lion"] = "adamw"
    learning_rate: float = 1e-3
    copied_factor: float = 1.0
    schedule: Literal["constant", "cosine"] = "cosine"
    warmup_steps: int = 100
    b1: float = 0.9
    b2: float = 0.999
    weight_decay: float = 1e-2
    clip_norm: float = 1.0
    ema_decay: float = 0.999


@dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis; data=-1 takes all that the others leave.

    The state is split over fsdp. strategy: "fsdp" gathers a parameter where it is used, "zero1" all of them once per
    step, in the compute type, which is faster where they fit. frozen: whether frozen networks are split over fsdp and
    gathered where they are used, or whole on every device; "auto" splits them with "fsdp" and not with "zero1". Over
    tensor they are split as what is trained.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1
    strategy: Literal["fsdp", "zero1"] = "fsdp"
    frozen: Literal["auto", "split", "whole"] = "auto"


@dataclass(frozen=True)
class TrainConfig:
    """One run. `steps` is its whole length; `minutes` ends a session early, at a checkpoint from which the next one
    resumes. `export_only` trains nothing and writes export/ from the newest checkpoint.

    steps_per_call: how many steps are one compiled call at most; it divides the three intervals. None is 1 on a CPU and
    with the loader, where several bring nothing, and up to 32 where the sets lie on an accelerator.
    profile_steps: FIRST:LAST, of which a profile is written (`profiling`). wandb: a project of Weights & Biases.
    accumulate: the batch goes through the networks in N parts, one after the other. compute: the type of frozen
    networks and of all that is computed with them; "auto" is float32 on a CPU, bfloat16 elsewhere. What is trained,
    its average and its optimizer state are float32 always.
    """

    task: (
        VAETask
        | BackboneTask
        | TextTask
        | BranchTask
        | LoRATask
        | DreamBoothTask
        | FinetuneTask
        | InversionTask
        | ControlNetTask
    )
    run: Path
    steps: int
    batch_size: int = 16
    accumulate: int = 1
    compute: Literal["auto", "float32", "bfloat16"] = "auto"
    seed: int = 0
    minutes: float | None = None
    export_only: bool = False
    log_every: int = 20
    checkpoint_every: int = 500
    sample_every: int = 500
    steps_per_call: int | None = None
    keep: int = 2
    profile_steps: str | None = None
    wandb: str | None = None
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)

    def to_json(self) -> dict[str, Any]:
        """Plain values, for the file beside the checkpoints."""
        return {
            "task_name": type(self.task).__name__,
            **json.loads(json.dumps(dataclasses.asdict(self), default=written)),
        }

    def compute_dtype(self) -> jnp.dtype:
        """What `compute` means on this machine."""
        auto = "float32" if jax.default_backend() == "cpu" else "bfloat16"
        return jnp.dtype(auto if self.compute == "auto" else self.compute)

    def folders(self) -> set[str]:
        """Names of the settings that are folders, which may move: what lies in them has digests (`inputs.py`)."""
        return {
            f"{name}.{field.name}"
            for name, part in (("task", self.task), ("data", self.data))
            for field in dataclasses.fields(part)
            if _is_folder(getattr(part, field.name))
        }

    def digest(self) -> str:
        """Of everything that decides what the run computes."""
        values = {key: value for key, value in self.to_json().items() if key not in _FREE_TO_CHANGE}
        folders = self.folders()
        for name in ("task", "data"):
            free = _FREE_IN_PARTS | {key for key in values[name] if f"{name}.{key}" in folders}
            free |= {key for key, usual in _LATER_IN_PARTS.items() if values[name].get(key, usual) == usual}
            # where these lie is free, not whether they are given at all
            given = {key: True for key in _LATER_IN_PARTS if f"{name}.{key}" in folders}
            values[name] = {**{key: value for key, value in values[name].items() if key not in free}, **given}
        if isinstance(getattr(self.task, "text_encoder", None), RobertaConfig):
            if self.task.text_encoder.projection_dim is None:  # later than the first runs that train one
                del values["task"]["text_encoder"]["projection_dim"]
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def settle(config: TrainConfig, default: TrainConfig | None = None) -> TrainConfig:
    """The run with what it names on a hub or by a link fetched, and with what the weights that it starts from say of
    its task; see `starting.fetched` and `starting.settled`, which raise UserError for what is not there or differs.
    """
    usual = None if default is None else default.task
    return dataclasses.replace(config, task=settled(fetched(config.task, config.run), config.run, usual))


def check(config: TrainConfig) -> None:
    """What can be known before anything is loaded or compiled; makes the run's folder.

    Raises:
        UserError: a value that is not valid, a folder that cannot be written, or one that holds checkpoints of a run
            which computes something else (the differing fields are named).
    """
    for name in ("steps", "batch_size", "accumulate", "log_every", "checkpoint_every", "sample_every", "keep"):
        if getattr(config, name) < 1:
            raise UserError(f"{name}={getattr(config, name)}: must be at least 1")
    if config.steps_per_call is not None and config.steps_per_call < 1:
        raise UserError(f"steps_per_call={config.steps_per_call}: must be at least 1")
    if config.seed < 0:
        raise UserError(f"seed={config.seed}: must not be negative")
    if config.minutes is not None and not config.minutes > 0:  # not a number is none either
        raise UserError(f"minutes={config.minutes}: must be positive")
    if config.profile_steps is not None:
        parse_steps(config.profile_steps, config.steps)
    if config.wandb is not None:
        check_wandb(config.wandb)
    if not 0 < config.optimizer.learning_rate < math.inf:
        raise UserError(f"optimizer.learning_rate={config.optimizer.learning_rate}: must be a positive number")
    weights, sets = config.data.weights, 1 + len(config.data.also)
    if weights and not (len(weights) == sets and all(0 < weight < math.inf for weight in weights)):
        raise UserError(f"data.weights={weights}: give a positive number for each of the {sets} sets, or none at all")
    if not 0 <= config.data.skip_rate <= 1:
        raise UserError(f"data.skip_rate={config.data.skip_rate}: must be between 0 and 1")
    told = config.data.scenes is not None or getattr(config.task, "style_in_caption", True)
    if config.data.style is None and not told:
        raise UserError("data.style=None trains on all styles: captions must name them, set task.style_in_caption")
    if config.accumulate > 1 and isinstance(config.task, TextTask):
        raise UserError(f"accumulate={config.accumulate}: the captions of a whole batch are compared, it has no parts")
    if getattr(config.task, "zero_snr", False) and config.task.prediction_type == "epsilon":
        raise UserError("task.zero_snr needs task.prediction_type=v_prediction: pure noise says nothing of the image")
    if getattr(config.task, "num_train_timesteps", 1) < 1:
        raise UserError(f"task.num_train_timesteps={config.task.num_train_timesteps}: must be at least 1")
    if not 0 < getattr(config.task, "beta_end", 0.5) < 1:
        raise UserError(f"task.beta_end={config.task.beta_end}: must be between 0 and 1")
    if not is_first():
        return
    try:
        config.run.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=config.run).close()
    except OSError as error:
        raise UserError(f"{config.run}: cannot be written ({error.strerror})") from error
    path = config.run / "config.json"
    if not path.is_file() or not has_checkpoints(config.run):  # before the first one nothing is lost
        return
    now, before = config.to_json(), read_json(path)
    if before.get("digest") != config.digest():
        changed = list(_differences(now, before, config.folders()))
        raise UserError(
            f"{config.run} holds a run with other settings ({', '.join(changed)}): "
            "choose another --run, or remove that folder"
        )


def remembered(config: TrainConfig) -> dict[str, str]:
    """The digests of what the run in its folder reads; {} where there are none."""
    path = config.run / "config.json"
    return {**read_json(path).get("inputs", {})} if path.is_file() else {}


def remember(config: TrainConfig, inputs: Mapping[str, str] | None = None) -> None:
    """Write the config beside the checkpoints, once everything it names has proved to be there. inputs: digests of what
    the run reads, as of `inputs.check_inputs`; others that are there already stay.
    """
    check(config)
    if is_first():
        known = {**remembered(config), **(inputs or {})}
        write_json(config.run / "config.json", {**config.to_json(), "digest": config.digest(), "inputs": known})


def _differences(
    now: dict[str, Any], before: dict[str, Any], folders: Collection[str], within: str = ""
) -> Iterator[str]:
    """Names of the settings that differ; those that only one version of the library has are marked. Folders that have
    moved are none.
    """
    free = _FREE_IN_PARTS if within else {*_FREE_TO_CHANGE, "digest", "inputs"}
    for name in sorted({*now, *before} - free):
        path = f"{within}{name}"
        if name not in before:
            if not (within and name in _LATER_IN_PARTS and now[name] == _LATER_IN_PARTS[name]):
                yield f"{path}, which is new"
        elif name not in now:
            yield f"{path}, which an older version had"
        elif isinstance(now[name], dict) and isinstance(before[name], dict):
            yield from _differences(now[name], before[name], folders, f"{path}.")
        elif now[name] != before[name] and not (path in folders and before[name]):
            yield path


def _is_folder(value: Any) -> bool:
    return isinstance(value, Path) or (isinstance(value, tuple) and any(isinstance(one, Path) for one in value))
