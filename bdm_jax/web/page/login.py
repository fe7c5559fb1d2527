"""The page's login: a key once, then a cookie for as long as the browser and the server run. No key is kept."""

import secrets
import threading
from collections import OrderedDict
from collections.abc import Callable
from html import escape

import fastapi
from fastapi.responses import HTMLResponse, RedirectResponse, Response

from bdm_jax.web.page.texts import language_of, say

_COOKIE = "bdm_jax"
_MAX_SESSIONS = 10_000
_STYLE = """
:root { color-scheme: light dark; --ground: #faf9f7; --card: #fff; --ink: #262321; --line: #dedad4; --accent: #b23a25 }
@media (prefers-color-scheme: dark) { :root { --ground: #161514; --card: #201e1d; --ink: #ece8e3; --line: #3b3734 } }
* { box-sizing: border-box }
body { margin: 0; min-height: 100vh; display: grid; place-items: center; background: var(--ground); color: var(--ink);
  font: 16px/1.5 system-ui, "PingFang SC", "Noto Sans CJK SC", "Microsoft YaHei", sans-serif }
form { width: min(22rem, calc(100vw - 2rem)); padding: 2rem; background: var(--card); border: 1px solid var(--line);
  border-radius: 12px; display: grid; gap: .9rem }
h1 { margin: 0; font-size: 1.15rem } label { font-size: .9rem } p { margin: 0; color: var(--accent); font-size: .9rem }
input { font: inherit; padding: .6rem .7rem; border: 1px solid var(--line); border-radius: 8px; background: none;
  color: inherit; width: 100% }
button { font: inherit; font-weight: 600; padding: .65rem; border: 0; border-radius: 8px; background: var(--accent);
  color: #fff; cursor: pointer }
"""


class Login:
    """Who may see the page, where keys are set.

    `owner_of`: the name of a key's owner; None for a key that is none.
    """

    def __init__(self, owner_of: Callable[[str], str | None]):
        self._owner_of, self._lock = owner_of, threading.Lock()
        self._sessions: OrderedDict[str, str] = OrderedDict()

    def owner(self, request: fastapi.Request) -> str | None:
        """Whose browser it is; None of one that has not logged in."""
        with self._lock:
            return self._sessions.get(request.cookies.get(_COOKIE, ""))

    def routes(self) -> fastapi.APIRouter:
        """/page/login and /page/logout."""
        router = fastapi.APIRouter(include_in_schema=False)

        @router.get("/page/login")
        def ask(request: fastapi.Request) -> Response:
            return _form(request)

        @router.post("/page/login")
        def enter(request: fastapi.Request, key: str = fastapi.Form("", max_length=1000)) -> Response:
            owner = self._owner_of(key)
            if owner is None:
                return _form(request, wrong=True)
            token = secrets.token_urlsafe(32)
            with self._lock:
                self._sessions[token] = owner
                while len(self._sessions) > _MAX_SESSIONS:
                    self._sessions.popitem(last=False)
            response = RedirectResponse("../", status_code=303)
            secure = request.url.scheme == "https"
            response.set_cookie(_COOKIE, token, httponly=True, samesite="lax", secure=secure)
            return response

        @router.get("/page/logout")
        def leave(request: fastapi.Request) -> Response:
            with self._lock:
                self._sessions.pop(request.cookies.get(_COOKIE, ""), None)
            response = RedirectResponse("login", status_code=303)
            response.delete_cookie(_COOKIE)
            return response

        return router


def _form(request: fastapi.Request, wrong: bool = False) -> Response:
    language = language_of(request.headers.get("accept-language"))
    words = {key: escape(say(key, language)) for key in ("login", "enter", "wrong_key")}
    error = f'<p role="alert">{words["wrong_key"]}</p>' if wrong else ""
    return HTMLResponse(
        f'<!doctype html><html lang="{language}"><meta charset="utf-8"><title>bdm_jax</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style>'
        f'<form method="post" action="login"><h1>bdm_jax</h1><label for="key">{words["login"]}</label>'
        f'<input id="key" name="key" type="password" autocomplete="current-password" autofocus required>{error}'
        f"<button>{words['enter']}</button></form></html>",
        status_code=401 if wrong else 200,
        headers={"Cache-Control": "no-store"},
    )
