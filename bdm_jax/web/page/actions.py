"""What the page's buttons do. Knows the fields by name, not how they are laid out."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

from bdm_jax.app.metadata import read_settings
from bdm_jax.app.service import Job, Service, Ticket
from bdm_jax.errors import UserError
from bdm_jax.web.page import show
from bdm_jax.web.page.fields import FormFields, Restored, from_picture, to_job

_LOOK = 0.15  # seconds between looks at what is being drawn
_GALLERY = 48  # pictures at a time
_REMEMBERED = 1000  # browsers' pages


@dataclass
class _Session:
    """One page in one browser: its jobs, the latest last."""

    tickets: list[Ticket] = field(default_factory=list)
    shown: int = _GALLERY
    selected: str | None = None


@dataclass(frozen=True)
class View:
    """What the page shows now.

    Attributes:
      stage: HTML of what is being drawn.
      gallery: HTML of the output folder's pictures; None where nothing has changed there.
      busy: something is drawn or waits for it.
      waiting: jobs of this page that wait behind the one that is shown.
      more: there are older pictures than the gallery has.
    """

    stage: str
    gallery: str | None
    busy: bool
    waiting: int
    more: bool


@dataclass(frozen=True)
class Visitor:
    """Who asks: the page in the browser, its language, and the owner of the key that it came with."""

    session: str
    language: str
    owner: str = ""


class Actions:
    """Of all pages of one service; `most` and `check` as of `mount`."""

    def __init__(self, service: Service, most: int | None = None, check: Callable[[Job], None] | None = None):
        self.service, self.most, self.check = service, most, check
        self._sessions: dict[str, _Session] = {}
        self._lock = threading.Lock()

    def opened(self, visitor: Visitor) -> View:
        """What a page shows when it is opened: also what the service is drawing for its owner."""
        session = self._session(visitor)
        current = self.service.current(visitor.owner)
        if current is not None and current not in session.tickets:
            session.tickets.append(current)
        return self._view(session, visitor, with_gallery=True)

    def closed(self, session: str | None) -> None:
        """Forget a page. What it has asked for is drawn nevertheless, and lies in the gallery."""
        with self._lock:
            self._sessions.pop(session or "", None)

    def draw(self, fields: FormFields, visitor: Visitor) -> None:
        """Into the queue. Raises UserError for what is not taken."""
        session = self._session(visitor)
        job = to_job(fields, self.service.models, self.service.parts, visitor.owner, self.most)
        if self.check is not None:
            self.check(job)
        ticket = self.service.submit(job)
        with self._lock:  # the button and the enter key, at once
            session.tickets = [one for one in session.tickets if not one.finished] + [ticket]

    async def watch(self, visitor: Visitor) -> AsyncIterator[View]:
        """The view, now and whenever it has changed, until nothing is left to draw. Holds no thread."""
        session, seen, pictures = self._session(visitor), None, None
        while True:
            now = [
                (one.state, one.done, one.position, id(one.preview), len(one.notes), one.pictures)
                for one in session.tickets
            ]
            files = [one.pictures for one in session.tickets]
            if now != seen:
                view = await asyncio.to_thread(self._view, session, visitor, with_gallery=files != pictures)
                seen, pictures = now, files
                yield view
                if not view.busy:
                    return
            await asyncio.sleep(_LOOK)

    def stop(self, visitor: Visitor) -> None:
        """The job that is drawn for this page, or else the first one that waits."""
        if (ticket := self._shown(self._session(visitor))) is not None:
            ticket.stop()

    def clear(self, visitor: Visitor) -> None:
        """The jobs of this page that wait."""
        for ticket in self._session(visitor).tickets:
            if ticket.state == "waiting":
                ticket.stop()

    def older(self, visitor: Visitor) -> str:
        """The gallery with more pictures."""
        session = self._session(visitor)
        session.shown += _GALLERY
        return self._gallery(session, visitor)

    def select(self, name: str | None, visitor: Visitor) -> tuple[str | None, str]:
        """A picture of the gallery by its file's name, None for none: what is said of it, and the gallery."""
        session = self._session(visitor)
        try:
            path = None if name is None else self.service.picture(name, visitor.owner)
        except UserError:
            path = None
        session.selected = None if path is None else path.name
        said = None if path is None else show.details(path, visitor.language)
        return said, self._gallery(session, visitor)

    def selected(self, visitor: Visitor) -> Path | None:
        """The picture that is selected."""
        name = self._session(visitor).selected
        return None if name is None else self.service.picture(name, visitor.owner)

    def restore(self, path: Path, visitor: Visitor) -> Restored:
        """The fields of a picture. Raises UserError for a file that is none of ours."""
        try:
            values = read_settings(path)
        except UserError as error:  # it names the file where the server has put it
            raise UserError(str(error).replace(str(path), path.name)) from error
        return from_picture(values, self.service.models, self.service.parts, visitor.language)

    def _session(self, visitor: Visitor) -> _Session:
        with self._lock:
            session = self._sessions.pop(visitor.session, None) or _Session()
            self._sessions[visitor.session] = session  # the latest last
            while len(self._sessions) > _REMEMBERED:
                self._sessions.pop(next(iter(self._sessions)))
            return session

    def _shown(self, session: _Session) -> Ticket | None:
        """The first job that is not finished, or the latest."""
        return next((one for one in session.tickets if not one.finished), (session.tickets or [None])[-1])

    def _view(self, session: _Session, visitor: Visitor, with_gallery: bool) -> View:
        shown = self._shown(session)
        left = sum(not one.finished for one in session.tickets)
        waiting = max(left - 1, 0)
        html = show.stage(shown, visitor.language, batch_size=self.service.batch_size, waiting=waiting)
        paths = self._paths(session, visitor)
        gallery = show.gallery(paths, visitor.language, session.selected) if with_gallery else None
        return View(html, gallery, left > 0, waiting, more=len(paths) >= session.shown)

    def _gallery(self, session: _Session, visitor: Visitor) -> str:
        return show.gallery(self._paths(session, visitor), visitor.language, session.selected)

    def _paths(self, session: _Session, visitor: Visitor) -> list[Path]:
        return self.service.pictures(visitor.owner, limit=session.shown)
