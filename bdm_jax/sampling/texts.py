"""The texts of one batch as its networks read them: encoded once for all steps, chosen for each plan of guidance."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from bdm_jax.models.functional import Params
from bdm_jax.models.unet.conditioning import Conditioning
from bdm_jax.sampling.batching import PreparedRequest, size_ids, stack
from bdm_jax.sampling.denoiser import BACKBONE, PredictionPlan, ResidualNetwork, with_keys
from bdm_jax.sampling.settings import Sampling
from bdm_jax.systems.pipeline import BridgePipeline
from bdm_jax.text import readers

ImageKeys = Mapping[str, tuple[jax.Array, jax.Array]]  # of an image prompt: keys and values, by attention


@dataclass(frozen=True)
class BatchTexts:
    """What every network reads, with its keys: all texts of each sample, sample by sample, (B*U,S,D).

    of_network: the texts by the network's name. source: by the same name, where they come from. count: U, by source.
    one_text: all texts of the backbone are one, for all samples; its U is 1 then.
    """

    of_network: dict[str, Conditioning]
    source: dict[str, str]
    count: dict[str, int]
    one_text: bool

    def chosen(self, plan: PredictionPlan, names: Sequence[str], size: tuple[int, int]) -> dict[str, Conditioning]:
        """Of the networks of these names the texts that a plan reads, as `plan.renumbered()` counts them.

        `size` (height, width) in pixels goes into the size ids of networks that have them.
        """
        found = {}
        for name in names:
            text, source = self.of_network[name], self.source[name]
            count, used = self.count[source], plan.used(source)
            if len(used) < count:
                text = jax.tree.map(partial(_take, texts=count, used=used), text)
            if text.pooled is not None:
                text = replace(text, time_ids=size_ids(size, len(text.tokens)))
            found[name] = text
        return found


def encode_batch(
    pipeline: BridgePipeline,
    settings: Sampling,
    jobs: Sequence[PreparedRequest],
    networks: Sequence[ResidualNetwork],
    params: Mapping[str, Params],
    images: Sequence[ImageKeys],
    place: Callable,
) -> BatchTexts:
    """Encode the requests' texts and make each network's keys of them.

    Args:
      networks, params: the residual networks beside the UNet, and the parameters of all by name.
      images: what the UNet reads of image prompts; the backbone's two halves then never are one.
      place: lays out arrays over the devices, samples along their first axis.
    """
    one_text = all(job.same_text(BACKBONE) for job in jobs) and not images
    texts, count = {}, {}
    for source, reader in pipeline.readers.items():
        backbone = source == BACKBONE
        count[source] = 1 if one_text and backbone else len(jobs[0].sources[source].texts)
        tokens = stack([job.texts[source] for job in jobs], slice(-count[source], None))
        clip_skip = settings.clip_skip if backbone else 1
        texts[source] = readers.encode(
            reader, pipeline.parts, place(tokens), clip_skip=clip_skip, reference=settings.reference
        )
    source = {"unet": BACKBONE, **{network.name: network.source for network in networks}}
    configs = {"unet": pipeline.unet.config, **{network.name: network.config for network in networks}}
    read = {name: with_keys(configs[name], params[name], texts[source[name]]) for name in configs}
    if images:
        read["unet"] = replace(read["unet"], image_keys=_image_keys(images, jobs, place))
    return BatchTexts(read, source, count, one_text)


def _image_keys(images: Sequence[ImageKeys], jobs: Sequence[PreparedRequest], place: Callable) -> dict[str, list]:
    """The image prompts' keys for each text of the samples: negative or positive (see `plugins.image_prompts`)."""
    texts = jobs[0].sources[BACKBONE]
    positive = np.arange(len(texts.texts)) >= texts.negatives

    def for_all(x: jax.Array) -> jax.Array:
        return place(jnp.tile(x[positive.astype(int)], (len(jobs), 1, 1, 1)))

    return {path: [jax.tree.map(for_all, image[path]) for image in images] for path in images[0]}


def _take(x: jax.Array, texts: int, used: tuple[int, ...]) -> jax.Array:
    """Of arrays (B*U,...) the texts used."""
    x = x.reshape(-1, texts, *x.shape[1:])
    return x[:, used[0]] if len(used) == 1 else x[:, np.array(used)].reshape(-1, *x.shape[2:])
