"""Clients that are slow, or send too much: sent away before they hold up anybody."""

import asyncio
import contextlib

import h11
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from bdm_jax.web.errors import refusal
from bdm_jax.web.limits import Limits

_LAST_ANSWERS = 4  # seconds for what is being answered when the server ends
_SLOWEST = 16 << 10  # bytes per second of a body, after the first seconds


class _Refused(Exception):
    """status and message of a body that is not read to its end."""


class BodyLimits:
    """ASGI: a body that is too large ends as 413, one that is too slow as 408, before anything is done with it."""

    def __init__(self, app: ASGIApp, limits: Limits):
        self.app, self.limits = app, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        most, patience = self.limits.max_body << 20, self.limits.patience
        size, ended, started, began = 0, False, False, asyncio.get_running_loop().time()

        async def bounded() -> Message:
            nonlocal size, ended
            if ended:  # what comes now is that the client has gone
                return await receive()
            left = began + patience + size / _SLOWEST - asyncio.get_running_loop().time()
            try:
                message = await asyncio.wait_for(receive(), max(min(patience, left), 0))
            except TimeoutError:
                raise _Refused(408, "the request came too slowly") from None
            size += len(message.get("body", b""))
            ended = not message.get("more_body", False)
            if size > most:
                raise _Refused(413, f"the request is larger than {self.limits.max_body} MiB")
            return message

        async def noted(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            length = dict(scope["headers"]).get(b"content-length", b"0")
            if not length.isdigit() or len(length) > 15 or int(length) > most:
                raise _Refused(413, f"the request is larger than {self.limits.max_body} MiB")
            await self.app(scope, bounded, noted)
        except _Refused as error:
            if not started:
                if not ended and error.args[0] == 413:  # a client that still sends would not see the answer
                    await _drained(receive, patience)
                response: Response = refusal(scope["path"], *error.args)
                response.headers["connection"] = "close"
                await response(scope, receive, send)


async def _drained(receive: Receive, seconds: float) -> None:
    """Take what a client still sends, and forget it, for so long at most."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            while (await receive()).get("more_body", False):
                pass


class TimedProtocol(H11Protocol):
    """uvicorn's HTTP/1.1, with an end to clients that do not finish their headers, and to all when the server ends."""

    patience = Limits.patience
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self._timer = self.loop.call_later(self.patience, self._too_slow)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._forget()
        elif self._timer is None and self.conn.trailing_data[0]:
            self._timer = self.loop.call_later(self.patience, self._too_slow)

    def shutdown(self) -> None:
        """The server ends: what is being answered has some seconds, a stream (kept open by a page) none."""
        super().shutdown()
        if self.cycle is not None and not self.cycle.response_complete:
            self.loop.call_later(0 if self.cycle.response_started else _LAST_ANSWERS, self.transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget()
        super().connection_lost(exc)

    def _forget(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _too_slow(self) -> None:
        self._timer = None
        if not self.transport.is_closing():
            said = b"the request came too slowly\n"
            head = b"HTTP/1.1 408 Request Timeout\r\nconnection: close\r\ncontent-type: text/plain\r\n"
            self.transport.write(head + b"content-length: %d\r\n\r\n" % len(said) + said)
            self.transport.close()
