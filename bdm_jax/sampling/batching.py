"""Requests as they go into batches: texts as tokens, sizes, images."""

import itertools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from bdm_jax.errors import UserError
from bdm_jax.images.decode import (
    array_image,
    check_mask,
    image_pixels,
    mask_pixels,
    read_image,
    read_mask,
    resize_to_cover,
)
from bdm_jax.plugins.controls import Control
from bdm_jax.plugins.image_prompts import ImagePrompt
from bdm_jax.sampling.reading import SourceTexts, shared_weights, source_texts
from bdm_jax.sampling.settings import Request, Sampling
from bdm_jax.systems.pipeline import BridgePipeline
from bdm_jax.text.readers import Tokens, read
from bdm_jax.text.tags import take_tags, without_folder
from bdm_jax.text.tokenizer import PromptWarning


@dataclass(frozen=True)
class PreparedRequest:
    """A request with its tokens: for each source, of each text encoder that reads it, (U, windows, length): of the
    negative prompt, then of the positive, or of as many texts as `sources` says.
    """

    request: Request
    texts: dict[str, tuple[Tokens, ...]]
    size: tuple[int, int]
    sources: dict[str, SourceTexts]

    @property
    def kind(self) -> tuple:
        """What the requests of one batch have in common."""
        windows = tuple(tokens.ids.shape[1] for text in self.texts.values() for tokens in text)
        reading = {source: texts.kind for source, texts in self.sources.items()}
        return windows, self.size, self.request.image is None, self.request.mask is None, reading

    def same_text(self, source: str) -> bool:
        """Whether all texts of a source, of the negative and of the positive prompt, are one text."""
        pairs = [pair for tokens in self.texts[source] for pair in (tokens.ids, tokens.weights)]
        return all(np.array_equal(pair[0], other) for pair in pairs for other in pair[1:])


def read_jobs(
    pipeline: BridgePipeline,
    settings: Sampling,
    controls: Sequence[Control],
    requests: Sequence[Request],
    counts: Callable[[Request, tuple[int, int]], Sequence[int]] = lambda request, size: (),
) -> list[PreparedRequest]:
    """Requests made ready, whose prompts of one source all take as many windows as the longest.

    `counts`: the number of rows of each pass of a request that is drawn at a size, for prompts that change on the way.

    Raises UserError for images that cannot be read, masks of another size, and prompts that are not understood.
    """
    sizes = [_size(pipeline, settings, controls, request) for request in requests]
    sources = [
        _sources(pipeline, settings, request, partial(counts, request, size))
        for request, size in zip(requests, sizes, strict=True)
    ]
    texts = {}
    for source, reader in pipeline.readers.items():
        masked = pipeline.masked if settings.masked is None else settings.masked
        prompts = [text for own in sources for text in own[source].texts]
        ends = [*itertools.accumulate((len(own[source].texts) for own in sources), initial=0)]
        how = {"reference": settings.reference, "masked": masked and source == "branch"}
        towers = [_cut(tokens, ends) for tokens in read(reader, pipeline.parts, prompts, **how)]
        texts[source] = list(zip(*towers, strict=True))
    each = [{source: own[i] for source, own in texts.items()} for i in range(len(requests))]
    return [PreparedRequest(*parts) for parts in zip(requests, each, sizes, sources, strict=True)]


def name_unused(pipeline: BridgePipeline, jobs: Sequence[PreparedRequest]) -> None:
    """Warns with PromptWarning where words of textual inversion are in none of the prompts that could have them."""
    for source, reader in pipeline.readers.items():
        unused: dict[tuple[str, ...], None] = {}
        for number, tower in enumerate(reader.towers):
            names: dict[tuple[int, ...], list[str]] = {}  # one word may have several
            for name, ids in pipeline.parts[tower.tokenizer].added.items():
                names.setdefault(tuple(ids), []).append(name)
            if names:
                read = set(np.concatenate([job.texts[source][number].ids.ravel() for job in jobs]).tolist())
                unused |= dict.fromkeys(tuple(own) for ids, own in names.items() if read.isdisjoint(ids))
        if unused:
            words = ", ".join(" or ".join(map(repr, sorted(own))) for own in unused)
            texts = "prompt" if len(pipeline.readers) == 1 else "English prompt" if source == "backbone" else "prompt"
            message = f"no {texts} has the added {'words' if len(unused) > 1 else 'word'} {words}: without effect"
            warnings.warn(message, PromptWarning, stacklevel=2)


def batches(jobs: list[PreparedRequest], batch_size: int) -> list[list[PreparedRequest]]:
    """Neighbours of one kind go together: the windows of one prompt never change another's image."""
    groups = [list(group) for _, group in itertools.groupby(jobs, key=lambda job: job.kind)]
    return [group[i : i + batch_size] for group in groups for i in range(0, len(group), batch_size)]


def stack(texts: Sequence[tuple[Tokens, ...]], which: slice = slice(None)) -> tuple[Tokens, ...]:
    """One source's tokens (U,n,L) of B samples -> (B*U,n,L) of all, sample by sample, for each text encoder."""
    return tuple(_concatenate(tokens, which) for tokens in zip(*texts, strict=True))


def _concatenate(tokens: Sequence[Tokens], which: slice) -> Tokens:
    columns = zip(*tokens, strict=True)
    return Tokens(*(None if column[0] is None else np.concatenate([x[which] for x in column]) for column in columns))


def size_ids(size: tuple[int, int], count: int) -> np.ndarray:
    """(count,6) fp32, the sizes that SDXL reads: an image's original size, where it was cropped, the size to draw."""
    height, width = size
    return np.tile(np.array([height, width, 0, 0, height, width], np.float32), (count, 1))


def load(request: Request) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Image (H,W,3) and mask (H,W) of a request, uint8. Raises UserError for files that cannot be read, and masks that
    leave nothing to repaint.
    """
    image, mask = request.image, request.mask
    if image is not None:
        image = image_pixels(array_image(image, "image")) if isinstance(image, np.ndarray) else read_image(image)
    if mask is not None:
        mask = mask_pixels(array_image(mask, "the mask")) if isinstance(mask, np.ndarray) else read_mask(mask)
    return image, mask


def as_english(request: Request) -> Request:
    """A request as a bare backbone reads it: its English prompts or, where they are empty, the others."""
    english, negative = request.english or request.prompt, request.english_negative or request.negative
    return replace(request, prompt="", negative="", english=english, english_negative=negative)


def default_size(pipeline: BridgePipeline, controls: Sequence[Control | ImagePrompt] = ()) -> tuple[int, int]:
    """(height, width) in pixels of the images that the UNet was trained on, or of the first control's map."""
    factor = pipeline.factor
    if maps := [control.hint for control in controls if isinstance(control, Control)]:
        return _floored(maps[0], factor)
    return (pipeline.unet.config.sample_size * factor,) * 2


def _size(
    pipeline: BridgePipeline, settings: Sampling, controls: Sequence[Control], request: Request
) -> tuple[int, int]:
    """(height, width) that a request is drawn at first; its image and mask are looked at on the way."""
    image, mask = load(request)
    if mask is not None and mask.shape != image.shape[:2]:
        sizes = (f"{array.shape[1]}x{array.shape[0]}" for array in (mask, image))
        raise UserError("the mask has {} pixels, the image {}: they must be of one size".format(*sizes))
    if settings.size is not None or image is None:
        size = settings.size or default_size(pipeline, controls)
    else:
        size = _floored(image, pipeline.factor)
    if mask is not None:
        height, width = size
        check_mask(resize_to_cover(mask, size), f"the mask, within the {width}x{height} that are drawn")
    return size


def _floored(image: np.ndarray, factor: int) -> tuple[int, int]:
    """(height, width) of an image, in whole latents."""
    height, width = (side // factor * factor for side in image.shape[:2])
    if not height or not width:
        raise UserError(f"an image of {image.shape[1]}x{image.shape[0]} pixels is too small; give a size")
    return height, width


def _sources(
    pipeline: BridgePipeline, settings: Sampling, request: Request, counts: Callable[[], Sequence[int]]
) -> dict[str, SourceTexts]:
    """The texts of each source; the reference knows none but the two prompts."""
    prompts = {source: _prompts(request, source) for source in pipeline.readers}
    if settings.reference:
        return {source: SourceTexts(texts) for source, texts in prompts.items()}
    for tag in (tag for texts in prompts.values() for text in texts for tag in take_tags(text)[1]):
        raise without_folder(tag)
    found = {source: source_texts(*texts, counts) for source, texts in prompts.items()}
    if len(shared_weights([*found.values()])) > 1:
        for name in ("english_guidance", "guidance_rescale"):
            if getattr(settings, name) != getattr(Sampling, name):
                raise UserError(f"{name.replace('_', ' ')} does not go with prompts of several parts (AND)")
    return found


def _prompts(request: Request, source: str) -> tuple[str, str]:
    """Negative and positive prompt of a source: the branch's, or the backbone's."""
    if source == "branch":
        return request.negative, request.prompt
    return request.english_negative, request.english


def _cut(tokens: Tokens, ends: Sequence[int]) -> list[Tokens]:
    """Tokens of all prompts -> those of each request."""
    return [Tokens(*(None if x is None else x[begin:end] for x in tokens)) for begin, end in itertools.pairwise(ends)]
