"""What the page shows of jobs and pictures, as HTML. Every text that comes from outside is escaped. Knows no Gradio."""

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

import numpy as np
from PIL import Image

from bdm_jax.app.metadata import read_settings, web_ui_parameters
from bdm_jax.app.service import Ticket
from bdm_jax.errors import UserError
from bdm_jax.web.page.texts import say

PICTURES, THUMBNAILS = "page/pictures", "page/thumbnails"  # routes, see `pictures`
_SHOWN_TILES = 16


def header(language: str, logout: bool) -> str:
    """The page's first line."""
    leave = f'<a href="page/logout">{say("logout", language)}</a>' if logout else ""
    return f"<header><h1>bdm_jax</h1><span>{say('title', language)}</span>{leave}</header>"


def stage(ticket: Ticket | None, language: str, *, batch_size: int, waiting: int = 0) -> str:
    """What is being drawn, or what was drawn last.

    Args:
      ticket: the job to show; None before the first one.
      batch_size: of the service, for how many images its preview has side by side.
      waiting: more jobs of this browser in the queue.
    """
    if ticket is None:
        blank = f'<div class="blank">{_lantern()}<p>{say("empty", language)}</p></div>'
        return f'<div class="stage" data-state="empty">{blank}</div>'
    parts = [_tiles(ticket, batch_size)]
    if not ticket.finished:
        parts.append(_bar(ticket))
    parts.append(f'<p class="status">{_status(ticket, language)}</p>')
    if waiting:
        parts.append(f'<p class="queued">{say("queued", language, n=waiting)}</p>')
    parts.append(_error(ticket.error))
    parts += [f'<p class="note">{html.escape(note)}</p>' for note in ticket.notes]
    return f'<div class="stage" data-state="{ticket.state}">{"".join(parts)}</div>'


def gallery(paths: Sequence[Path], language: str, selected: str | None = None) -> str:
    """Small pictures to pick from, newest first."""
    if not paths:
        return f'<p class="nothing">{say("gallery_empty", language)}</p>'
    return f'<div class="grid">{"".join(_thumbnail(path, path.name == selected) for path in paths)}</div>'


def details(path: Path, language: str) -> str:
    """One picture with the settings inside it. A file that has none says so, in one line."""
    try:
        lines = web_ui_parameters(read_settings(path)).split("\n")
        said = "".join(f"<p>{html.escape(line)}</p>" for line in lines if line)
    except UserError as error:
        said = _error(str(error))
    link = f'<a href="{_address(PICTURES, path)}" target="_blank">{say("open_file", language)}</a>'
    picture = f'<img src="{_address(PICTURES, path)}" alt="{html.escape(path.stem)}">'
    said += f'<p class="file">{html.escape(path.name)} · {link}</p>'
    return f'<div class="details">{picture}<div class="said">{said}</div></div>'


def notes(lines: Sequence[str], failed: bool = False) -> str:
    """A few lines below the fields."""
    kind = "error" if failed else "note"
    return "".join(f'<p class="{kind}">{html.escape(" ".join(line.split()))}</p>' for line in lines)


def _tiles(ticket: Ticket, batch_size: int) -> str:
    """Finished pictures, what is being drawn, and the places of those that come."""
    count, pictures = len(ticket.job.requests), ticket.pictures
    height, width = ticket.job.settings.size or (1, 1)
    open_places = 0 if ticket.finished else min(count - len(pictures), _SHOWN_TILES)
    previews = _previews(ticket.preview, min(count - len(pictures), batch_size))[:open_places]
    tiles = [
        f'<button class="tile" data-name="{html.escape(path.name)}">'
        f'<img src="{_address(PICTURES, path)}" alt="{html.escape(path.stem)}"></button>'
        for path in pictures
    ]
    tiles += [f'<div class="tile preview"><img src="{address}" alt=""></div>' for address in previews]
    place = f'<div class="tile place" style="aspect-ratio:{width}/{height}"></div>'
    tiles += [place] * (open_places - len(previews))
    return f'<div class="tiles" data-count="{len(tiles)}">{"".join(tiles)}</div>' if tiles else ""


def _previews(preview: np.ndarray | None, count: int) -> list[str]:
    """Images side by side (h,w,3) uint8 -> one data address for each."""
    if preview is None or count < 1:
        return []
    if preview.shape[1] % count:
        count = 1
    return [_data_address(one) for one in np.split(preview, count, axis=1)]


def _data_address(pixels: np.ndarray) -> str:
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "jpeg", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"


def _bar(ticket: Ticket) -> str:
    share = 100 * ticket.done / ticket.total if ticket.total else 0
    return (
        f'<div class="bar" role="progressbar" aria-valuenow="{share:.0f}" aria-valuemin="0" aria-valuemax="100">'
        f'<i style="width:{share:.1f}%"></i></div>'
    )


def _status(ticket: Ticket, language: str) -> str:
    count, kept = len(ticket.job.requests), len(ticket.pictures)
    if ticket.state == "waiting":
        place = ticket.position
        return say("waiting", language, n=place) if place else say("next", language)
    if ticket.state == "drawing":
        number = f" <span>{say('of', language, n=min(kept + 1, count), total=count)}</span>" if count > 1 else ""
        return (say("drawing", language) if ticket.done else say("compiling", language)) + number
    if ticket.state == "stopped" and kept:
        return say("stopped_kept", language)
    return say(ticket.state, language)


def _thumbnail(path: Path, selected: bool) -> str:
    return (
        f'<button class="thumb" data-name="{html.escape(path.name)}" aria-pressed="{str(selected).lower()}">'
        f'<img src="{_address(THUMBNAILS, path)}" alt="{html.escape(path.stem)}" loading="lazy"></button>'
    )


def _address(route: str, path: Path) -> str:
    """With the time of its last change, so that browsers may keep what they have."""
    try:
        changed = path.stat().st_mtime_ns
    except OSError:  # taken away meanwhile
        changed = 0
    return f"{route}/{quote(path.name)}?{changed}"


def _error(line: str | None) -> str:
    return f'<p class="error" role="alert">{html.escape(" ".join(line.split()))}</p>' if line else ""


def _lantern() -> str:
    """A drawing for the empty page, in the colour of its text."""
    return (
        '<svg viewBox="0 0 64 80" width="64" height="80" fill="none" stroke="currentColor" stroke-width="2"'
        ' stroke-linecap="round" aria-hidden="true">'
        '<path d="M32 4v10M24 14h16M24 54h16M32 54v12M28 66v8M32 66v10M36 66v8"/>'
        '<ellipse cx="32" cy="34" rx="24" ry="20"/>'
        '<path d="M32 14c-9 6-9 34 0 40M32 14c9 6 9 34 0 40"/></svg>'
    )
