"""The page as a part of a server."""

import os
from collections.abc import Callable
from pathlib import Path

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before Gradio is imported: it asks its makers' host for news

import fastapi  # noqa: E402
import gradio as gr
from fastapi.responses import RedirectResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from bdm_jax.app.service import Job, Service
from bdm_jax.web.page import pictures
from bdm_jax.web.page.actions import Actions
from bdm_jax.web.page.layout import Layout, texts
from bdm_jax.web.page.login import Login

_STYLE = Path(__file__).with_name("page.css")
_UPLOAD = 64 << 20  # bytes of one image
_FONTS = ("system-ui", "PingFang SC", "Noto Sans CJK SC", "Microsoft YaHei", "sans-serif")  # no file is fetched
_CINNABAR = gr.themes.Color(
    "#fdf4f1",
    "#fae5df",
    "#f4c9be",
    "#eaa392",
    "#dc765f",
    "#c9513a",
    "#b23a25",
    "#94301f",
    "#77291c",
    "#5f241b",
    "#34100b",
)


def mount(
    app: fastapi.FastAPI,
    service: Service,
    *,
    owner_of: Callable[[str], str | None] | None = None,
    most: int | None = None,
    check: Callable[[Job], None] | None = None,
) -> None:
    """Put the page at / of an app, behind the routes that it has already.

    Args:
      owner_of: the name of a key's owner, None for a wrong key: the page then asks for a key, and shows that owner's
        pictures. Without, everybody who reaches the page sees them all.
      most: pictures of one job; as many as they like without.
      check: raises UserError for a job that is not allowed.
    """
    login = None if owner_of is None else Login(owner_of)
    owner = (lambda request: "") if login is None else login.owner
    app.include_router(pictures.routes(service, owner))
    if login is not None:
        app.include_router(login.routes())
        app.add_middleware(_ToLogin, login=login)
    actions = Actions(service, most, check)
    with gr.Blocks(analytics_enabled=False, title="bdm_jax", fill_width=True, delete_cache=(3600, 86400)) as page:
        Layout(page, actions, login is not None)
    page.queue(default_concurrency_limit=None, api_open=False)
    gr.mount_gradio_app(
        app,
        page,
        "/",
        auth_dependency=None if login is None else login.owner,
        i18n=texts,
        theme=_theme(),
        css_paths=_STYLE,
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        pwa=False,
        enable_monitoring=False,
        mcp_server=False,
        max_file_size=_UPLOAD,
        show_error=False,
    )


class _ToLogin:
    """ASGI: who opens the page without having logged in is sent to the login."""

    def __init__(self, app: ASGIApp, login: Login):
        self.app, self.login = app, login

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        asked = scope["type"] == "http" and scope["path"] == "/" and scope["method"] in ("GET", "HEAD")
        if asked and self.login.owner(fastapi.Request(scope)) is None:
            await RedirectResponse("page/login", status_code=303)(scope, receive, send)
            return
        await self.app(scope, receive, send)


def _theme() -> gr.themes.Base:
    theme = gr.themes.Base(
        primary_hue=_CINNABAR,
        secondary_hue=_CINNABAR,
        neutral_hue=gr.themes.colors.stone,
        radius_size=gr.themes.sizes.radius_md,
        font=_FONTS,
        font_mono=("ui-monospace", "Consolas", "monospace"),
    )
    return theme.set(
        body_background_fill="#faf9f7",
        body_background_fill_dark="#161514",
        body_text_color_subdued="#79716b",
        body_text_color_subdued_dark="#a8a29c",
        block_background_fill="#ffffff",
        block_background_fill_dark="#1f1d1c",
        block_border_color="#e6e2dd",
        block_border_color_dark="#34302d",
        border_color_primary="#e0dbd5",
        border_color_primary_dark="#3b3734",
        block_label_text_color="#57534e",
        block_title_text_color="#57534e",
        block_title_text_color_dark="#c3bdb7",
        block_title_text_size="13px",
        block_title_text_weight="500",
        input_background_fill="#ffffff",
        input_background_fill_dark="#191716",
        input_border_width="1px",
        input_border_color="#ddd8d2",
        input_border_color_dark="#3b3734",
        input_border_color_focus="*primary_400",
        input_border_color_focus_dark="*primary_500",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_dark="*primary_600",
        button_primary_background_fill_hover_dark="*primary_500",
        button_primary_text_color="#ffffff",
        button_secondary_background_fill="#efece8",
        button_secondary_background_fill_hover="#e6e2dd",
        button_secondary_background_fill_dark="#2c2927",
        button_secondary_background_fill_hover_dark="#393532",
        button_large_text_weight="600",
        button_small_text_weight="500",
        slider_color="*primary_600",
        slider_color_dark="*primary_500",
    )
