"""The routes of the web UI's API."""

import contextlib
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request as HttpRequest

from bdm_jax.app.metadata import WEB_UI_SAMPLERS
from bdm_jax.app.service import stem
from bdm_jax.errors import short
from bdm_jax.web import uploads
from bdm_jax.web.a1111 import answers, jobs
from bdm_jax.web.a1111.fields import Img2Img, Options, PngInfo, Txt2Img
from bdm_jax.web.a1111.jobs import LAYOUTS, MAPS, plain_name
from bdm_jax.web.asking import Desk, owner_of, read_fields


def router(desk: Desk) -> APIRouter:
    """All routes."""
    api = APIRouter(tags=["A1111"])
    _add_drawing(api, desk)
    _add_options(api, desk)
    _add_lists(api, desk)
    return api


def _add_drawing(api: APIRouter, desk: Desk) -> None:
    """Pictures, what becomes of them, and what is inside them."""
    service = desk.service

    async def draw(http: HttpRequest, asked: Txt2Img) -> dict[str, Any]:
        with contextlib.ExitStack() as leave:
            owner = owner_of(http)
            ticket, notes = await desk.in_thread(jobs.submit, desk, asked, owner, leave)
            await desk.drawn(http, ticket)
            return await desk.in_thread(answers.answer, ticket, asked, [*notes, *ticket.notes])

    @api.post("/sdapi/v1/txt2img")
    async def txt2img(http: HttpRequest) -> dict[str, Any]:
        return await draw(http, await read_fields(http, Txt2Img))

    @api.post("/sdapi/v1/img2img")
    async def img2img(http: HttpRequest) -> dict[str, Any]:
        return await draw(http, await read_fields(http, Img2Img))

    @api.get("/sdapi/v1/progress")
    async def progress(http: HttpRequest, skip_current_image: bool = False) -> dict[str, Any]:
        return await desk.in_thread(answers.progress, desk, owner_of(http), skip_current_image)

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


def _add_options(api: APIRouter, desk: Desk) -> None:
    """The model that a key's owner draws with."""

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
            name = plain_name(asked.sd_model_checkpoint)
            await desk.in_thread(desk.parts, name)
            desk.chosen[owner_of(http)] = name
        ignored = [f"option {short(name)!r} is ignored" for name in asked.model_extra or {}]
        return {"warnings": ignored} if ignored else None


def _add_lists(api: APIRouter, desk: Desk) -> None:
    """What can be named in a request, and empty lists of what there is not."""
    models = desk.service.models

    @api.get("/sdapi/v1/sd-models")
    async def sd_models() -> list[dict[str, Any]]:
        names = await desk.in_thread(desk.models)
        one = {"hash": None, "sha256": None, "config": None}
        return [{"title": name, "model_name": stem(name), "filename": name, **one} for name in names]

    @api.get("/sdapi/v1/samplers")
    async def samplers() -> list[dict[str, Any]]:
        return [{"name": theirs, "aliases": [ours], "options": {}} for ours, theirs in WEB_UI_SAMPLERS.items()]

    @api.get("/sdapi/v1/schedulers")
    async def schedulers() -> list[dict[str, Any]]:
        more = {"aliases": None, "default_rho": -1.0, "need_inner_model": False}
        return [{"name": name, "label": name.capitalize(), **more} for name in ("automatic", *LAYOUTS)]

    @api.get("/sdapi/v1/loras")
    async def loras() -> list[dict[str, Any]]:
        names = await desk.in_thread(models.names, "loras")
        return [{"name": stem(name), "alias": stem(name), "path": name, "metadata": {}} for name in names]

    @api.get("/sdapi/v1/embeddings")
    async def embeddings() -> dict[str, Any]:
        names = await desk.in_thread(models.names, "embeddings")
        one = {"step": None, "sd_checkpoint": None, "sd_checkpoint_name": None}
        return {"loaded": {stem(name): {**one, "shape": 0, "vectors": 0} for name in names}, "skipped": {}}

    @api.get("/sdapi/v1/sd-vae")
    async def vaes() -> list[dict[str, Any]]:
        names = await desk.in_thread(models.names, "vaes")
        return [{"model_name": stem(name), "filename": name} for name in names]

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
        return {"model_list": await desk.in_thread(models.names, "controls")}

    @api.get("/controlnet/module_list")
    async def controlnet_modules() -> dict[str, list[str]]:
        return {"module_list": [*MAPS]}
