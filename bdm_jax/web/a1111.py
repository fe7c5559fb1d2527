"""The web API of A1111's Stable Diffusion web UI, as its clients and plug-ins speak it.

`prompt` and `negative_prompt` are the branch's (Chinese); `english` and `english_negative`, fields of their own or of
`override_settings`, the backbone's. `override_settings` also takes sample.py's settings by name, as
`{"branch_strength": 0.8}`. What is not known, or has no effect here, is named in `info` under `warnings`.
"""

import contextlib
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import APIRouter
from PIL import Image, ImageFilter
from pydantic import Field
from starlette.requests import Request as HttpRequest

from bdm_jax.app.metadata import WEB_UI_SAMPLERS, read_settings, web_ui_parameters
from bdm_jax.app.parts import Parts
from bdm_jax.app.service import Job, Ticket
from bdm_jax.diffusion.samplers import SAMPLERS, canonical
from bdm_jax.errors import UserError, short, unknown
from bdm_jax.images.pictures import write_png
from bdm_jax.sampling.settings import ANY_SEED, Request, Sampling
from bdm_jax.web import uploads
from bdm_jax.web.asking import SETTINGS, Desk, Fields, owner_of, read_fields, settings_of

LAYOUTS = ("karras", "exponential", "beta")
_PLAIN = ("automatic", "normal", "uniform", "simple", "")  # schedulers that leave a sampler's own steps
_MAPS = {"none": "", "canny": "canny", "lineart": "line", "tile_resample": "tile", "blur_gaussian": "blur"}
# Fields without a counterpart, and the values with which they ask for nothing.
_NOTHING: dict[str, tuple[Any, ...]] = {
    "restore_faces": (False,),
    "tiling": (False,),
    "styles": ([],),
    "subseed": (-1,),
    "subseed_strength": (0,),
    "seed_resize_from_h": (0, -1),
    "seed_resize_from_w": (0, -1),
    "s_churn": (0,),
    "s_tmin": (0,),
    "s_tmax": (0,),
    "s_noise": (1,),
    "s_min_uncond": (0,),
    "do_not_save_samples": (False,),
    "do_not_save_grid": (True, False),
    "save_images": (True, False),  # they always are
    "override_settings_restore_afterwards": (True,),
    "script_name": ("",),
    "script_args": ([],),
    "firstphase_width": (0,),
    "firstphase_height": (0,),
    "hr_upscaler": ("Lanczos", "Latent"),
    "hr_second_pass_steps": (0,),
    "hr_resize_x": (0,),
    "hr_resize_y": (0,),
    "hr_checkpoint_name": ("",),
    "hr_sampler_name": ("",),
    "hr_scheduler": ("",),
    "hr_prompt": ("",),
    "hr_negative_prompt": ("",),
    "image_cfg_scale": (1.5,),
    "initial_noise_multiplier": (1,),
    "inpainting_fill": (1,),
    "inpaint_full_res": (False, 0),
    "inpaint_full_res_padding": (0, 32),
    "include_init_images": (False,),
}


class Txt2Img(Fields):
    """Of /txt2img, and of /img2img."""

    prompt: str = ""
    negative_prompt: str = ""
    english: str = ""
    english_negative: str = ""
    seed: int = -1
    steps: int | None = None
    width: int | None = None
    height: int | None = None
    cfg_scale: float | None = None
    sampler_name: str | None = None
    sampler_index: str | None = None
    scheduler: str = "automatic"
    batch_size: int = Field(1, ge=1)
    n_iter: int = Field(1, ge=1)
    denoising_strength: float | None = None
    eta: float | None = None
    enable_hr: bool = False
    hr_scale: float = 2.0
    override_settings: dict[str, Any] = {}
    alwayson_scripts: dict[str, Any] = {}
    send_images: bool = True


class Img2Img(Txt2Img):
    """Of /img2img."""

    init_images: list[str] = Field(min_length=1)
    mask: str | None = None
    mask_blur: float = Field(4.0, ge=0, le=256)
    inpainting_mask_invert: int = 0
    resize_mode: int = 0


class ControlUnit(Fields):
    """One unit of the ControlNet extension."""

    enabled: bool = True
    image: str | dict[str, str] = ""
    model: str = "None"
    module: str = "none"
    weight: float = 1.0
    guidance_start: float = 0.0
    guidance_end: float = 1.0


class PngInfo(Fields):
    """Of /png-info."""

    image: str


class Options(Fields):
    """Of /options: those that can be set."""

    sd_model_checkpoint: str | None = None


class Empty(Fields):
    """A request whose fields do not matter."""


def router(desk: Desk) -> APIRouter:
    """All routes."""
    api = APIRouter(tags=["A1111"])
    service = desk.service

    async def draw(http: HttpRequest, asked: Txt2Img) -> dict[str, Any]:
        with contextlib.ExitStack() as leave:
            owner = owner_of(http)
            ticket, notes = await desk.in_thread(_submit, desk, asked, owner, leave)
            await desk.drawn(http, ticket)
            return await desk.in_thread(_answer, ticket, asked, [*notes, *ticket.notes])

    @api.post("/sdapi/v1/txt2img")
    async def txt2img(http: HttpRequest) -> dict[str, Any]:
        return await draw(http, await read_fields(http, Txt2Img))

    @api.post("/sdapi/v1/img2img")
    async def img2img(http: HttpRequest) -> dict[str, Any]:
        return await draw(http, await read_fields(http, Img2Img))

    @api.get("/sdapi/v1/progress")
    async def progress(http: HttpRequest, skip_current_image: bool = False) -> dict[str, Any]:
        return await desk.in_thread(_progress, desk, owner_of(http), skip_current_image)

    @api.post("/sdapi/v1/interrupt")
    async def interrupt(http: HttpRequest) -> dict[str, Any]:
        service.stop(owner_of(http))
        return {}

    @api.post("/sdapi/v1/skip")
    async def skip(http: HttpRequest) -> dict[str, Any]:
        service.skip(owner_of(http))
        return {}

    @api.post("/sdapi/v1/png-info")
    async def png_info(http: HttpRequest) -> dict[str, Any]:
        asked = await read_fields(http, PngInfo)
        chunks = await desk.in_thread(uploads.text_chunks, asked.image)
        return {"info": chunks.get("parameters", ""), "items": chunks, "parameters": {}}

    @api.get("/sdapi/v1/options")
    async def options(http: HttpRequest) -> dict[str, Any]:
        return {
            "sd_model_checkpoint": desk.model(owner_of(http)),
            "sd_checkpoint_hash": "",
            "sd_vae": "Automatic",
            "CLIP_stop_at_last_layers": 1,
            "samples_format": "png",
            "samples_save": True,
        }

    @api.post("/sdapi/v1/options")
    async def set_options(http: HttpRequest) -> dict[str, Any] | None:
        asked = await read_fields(http, Options)
        if asked.sd_model_checkpoint is not None:
            name = _plain_name(asked.sd_model_checkpoint)
            await desk.in_thread(desk.parts, name)
            desk.chosen[owner_of(http)] = name
        ignored = [f"option {short(name)!r} is ignored" for name in asked.model_extra or {}]
        return {"warnings": ignored} if ignored else None

    @api.get("/sdapi/v1/sd-models")
    async def sd_models() -> list[dict[str, Any]]:
        names = await desk.in_thread(desk.models)
        one = {"hash": None, "sha256": None, "config": None}
        return [{"title": name, "model_name": _stem(name), "filename": name, **one} for name in names]

    @api.get("/sdapi/v1/samplers")
    async def samplers() -> list[dict[str, Any]]:
        return [{"name": theirs, "aliases": [ours], "options": {}} for ours, theirs in WEB_UI_SAMPLERS.items()]

    @api.get("/sdapi/v1/schedulers")
    async def schedulers() -> list[dict[str, Any]]:
        more = {"aliases": None, "default_rho": -1.0, "need_inner_model": False}
        return [{"name": name, "label": name.capitalize(), **more} for name in ("automatic", *LAYOUTS)]

    @api.get("/sdapi/v1/loras")
    async def loras() -> list[dict[str, Any]]:
        names = await desk.in_thread(service.models.names, "loras")
        return [{"name": _stem(name), "alias": _stem(name), "path": name, "metadata": {}} for name in names]

    @api.get("/sdapi/v1/embeddings")
    async def embeddings() -> dict[str, Any]:
        names = await desk.in_thread(service.models.names, "embeddings")
        one = {"step": None, "sd_checkpoint": None, "sd_checkpoint_name": None}
        return {"loaded": {_stem(name): {**one, "shape": 0, "vectors": 0} for name in names}, "skipped": {}}

    @api.get("/sdapi/v1/sd-vae")
    async def vaes() -> list[dict[str, Any]]:
        names = await desk.in_thread(service.models.names, "vaes")
        return [{"model_name": _stem(name), "filename": name} for name in names]

    @api.get("/sdapi/v1/upscalers")
    async def upscalers() -> list[dict[str, Any]]:
        return [{"name": "Lanczos", "model_name": None, "model_path": None, "model_url": None, "scale": 4}]

    @api.get("/sdapi/v1/cmd-flags")
    async def flags() -> dict[str, Any]:
        return {"api": True}

    @api.get("/sdapi/v1/memory")
    async def memory() -> dict[str, Any]:
        return {"ram": {}, "cuda": {}}

    @api.get("/sdapi/v1/scripts")
    async def scripts() -> dict[str, Any]:
        return {"txt2img": [], "img2img": []}

    @api.post("/sdapi/v1/refresh-checkpoints")
    @api.post("/sdapi/v1/refresh-loras")
    @api.post("/sdapi/v1/refresh-vae")
    async def refresh() -> None:  # the folder is looked at whenever it is asked for
        return None

    @api.get("/sdapi/v1/hypernetworks")
    @api.get("/sdapi/v1/face-restorers")
    @api.get("/sdapi/v1/realesrgan-models")
    @api.get("/sdapi/v1/prompt-styles")
    @api.get("/sdapi/v1/latent-upscale-modes")
    async def none_of_these() -> list[Any]:
        return []

    @api.get("/controlnet/version")
    async def controlnet_version() -> dict[str, int]:
        return {"version": 2}

    @api.get("/controlnet/model_list")
    async def controlnet_models() -> dict[str, list[str]]:
        return {"model_list": await desk.in_thread(service.models.names, "controls")}

    @api.get("/controlnet/module_list")
    async def controlnet_modules() -> dict[str, list[str]]:
        return {"module_list": [*_MAPS]}

    return api


def _submit(desk: Desk, asked: Txt2Img, owner: str, leave: contextlib.ExitStack) -> tuple[Ticket, list[str]]:
    """The job of a request, queued, and what of the request has no effect. Raises UserError."""
    notes = [*_without_effect(asked)]
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
    own = desk.parts(desk.model(owner) if name is None else _plain_name(_text(name, "sd_model_checkpoint")))
    vae = _text(overrides.pop("sd_vae", "Automatic"), "sd_vae")
    if vae not in ("Automatic", "None", ""):
        changes["vae"] = desk.service.models.path("vaes", _plain_name(vae))
    return replace(own, **changes)


def _with_embeddings(desk: Desk, parts: Parts, asked: Txt2Img) -> Parts:
    """With the words of textual inversion that the English prompts have; that is how the web UI names them."""
    texts = f"{asked.english} {asked.english_negative}"
    found = [name for name in desk.service.models.names("embeddings") if _stem(Path(name).name) in texts]
    paths = tuple(str(desk.service.models.path("embeddings", name)) for name in found)
    return replace(parts, embedding=(*parts.embedding, *paths)) if paths else parts


def _with_controls(
    desk: Desk, parts: Parts, scripts: dict[str, Any], leave: contextlib.ExitStack, notes: list[str]
) -> Parts:
    """With the ControlNets of the extension's units, their pictures in files that go when the request does."""
    found = []
    for name, script in scripts.items():
        units = script.get("args") if isinstance(script, dict) else None
        if name.lower() != "controlnet":
            if units and units[0] not in (False, None):
                notes.append(f"alwayson_scripts: {short(name)!r} is unknown and ignored")
            continue
        for values in units or []:
            if not isinstance(values, dict):
                raise UserError("alwayson_scripts: ControlNet: args: expected a list of objects")
            unit = ControlUnit.model_validate({key: value for key, value in values.items() if value is not None})
            if not unit.enabled or unit.model in ("None", ""):
                continue
            if unit.module not in _MAPS:
                raise unknown("module of a ControlNet", short(unit.module), _MAPS)
            text = unit.image if isinstance(unit.image, str) else unit.image.get("image", "")
            pixels = uploads.image(text, desk.limits.max_upload * 10**6, "ControlNet image")
            network = desk.service.models.path("controls", _plain_name(unit.model))
            folder = Path(leave.enter_context(tempfile.TemporaryDirectory(prefix="bdm-control-")))
            write_png(folder / "map.png", pixels)
            made = f",from={_MAPS[unit.module]}" if _MAPS[unit.module] else ""
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


def _without_effect(asked: Txt2Img) -> Iterator[str]:
    """What a request asks for in vain."""
    for name, value in (asked.model_extra or {}).items():
        if name not in _NOTHING:
            yield f"{short(name)!r} is unknown and ignored"
        elif name.startswith("inpaint") and getattr(asked, "mask", None) is None:
            continue
        elif value not in _NOTHING[name]:
            yield f"{name} {short(json.dumps(value), 40)} is ignored"
    if isinstance(asked, Img2Img) and asked.resize_mode not in (0, 1):
        yield f"resize_mode {asked.resize_mode} is ignored: pictures are cropped and resized"


def _answer(ticket: Ticket, asked: Txt2Img, notes: list[str]) -> dict[str, Any]:
    """Pictures, the request without them, and `info` as the web UI has it."""
    drawn = [read_settings(path) for path in ticket.pictures]
    requests, settings = ticket.job.requests, ticket.job.settings
    texts = [web_ui_parameters(values) for values in drawn]
    seeds = [values["seed"] for values in drawn] or [request.seed for request in requests]
    first = drawn[0] if drawn else {}
    info = {
        "prompt": asked.prompt,
        "all_prompts": [asked.prompt] * len(seeds),
        "negative_prompt": asked.negative_prompt,
        "all_negative_prompts": [asked.negative_prompt] * len(seeds),
        "english": requests[0].english,
        "english_negative": requests[0].english_negative,
        "seed": seeds[0],
        "all_seeds": seeds,
        "subseed": seeds[0],
        "all_subseeds": seeds,
        "subseed_strength": 0,
        "width": first.get("width"),
        "height": first.get("height"),
        "sampler_name": WEB_UI_SAMPLERS.get(first.get("sampler", ""), first.get("sampler")),
        "cfg_scale": first.get("guidance", settings.guidance),
        "steps": first.get("steps", settings.steps),
        "batch_size": asked.batch_size,
        "denoising_strength": asked.denoising_strength,
        "sd_model_name": first.get("model"),
        "clip_skip": settings.clip_skip,
        "extra_generation_params": {},
        "index_of_first_image": 0,
        "infotexts": texts,
        "job_timestamp": time.strftime("%Y%m%d%H%M%S"),
        "state": ticket.state,
        "files": [path.name for path in ticket.pictures],
        "warnings": notes,
    }
    images = [uploads.to_base64(path.read_bytes()) for path in ticket.pictures] if asked.send_images else []
    left_out = {*(asked.model_extra or {}), "init_images", "mask", "alwayson_scripts", "override_settings"}
    parameters = asked.model_dump(mode="json", exclude=left_out)
    return {"images": images, "parameters": parameters, "info": json.dumps(info, ensure_ascii=False)}


def _progress(desk: Desk, owner: str, without_image: bool) -> dict[str, Any]:
    """Of an owner's job that is being drawn."""
    ticket, waiting = desk.service.current(owner), desk.service.waiting(owner)
    done, total = (ticket.done, max(ticket.total, 1)) if ticket else (0, 1)
    images = len(ticket.job.requests) if ticket else 0
    each = max(total // max(images, 1), 1)
    elapsed = time.monotonic() - ticket.times.get("started", time.monotonic()) if ticket else 0.0
    shown = None
    if ticket is not None and not without_image and (preview := ticket.preview) is not None:
        shown = uploads.to_base64(uploads.png_bytes(preview))
    return {
        "progress": min(done / total, 1.0),
        "eta_relative": elapsed / done * (total - done) if done else 0.0,
        "state": {
            "skipped": False,
            "interrupted": False,
            "stopping_generation": False,
            "job": ticket.id if ticket else "",
            "job_count": waiting + (ticket is not None),
            "job_timestamp": "0",
            "job_no": 0,
            "sampling_step": done % each if done < total else each,
            "sampling_steps": each if ticket else 0,
        },
        "current_image": shown,
        "textinfo": ticket.state if ticket else None,
    }


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{name} {short(repr(value))}: expected a text")
    return value


def _plain_name(title: str) -> str:
    """`model.safetensors [6ce0161689]` -> model.safetensors"""
    head, bracket, rest = title.rpartition(" [")
    return head if bracket and rest.endswith("]") else title


def _stem(name: str) -> str:
    return name.rsplit(".", 1)[0] if "." in name.rpartition("/")[2] else name
