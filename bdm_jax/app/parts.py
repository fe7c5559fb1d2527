"""Which networks and plug-ins draw: the flags that name them, reading them, and what an image records of them."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, make_dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from bdm_jax.app.metadata import PARTS, digest
from bdm_jax.app.spec import (
    parse_blend,
    parse_control,
    parse_embedding,
    parse_image_prompt,
    parse_spec,
    rewritten,
)
from bdm_jax.app.tags import find_loras, written
from bdm_jax.command_line import ModelPath, OptionalModelPath
from bdm_jax.errors import UserError, unknown
from bdm_jax.formats.hub import is_remote
from bdm_jax.images.decode import read_image
from bdm_jax.paths import DEMO, no_such
from bdm_jax.systems.families import flags
from bdm_jax.systems.fetch import local, local_blended, local_parts, recorded, remote_name
from bdm_jax.text.tags import LoraTag

if TYPE_CHECKING:
    from bdm_jax.plugins.controls import Control
    from bdm_jax.plugins.image_prompts import ImagePrompt
    from bdm_jax.systems.pipeline import BridgePipeline

# Flags that name files in texts of their own; those whose value names a picture, the last of its paths.
_PLUGINS = ("blend", "lora", "branch_lora", "embedding", "branch_embedding", "control", "adapter", "image_prompt")
_PICTURED = {"control": parse_control, "adapter": parse_control, "image_prompt": parse_image_prompt}


@dataclass(frozen=True)
class _Model:
    model: ModelPath = DEMO
    """Model: a pipeline folder, or a single file of UNet, VAE and text encoder; here, or by its name on a hub
    (OWNER/NAME[@REVISION][:FILE]) or its link, as all models and plug-ins."""
    backbone: OptionalModelPath = None
    """Another English model in place of the model's own: a pipeline folder or a single file."""


# A flag for each network that the families of systems have.
_Networks = make_dataclass(
    "_Networks",
    [(name, Annotated[OptionalModelPath, tyro.conf.arg(help=text)], None) for name, text in flags().items()],
    bases=(_Model,),
    frozen=True,
)


@dataclass(frozen=True)
class Parts(_Networks):
    """Which networks draw."""

    variant: str | None = None
    """Which of a folder's weight files to read, as in fp16; of a part that is named by itself where it has it."""
    blend: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A backbone to blend in: MODEL:WEIGHT, or MODEL,BASE:WEIGHT for what it has over its base. May be given again."""
    lora: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A LoRA for the backbone: FILE[:STRENGTH[:TEXT_STRENGTH]]. May be given again, as all of these."""
    lora_dir: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """Where the LoRAs lie that prompts name, as in <lora:NAME:0.8>: files of that name, also in folders within."""
    branch_lora: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A LoRA that changes the branch and its text encoder."""
    embedding: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A word of textual inversion for the English prompt: FILE, whose name is the word, or FILE=TOKEN for another."""
    branch_embedding: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A word of textual inversion for the branch's prompt."""
    control: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A ControlNet: NETWORK,MAP[,strength=1][,start=0][,end=1]; with from=canny (line, tile, blur, luminance) the map
    is made of a picture."""
    adapter: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A T2I-Adapter, with its map: as a ControlNet."""
    image_prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A picture to draw after, by an IP-Adapter: ADAPTER,VISION,PICTURE[,strength=1], VISION a CLIP vision tower."""

    text_weights: Literal["int8"] | None = None
    """Keep the text encoders' matrices in int8: a quarter of fp32's memory, nearly the same pictures."""

    def check(self) -> None:
        """Raises UserError for what is no such flag's value, and neither a file nor such a name as may be elsewhere."""
        paths = [parse_spec(text).path for text in (*self.lora, *self.branch_lora)]
        paths += [parse_embedding(text)[0] for text in (*self.embedding, *self.branch_embedding)]
        paths += [
            path for name, parse in _PICTURED.items() for text in getattr(self, name) for path in parse(text)[:-1]
        ]
        paths += [path for text in self.blend for path in parse_blend(text)[:2] if path is not None]
        if not os.path.exists(self.model) and not is_remote(self.model):
            raise no_such(self.model, "model folder")
        for path in paths:
            if not os.path.exists(path) and not is_remote(path):  # also for names that are too long to exist
                raise UserError(f"{path}: no such file or folder")

    def fetched(self) -> "Parts":
        """These, with what lies on a hub or behind a link as paths here, fetched where it was not yet.

        Raises UserError or FileError, one line, for what cannot be had.
        """
        given = {name: getattr(self, name) for name in flags()}
        model, backbone, networks = local_parts(self.model, self.backbone, given, self.variant)
        plugins = {
            name: tuple(rewritten(name, text, partial(_fetch, name)) for text in getattr(self, name))
            for name in _PLUGINS
        }
        return replace(self, model=model, backbone=backbone, **networks, **plugins)

    def with_tags(self, tags: Sequence[LoraTag]) -> "Parts":
        """These, with the LoRAs that prompts name. Raises UserError for those that --lora-dir lacks."""
        return replace(self, lora=(*self.lora, *written(find_loras(self.lora_dir, tags)))) if tags else self

    def names(self) -> dict[str, str]:
        """What an image records about them: names without their folders, of what lies on a hub with its commit."""
        here = self.fetched()
        given = {name: getattr(here, name) for name in PARTS if getattr(here, name) not in (None, ())}
        return {name: _name(name, part) for name, part in given.items()}

    def load(self, dtype: str = "auto") -> "BridgePipeline":
        """Read them, their weights as `dtype` (of `Sampling`). Raises UserError or FileError that names what is missing
        or does not fit.
        """
        self = self.fetched()
        from bdm_jax.plugins.install import with_blend, with_embeddings, with_loras
        from bdm_jax.plugins.inversion import load_embeddings
        from bdm_jax.systems.pipeline import BridgePipeline

        given = {name: getattr(self, name) for name in ("backbone", "variant", *flags())}
        changed = any((self.blend, self.lora, self.branch_lora, self.embedding, self.branch_embedding))
        given["text_weights"] = None if changed else self.text_weights  # plug-ins change them before
        pipeline = BridgePipeline.from_pretrained(self.model, None if dtype == "auto" else dtype, **given)
        for other, base, weight in map(parse_blend, self.blend):
            pipeline = with_blend(pipeline, other, weight, base)
        for target, specs in (("unet", self.lora), ("branch", self.branch_lora)):
            if specs:
                pipeline = with_loras(pipeline, [*map(parse_spec, specs)], target if target == "branch" else None)
        for source, texts in (("backbone", self.embedding), ("branch", self.branch_embedding)):
            if texts:
                found = [one for text in texts for one in load_embeddings(*parse_embedding(text))]
                pipeline = with_embeddings(pipeline, found, source)
        return pipeline.with_int8_text() if self.text_weights else pipeline

    def load_controls(self) -> list["Control | ImagePrompt"]:
        """Read the ControlNets, T2I-Adapters and IP-Adapters with their pictures. Raises UserError or FileError."""
        here = self.fetched()
        found = [*map(load_control, here.control)]
        found += [load_control(text, kind="t2i_adapter") for text in here.adapter]
        return [*found, *map(load_image_prompt, here.image_prompt)]


def load_control(text: str, dtype: str | None = None, kind: str = "controlnet") -> "Control":
    """A control as it is written on the command line (see `spec.parse_control`); with `from`, its map is made of a
    picture. `kind`: controlnet or t2i_adapter.
    """
    from bdm_jax.plugins.controls import Control
    from bdm_jax.systems.components import load_component

    network, picture, values = parse_control(text)
    hint = read_image(picture)
    if (maker := values.pop("from", None)) is not None:
        from bdm_jax.plugins.hints import HINTS  # OpenCV, where it is asked for

        if maker not in HINTS:
            raise unknown("map", maker, HINTS)
        hint = HINTS[maker](hint)
    return Control(load_component(network, dtype, kind), hint, **values, name=recorded(network))


def load_image_prompt(text: str, dtype: str | None = None) -> "ImagePrompt":
    """An image prompt as it is written on the command line (see `spec.parse_image_prompt`)."""
    from bdm_jax.plugins.image_prompts import ImagePrompt, read_adapter
    from bdm_jax.systems.components import load_component

    path, vision, picture, values = parse_image_prompt(text)
    tower = load_component(vision, dtype, "image_encoder")
    return ImagePrompt(read_adapter(path), tower, read_image(picture), **values, name=recorded(path))


def _fetch(kind: str, path: str, place: int) -> str:
    """The path of a plug-in's file or network, the `place`th of its text; a picture's stays as it is."""
    if kind in _PICTURED:
        parts = (
            ("", "image_encoder") if kind == "image_prompt" else ({"adapter": "t2i_adapter"}.get(kind, "controlnet"),)
        )
        return str(local(path, parts[place] or None)) if place < len(parts) else path
    return str(local_blended(path) if kind == "blend" else local(path))


def _name(kind: str, part: Path | str | tuple[str, ...]) -> str:
    """What an image records about a part: its name without folders; of a plug-in's map or image also a digest."""
    if isinstance(part, Path):
        return remote_name(part) or part.resolve().name
    if isinstance(part, str):
        return part
    names = []
    for text in part:
        parse = _PICTURED.get(kind)
        seen = [f"map={digest(read_image(parse(text)[-2]))[:16]}"] if parse else []
        names.append(",".join([rewritten(kind, text, lambda path, _: recorded(path)), *seen]))
    return " + ".join(names)
