"""A pipeline that draws when it is called: `BridgePipeline.from_pretrained(folder)("红灯笼", seed=0).images[0]`."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bdm_jax.app.metadata import text_chunks
from bdm_jax.app.runs import describe_all
from bdm_jax.errors import UserError, unknown
from bdm_jax.images.pictures import file_name, next_index, write_png
from bdm_jax.plugins.controls import Control
from bdm_jax.plugins.image_prompts import ImagePrompt
from bdm_jax.sampling.generate import Progress, generate
from bdm_jax.sampling.settings import Request, Sampling
from bdm_jax.systems.pipeline import BridgePipeline, draws_when_called

__all__ = ["BridgePipeline", "PipelineOutput", "draw"]

_OF_REQUESTS = tuple(field.name for field in dataclasses.fields(Request) if field.name not in ("prompt", "seed"))
_OF_SAMPLING = tuple(field.name for field in dataclasses.fields(Sampling))
# What diffusers calls them.
_ELSEWHERE = {
    "num_inference_steps": "steps",
    "guidance_scale": "guidance",
    "negative_prompt": "negative",
    "generator": "seed",
    "num_images_per_prompt": "seed=range(n)",
    "height": "size=(height, width)",
    "width": "size=(height, width)",
}


@dataclass(frozen=True)
class PipelineOutput:
    """What a call of a pipeline gives.

    Attributes:
      images: one for each request; `image.info` has its settings as the text chunks of a PNG of ours.
      settings: what each depends on, as plain values (see `app.metadata.describe`).
    """

    images: list[Image.Image]
    settings: list[dict[str, Any]]

    def save(self, folder: str | Path) -> list[Path]:
        """Write the images as PNG, with their settings inside, under sample.py's names; returns the files.

        They are numbered after those that the folder holds. `sample.py --from FILE` draws one again. Raises FileError
        where the folder cannot be written.
        """
        folder, first, files = Path(folder), next_index(Path(folder)), []
        for number, (image, values) in enumerate(zip(self.images, self.settings, strict=True), first):
            files.append(folder / file_name(number, values["prompt"] or values["english"], values["seed"]))
            write_png(files[-1], np.asarray(image), text_chunks(values))
        return files


@draws_when_called
def draw(
    pipeline: BridgePipeline,
    prompt: str | Sequence[str],
    *,
    seed: int | Sequence[int] = 0,
    controls: Sequence[Control | ImagePrompt] = (),
    batch_size: int = 8,
    progress: Progress | None = None,
    **options: Any,
) -> PipelineOutput:
    """Draw one image for each prompt and each seed.

    Args:
      prompt: what to draw, in the branch's language; one text or several.
      seed: one, or several of each prompt, in [0, 2**32).
      controls, batch_size, progress: as of `sampling.generate.generate`.
      options: fields of `Request` (negative, english, image, mask, ...) and of `Sampling` (steps, sampler, guidance,
        size, ...) by name.

    Raises UserError for an option that there is not, and as `generate` does.
    """
    for name in options:
        if name in _ELSEWHERE:
            raise UserError(f"unknown option {name!r}: it is called {_ELSEWHERE[name]} here")
        if name not in (*_OF_REQUESTS, *_OF_SAMPLING):
            raise unknown("option", name, ("seed", *_OF_REQUESTS, *_OF_SAMPLING))
    prompts, seeds = _several("prompt", prompt, str), _several("seed", seed, int | np.integer)
    common = {name: _pixels(name, value) for name, value in options.items() if name in _OF_REQUESTS}
    common = {name: value for name, value in common.items() if value is not None}  # as diffusers' habit negative=None
    requests = [Request(text, seed=int(one), **common) for text in prompts for one in seeds]
    settings = Sampling(**{name: value for name, value in options.items() if name in _OF_SAMPLING})
    described = describe_all(pipeline, requests, settings, {}, controls)
    drawn = generate(pipeline, requests, settings, controls=controls, batch_size=batch_size, progress=progress)
    images = [Image.fromarray(pixels) for pixels in drawn]
    for image, values in zip(images, described, strict=True):
        image.info.update(text_chunks(values))
    return PipelineOutput(images, described)


def _several(name: str, value: Any, kind: Any) -> list[Any]:
    """One value of a kind, or a list of them, as a list. Raises UserError for anything else."""
    values = list(value) if isinstance(value, list | tuple | range | np.ndarray) else [value]
    for one in values:
        if not isinstance(one, kind) or isinstance(one, bool):
            expected = "a text or a list of texts" if kind is str else "a whole number or a list of them"
            raise UserError(f"{name} {one!r}: expected {expected}")
    return values


def _pixels(name: str, value: Any) -> Any:
    """An option of a request: PIL images as arrays, texts checked. Raises UserError for a text that is none."""
    if isinstance(value, Image.Image):
        return np.asarray(value.convert("L" if name == "mask" else "RGB"))
    if name not in ("image", "mask") and not isinstance(value, str | None):
        raise UserError(f"{name} {value!r}: expected a text")
    return value
