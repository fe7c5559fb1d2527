"""Errors in the shape that each API's clients expect, one line each."""

import re
from http import HTTPStatus
from typing import Any

from pydantic import ValidationError
from starlette.responses import JSONResponse

from bdm_jax.errors import short


class RefusedRequest(Exception):
    """A request that is answered with an error: its status, and what is said, in one line.

    `code`: what OpenAI's clients read beside the message.
    """

    def __init__(self, status: int, message: str, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


def refusal(path: str, status: int, message: str, code: str | None = None) -> JSONResponse:
    """The answer, in OpenAI's shape below /v1, elsewhere in the web UI's."""
    message = " ".join(message.split())
    headers = {429: {"retry-after": "5"}, 401: {"www-authenticate": 'Basic realm="bdm_jax", charset="UTF-8"'}}
    if path.startswith("/v1/"):
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
        content: dict[str, Any] = {"error": {"message": message, "type": kind, "param": None, "code": code}}
    else:
        content = {"error": HTTPStatus(status).phrase, "detail": message, "body": "", "errors": ""}
    return JSONResponse(content, status, headers.get(status))


def first_fault(error: ValidationError) -> str:
    """What is wrong with the first field that is wrong."""
    fault = error.errors(include_url=False, include_context=False)[0]
    where = ".".join(str(part) for part in fault["loc"] if not re.search(r"[\[\]()]", str(part))) or "the request"
    given = "" if fault["type"] == "missing" else f", not {short(repr(fault['input']))}"
    return f"{where}: {fault['msg'][0].lower()}{fault['msg'][1:]}{given}"
