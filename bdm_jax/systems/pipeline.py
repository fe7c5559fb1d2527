"""One whole text-to-image system: a diffusers-style folder on disk, parts by name in memory.

Which parts there are its family says (see `families`). In the folder each part has a folder of its name, beside
`scheduler` and model_index.json; networks lie in safetensors under the names that diffusers and transformers read.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from bdm_jax.diffusion.schedule import Schedule
from bdm_jax.errors import UserError, unknown
from bdm_jax.formats.files import write_json
from bdm_jax.models.functional import is_int8
from bdm_jax.systems import families
from bdm_jax.systems.components import Component, in_dtype, save_component
from bdm_jax.systems.families import Family
from bdm_jax.systems.fetch import local_parts
from bdm_jax.systems.folder import find_parts, load_parts, scheduler_values
from bdm_jax.systems.index import INDEX, SCHEDULE, model_index
from bdm_jax.systems.int8 import to_int8
from bdm_jax.text import readers
from bdm_jax.text.tokenizer import Tokenizer
from bdm_jax.text.towers import SETTING, Reader, Tower

_FEWEST_WORDS = 0.9  # of the table: tables are padded, or have a few words more than their tokenizer


@dataclass(frozen=True, eq=False)
class BridgePipeline:
    """The parts of one system, checked against the row of its family. Without a bridge it is a bare backbone.

    Each part is also an attribute (`pipeline.unet`), None where the system has none of that name.

    Attributes:
      family: its row in `families`.
      parts: networks (`Component`) and tokenizers by name.
      schedule: the noise schedule; the family's own where None is given.
      guidance: the scale that its images look best at; the family's where None is given.
      masked: whether its branch was trained with the padding of its prompts hidden.
      zero_empty: whether an empty prompt of the backbone is zeros; the family's habit where None is given.
      branch_towers: which text encoders read the branch's prompt, in the order in which their states are joined, from
        which layer, and what the pooled text is (see `index.branch_towers`); the family's where None.

    The last four are kept in model_index.json. Raises UserError for parts that are missing or do not fit.
    """

    family: Family
    parts: Mapping[str, Component | Tokenizer]
    schedule: Schedule | None = None
    guidance: float | None = None
    masked: bool = False
    zero_empty: bool | None = None
    branch_towers: tuple[Tower, ...] | None = None

    def __post_init__(self):
        family = self.family
        usual = {"guidance": family.guidance, "zero_empty": family.zero_empty}
        usual |= {"schedule": family.default_schedule()} if self.schedule is None else {}
        for name, value in usual.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        known = family.parts
        for name in self.parts:
            if name not in known:
                raise unknown(f"part of a system of the family {family.title}", name, known)
        object.__setattr__(self, "parts", {name: self.parts[name] for name in known if name in self.parts})
        self._check_parts()
        self._check_widths()
        for tower in family.towers:
            if tower.encoder in self.parts:
                self._check_vocabulary(tower.tokenizer, tower.encoder)

    def __getattr__(self, name: str) -> Component | Tokenizer | None:
        parts = self.__dict__.get("parts", {})
        if name in parts:
            return parts[name]
        if not name.startswith("_") and (name in families.names() or name in self.family.parts):
            return None
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    @property
    def networks(self) -> dict[str, Component]:
        """The networks by name."""
        return {name: self.parts[name] for name in self.family.networks if name in self.parts}

    @property
    def factor(self) -> int:
        """Pixels per latent, on each side; 1 for a system without an autoencoder, whose latents are pixels."""
        return 1 if self.vae is None else self.vae.config.factor

    @property
    def tokenizers(self) -> dict[str, Tokenizer]:
        """The tokenizers by name."""
        return {name: self.parts[name] for name in self.family.tokenizers if name in self.parts}

    @property
    def readers(self) -> dict[str, Reader]:
        """Who reads which text, by source: those whose text encoders are there."""
        found = {}
        for reader in self.family.readers:
            if reader.source == "branch" and self.branch_towers is not None:
                reader = replace(reader, towers=self.branch_towers)
            if all(tower.encoder in self.parts for tower in reader.towers):
                zero_empty = self.zero_empty if reader.source == "backbone" else reader.zero_empty
                found[reader.source] = replace(reader, zero_empty=zero_empty)
        return found

    def replace(self, **changes: Any) -> "BridgePipeline":
        """This system with other parts, or fields, by name; a part given as None is taken away."""
        fields = {name: changes.pop(name) for name in [*changes] if name in self.__dataclass_fields__}
        parts = {**fields.pop("parts", self.parts), **changes}
        return replace(self, parts={name: part for name, part in parts.items() if part is not None}, **fields)

    def in_dtype(self, dtype: str) -> "BridgePipeline":
        """This system with the weights of its networks, which they compute in too, as float32, bfloat16 or float16."""
        return self.replace(**{name: in_dtype(component, dtype) for name, component in self.networks.items()})

    def without_bridge(self) -> "BridgePipeline":
        """The bare backbone."""
        bridge = (name for name in self.family.bridge_names if name in self.parts)
        return self.replace(branch_towers=None, **dict.fromkeys(bridge))

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        dtype: str | None = None,
        *,
        backbone: str | Path | None = None,
        variant: str | None = None,
        text_weights: Literal["int8"] | None = None,
        **networks: str | Path | None,
    ) -> "BridgePipeline":
        """Read a system: a pipeline folder, with other parts in place of its own.

        Args:
          model: a pipeline folder, or a single file that holds all of a backbone's networks (a bare backbone, then);
            like all that follow also a name on a hub, or a link (see `systems.fetch`).
          dtype: the weights' type in memory: by default what the device can (`components.default_dtype`).
          backbone: a pipeline folder or single file whose networks (those it has) are taken.
          variant: which of a folder's weight files to take ("fp16"), where it has several.
          text_weights: "int8" keeps the text encoders' matrices so (see `int8`), from their reading on.
          networks: by name (vae, text_encoder, branch, branch_text_encoder, ...), a component folder or a file.

        Raises UserError or FileError that names the folder, file or weight that is missing or does not fit.
        """
        known = [part.name for part in families.parts() if part.configs and part.name in families.names()]
        for name in networks:
            if name == "torch_dtype":
                raise UserError("unknown option 'torch_dtype': it is called dtype here, as in dtype='float16'")
            if name not in known:
                raise unknown("part of a system", name, known)
        for name, path in {"model": model, "backbone": backbone, **networks}.items():
            if not isinstance(path, str | Path) and (path is not None or name == "model"):
                raise UserError(f"{name} {path!r}: expected the path of a folder or file")
        model, backbone, given = local_parts(model, backbone, networks, variant)
        found = find_parts(model, backbone, given, variant)
        return cls(*load_parts(model, found, dtype, text_weights), **found.settings)

    def save_pretrained(
        self, folder: str | Path, dtype: str = "float16", metadata: Mapping[str, str] | None = None
    ) -> None:
        """Write a folder that `from_pretrained` here and, component by component, diffusers' and transformers' read.

        `metadata` goes into the header of every weights file. Raises UserError, before anything is written, for a
        system with added tokens (textual inversion), which such a folder cannot hold.
        """
        folder = Path(folder)
        for tokenizer in self.tokenizers.values():
            if tokenizer.added:
                names = ", ".join(tokenizer.added)
                raise UserError(f"{folder}: the added tokens {names} cannot be saved; save the system without them")
        for name, (_, params) in self.networks.items():
            if any(map(is_int8, params.values())):
                raise UserError(f"{folder}: a {name} in int8 cannot be saved; save the system without")
        for name, component in self.networks.items():
            save_component(folder / name, *component, dtype, metadata)
        for name, tokenizer in self.tokenizers.items():
            tokenizer.save_pretrained(folder / name)
        write_json(folder / "scheduler" / SCHEDULE, scheduler_values(self.family, self.schedule))
        configs = {name: component.config for name, component in self.networks.items()}
        prompts = self.masked, self.zero_empty, self.branch_towers
        write_json(folder / INDEX, model_index(self.family, configs, self.guidance, *prompts))

    def __call__(self, prompt: str | Sequence[str], **options: Any) -> Any:
        """Draw: `pipeline("红灯笼", seed=0).images[0]`; options and result are those of `app.drawing.draw`."""
        if not _draw:
            raise TypeError("a pipeline that draws when it is called comes from: from bdm_jax import BridgePipeline")
        return _draw[-1](self, prompt, **options)

    def with_int8_text(self) -> "BridgePipeline":
        """This system with its text encoders' matrices in int8 (see `int8`): the last change before it draws.

        Plug-ins that change a text encoder come before it. Raises UserError where qwix is not installed.
        """
        encoders = [name for name in self.family.text_encoders if name in self.parts]
        return self.replace(**{name: to_int8(self.parts[name]) for name in encoders})

    def _check_parts(self) -> None:
        family = self.family
        if missing := [name for name in family.backbone_names if name not in self.parts]:
            raise UserError(f"a system of the family {family.title} lacks: {', '.join(missing)}")
        missing = [name for name in family.bridge_names if name not in self.parts]
        if 0 < len(missing) < len(family.bridge):
            raise UserError(f"a bridge needs {', '.join(family.bridge_names)}; missing: {', '.join(missing)}")
        for name, component in self.networks.items():
            if not isinstance(component, Component):
                raise UserError(f"{name} {component!r:.60}: expected a Component, as load_component gives")
            kinds = family.parts[name].configs
            if not isinstance(component.config, kinds):
                expected = " or ".join(kind.__name__ for kind in kinds)
                raise UserError(f"{name}: {type(component.config).__name__} in place of {expected}")

    def _check_widths(self) -> None:
        """Components that are each in order may still not belong together."""
        own = {tower.encoder for tower in self.family.branch_towers}
        for tower in self.branch_towers or ():
            if tower.encoder not in own:
                raise UserError(f"{SETTING}: a branch of {self.family.title} has no {tower.encoder}")
        unet, pairs = self.unet.config, []
        if self.vae is not None:
            pairs.append(("unet", unet.in_channels, "latent channels", "vae", self.vae.config.latent_channels))
        for source, reader in self.readers.items():
            readers.check(reader, self.parts)
            name = "branch" if source == "branch" else "unet"
            config, encoders = self.parts[name].config, " and ".join(tower.encoder for tower in reader.towers)
            pairs.append((name, config.text_dim, "text width", encoders, readers.width(reader, self.parts)))
            if config.has_addition:
                width = readers.pooled_width(reader, self.parts)
                pairs.append((name, config.pooled_dim, "width of the pooled text", encoders, width))
        if self.branch is not None:
            skips = self.branch.config.skip_channels
            pairs.append(("branch", skips, "skip channels", "unet", unet.skip_channels))
        for name, value, what, other, other_value in pairs:
            if value != other_value:
                raise UserError(f"{name} and {other} do not belong together: {what} {value} and {other_value}")

    def _check_vocabulary(self, tokenizer: str, encoder: str) -> None:
        """JAX reads past the end of an embedding table without a word; words of another vocabulary mean others."""
        ours, sizes = self.parts[tokenizer], self.parts[encoder].config
        places = getattr(sizes, "max_position_embeddings", ours.length)
        if not _FEWEST_WORDS * sizes.vocab_size <= ours.vocab_size <= sizes.vocab_size or ours.length > places:
            raise UserError(
                f"{tokenizer} and {encoder} do not belong together: {ours.vocab_size} tokens in windows of "
                f"{ours.length}, but embeddings of {sizes.vocab_size} tokens at {places} positions"
            )


_draw: list[Callable] = []


def draws_when_called(draw: Callable) -> Callable:
    """Decorator: what a call of a pipeline does. Drawing lies on a floor above this one, and registers itself here."""
    _draw[:] = [draw]
    return draw
