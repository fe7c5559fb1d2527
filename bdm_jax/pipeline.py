"""One whole text-to-image system: a diffusers-style folder on disk, named components in memory.

Folder: unet, vae, text_encoder, tokenizer, scheduler and, for a bridge, branch, branch_text_encoder, branch_tokenizer,
with model_index.json beside them. Networks lie in safetensors under the names that diffusers and transformers read.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bdm_jax.diffusion import schedule as schedules
from bdm_jax.diffusion.schedule import Schedule
from bdm_jax.errors import UserError, unknown
from bdm_jax.models.config import (
    BranchConfig,
    CLIPTextConfig,
    Config,
    RobertaConfig,
    UNetConfig,
    VAEConfig,
    from_json,
    to_json,
)
from bdm_jax.models.functional import Params, abstract
from bdm_jax.text.tokenizer import Tokenizer
from convert.files import (
    DIFFUSERS_WEIGHTS,
    TRANSFORMERS_WEIGHTS,
    read_json,
    read_weights,
    write_json,
    write_safetensors,
)
from convert.keys import table_for
from convert.layouts import tree_from_torch, tree_to_torch

DTYPES = ("float32", "bfloat16", "float16")

_NETWORKS = {"unet": UNetConfig, "vae": VAEConfig, "text_encoder": CLIPTextConfig}
_BRIDGE_NETWORKS = {"branch": BranchConfig, "branch_text_encoder": RobertaConfig}
_SCHEDULE = Path("scheduler") / "scheduler_config.json"
_INDEX = "model_index.json"
_GUIDANCE = "_bdm_guidance"


class Component(NamedTuple):
    """One network: its sizes and its weights."""

    config: Config
    params: Params


@dataclass(frozen=True)
class BridgePipeline:
    """The components of one system. Without the three branch parts it is a bare backbone, which reads English only.

    `guidance` is the scale that its pictures look best at, kept in model_index.json.
    """

    unet: Component
    vae: Component
    text_encoder: Component
    tokenizer: Tokenizer
    schedule: Schedule
    branch: Component | None = None
    branch_text_encoder: Component | None = None
    branch_tokenizer: Tokenizer | None = None
    guidance: float = 7.5

    def __post_init__(self):
        parts = {name: getattr(self, name) for name in (*_BRIDGE_NETWORKS, "branch_tokenizer")}
        missing = [name for name, part in parts.items() if part is None]
        if 0 < len(missing) < len(parts):
            raise UserError(f"a bridge needs {', '.join(parts)}; missing: {', '.join(missing)}")
        for name, kind in (_NETWORKS | _BRIDGE_NETWORKS).items():
            component = getattr(self, name)
            if component is not None and not isinstance(component.config, kind):
                raise UserError(f"{name}: {type(component.config).__name__} in place of {kind.__name__}")
        self._check_widths()
        self._check_words("tokenizer", "text_encoder")
        if self.branch is not None:
            self._check_words("branch_tokenizer", "branch_text_encoder")

    @classmethod
    def from_pretrained(cls, folder: str | Path, dtype: str | None = None) -> "BridgePipeline":
        """Read a pipeline folder.

        `dtype` is the weights' type in memory: by default float32 on a CPU and bfloat16 on an accelerator.
        Raises UserError or FileError that names the folder, file or weight that is missing or does not fit.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise UserError(f"{folder}: no such model folder")
        names = [*_NETWORKS, "tokenizer"]
        if any((folder / name).is_dir() for name in (*_BRIDGE_NETWORKS, "branch_tokenizer")):
            names += [*_BRIDGE_NETWORKS, "branch_tokenizer"]
        if missing := [name for name in (*names, "scheduler") if not (folder / name).is_dir()]:
            raise UserError(f"{folder}: not a whole model folder; missing: {', '.join(missing)}")
        parts: dict[str, Any] = {
            name: Tokenizer.from_pretrained(folder / name)
            if name.endswith("tokenizer")
            else load_component(folder / name, dtype)
            for name in names
        }
        return cls(**parts, schedule=_load_schedule(folder / _SCHEDULE), guidance=_load_guidance(folder / _INDEX))

    def save_pretrained(self, folder: str | Path, dtype: str = "float16") -> None:
        """Write a folder that `from_pretrained` here and, component by component, diffusers' and transformers' read."""
        folder = Path(folder)
        for name in (*_NETWORKS, *_BRIDGE_NETWORKS):
            if component := getattr(self, name):
                save_component(folder / name, *component, dtype)
        for name in ("tokenizer", "branch_tokenizer"):
            if tokenizer := getattr(self, name):
                tokenizer.save_pretrained(folder / name)
        write_json(folder / _SCHEDULE, schedules.to_json(self.schedule))
        write_json(folder / _INDEX, self._index())

    def _index(self) -> dict[str, Any]:
        """model_index.json; to diffusers, the backbone is a StableDiffusionPipeline, names with _ are nothing."""
        return {
            "_class_name": "StableDiffusionPipeline",
            _GUIDANCE: self.guidance,
            "feature_extractor": [None, None],
            "image_encoder": [None, None],
            "requires_safety_checker": False,
            "safety_checker": [None, None],
            "scheduler": ["diffusers", "DDIMScheduler"],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"],
        }

    def _check_widths(self) -> None:
        """Components that are each in order may still not belong together."""
        unet, vae = self.unet.config, self.vae.config
        pairs = [
            ("unet", unet.in_channels, "latent channels", "vae", vae.latent_channels),
            ("unet", unet.cross_attention_dim, "text width", "text_encoder", self.text_encoder.config.hidden_size),
        ]
        if self.branch is not None:
            branch = self.branch.config
            width = self.branch_text_encoder.config.hidden_size
            pairs += [
                ("branch", branch.cross_attention_dim, "text width", "branch_text_encoder", width),
                ("branch", branch.skip_channels, "skip channels", "unet", unet.skip_channels),
            ]
        for name, value, what, other, other_value in pairs:
            if value != other_value:
                raise UserError(f"{name} and {other} do not belong together: {what} {value} and {other_value}")

    def _check_words(self, tokenizer: str, tower: str) -> None:
        """JAX reads past the end of an embedding table without a word."""
        ours, sizes = getattr(self, tokenizer), getattr(self, tower).config
        if ours.vocab_size > sizes.vocab_size or ours.length > sizes.max_position_embeddings:
            raise UserError(
                f"{tokenizer} and {tower} do not belong together: {ours.vocab_size} words in windows of {ours.length}, "
                f"but embeddings of {sizes.vocab_size} words at {sizes.max_position_embeddings} places"
            )


def load_component(folder: str | Path, dtype: str | None = None) -> Component:
    """Read one network's folder: config.json and safetensors weights (one file, or shards with their index).

    Weights come as `dtype`, by default float32 on a CPU and bfloat16 on an accelerator, on JAX's default device.
    Raises UserError or FileError that names what is missing, unknown or misshaped.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such component folder")
    values = read_json(folder / "config.json")
    try:
        config = from_json(values)
    except (TypeError, ValueError) as error:
        raise UserError(f"{folder}: {error}") from error
    path, tensors = read_weights(folder)
    tree = tree_from_torch(tensors, abstract(config), str(path), table_for(values))
    target = _dtype(dtype or default_dtype())
    return Component(config, {key: jax.device_put(np.array(value, target, order="C")) for key, value in tree.items()})


def save_component(
    folder: str | Path,
    config: Config,
    params: Params,
    dtype: str = "float16",
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write one network's folder as diffusers or transformers reads it, weights first, config.json last.

    `metadata` goes into the header of the weights file. Raises UserError when `params` are not those of `config`, or
    when a finite weight is too large for `dtype`.
    """
    folder, target = Path(folder), _dtype(dtype)
    if wrong := sorted(abstract(config).keys() ^ params.keys()):
        raise UserError(f"{folder}: weights do not fit the config: {', '.join(wrong[:3])} ({len(wrong)} in all)")
    values, name = to_json(config), DIFFUSERS_WEIGHTS
    if isinstance(config, CLIPTextConfig | RobertaConfig):
        values, name = {**values, "dtype": dtype}, TRANSFORMERS_WEIGHTS
    tensors = tree_to_torch({key: _narrow(folder, key, np.asarray(value), target) for key, value in params.items()})
    write_safetensors(folder / name, tensors, {"format": "pt", **(metadata or {})})
    write_json(folder / "config.json", values)


def default_dtype() -> str:
    """The type of weights and computation unless asked: float32 on a CPU, bfloat16 on an accelerator."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def _dtype(name: str) -> np.dtype:
    if name not in DTYPES:
        raise unknown("dtype", name, DTYPES)
    return jnp.dtype(name)


def _narrow(folder: Path, key: str, array: np.ndarray, target: np.dtype) -> np.ndarray:
    with np.errstate(over="ignore"):
        narrow = array.astype(target)
    if not np.isfinite(narrow.astype(np.float32)).all() and np.isfinite(array.astype(np.float32)).all():
        raise UserError(f"{folder}: {key} has values beyond {target.name}'s range; save as bfloat16 or float32")
    return narrow


def _load_schedule(path: Path) -> Schedule:
    values = read_json(path)
    try:
        return schedules.from_json(values)
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: {error}") from error


def _load_guidance(path: Path) -> float:
    """A folder that others made has no guidance of its own, perhaps not even the file."""
    value = read_json(path).get(_GUIDANCE, BridgePipeline.guidance) if path.is_file() else BridgePipeline.guidance
    if not isinstance(value, int | float):
        raise UserError(f"{path}: {_GUIDANCE}={value!r} is not a number")
    return float(value)
