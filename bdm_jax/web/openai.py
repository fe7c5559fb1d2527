"""OpenAI's images API: `POST /v1/images/generations` and `/v1/models`.

`prompt` is the branch's (Chinese). Beside OpenAI's fields it takes `negative`, `english`, `english_negative`, `seed`
and sample.py's settings by name (`steps`, `sampler`, `guidance`, `branch_strength`, ...), which clients send as extra
fields. What has no effect is named under `warnings`.
"""

import hashlib
import hmac
import secrets
import time
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request as HttpRequest
from starlette.responses import FileResponse

from bdm_jax.app.metadata import read_settings
from bdm_jax.app.service import Job, Ticket
from bdm_jax.errors import UserError, short
from bdm_jax.sampling.settings import ANY_SEED, Request
from bdm_jax.web import uploads
from bdm_jax.web.asking import SETTINGS, Desk, Fields, owner_of, read_fields, settings_of
from bdm_jax.web.errors import RefusedRequest

_EXPIRY = 3600  # seconds that a link to a picture is good for
_NOTHING = {"quality", "style", "user", "moderation", "background", "output_compression"}


class ImageGeneration(Fields):
    """Of /v1/images/generations."""

    prompt: str
    model: str | None = None
    n: int = Field(1, ge=1)
    size: str = "auto"
    response_format: Literal["b64_json", "url"] = "b64_json"
    output_format: Literal["png"] = "png"
    stream: Literal[False] = False
    negative: str = ""
    english: str = ""
    english_negative: str = ""
    seed: int = ANY_SEED


class Links:
    """Addresses of pictures that can be opened without a key, for an hour."""

    def __init__(self):
        self._secret = secrets.token_bytes(32)

    def make(self, path: Path, owner: str) -> str:
        """The path and query of a picture's address."""
        until = int(time.time()) + _EXPIRY
        name = quote(path.name)
        return f"/pictures/{name}?owner={owner}&until={until}&signature={self._sign(path.name, owner, until)}"

    def good(self, name: str, owner: str, until: int, signature: str) -> bool:
        """Whether it is an address that `make` made, not too long ago."""
        expected = self._sign(name, owner, until)
        return hmac.compare_digest(expected.encode(), signature.encode("utf-8", "replace")) and time.time() < until

    def _sign(self, name: str, owner: str, until: int) -> str:
        said = f"{owner}\n{until}\n{name}".encode("utf-8", "surrogatepass")
        return hmac.new(self._secret, said, hashlib.sha256).hexdigest()


def router(desk: Desk) -> APIRouter:
    """All routes."""
    api, links = APIRouter(tags=["OpenAI"]), Links()

    @api.post("/v1/images/generations")
    async def generations(http: HttpRequest) -> dict[str, Any]:
        asked = await read_fields(http, ImageGeneration)
        owner = owner_of(http)
        if asked.model is not None and asked.model not in await desk.in_thread(desk.models):
            raise RefusedRequest(404, f"the model {short(asked.model)!r} is not there", "model_not_found")
        ticket, notes = await desk.in_thread(_submit, desk, asked, owner)
        await desk.drawn(http, ticket)
        data, size = await desk.in_thread(_data, ticket, asked, links, str(http.base_url).rstrip("/"), owner)
        warnings = [*notes, *ticket.notes]
        more = {"output_format": "png", "size": size, "warnings": warnings}
        return {"created": int(time.time()), "data": data, **more}

    @api.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(name) for name in await desk.in_thread(desk.models)]}

    @api.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        if name not in await desk.in_thread(desk.models):
            raise RefusedRequest(404, f"the model {short(name)!r} is not there", "model_not_found")
        return _model(name)

    @api.get("/pictures/{name}")
    async def picture(name: str, owner: str = "", until: int = 0, signature: str = "") -> FileResponse:
        if not links.good(name, owner, until, signature):
            raise RefusedRequest(403, "this address of a picture is not good, or not any more")
        try:
            path = desk.service.picture(name, owner)
        except UserError as error:
            raise RefusedRequest(404, str(error)) from error
        return FileResponse(path, media_type="image/png", headers={"x-content-type-options": "nosniff"})

    return api


def _submit(desk: Desk, asked: ImageGeneration, owner: str) -> tuple[Ticket, list[str]]:
    """The job of a request, queued, and what of the request has no effect. Raises UserError."""
    extra = dict(asked.model_extra or {})
    given = {name: extra.pop(name) for name in [*extra] if name in SETTINGS}
    notes = [f"{short(name)!r} is {'ignored' if name in _NOTHING else 'unknown and ignored'}" for name in extra]
    if asked.size != "auto":
        given["size"] = asked.size
    settings = settings_of(given, {})
    desk.limits.check_count(asked.n)
    texts = asked.prompt, asked.negative, asked.english, asked.english_negative
    seeds = [ANY_SEED if asked.seed == ANY_SEED else asked.seed + number for number in range(asked.n)]
    parts = desk.parts(asked.model or desk.model(owner))
    return desk.submit(Job(tuple(Request(*texts, seed) for seed in seeds), settings, parts, owner)), notes


def _data(
    ticket: Ticket, asked: ImageGeneration, links: Links, base: str, owner: str
) -> tuple[list[dict[str, Any]], str | None]:
    """The pictures, and their size."""
    data, size = [], None
    for path in ticket.pictures:
        values = read_settings(path)
        size = f"{values['width']}x{values['height']}"
        if asked.response_format == "url":
            one = {"url": base + links.make(path, owner)}
        else:
            one = {"b64_json": uploads.to_base64(path.read_bytes())}
        data.append({**one, "seed": values["seed"]})
    return data, size


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "local"}
