"""The page /access-log inside mitmweb, behind mitmweb's own login; asks no database itself (query_pool.py).

Imported in mitmweb alone. Its classes are built upon mitmweb's request handlers, which are no public
interface (mitmproxy/tools/web/app.py of mitmproxy 12): whoever calls `register` is ready for an error.
"""

from __future__ import annotations

import http
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from uuid import UUID

import psycopg
import tornado.web
from mitmproxy.tools.web.app import RequestHandler

from addon.web import page_text
from addon.web.query_pool import TooManyQueriesError
from exporter.health import judge
from exporter.postgres.connection import DeadlineExceededError
from exporter.read import human, lines, time_search
from exporter.read import page as queries
from exporter.read.selection import FILTER_NAMES, Selection, SelectionError

PATH = "/access-log"
ROWS = 50
_GAPS = 5
_FILES = Path(__file__).with_name("files")
_TYPES = {"style.css": "text/css; charset=utf-8", "script.js": "text/javascript; charset=utf-8"}
_DATABASE_ERRORS = (psycopg.Error, DeadlineExceededError, OSError)
_BUSY = "Too many questions wait for the database; this one was not asked. Try again in a moment."
_REGISTERED = "artifactapi_page"


def register(master: Any) -> str:
    """Serve the page in this WebMaster; its address, without mitmweb's token.

    Idempotent: a handler can't be removed.

    Raises:
        AttributeError, ImportError, TypeError: this mitmweb is made another way.
    """
    if _REGISTERED not in master.app.settings:
        names = "|".join(name.replace(".", r"\.") for name in _TYPES)
        handlers: Any = [
            (PATH, _List),
            (f"{PATH}/row", _Row),
            (rf"{PATH}/(?P<name>{names})", _File),
        ]
        master.app.add_handlers(r".*", handlers)
        master.app.settings[_REGISTERED] = True
    address: str = master.web_url
    return address.partition("?")[0].rstrip("/") + PATH


class _Handler(RequestHandler):
    """What all pages share. mitmweb's base class asks for its login before each method of a subclass."""

    def get_template_path(self) -> str:
        return str(_FILES)

    def get_template_namespace(self) -> dict[str, Any]:
        return {
            **super().get_template_namespace(),
            "human": human,
            "lines": lines,
            "show": page_text,
        }

    def auth_fail(self, invalid_password: bool) -> None:
        """Let whoever came by a link log in here."""
        self.render("login.html", invalid=invalid_password)

    def set_default_headers(self) -> None:
        super().set_default_headers()
        self.set_header("Cache-Control", "no-store")
        self.set_header("Referrer-Policy", "same-origin")

    def write_error(self, status_code: int, **_: Any) -> None:
        """One sentence; never a traceback."""
        try:
            phrase = http.HTTPStatus(status_code).phrase
        except ValueError:
            phrase = "Error"
        self.fail(status_code, f"{phrase}.")

    def fail(self, status_code: int, sentence: str) -> None:
        """A page with nothing but this sentence."""
        self.set_status(status_code)
        self.render("sentence.html", sentence=sentence)

    @property
    def addon(self) -> Any:
        """The addon that runs now: the script may have been loaded anew since this class was made."""
        return self.master.addons.get("artifactapi")

    @property
    def query_pool(self) -> Any:
        """Where to ask; raises HTTPError while there is none."""
        query_pool = getattr(self.addon, "query_pool", None)
        if query_pool is None:
            raise tornado.web.HTTPError(http.HTTPStatus.SERVICE_UNAVAILABLE)
        return query_pool


class _File(_Handler):
    """The script and the style: mitmweb's security policy allows none within the page."""

    def get(self, name: str) -> None:
        self.set_header("Content-Type", _TYPES[name])
        self.set_header("Cache-Control", "no-cache")
        self.finish((_FILES / name).read_bytes())


class _List(_Handler):
    """Is logging healthy, how much was there when, and which rows."""

    async def get(self) -> None:
        asked = {
            name: value
            for name in FILTER_NAMES
            if (value := self.get_query_argument(name, "")[: page_text.MAX_ASKED])
        }
        status = self.addon.counters() if self.addon is not None else None
        page = page_text.Page(asked=asked, health=judge(status), status=status or {})
        page.whole = self.get_query_argument("part", "") != "live"
        await self._ask(page)
        self.render("list.html", page=page, link=_link, ROWS=ROWS)

    def post(self) -> None:
        """Logged in; see `auth_fail`."""
        self.redirect(self.request.uri or PATH)

    async def _ask(self, page: page_text.Page) -> None:
        """Fill the page with what the database says, or with why it says nothing."""
        try:
            selection = Selection.parse(page_text.in_utc(page.asked))
            after = _cursor(self)
        except SelectionError as e:
            page.sentence = str(e)
            self.set_status(http.HTTPStatus.BAD_REQUEST)
            return
        page.is_first = after is None
        seconds = self.query_pool.settings.page.query_seconds / time_search.MOST_SHARE
        if page.is_first and selection.since is None:
            seconds = min(seconds, time_search.SEARCH_SECONDS)
        try:
            page.rows, page.gaps = await self.query_pool.run(
                lambda it: (
                    queries.newest(it, selection, ROWS, after, seconds),
                    queries.recent_gaps(it, _GAPS),
                )
            )
            if page.whole:
                page.traffic = await self.query_pool.run(lambda it: queries.traffic(it, selection))
        except TooManyQueriesError:
            page.sentence = _BUSY
        except _DATABASE_ERRORS as e:
            page.sentence = queries.explain(e)


class _Row(_Handler):
    """All columns of one row, and the way to its flow while mitmweb has it."""

    def post(self) -> None:
        """Logged in; see `auth_fail`."""
        self.redirect(self.request.uri or PATH)

    async def get(self) -> None:
        try:
            cursor = _cursor(self)
        except SelectionError as e:
            self.fail(http.HTTPStatus.BAD_REQUEST, str(e))
            return
        if cursor is None:
            self.fail(http.HTTPStatus.BAD_REQUEST, "The address of a row has its time and its id.")
            return
        try:
            columns = await self.query_pool.run(lambda it: queries.one(it, cursor))
        except TooManyQueriesError:
            self.fail(http.HTTPStatus.SERVICE_UNAVAILABLE, _BUSY)
        except _DATABASE_ERRORS as e:
            self.fail(http.HTTPStatus.SERVICE_UNAVAILABLE, queries.explain(e))
        else:
            if not columns:
                self.fail(
                    http.HTTPStatus.NOT_FOUND, "There is no such row, or it is not yet written."
                )
                return
            flow_id = str(cursor.flow_id)
            in_mitmweb = self.view.get_by_id(flow_id) is not None
            self.render("row.html", columns=columns, flow_id=flow_id if in_mitmweb else None)


def _cursor(handler: _Handler) -> queries.Cursor | None:
    """The place in the list that the query names; None: its beginning."""
    at, flow_id = (handler.get_query_argument(name, "") for name in ("at", "id"))
    if not at and not flow_id:
        return None
    try:
        moment = datetime.fromisoformat(at)
        return queries.Cursor(
            moment if moment.tzinfo else moment.replace(tzinfo=UTC), UUID(flow_id)
        )
    except ValueError:
        raise SelectionError("The address names no place in the log; begin anew.") from None


def _link(target: str, asked: dict[str, str], place: Any = None) -> str:
    """An address with the search it belongs to, and a place in the log."""
    query = dict(asked)
    if place is not None:
        query |= {"at": place.started_at.isoformat(), "id": str(place.flow_id)}
    return f"{target}?{urlencode(query)}" if query else target
