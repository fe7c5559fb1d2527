"""What a pipeline folder's own files are called and say: model_index.json, which names its class and parts."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bdm_jax.errors import UserError, unknown
from bdm_jax.formats.files import read_json, shown
from bdm_jax.models.config import to_json
from bdm_jax.systems import families
from bdm_jax.systems.families import Family
from bdm_jax.text.towers import SETTING, Tower

SCHEDULE, INDEX = "scheduler_config.json", "model_index.json"
CHECKERS = {"safety_checker", "feature_extractor"}  # folders of what only checks images
_GUIDANCE, _MASKED, _ZERO_EMPTY = "_bdm_guidance", "_bdm_masked", "force_zeros_for_empty_prompt"
_POOLED = ("projected", "raw")
# What diffusers calls pipelines of the parts of SD1.x; others that begin so have other networks.
_LIKE_SD = re.compile(r"\w{0,4}StableDiffusion(?!3|XL|Upscale|LatentUpscale|ImageVariation|GLIGEN)\w*Pipeline\w*")


def model_index(
    family: Family,
    configs: Mapping[str, Any],
    guidance: float | None = None,
    masked: bool = False,
    zero_empty: bool | None = None,
    branch_towers: Sequence[Tower] | None = None,
) -> dict[str, Any]:
    """model_index.json of a system whose networks have these configs; to diffusers, names with _ are nothing."""
    zero_empty = family.zero_empty if zero_empty is None else zero_empty
    entries = dict(family.index)
    for name, part in family.parts.items():
        if part.entry is not None:
            library, cls = part.entry
            values = to_json(configs[name]) if name in configs else {}
            entries[name] = [library, values.get("_class_name", cls)]
    return {
        "_class_name": family.pipeline_class,
        _GUIDANCE: family.guidance if guidance is None else guidance,
        **({_MASKED: True} if masked else {}),
        **({} if branch_towers is None else {SETTING: [*map(tower_json, branch_towers)]}),
        **({_ZERO_EMPTY: zero_empty} if family.zero_empty or zero_empty else {}),
        **dict(sorted({**entries, "scheduler": ["diffusers", family.scheduler_class]}.items())),
    }


def read_index(path: Path) -> dict[str, Any]:
    """What a model_index.json says: `pipeline_class` and `settings` (see `FoundSystem`). A folder that others made has
    no settings of its own, perhaps not even the file. Raises UserError for a class or value that cannot be.
    """
    values = read_json(path) if path.is_file() else {}
    kinds = {
        "guidance": (_GUIDANCE, int | float, "a number"),
        "masked": (_MASKED, bool, "true or false"),
        "zero_empty": (_ZERO_EMPTY, bool, "true or false"),
    }
    settings = {}
    for name, (key, kind, what) in kinds.items():
        if key in values:
            value = values[key]
            if not isinstance(value, kind) or (name == "guidance" and isinstance(value, bool)):
                raise UserError(f"{path}: {key}={value!r} is not {what}")
            settings[name] = float(value) if name == "guidance" else value
    if SETTING in values:
        settings["branch_towers"] = branch_towers(values[SETTING], str(path))
    return {"pipeline_class": _class_in(path, values.get("_class_name")), "settings": settings}


def branch_towers(value: Any, where: str) -> tuple[Tower, ...]:
    """The text encoders of a branch as `_bdm_branch_towers` has them, in the order in which their states are joined:
    [{"encoder": "branch_text_encoder", "layer": 1, "pooled": false}, ...], of which `layer` (counted from the last, 1)
    and `pooled` (true, "projected", "raw"; see `Tower`) may be left out. Raises UserError, beginning with `where`.
    """
    wrong = UserError(f'{where}: {SETTING}: expected a list as in [{{"encoder": "branch_text_encoder", "layer": 2}}]')
    if not isinstance(value, list) or not value or not all(isinstance(one, dict) for one in value):
        raise wrong
    encoders = {tower.encoder for family in families.FAMILIES.values() for tower in family.branch_towers}
    towers = []
    for one in value:
        if strange := sorted(one.keys() - {"encoder", "layer", "pooled"}):
            raise unknown(f"{where}: {SETTING}: field", strange[0], ("encoder", "layer", "pooled"))
        encoder, layer, pooled = one.get("encoder"), one.get("layer", 1), one.get("pooled", False)
        if encoder not in encoders:
            raise unknown(f"{where}: {SETTING}: text encoder of a branch", str(encoder), encoders)
        if type(layer) is not int or layer < 1:
            raise UserError(f"{where}: {SETTING}: layer={layer!r} of {encoder}: a number from 1, the last layer, on")
        if type(pooled) is not bool and pooled not in _POOLED:
            raise UserError(f"{where}: {SETTING}: pooled={pooled!r} of {encoder}: true, false, {' or '.join(_POOLED)}")
        if any(tower.encoder == encoder for tower in towers):
            raise UserError(f"{where}: {SETTING}: {encoder} is there twice")
        towers.append(Tower(encoder, families.tokenizer_of(encoder), layer, pooled=pooled))
    return tuple(towers)


def tower_json(tower: Tower) -> dict[str, Any]:
    """A text encoder as `branch_towers` reads it."""
    return {"encoder": tower.encoder, "layer": tower.layer, "pooled": tower.pooled}


def _class_in(path: Path, name: Any) -> str | None:
    """The class that a model_index.json names. Raises UserError for one that none of our families is like."""
    known = {family.pipeline_class for family in families.FAMILIES.values()}
    if name is None or (isinstance(name, str) and (name in known or _LIKE_SD.fullmatch(name))):
        return name
    for family in (families.SDXL, families.KOLORS):
        if isinstance(name, str) and name.startswith(family.pipeline_class.removesuffix("Pipeline")):
            return family.pipeline_class
    which = name if isinstance(name, str) else json.dumps(name)
    raise UserError(f"{path}: {shown(which)}, which this library does not have; it has {', '.join(sorted(known))}")
