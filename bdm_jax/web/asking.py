"""A request of either API as a job of the service: read, submitted, waited for."""

import asyncio
import contextlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from anyio import CapacityLimiter, to_thread
from pydantic import BaseModel, ConfigDict, ValidationError
from starlette.requests import Request as HttpRequest

from bdm_jax.app.parts import Parts
from bdm_jax.app.service import Job, QueueFull, Service, Ticket
from bdm_jax.errors import UserError, short
from bdm_jax.sampling.settings import KIND_OF, Sampling, parse_size
from bdm_jax.web.errors import RefusedRequest, first_fault
from bdm_jax.web.limits import Limits

_DIGITS = 18  # of a whole number
_AT_ONCE = 4  # requests that are decoded at a time; others wait, and the event loop goes on
Asked = TypeVar("Asked", bound="Fields")


class Fields(BaseModel):
    """The fields of a request: those that it knows checked, others kept to be named in a warning."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)


@dataclass
class Desk:
    """What both APIs ask: one service within limits.

    Attributes:
      chosen: the name of the model that an owner has chosen.
      closing: the server ends: who waits for a picture is told so.
    """

    service: Service
    limits: Limits
    chosen: dict[str, str] = field(default_factory=dict)
    closing: asyncio.Event = field(default_factory=asyncio.Event)
    _decoding: CapacityLimiter | None = None

    @property
    def own_model(self) -> str:
        """What the service's own model is called."""
        return self.service.parts.names()["model"]

    def model(self, owner: str) -> str:
        """The name of the model that draws an owner's pictures."""
        return self.chosen.get(owner, self.own_model)

    def models(self) -> list[str]:
        """All that may be chosen, the service's own first."""
        return list(dict.fromkeys([self.own_model, *self.service.models.names("models")]))

    def parts(self, name: str) -> Parts:
        """What draws under the name of a model. Raises UserError for a name that there is not."""
        return self.service.parts if name == self.own_model else Parts(model=self.service.models.path("models", name))

    async def in_thread(self, function: Callable, *arguments: Any) -> Any:
        """What would hold up the event loop; a UserError of it becomes status 422."""
        if self._decoding is None:
            self._decoding = CapacityLimiter(_AT_ONCE)
        try:
            return await to_thread.run_sync(function, *arguments, limiter=self._decoding)
        except QueueFull as error:
            raise RefusedRequest(429, str(error), "queue_full") from error
        except ValidationError as error:
            raise RefusedRequest(422, first_fault(error)) from error
        except UserError as error:
            raise RefusedRequest(422, str(error)) from error

    def submit(self, job: Job) -> Ticket:
        """Within the limits. Raises UserError and QueueFull."""
        self.limits.check_job(job)
        return self.service.submit(job)

    async def drawn(self, http: HttpRequest, ticket: Ticket) -> Ticket:
        """Until it is finished; stopped where it takes too long or the client has gone.

        Raises RefusedRequest: 422 for what the model cannot draw, 504 where it took too long, 503 at the server's end.
        """
        gone, closing = asyncio.ensure_future(_disconnected(http)), asyncio.ensure_future(self.closing.wait())
        finished = asyncio.wrap_future(ticket.future)
        try:
            limit = self.limits.max_seconds
            ends = gone, closing, finished
            done, _ = await asyncio.wait(ends, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            closing.cancel()
            if not finished.done():
                ticket.stop()
        if finished not in done:
            if closing in done:
                raise RefusedRequest(503, "the server is being stopped")
            raise RefusedRequest(504, f"not drawn within {self.limits.max_seconds:g} s: given up")
        if ticket.error is not None:
            finished.exception()
            raise RefusedRequest(500 if ticket.error.startswith("the job failed") else 422, ticket.error)
        return ticket


def owner_of(http: HttpRequest) -> str:
    """Whose key the request has."""
    return http.scope["state"]["owner"] or ""


async def read_fields(http: HttpRequest, kind: type[Asked]) -> Asked:
    """The JSON body of a request; null is as if the field were not there. Raises RefusedRequest with status 422."""
    try:
        body = await http.body()
        content = json.loads(body, parse_constant=_no_number, parse_int=_whole, parse_float=_finite)
        if b"\\ud" in body.lower():  # halves of characters, which cannot be written anywhere
            json.dumps(content, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise RefusedRequest(422, f"the request is no JSON that can be read ({short(str(error), 100)})") from error
    if not isinstance(content, dict):
        raise RefusedRequest(422, "the request is no JSON object")
    try:
        return kind.model_validate({key: value for key, value in content.items() if value is not None})
    except ValidationError as error:
        raise RefusedRequest(422, first_fault(error)) from error


def settings_of(values: dict[str, Any], given: dict[str, Any]) -> Sampling:
    """Settings by the names of `sample.py`'s flags, beside those that an API has names of its own for.

    Raises UserError for a value of a wrong kind.
    """
    found = dict(given)
    for name, value in values.items():
        if value is None:
            continue
        if name == "size" and isinstance(value, str):
            try:
                value = parse_size(value)
            except ValueError as error:
                raise UserError(str(error)) from error
        elif isinstance(value, list):
            value = tuple(value)
        if KIND_OF.get(name, type(getattr(Sampling, name))) is float and type(value) is int and abs(value) < 1e9:
            value = float(value)  # 1 and 1.0 are one setting, and one batch
        found[name] = value
    return Sampling(**found)


SETTINGS = frozenset(one.name for one in fields(Sampling))


async def _disconnected(http: HttpRequest) -> None:
    with contextlib.suppress(asyncio.CancelledError):
        while (await http.receive())["type"] != "http.disconnect":
            pass


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is no number of JSON")


def _whole(text: str) -> int:
    if len(text) > _DIGITS:
        raise RefusedRequest(422, f"{text[:_DIGITS]}...: a whole number of more than {_DIGITS} digits")
    return int(text)


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{short(text)} is too large")
    return value
