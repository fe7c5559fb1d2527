"""The application: both APIs, health, metrics and the page behind one guard; and the process that serves it."""

import asyncio
import logging
import socket
from collections.abc import Collection

import uvicorn
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response

from bdm_jax.app.service import Service
from bdm_jax.errors import UserError
from bdm_jax.web import a1111, openai
from bdm_jax.web.asking import Desk
from bdm_jax.web.errors import RefusedRequest, refusal
from bdm_jax.web.guard import Guard
from bdm_jax.web.keys import Keys
from bdm_jax.web.limits import Limits
from bdm_jax.web.metrics import Counted, registry
from bdm_jax.web.patience import BodyLimits, TimedProtocol

_APIS = ("/sdapi/", "/controlnet/", "/v1/", "/pictures/", "/metrics", "/openapi.json")
_CONNECTIONS = 512
_log = logging.getLogger(__name__)


def create_app(
    service: Service,
    keys: Keys | None = None,
    limits: Limits | None = None,
    *,
    hosts: Collection[str] = (),
    page: bool = True,
) -> FastAPI:
    """Everything that is served.

    Args:
      keys: who may ask; everybody without.
      hosts: further names that this server is asked by, see `Guard`.
      page: also the page at `/`; needs Gradio.

    Raises UserError for a page without Gradio.
    """
    keys, limits = keys or Keys(), limits or Limits()
    desk = Desk(service, limits)
    # No pages of its documentation: they would fetch scripts from another host. /openapi.json is there.
    app = FastAPI(title="bdm_jax", docs_url=None, redoc_url=None)
    app.state.desk = desk
    metrics, requests = registry(service)
    app.include_router(a1111.router(desk))
    app.include_router(openai.router(desk))

    @app.get("/health")
    async def health() -> JSONResponse:
        alive = service.alive
        return JSONResponse({"status": "ok" if alive else "the drawing thread has ended"}, 200 if alive else 503)

    @app.get("/metrics")
    async def prometheus() -> Response:
        return Response(await desk.in_thread(generate_latest, metrics), media_type=CONTENT_TYPE_LATEST)

    @app.exception_handler(RefusedRequest)
    async def refused(http: HttpRequest, error: RefusedRequest) -> JSONResponse:
        openai_status = 400 if error.status == 422 and http.url.path.startswith("/v1/") else error.status
        return refusal(http.url.path, openai_status, error.message, error.code)

    @app.exception_handler(ClientDisconnect)
    async def gone(http: HttpRequest, error: ClientDisconnect) -> JSONResponse:
        return refusal(http.url.path, 400, "the request broke off")  # nobody reads it; the log of requests counts it

    @app.exception_handler(RequestValidationError)
    async def invalid(http: HttpRequest, error: RequestValidationError) -> JSONResponse:
        fault = error.errors()[0]
        return refusal(http.url.path, 422, f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}")

    @app.exception_handler(HTTPException)
    async def no_route(http: HttpRequest, error: HTTPException) -> JSONResponse:
        return refusal(http.url.path, error.status_code, str(error.detail))

    @app.exception_handler(Exception)
    async def failed(http: HttpRequest, error: Exception) -> JSONResponse:
        _log.error("a request failed", exc_info=error)
        return refusal(http.url.path, 500, f"the request failed: {type(error).__name__}")

    if page:
        try:
            from bdm_jax.web.page.mount import mount  # Gradio takes seconds to import
        except ModuleNotFoundError as error:
            message = f"the page needs {error.name}: pip install 'bdm_jax[web]', or leave the page out with --no-page"
            raise UserError(message) from error

        owner_of = keys.owner if keys else None
        mount(app, service, owner_of=owner_of, most=limits.max_images, check=limits.check_job)
    app.add_middleware(BodyLimits, limits=limits)
    app.add_middleware(Guard, keys=keys, hosts=hosts, guarded=_APIS if page else ("/",))
    app.add_middleware(Counted, requests=requests)
    return app


class Server(uvicorn.Server):
    """uvicorn with our limits on a socket that is bound already, so that the port is known before it runs."""

    def __init__(self, app: FastAPI, host: str, port: int, limits: Limits | None = None):
        """Raises UserError for an address that cannot be taken."""
        limits = limits or Limits()
        protocol = type("_Protocol", (TimedProtocol,), {"patience": limits.patience})
        super().__init__(
            uvicorn.Config(
                app,
                http=protocol,
                ws="none",
                lifespan="on",
                log_level="warning",
                access_log=False,
                limit_concurrency=_CONNECTIONS,
                h11_max_incomplete_event_size=64 << 10,
                timeout_graceful_shutdown=5,
                server_header=False,
            )
        )
        try:
            family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            self._socket = socket.socket(family)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._socket.bind(address)
            self._socket.listen(_CONNECTIONS)  # who comes before it runs waits
        except OSError as error:
            raise UserError(f"{host} port {port}: cannot be served at ({error.strerror or error})") from error
        self.port = self._socket.getsockname()[1]

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's, but that those who wait for pictures are told first."""
        self.config.app.state.desk.closing.set()
        await super().shutdown(sockets)

    def run(self) -> None:
        """Serve until it is told to end."""
        asyncio.run(self.serve([self._socket]))
