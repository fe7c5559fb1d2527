"""Plug-ins into a system: LoRAs, words of textual inversion, blends of checkpoints. Each gives a new pipeline."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bdm_jax.errors import UserError
from bdm_jax.plugins.blend import add_difference, weighted_sum
from bdm_jax.plugins.inversion import Embedding, add_embeddings, for_encoders
from bdm_jax.plugins.lora import apply, load_lora
from bdm_jax.plugins.spec import Spec
from bdm_jax.systems.components import Component, load_found
from bdm_jax.systems.fetch import local_blended
from bdm_jax.systems.folder import find_system
from bdm_jax.systems.pipeline import BridgePipeline


def with_loras(pipeline: BridgePipeline, specs: Sequence[Spec], target: str | None = None) -> BridgePipeline:
    """This system with plug-ins of the LoRA family merged in (see `plugins.lora`); this one stays as it is.

    All that are to act together are given at once: each changes the original weights. `target="branch"` has those
    made for the UNet and its text encoder change the branch and its own. Words that were trained along are added.
    """
    names = [name for name in pipeline.family.lora_networks if name in pipeline.networks]
    networks = {name: pipeline.networks[name].params for name in names}
    uses = [(load_lora(spec.path, networks, target), spec.strength, spec.text_strength) for spec in specs]
    changed = apply(networks, uses)
    merged = pipeline.replace(
        **{name: Component(pipeline.networks[name].config, params) for name, params in changed.items()}
    )
    words = [Embedding(word, np.atleast_2d(rows)) for lora, *_ in uses for word, rows in lora.tokens.items()]
    return with_embeddings(merged, words)


def with_embeddings(
    pipeline: BridgePipeline, embeddings: Sequence[Embedding], source: str = "backbone"
) -> BridgePipeline:
    """This system with words of textual inversion added to the text encoders that read a text.

    `source`: the backbone's text, or the branch's ("branch"). Raises UserError for a system without that text.
    """
    if source not in pipeline.readers:
        raise UserError(f"this system has no {source} that reads, to add words to")
    towers = {tower.encoder: tower.tokenizer for tower in pipeline.readers[source].towers}
    widths = {name: pipeline.networks[name].config.hidden_size for name in towers}
    changes = {}
    for name, own in for_encoders(embeddings, widths).items():
        tokenizer = towers[name]
        changes[tokenizer], changes[name] = add_embeddings(pipeline.tokenizers[tokenizer], pipeline.networks[name], own)
    return pipeline.replace(**changes)


def with_blend(
    pipeline: BridgePipeline, other: str | Path, weight: float, base: str | Path | None = None
) -> BridgePipeline:
    """This system with its backbone's UNet and text encoders blended with those of another model.

    (1 - weight) of its own and weight of the other's; with `base`, weight times what the other has over the base is
    added (see `plugins.blend`). Parts that the other lacks stay.
    """
    others, bases = (find_system(local_blended(path)).networks if path else {} for path in (other, base))
    blended = {}
    for name in pipeline.family.lora_networks:
        if name in pipeline.family.backbone_names and name in others and (base is None or name in bases):
            own, their = pipeline.networks[name], load_found(others[name])
            if base is None:
                blended[name] = weighted_sum(own, their, weight, f"{other}: {name}")
            else:
                blended[name] = add_difference(own, their, load_found(bases[name]), weight, f"{other}: {name}")
    if not blended:
        raise UserError(f"{other}: no UNet and no text encoder to blend with")
    return pipeline.replace(**blended)
