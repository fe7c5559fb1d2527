"""What a run reads beside its settings: a digest of each network, tokenizer, schedule and set, kept in its config.json.

A digest is of what was read, not of files: a network in another layout or place is the same network.
`latents.moments.digest`, which sets of latents have stored, counts every field of a config; here fields that later
versions add change nothing as long as they have their defaults.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bdm_jax.diffusion.schedule import Schedule
from bdm_jax.errors import UserError
from bdm_jax.systems.components import Component
from bdm_jax.systems.fetch import written
from bdm_jax.systems.index import tower_json
from bdm_jax.systems.pipeline import BridgePipeline
from bdm_jax.text.tokenizer import Tokenizer

PROBE = "A photo of an astronaut riding 3 red horses, isn't it? 红灯笼和熊猫，在雪山上的北京；龍 Été"
_THREADS = 4


class Input(NamedTuple):
    """Where something that a run reads lies, and the function that makes its digest, 32 hexadecimal digits."""

    where: str
    digest: Callable[[], str]


Inputs = Mapping[str, Input]


def of_part(part: Component | Tokenizer | Schedule, where: str | Path) -> Input:
    """A network (in fp32), a tokenizer or a schedule."""
    return Input(written(where), partial(_digest, part))


def of_params(params: Mapping[str, Any], where: str | Path) -> Input:
    """Arrays by name, in fp32."""
    return Input(written(where), partial(_of_params, "", params))


def of_pipeline(pipeline: BridgePipeline, folder: Path) -> dict[str, Input]:
    """All parts of a system, its schedule, and what model_index.json says of its prompts."""
    inputs = {name: of_part(part, folder) for name, part in pipeline.parts.items()}
    prompts = {"masked": pipeline.masked, "zero_empty": pipeline.zero_empty}
    if pipeline.branch_towers is not None:
        prompts["branch_towers"] = [*map(tower_json, pipeline.branch_towers)]
    return {
        **inputs,
        "schedule": of_part(pipeline.schedule, folder),
        "prompts": Input(written(folder), partial(_of_text, json.dumps(prompts))),
    }


def check_inputs(run: Path, inputs: Inputs, before: Mapping[str, Any]) -> dict[str, str]:
    """The digests now; they must be those of `before`, where it has them.

    Raises:
        UserError: something is not as it was (its name and place are said).
    """
    now = {name: found.digest() for name, found in inputs.items()}
    changed = [name for name, digest in now.items() if before.get(name, digest) != digest]
    if changed:
        names = ", ".join(f"{name} ({inputs[name].where})" for name in changed)
        verb = "is" if len(changed) == 1 else "are"
        raise UserError(
            f"{names} {verb} not what the run in {run} has been trained with: put the old files back, or begin "
            "a new run (another --run)"
        )
    return now


def has_checkpoints(run: Path) -> bool:
    """Whether a run's folder has had any, damaged ones and ones that are gone among them (see `checkpoint.py`)."""
    folder = run / "checkpoints"
    return (folder / "newest.json").exists() or any(path.name.isdecimal() for path in folder.glob("*"))


def _digest(part: Component | Tokenizer | Schedule) -> str:
    if isinstance(part, Tokenizer):
        return part.fingerprint(PROBE)
    if not isinstance(part, Component):
        return _of_text(_changed_fields(part))
    return _of_params(_changed_fields(part.config), part.params)


def _of_params(about: str, params: Mapping[str, Any]) -> str:
    sha = hashlib.sha256(about.encode())
    with ThreadPoolExecutor(_THREADS) as pool:
        for digest in pool.map(_of_array, sorted(params), (params[path] for path in sorted(params))):
            sha.update(digest)
    return sha.hexdigest()[:32]


def _of_array(path: str, values: Any) -> bytes:
    array = np.ascontiguousarray(np.asarray(values, np.float32))
    sha = hashlib.sha256(f"{path} {array.shape}".encode())
    sha.update(array.data)
    return sha.digest()


def _changed_fields(config: Any) -> str:
    """The fields that are not as by default: a field that comes later changes nothing."""
    values = {
        field.name: str(getattr(config, field.name))
        for field in dataclasses.fields(config)
        if getattr(config, field.name) != field.default
    }
    return json.dumps([type(config).__name__, values], sort_keys=True)


def _of_text(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]
