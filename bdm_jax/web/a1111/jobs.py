"""The job that a request of the web UI's API asks for."""

import contextlib
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from bdm_jax.app.metadata import WEB_UI_SAMPLERS
from bdm_jax.app.parts import Parts
from bdm_jax.app.service import Job, Ticket, stem
from bdm_jax.diffusion.samplers import SAMPLERS, canonical
from bdm_jax.errors import UserError, short, unknown
from bdm_jax.images.pictures import write_png
from bdm_jax.sampling.settings import ANY_SEED, Request, Sampling
from bdm_jax.web import uploads
from bdm_jax.web.a1111.fields import ControlUnit, Img2Img, Txt2Img, without_effect
from bdm_jax.web.asking import SETTINGS, Desk, settings_of

LAYOUTS = ("karras", "exponential", "beta")
MAPS = {"none": "", "canny": "canny", "lineart": "line", "tile_resample": "tile", "blur_gaussian": "blur"}
_PLAIN = ("automatic", "normal", "uniform", "simple", "")  # schedulers that leave a sampler's own steps


def submit(desk: Desk, asked: Txt2Img, owner: str, leave: contextlib.ExitStack) -> tuple[Ticket, list[str]]:
    """The job of a request, queued, and what of the request has no effect. Raises UserError."""
    notes = [*without_effect(asked)]
    overrides = dict(asked.override_settings)
    settings = _sampling(asked, overrides, notes)
    parts = _parts(desk, overrides, owner)
    parts = _with_embeddings(desk, parts, asked)
    parts = _with_controls(desk, parts, asked.alwayson_scripts, leave, notes)
    texts = {name: _text(overrides.pop(name, getattr(asked, name)), name) for name in ("english", "english_negative")}
    notes += [f"override_settings: {short(name)!r} is unknown and ignored" for name in overrides]
    count = asked.batch_size * asked.n_iter
    desk.limits.check_count(count)
    images: list[np.ndarray | None] = [None]
    masks: list[np.ndarray | None] = [None]
    if isinstance(asked, Img2Img):
        count = max(count, len(asked.init_images))
        desk.limits.check_count(count)
        images = [uploads.image(text, desk.limits.max_upload * 10**6, "init_images") for text in asked.init_images]
        masks = [_mask(desk, asked, image) for image in images]
    requests = tuple(
        Request(
            asked.prompt,
            asked.negative_prompt,
            **texts,
            seed=ANY_SEED if asked.seed == ANY_SEED else asked.seed + number,
            image=images[number % len(images)],
            mask=masks[number % len(masks)],
        )
        for number in range(count)
    )
    return desk.submit(Job(requests, settings, parts, owner)), notes


def _sampling(asked: Txt2Img, overrides: dict[str, Any], notes: list[str]) -> Sampling:
    """The settings of a request; what of `overrides` goes into them is taken out."""
    given: dict[str, Any] = {}
    if asked.steps is not None:
        given["steps"] = asked.steps
    if asked.cfg_scale is not None:
        given["guidance"] = asked.cfg_scale
    if (asked.width is None) != (asked.height is None):
        raise UserError("width and height: give both, or none")
    if asked.width is not None:
        given["size"] = (asked.height, asked.width)
    if (name := asked.sampler_name or asked.sampler_index) is not None:
        given["sampler"] = _sampler(name, asked.scheduler, notes)
    elif asked.scheduler.strip().lower() not in _PLAIN:
        notes.append(f"scheduler {short(asked.scheduler)!r} is ignored: it goes with a sampler_name")
    if asked.eta is not None and given.get("sampler") == "ddim":
        given["eta"] = asked.eta
    if asked.enable_hr:
        given["hires"] = asked.hr_scale
    if asked.denoising_strength is not None:
        if isinstance(asked, Img2Img):
            given["strength"] = asked.denoising_strength
        elif asked.enable_hr:
            given["hires_strength"] = asked.denoising_strength
    if (layers := overrides.pop("CLIP_stop_at_last_layers", None)) is not None:
        given["clip_skip"] = layers
    return settings_of({name: overrides.pop(name) for name in [*overrides] if name in SETTINGS}, given)


def _sampler(name: str, scheduler: str, notes: list[str]) -> str:
    """`DPM++ 2M` and `Karras` -> dpmpp-2m-karras. Raises UserError for an unknown sampler."""
    ours, layout = canonical(name), scheduler.strip().lower()
    if ours not in SAMPLERS:
        raise unknown("sampler", short(name), WEB_UI_SAMPLERS.values())
    if layout in _PLAIN or ours.endswith(tuple(f"-{one}" for one in LAYOUTS)):
        return ours
    if f"{ours}-{layout}" in SAMPLERS:
        return f"{ours}-{layout}"
    notes.append(f"scheduler {short(scheduler)!r} is ignored: {name} has no such layout of its steps here")
    return ours


def _parts(desk: Desk, overrides: dict[str, Any], owner: str) -> Parts:
    """The model that is asked for, or chosen before. Raises UserError for a name that is not in the models folder."""
    changes = {}
    name = overrides.pop("sd_model_checkpoint", None)
    own = desk.parts(desk.model(owner) if name is None else plain_name(_text(name, "sd_model_checkpoint")))
    vae = _text(overrides.pop("sd_vae", "Automatic"), "sd_vae")
    if vae not in ("Automatic", "None", ""):
        changes["vae"] = desk.service.models.path("vaes", plain_name(vae))
    return replace(own, **changes)


def _with_embeddings(desk: Desk, parts: Parts, asked: Txt2Img) -> Parts:
    """With the words of textual inversion that the English prompts have; that is how the web UI names them."""
    texts = f"{asked.english} {asked.english_negative}"
    found = [name for name in desk.service.models.names("embeddings") if stem(Path(name).name) in texts]
    paths = tuple(str(desk.service.models.path("embeddings", name)) for name in found)
    return replace(parts, embedding=(*parts.embedding, *paths)) if paths else parts


def _with_controls(
    desk: Desk, parts: Parts, scripts: dict[str, Any], leave: contextlib.ExitStack, notes: list[str]
) -> Parts:
    """With the ControlNets of the extension's units, their pictures in files that go when the request does."""
    found = []
    for name, script in scripts.items():
        units = script.get("args") if isinstance(script, dict) else script
        if name.lower() != "controlnet":
            asks = units[0] not in (False, None) if isinstance(units, list) and units else units
            if asks:
                notes.append(f"alwayson_scripts: {short(name)!r} is unknown and ignored")
            continue
        units = [] if units is None else units
        if not isinstance(units, list) or not all(isinstance(values, dict) for values in units):
            raise UserError("alwayson_scripts: ControlNet: args: expected a list of objects")
        for values in units:
            unit = ControlUnit.model_validate({key: value for key, value in values.items() if value is not None})
            if not unit.enabled:
                continue
            if unit.model in ("None", ""):
                if unit.image or unit.input_image or unit.module != "none":
                    notes.append("a unit of the ControlNet extension is ignored: it names no model")
                continue
            if unit.module not in MAPS:
                raise unknown("module of a ControlNet", short(unit.module), MAPS)
            given = unit.image or unit.input_image
            text = given if isinstance(given, str) else given.get("image", "")
            pixels = uploads.image(text, desk.limits.max_upload * 10**6, "ControlNet image")
            network = desk.service.models.path("controls", plain_name(unit.model))
            folder = Path(leave.enter_context(tempfile.TemporaryDirectory(prefix="bdm-control-")))
            write_png(folder / "map.png", pixels)
            made = f",from={MAPS[unit.module]}" if MAPS[unit.module] else ""
            interval = f"start={unit.guidance_start:g},end={unit.guidance_end:g}"
            found.append(f"{network},{folder / 'map.png'},strength={unit.weight:g},{interval}{made}")
    return replace(parts, control=(*parts.control, *found)) if found else parts


def _mask(desk: Desk, asked: Img2Img, image: np.ndarray) -> np.ndarray | None:
    """The mask at the size of the picture, blurred as the web UI does."""
    if asked.mask is None:
        return None
    pixels = uploads.mask(asked.mask, desk.limits.max_upload * 10**6)
    if asked.inpainting_mask_invert:
        pixels = 255 - pixels
    found = Image.fromarray(pixels)
    if found.size != image.shape[1::-1]:
        found = found.resize(image.shape[1::-1], Image.Resampling.BILINEAR)
    if asked.mask_blur:
        found = found.filter(ImageFilter.GaussianBlur(asked.mask_blur))
    return np.array(found)


def _text(value: Any, name: str) -> str:
    """Raises UserError for what is no text, naming the field."""
    if not isinstance(value, str):
        raise UserError(f"{name} {short(repr(value))}: expected a text")
    return value


def plain_name(title: str) -> str:
    """`model.safetensors [6ce0161689]` -> model.safetensors"""
    head, bracket, rest = title.rpartition(" [")
    return head if bracket and rest.endswith("]") else title
