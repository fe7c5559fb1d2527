"""Pictures of the output folder for the browser: whole and small, to their owner only."""

import io
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import fastapi
from fastapi.responses import FileResponse, Response
from PIL import Image

from bdm_jax.app.service import Service
from bdm_jax.errors import UserError
from bdm_jax.images.decode import read_image
from bdm_jax.web.page.show import PICTURES, THUMBNAILS

_SIDE = 256
_KEPT = 1000  # thumbnails in memory, of some 10 KB each
_HEADERS = {"Cache-Control": "private, max-age=31536000, immutable", "X-Content-Type-Options": "nosniff"}


def routes(service: Service, owner: Callable[[fastapi.Request], str | None]) -> fastapi.APIRouter:
    """`owner`: whose request it is; None of nobody who may see anything."""
    router = fastapi.APIRouter(include_in_schema=False)

    def found(request: fastapi.Request, name: str) -> Path:
        if (asking := owner(request)) is None:
            raise fastapi.HTTPException(401)
        try:
            return service.picture(name, asking)
        except UserError as error:
            raise fastapi.HTTPException(404, str(error)) from error

    @router.get(f"/{PICTURES}/{{name}}")
    def picture(request: fastapi.Request, name: str) -> FileResponse:
        return FileResponse(found(request, name), media_type="image/png", headers=_HEADERS)

    @router.get(f"/{THUMBNAILS}/{{name}}")
    def thumbnail(request: fastapi.Request, name: str) -> Response:
        path = found(request, name)
        try:
            data = _small(path, path.stat().st_mtime_ns)
        except (UserError, OSError) as error:
            raise fastapi.HTTPException(404, "this picture cannot be read") from error
        return Response(data, media_type="image/webp", headers=_HEADERS)

    return router


@lru_cache(maxsize=_KEPT)
def _small(path: Path, changed: int) -> bytes:
    """`changed`: when; a file that has changed is read anew."""
    image, data = Image.fromarray(read_image(path)), io.BytesIO()
    image.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    image.save(data, "webp", quality=85)
    return data.getvalue()
