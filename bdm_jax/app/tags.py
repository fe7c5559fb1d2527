"""The LoRAs that prompts name (`text.tags`): which they are, and where they lie. No JAX."""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from bdm_jax.errors import UserError, unknown
from bdm_jax.plugins.spec import Spec
from bdm_jax.sampling.settings import Request, Sampling
from bdm_jax.text.tags import LoraTag, take_tags, without_folder

_TEXTS = ("prompt", "negative", "english", "english_negative")
_SUFFIXES = (".safetensors", ".pt", ".bin", ".ckpt")


def shared_tags(requests: Sequence[Request], settings: Sampling) -> tuple[LoraTag, ...]:
    """The LoRAs that the prompts of all requests name; none in the reference mode, where tags are text.

    Raises UserError for requests that name different ones: one run has one system.
    """
    if settings.reference or not requests:
        return ()
    first, *others = ({tag: None for name in _TEXTS for tag in take_tags(getattr(r, name))[1]} for r in requests)
    for other in others:
        if set(other) != set(first):
            shown = " and ".join(", ".join(_written(tag) for tag in own) or "none" for own in (first, other))
            raise UserError(f"the prompts of one run name different LoRAs: {shown}; draw them in runs of their own")
    if len({tag.name for tag in first}) < len(first):
        raise UserError(f"a LoRA has two strengths: {', '.join(map(_written, first))}")
    return tuple(first)


def without_tags(request: Request, settings: Sampling) -> Request:
    """A request whose prompts are text alone."""
    if settings.reference:
        return request
    return replace(request, **{name: take_tags(getattr(request, name))[0] for name in _TEXTS})


def find_loras(folder: str | Path | None, tags: Sequence[LoraTag]) -> list[Spec]:
    """The files of these names, without their endings, in a folder and all within it.

    Raises UserError where there is no folder, no such file, or several.
    """
    if not tags:
        return []
    if folder is None:
        raise without_folder(tags[0])
    if not os.path.isdir(folder):
        raise UserError(f"{folder}: no such folder of LoRAs")
    files: dict[str, list[Path]] = {}
    for place, folders, names in os.walk(folder):
        folders.sort()
        for path in (Path(place, name) for name in sorted(names)):
            if path.suffix.lower() in _SUFFIXES:
                files.setdefault(path.stem, []).append(path)
    specs = []
    for tag in tags:
        if tag.name not in files:
            raise unknown(f"LoRA in {folder}", tag.name, files) if files else UserError(f"{folder}: no LoRAs in it")
        if len(files[tag.name]) > 1:
            both = " and ".join(map(str, files[tag.name][:2]))
            raise UserError(f"the LoRA {tag.name!r} is there twice: {both}; rename one")
        specs.append(Spec(files[tag.name][0], tag.strength, tag.text_strength))
    return specs


def written(specs: Sequence[Spec]) -> tuple[str, ...]:
    """As `--lora` has them."""
    return tuple(f"{spec.path}:{spec.strength:g}:{spec.text_strength:g}" for spec in specs)


def _written(tag: LoraTag) -> str:
    return f"<lora:{tag.name}:{tag.text_strength:g}:{tag.strength:g}>"
