"""Plug-ins into a system: LoRAs, words of textual inversion, blends of checkpoints. Each gives a new pipeline."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from bdm_jax.errors import UserError
from bdm_jax.plugins.blend import add_difference, weighted_sum
from bdm_jax.plugins.inversion import Embedding, add_embeddings
from bdm_jax.plugins.lora import TARGETS, apply, load_lora
from bdm_jax.plugins.spec import Spec
from bdm_jax.systems.components import Component
from bdm_jax.systems.pipeline import BridgePipeline, network_parts


def with_loras(pipeline: BridgePipeline, specs: Sequence[Spec], target: str | None = None) -> BridgePipeline:
    """This system with plug-ins of the LoRA family merged in (see `plugins.lora`); this one stays as it is.

    All that are to act together are given at once: each changes the original weights. `target="branch"` has those
    made for the UNet and its text tower change the branch and its own. Words that were trained along are added.
    """
    networks = {name: getattr(pipeline, name).params for name in TARGETS if getattr(pipeline, name) is not None}
    uses = [(load_lora(spec.path, networks, target), spec.strength, spec.text_strength) for spec in specs]
    changed = apply(networks, uses)
    merged = replace(pipeline, **{name: Component(getattr(pipeline, name).config, changed[name]) for name in changed})
    words = [Embedding(word, np.atleast_2d(rows)) for lora, *_ in uses for word, rows in lora.tokens.items()]
    return with_embeddings(merged, words)


def with_embeddings(
    pipeline: BridgePipeline, embeddings: Sequence[Embedding], tower: str = "text_encoder"
) -> BridgePipeline:
    """This system with words of textual inversion added to its English tower, or to "branch_text_encoder"."""
    name = tower.replace("text_encoder", "tokenizer")
    if getattr(pipeline, tower) is None:
        raise UserError(f"a bare backbone has no {tower} to add words to")
    tokenizer, component = add_embeddings(getattr(pipeline, name), getattr(pipeline, tower), embeddings)
    return replace(pipeline, **{name: tokenizer, tower: component})


def with_blend(
    pipeline: BridgePipeline, other: str | Path, weight: float, base: str | Path | None = None
) -> BridgePipeline:
    """This system with its backbone's UNet and text tower blended with those of another model.

    (1 - weight) of its own and weight of the other's; with `base`, weight times what the other has over the base is
    added (see `plugins.blend`). Parts that the other lacks stay.
    """
    others, bases = (network_parts(Path(path), None) if path else {} for path in (other, base))
    blended = {}
    for name in ("unet", "text_encoder"):
        if name in others and (base is None or name in bases):
            own, their = getattr(pipeline, name), others[name].load()
            if base is None:
                blended[name] = weighted_sum(own, their, weight, f"{other}: {name}")
            else:
                blended[name] = add_difference(own, their, bases[name].load(), weight, f"{other}: {name}")
    if not blended:
        raise UserError(f"{other}: no UNet and no text tower to blend with")
    return replace(pipeline, **blended)
