"""Requests as they go into batches: texts as tokens, sizes, images."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from bdm_jax.errors import UserError
from bdm_jax.images.decode import read_image, read_mask
from bdm_jax.plugins.controls import Control
from bdm_jax.plugins.image_prompts import ImagePrompt
from bdm_jax.sampling.settings import Request, Sampling
from bdm_jax.systems.pipeline import BridgePipeline
from bdm_jax.text.readers import Tokens, read


@dataclass(frozen=True)
class PreparedRequest:
    """A request with its tokens: for each source, of each text encoder that reads it, (2, windows, length): of the
    negative prompt, then of the positive.
    """

    request: Request
    texts: dict[str, tuple[Tokens, ...]]
    size: tuple[int, int]

    @property
    def kind(self) -> tuple:
        """What the requests of one batch have in common."""
        windows = tuple(tokens.ids.shape[1] for text in self.texts.values() for tokens in text)
        return windows, self.size, self.request.image is None, self.request.mask is None

    def same_text(self, source: str) -> bool:
        """Whether negative and positive prompt of a source are one text."""
        pairs = [pair for tokens in self.texts[source] for pair in (tokens.ids, tokens.weights)]
        return all(np.array_equal(*pair) for pair in pairs)


def read_jobs(
    pipeline: BridgePipeline, settings: Sampling, controls: Sequence[Control], requests: Sequence[Request]
) -> list[PreparedRequest]:
    """Requests made ready, whose prompts of one source all take as many windows as the longest.

    Raises UserError for images that cannot be read, and masks of another size.
    """
    texts = {}
    for source, reader in pipeline.readers.items():
        masked = pipeline.masked if settings.masked is None else settings.masked
        prompts = [prompt for request in requests for prompt in _prompts(request, source)]
        how = {"reference": settings.reference, "masked": masked and source == "branch"}
        towers = [_pairs(tokens) for tokens in read(reader, pipeline.parts, prompts, **how)]
        texts[source] = list(zip(*towers, strict=True))
    sizes = [_size(pipeline, settings, controls, request) for request in requests]
    each = [{source: own[i] for source, own in texts.items()} for i in range(len(requests))]
    return [PreparedRequest(*parts) for parts in zip(requests, each, sizes, strict=True)]


def batches(jobs: list[PreparedRequest], batch_size: int) -> list[list[PreparedRequest]]:
    """Neighbours of one kind go together: the windows of one prompt never change another's image."""
    groups = [list(group) for _, group in itertools.groupby(jobs, key=lambda job: job.kind)]
    return [group[i : i + batch_size] for group in groups for i in range(0, len(group), batch_size)]


def stack(texts: Sequence[tuple[Tokens, ...]], which: slice = slice(0, 2)) -> tuple[Tokens, ...]:
    """One source's tokens (2,n,L) of B samples -> (B*U,n,L) of all, sample by sample, for each text encoder."""
    return tuple(_concatenate(tokens, which) for tokens in zip(*texts, strict=True))


def _concatenate(tokens: Sequence[Tokens], which: slice) -> Tokens:
    columns = zip(*tokens, strict=True)
    return Tokens(*(None if column[0] is None else np.concatenate([x[which] for x in column]) for column in columns))


def size_ids(size: tuple[int, int], count: int) -> np.ndarray:
    """(count,6) fp32, the sizes that SDXL reads: an image's original size, where it was cropped, the size to draw."""
    height, width = size
    return np.tile(np.array([height, width, 0, 0, height, width], np.float32), (count, 1))


def load(request: Request) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Image (H,W,3) and mask (H,W) of a request, uint8. Raises UserError for files that cannot be read."""
    image, mask = request.image, request.mask
    image = image if image is None or isinstance(image, np.ndarray) else read_image(image)
    return image, mask if mask is None or isinstance(mask, np.ndarray) else read_mask(mask)


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
        return settings.size or default_size(pipeline, controls)
    return _floored(image, pipeline.factor)


def _floored(image: np.ndarray, factor: int) -> tuple[int, int]:
    """(height, width) of an image, in whole latents."""
    height, width = (side // factor * factor for side in image.shape[:2])
    if not height or not width:
        raise UserError(f"an image of {image.shape[1]}x{image.shape[0]} pixels is too small; give a size")
    return height, width


def _prompts(request: Request, source: str) -> tuple[str, str]:
    """Negative and positive prompt of a source: the branch's, or the backbone's."""
    if source == "branch":
        return request.negative, request.prompt
    return request.english_negative, request.english


def _pairs(tokens: Tokens) -> list[Tokens]:
    """Tokens of 2B prompts -> B times the tokens of two."""
    pairs = len(tokens.ids) // 2
    columns = [[None] * pairs if x is None else x.reshape(-1, 2, *x.shape[1:]) for x in tokens]
    return [Tokens(*parts) for parts in zip(*columns, strict=True)]
