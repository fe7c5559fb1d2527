"""One whole text-to-image system: a diffusers-style folder on disk, named components in memory.

Folder: unet, vae, text_encoder, tokenizer, scheduler and, for a bridge, branch, branch_text_encoder, branch_tokenizer,
with model_index.json beside them. Networks lie in safetensors under the names that diffusers and transformers read.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bdm_jax.diffusion import schedule as schedules
from bdm_jax.diffusion.schedule import Schedule
from bdm_jax.errors import UserError
from bdm_jax.formats.files import read_json, write_json
from bdm_jax.models.config import TinyVAEConfig, VAEConfig, to_json
from bdm_jax.models.functional import is_int8
from bdm_jax.paths import TOKENIZERS
from bdm_jax.systems.components import KINDS, Component, find, pick_network, save_component
from bdm_jax.systems.int8 import to_int8
from bdm_jax.text.tokenizer import Tokenizer

_BACKBONE_NETWORKS = ("unet", "vae", "text_encoder")
_BRIDGE_NETWORKS = ("branch", "branch_text_encoder")
NETWORKS = (*_BACKBONE_NETWORKS, *_BRIDGE_NETWORKS)
_SCHEDULE = "scheduler_config.json"
_INDEX = "model_index.json"
_GUIDANCE, _MASKED = "_bdm_guidance", "_bdm_masked"
# For networks that come without their tokenizer: words -> (bundled folder, tokens in a window).
_BUNDLED = {49408: (TOKENIZERS / "clip", 77), 21128: (TOKENIZERS / "chinese", 52)}


@dataclass(frozen=True)
class BridgePipeline:
    """The components of one system. Without the three branch parts it is a bare backbone, which reads English only.

    `guidance` is the scale that its pictures look best at, `masked` whether its branch was trained with the padding of
    its prompts hidden; both are kept in model_index.json.
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
    masked: bool = False

    def __post_init__(self):
        parts = {name: getattr(self, name) for name in (*_BRIDGE_NETWORKS, "branch_tokenizer")}
        missing = [name for name, part in parts.items() if part is None]
        if 0 < len(missing) < len(parts):
            raise UserError(f"a bridge needs {', '.join(parts)}; missing: {', '.join(missing)}")
        for name in NETWORKS:
            component = getattr(self, name)
            if component is not None and not isinstance(component.config, KINDS[name]):
                expected = " or ".join(kind.__name__ for kind in KINDS[name])
                raise UserError(f"{name}: {type(component.config).__name__} in place of {expected}")
        self._check_widths()
        self._check_vocabulary("tokenizer", "text_encoder")
        if self.branch is not None:
            self._check_vocabulary("branch_tokenizer", "branch_text_encoder")

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        dtype: str | None = None,
        *,
        backbone: str | Path | None = None,
        vae: str | Path | None = None,
        text_encoder: str | Path | None = None,
        branch: str | Path | None = None,
        branch_text_encoder: str | Path | None = None,
        variant: str | None = None,
    ) -> "BridgePipeline":
        """Read a system: a pipeline folder, with other parts in place of its own.

        Args:
          model: a pipeline folder, or a single file that holds UNet, VAE and text tower (a bare backbone, then).
          dtype: the weights' type in memory: by default float32 on a CPU and bfloat16 on an accelerator.
          backbone: a pipeline folder or single file whose UNet, VAE and text tower (those it has) are taken.
          vae, text_encoder, branch, branch_text_encoder: a component folder or a file.
          variant: which of a folder's weight files to take ("fp16"), where it has several.

        Raises UserError or FileError that names the folder, file or weight that is missing or does not fit.
        """
        parts = network_parts(Path(model), variant)
        if backbone is not None:
            parts = _replace_backbone(parts, network_parts(Path(backbone), variant))
        one = {"vae": vae, "text_encoder": text_encoder, "branch": branch, "branch_text_encoder": branch_text_encoder}
        for name, path in one.items():
            if path is not None:
                parts |= _tokenizer_beside(name, Path(path)) | {name: pick_network(find(path, variant), path, name)}
        return _assemble(Path(model), parts, dtype)

    def save_pretrained(
        self, folder: str | Path, dtype: str = "float16", metadata: Mapping[str, str] | None = None
    ) -> None:
        """Write a folder that `from_pretrained` here and, component by component, diffusers' and transformers' read.

        `metadata` goes into the header of every weights file. Raises UserError, before anything is written, for a
        system with added tokens (textual inversion), which such a folder cannot hold.
        """
        folder = Path(folder)
        for tokenizer in (self.tokenizer, self.branch_tokenizer):
            if tokenizer is not None and tokenizer.added:
                names = ", ".join(tokenizer.added)
                raise UserError(f"{folder}: the added tokens {names} cannot be saved; save the system without them")
        parts = {name: part for name in NETWORKS if (part := getattr(self, name))}
        for name, (_, params) in parts.items():
            if any(map(is_int8, params.values())):
                raise UserError(f"{folder}: a {name} in eight bits cannot be saved; save the system without")
        for name, component in parts.items():
            save_component(folder / name, *component, dtype, metadata)
        for name in ("tokenizer", "branch_tokenizer"):
            if tokenizer := getattr(self, name):
                tokenizer.save_pretrained(folder / name)
        write_json(folder / "scheduler" / _SCHEDULE, schedules.to_json(self.schedule))
        write_json(folder / _INDEX, model_index(self.vae.config, self.guidance, self.masked))

    def with_int8_text(self) -> "BridgePipeline":
        """This system with its text towers' matrices in eight bits (see `int8`): the last change before it draws.

        Plug-ins that change a tower come before it. Raises UserError where qwix is not installed.
        """
        towers = [name for name in ("text_encoder", "branch_text_encoder") if getattr(self, name)]
        return replace(self, **{name: to_int8(getattr(self, name)) for name in towers})

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

    def _check_vocabulary(self, tokenizer: str, tower: str) -> None:
        """JAX reads past the end of an embedding table without a word."""
        ours, sizes = getattr(self, tokenizer), getattr(self, tower).config
        if ours.vocab_size > sizes.vocab_size or ours.length > sizes.max_position_embeddings:
            raise UserError(
                f"{tokenizer} and {tower} do not belong together: {ours.vocab_size} words in windows of {ours.length}, "
                f"but embeddings of {sizes.vocab_size} words at {sizes.max_position_embeddings} places"
            )


def model_index(
    vae: VAEConfig | TinyVAEConfig, guidance: float = BridgePipeline.guidance, masked: bool = BridgePipeline.masked
) -> dict[str, Any]:
    """model_index.json; to diffusers, the backbone is a StableDiffusionPipeline, names with _ are nothing."""
    return {
        "_class_name": "StableDiffusionPipeline",
        _GUIDANCE: guidance,
        **({_MASKED: True} if masked else {}),
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", to_json(vae)["_class_name"]],
    }


def bundled_tokenizer(words: int) -> Tokenizer | None:
    """The tokenizer of a text tower with so many words, for towers that come without one; None where none fits."""
    if words not in _BUNDLED:
        return None
    folder, length = _BUNDLED[words]
    return Tokenizer.from_pretrained(folder, length)


def load_schedule(folder: Path) -> Schedule:
    """The noise schedule of a `scheduler` folder. Raises UserError or FileError that names its file."""
    values = read_json(folder / _SCHEDULE)
    try:
        return schedules.from_json(values)
    except (TypeError, ValueError) as error:
        raise UserError(f"{folder / _SCHEDULE}: {error}") from error


# What a system is put together from, by name: networks found but not yet in memory, a tokenizer's folder (None: the
# bundled one that fits the tower), a schedule.
_Parts = dict[str, Any]


def network_parts(model: Path, variant: str | None) -> _Parts:
    """Everything in a pipeline folder, a component folder or a file."""
    if not model.exists():
        raise UserError(f"{model}: no such model folder")
    if model.is_file() or (model / "config.json").is_file():
        found = find(model, variant)
        parts: _Parts = {**found, **({"tokenizer": None} if "text_encoder" in found else {})}
        prediction = found["unet"].prediction if "unet" in found else None
        if prediction is None and "text_encoder" in found:  # a whole SD1.x model that says nothing predicts epsilon
            prediction = "epsilon"
        return {**parts, **({"scheduler": Schedule(prediction_type=prediction)} if prediction else {})}
    names = NETWORKS
    parts = {
        name: pick_network(find(model / name, variant), model / name, name) for name in names if (model / name).is_dir()
    }
    tokenizers = ("tokenizer", "branch_tokenizer")
    parts |= {name: model / name for name in tokenizers if (model / name).is_dir()}
    if (model / "scheduler").is_dir():
        parts["scheduler"] = load_schedule(model / "scheduler")
    if not parts:
        raise UserError(f"{model}: not a whole model folder; missing: {', '.join((*names, *tokenizers, 'scheduler'))}")
    return {**parts, **_load_index(model / _INDEX)}


def _replace_backbone(parts: _Parts, others: _Parts) -> _Parts:
    """The English half of `others` in place of that of `parts`; a text tower brings its tokenizer."""
    english = {n: part for n, part in others.items() if not n.startswith("branch") and n not in ("guidance", "masked")}
    return {**parts, **english, "guidance": others.get("guidance", BridgePipeline.guidance)}


def _tokenizer_beside(tower: str, path: Path) -> _Parts:
    """The tokenizer that a text tower's folder holds or has beside it; None (a bundled one) where it has none."""
    if not tower.endswith("text_encoder"):
        return {}
    name = tower.replace("text_encoder", "tokenizer")
    files = ("tokenizer.json", "vocab.txt", "vocab.json")
    inside = path.is_dir() and any((path / file).is_file() for file in files)
    beside = path.parent / name if path.name == tower else path / name
    return {name: path if inside else beside if beside.is_dir() else None}


def _assemble(model: Path, parts: _Parts, dtype: str | None) -> BridgePipeline:
    for tower in ("text_encoder", "branch_text_encoder"):
        name = tower.replace("text_encoder", "tokenizer")
        if tower in parts and name in parts and parts[name] is None:
            parts[name] = bundled_tokenizer(parts[tower].config().vocab_size)
    names = (*_BACKBONE_NETWORKS, "tokenizer", "scheduler")
    bridge = (*_BRIDGE_NETWORKS, "branch_tokenizer")
    names += bridge if any(name in parts for name in bridge) else ()
    if missing := [name for name in names if parts.get(name) is None]:
        raise UserError(f"{model}: not a whole model folder; missing: {', '.join(missing)}")
    made: dict[str, Any] = {key: parts[key] for key in ("guidance", "masked") if key in parts}
    made["schedule"] = parts["scheduler"]
    for name in names:
        if name in NETWORKS:
            made[name] = parts[name].load(dtype)
        elif name != "scheduler":
            part = parts[name]
            made[name] = part if isinstance(part, Tokenizer) else Tokenizer.from_pretrained(part)
    return BridgePipeline(**made)


def _load_index(path: Path) -> _Parts:
    """A folder that others made has no settings of its own, perhaps not even the file."""
    values = read_json(path) if path.is_file() else {}
    guidance, masked = values.get(_GUIDANCE, BridgePipeline.guidance), values.get(_MASKED, False)
    if not isinstance(guidance, int | float):
        raise UserError(f"{path}: {_GUIDANCE}={guidance!r} is not a number")
    if not isinstance(masked, bool):
        raise UserError(f"{path}: {_MASKED}={masked!r} is neither true nor false")
    return {"guidance": float(guidance), "masked": masked}
