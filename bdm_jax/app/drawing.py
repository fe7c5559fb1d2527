"""A pipeline that draws when it is called: `BridgePipeline.from_pretrained(folder)("红灯笼", seed=0).images[0]`."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bdm_jax.app import claims
from bdm_jax.app.metadata import text_chunks
from bdm_jax.app.runs import describe_all
from bdm_jax.app.tags import find_loras, shared_tags, without_tags, written
from bdm_jax.errors import FileError, UserError, unknown
from bdm_jax.images.decode import array_image, image_pixels, mask_pixels
from bdm_jax.images.pictures import file_name, write_png
from bdm_jax.plugins.controls import Control
from bdm_jax.plugins.image_prompts import ImagePrompt
from bdm_jax.plugins.install import with_loras
from bdm_jax.sampling.generate import Progress, generate
from bdm_jax.sampling.settings import Request, Sampling, with_seeds
from bdm_jax.sampling.settings import check as check_settings
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

        They are numbered after those that the folder holds; several processes may save into one folder.
        `sample.py --from FILE` draws one again. Raises FileError where the folder cannot be written.
        """
        folder, files = Path(folder), []
        if folder.exists() and not folder.is_dir():
            raise FileError(f"{folder}: a file; the images go into a folder, under names of their own")
        claim = claims.claim(folder, len(self.images))
        try:
            for number, (image, values) in enumerate(zip(self.images, self.settings, strict=True), claim.first):
                files.append(folder / file_name(number, values["prompt"] or values["english"], values["seed"]))
                write_png(files[-1], np.asarray(image), text_chunks(values))
        finally:
            claim.release()
        return files


@draws_when_called
def draw(
    pipeline: BridgePipeline,
    prompt: str | Sequence[str],
    *,
    seed: int | Sequence[int] = 0,
    controls: Sequence[Control | ImagePrompt] = (),
    lora_dir: str | Path | None = None,
    batch_size: int = 8,
    progress: Progress | None = None,
    **options: Any,
) -> PipelineOutput:
    """Draw one image for each prompt and each seed.

    Args:
      prompt: what to draw, in the branch's language; one text or several.
      seed: one, or several of each prompt, in [0, 2**32); -1 for any, each image its own.
      lora_dir: where the LoRAs lie that prompts name, as in "<lora:NAME:0.8>": files of that name.
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
    requests = with_seeds([Request(text, seed=int(one), **common) for text in prompts for one in seeds])
    settings = Sampling(**{name: value for name, value in options.items() if name in _OF_SAMPLING})
    check_settings(settings)
    specs = find_loras(lora_dir, shared_tags(requests, settings))
    pipeline = with_loras(pipeline, specs) if specs else pipeline
    parts = {"lora": " + ".join(written([spec._replace(path=Path(spec.path.name)) for spec in specs]))} if specs else {}
    described = describe_all(pipeline, requests, settings, parts, controls)
    requests = [without_tags(request, settings) for request in requests]
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
    """An option of a request: images as arrays uint8, texts checked. Raises UserError for a text that is none."""
    if name in ("image", "mask") and isinstance(value, np.ndarray):
        value = array_image(value, name)
    if isinstance(value, Image.Image):
        return mask_pixels(value) if name == "mask" else image_pixels(value)
    if name not in ("image", "mask") and not isinstance(value, str | None):
        raise UserError(f"{name} {value!r}: expected a text")
    return value
