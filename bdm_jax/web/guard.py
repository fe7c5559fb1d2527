"""What stands before every request: which host it was sent to, which page sent it, whose key it has."""

import ipaddress
import socket
from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from bdm_jax.errors import short
from bdm_jax.web.errors import refusal
from bdm_jax.web.keys import Keys, key_of

OPEN = ("/health", "/pictures/")  # for everybody: one says nothing, the other's links are signed
_MAX_HEADERS = 32 << 10
_SAFE = ("GET", "HEAD", "OPTIONS")


class Guard:
    """ASGI: refuses requests of other sites' pages and of people without a key; the owner is `scope["state"]["owner"]`.

    A page of another site can make a browser on this machine ask a server that only this machine reaches. Without keys,
    names that are not this machine's are therefore refused (a name that an attacker's DNS leads here), and with or
    without them what changes something is taken from pages of this server only.

    Args:
      hosts: further names of this server, as behind a proxy; without keys.
      guarded: paths that need a key begin so; the page at the others asks for it by itself.
    """

    def __init__(self, app: ASGIApp, keys: Keys, hosts: Collection[str] = (), guarded: tuple[str, ...] = ("/",)):
        self.app, self.keys, self.guarded = app, keys, guarded
        self.hosts = {"localhost", socket.gethostname().lower(), *(host.lower() for host in hosts)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers, path = Headers(scope=scope), scope["path"]
        if (said := self._foreign(headers, scope["method"])) is not None:
            await refusal(path, 403, said)(scope, receive, send)
            return
        owner = self.keys.owner(key_of(headers))
        if owner is None and path.startswith(self.guarded) and not path.startswith(OPEN):
            said = "no API key that is known: send it as Authorization: Bearer KEY, or as a password"
            await refusal(path, 401, said, "invalid_api_key")(scope, receive, send)
            return
        scope.setdefault("state", {})["owner"] = owner
        await self.app(scope, receive, send)

    def _foreign(self, headers: Headers, method: str) -> str | None:
        """What is wrong with where a request comes from."""
        host = headers.get("host", "")
        name = _name(host)
        if sum(len(name) + len(value) for name, value in headers.raw) > _MAX_HEADERS:
            return f"the headers are larger than {_MAX_HEADERS >> 10} KiB"
        if len(headers.getlist("host")) > 1 or name is None:
            return "the Host header is none"
        if not self.keys and name not in self.hosts and not _is_address(name):
            shown = short(name)
            return f"{shown} is no name of this server: ask by its address, or start it with --host-name {shown}"
        if method not in _SAFE:
            origin, site = headers.get("origin"), headers.get("sec-fetch-site")
            if origin is not None and urlsplit(origin).netloc.lower() != host.lower():
                return "a page of another site may not ask this server"
            if site not in (None, "same-origin", "none"):
                return "a page of another site may not ask this server"
        return None


def _name(host: str) -> str | None:
    """`localhost:7860` -> localhost; None for what is no host."""
    try:
        found = urlsplit(f"//{host}")
        return found.hostname if found.netloc == host and (found.port or True) and "@" not in host else None
    except ValueError:
        return None


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
