"""Serve the page /access-log in mitmweb, behind mitmweb's login. Queries run in query_pool.py.

Import this only in mitmweb. The handlers derive from mitmweb's own, which are not a public interface
(mitmproxy/tools/web/app.py of mitmproxy 12), so `register` can fail with another mitmproxy.
"""

from __future__ import annotations

import http
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode, urlsplit, urlunsplit
from uuid import UUID

import tornado.web
from mitmproxy.tools.web.app import RequestHandler

from addon.web import page_view
from addon.web.query_pool import TooManyQueriesError
from exporter.health import judge
from exporter.read import human, lines, time_search
from exporter.read import page as queries
from exporter.read.gaps import recent_gaps
from exporter.read.kept_advisories import compared_at, marks
from exporter.read.log_size import log_size
from exporter.read.newest import Cursor
from exporter.read.nodes import nodes_summary
from exporter.read.selection import FILTER_NAMES, Selection, SelectionError
from exporter.read.session import DATABASE_ERRORS

if TYPE_CHECKING:
    from psycopg import Connection

    from exporter.read.gaps import RecordedGap
    from exporter.read.kept_advisories import Mark
    from exporter.read.nodes import NodesSummary
    from exporter.read.page import RowPage

PATH = "/access-log"
MAX_ROWS = 50
_MAX_GAPS = 5
_FILES = Path(__file__).with_name("files")
_CONTENT_TYPES = {
    "style.css": "text/css; charset=utf-8",
    "script.js": "text/javascript; charset=utf-8",
}
_BUSY = (
    "Too many queries are waiting for the database; this one was not run. Try again in a moment."
)
_REGISTERED_KEY = "artifactapi_page"


def register(master: Any) -> str:
    """Serve the page in this WebMaster. Return its URL, with the token if mitmweb's own URL has it.

    Idempotent, because tornado cannot remove a handler when the script is reloaded.

    Raises:
        AttributeError, ImportError, TypeError: this version of mitmweb has a different structure.
    """
    if _REGISTERED_KEY not in master.app.settings:
        names = "|".join(name.replace(".", r"\.") for name in _CONTENT_TYPES)
        handlers: Any = [
            (PATH, _ListHandler),
            (f"{PATH}/row", _RowHandler),
            (rf"{PATH}/(?P<name>{names})", _FileHandler),
        ]
        master.app.add_handlers(r".*", handlers)
        master.app.settings[_REGISTERED_KEY] = True
    web_url: str = master.web_url
    return urlunsplit(urlsplit(web_url)._replace(path=PATH))


class _PageHandler(RequestHandler):
    """Base of the handlers below. mitmweb's RequestHandler checks the login before each method."""

    def get_template_path(self) -> str:
        return str(_FILES)

    def get_template_namespace(self) -> dict[str, Any]:
        return {
            **super().get_template_namespace(),
            "human": human,
            "lines": lines,
            "view": page_view,
        }

    def auth_fail(self, invalid_password: bool) -> None:
        """Show a login form, for users who follow a link to this page."""
        self.render("login.html", invalid=invalid_password)

    def set_default_headers(self) -> None:
        super().set_default_headers()
        self.set_header("Cache-Control", "no-store")
        self.set_header("Referrer-Policy", "same-origin")

    def write_error(self, status_code: int, **_: Any) -> None:
        """Show one sentence and never a traceback."""
        try:
            phrase = http.HTTPStatus(status_code).phrase
        except ValueError:
            phrase = "Error"
        self.render_error(status_code, f"{phrase}.")

    def render_error(self, status_code: int, message: str) -> None:
        """Render a page that shows only this message."""
        self.set_status(status_code)
        self.render("error.html", message=message)

    @property
    def addon(self) -> Any:
        """The current addon. A reload of the script replaces it, but not the registered handlers."""
        return self.master.addons.get("artifactapi")

    @property
    def query_pool(self) -> Any:
        """The current addon's query pool; HTTPError 503 while there is none."""
        query_pool = getattr(self.addon, "query_pool", None)
        if query_pool is None:
            raise tornado.web.HTTPError(http.HTTPStatus.SERVICE_UNAVAILABLE)
        return query_pool


class _FileHandler(_PageHandler):
    """The script and the style sheet. mitmweb's content security policy forbids inline ones."""

    def get(self, name: str) -> None:
        self.set_header("Content-Type", _CONTENT_TYPES[name])
        self.set_header("Cache-Control", "no-cache")
        self.finish((_FILES / name).read_bytes())


class _ListHandler(_PageHandler):
    """The list page: health, traffic over time, and rows."""

    async def get(self) -> None:
        filters = {}
        for name in FILTER_NAMES:
            value = self.get_query_argument(name, "")[: page_view.MAX_FILTER_LENGTH]
            if value:
                filters[name] = value
        status = self.addon.counters() if self.addon is not None else None
        page = page_view.Page(filters=filters, health=judge(status), status=status or {})
        page.with_traffic = self.get_query_argument("part", "") != "live"
        await self._query(page)
        self.render("list.html", page=page, link=_link, MAX_ROWS=MAX_ROWS)

    def post(self) -> None:
        """Return to the page after a login; see `auth_fail`."""
        self.redirect(self.request.uri or PATH)

    async def _query(self, page: page_view.Page) -> None:
        """Fill the page from the database, or with the reason why that failed."""
        try:
            # The page shows times in UTC.
            selection = Selection.parse(page.filters, zone=UTC)
            after = _cursor(self)
        except SelectionError as e:
            page.error = str(e)
            self.set_status(http.HTTPStatus.BAD_REQUEST)
            return
        page.is_first = after is None
        seconds = self.query_pool.settings.page.query_seconds / time_search.MAX_OVERRUN
        if page.is_first and selection.since is None:
            seconds = min(seconds, time_search.SEARCH_SECONDS)
        try:
            (
                page.rows,
                page.gaps,
                page.proxies,
                page.compared_at,
                page.marks,
            ) = await self.query_pool.run(
                lambda connection: _read_list(connection, selection, after, seconds)
            )
            if page.with_traffic:
                kept_days = self.query_pool.settings.retention.days
                page.traffic, page.log = await self.query_pool.run(
                    lambda connection: (
                        queries.traffic(connection, selection),
                        log_size(connection, kept_days),
                    )
                )
        except TooManyQueriesError:
            page.error = _BUSY
        except DATABASE_ERRORS as e:
            page.error = queries.explain(e)


class _RowHandler(_PageHandler):
    """All columns of one row, with a link to its flow while mitmweb has it."""

    def post(self) -> None:
        """Return to the page after a login; see `auth_fail`."""
        self.redirect(self.request.uri or PATH)

    async def get(self) -> None:
        try:
            cursor = _cursor(self)
        except SelectionError as e:
            self.render_error(http.HTTPStatus.BAD_REQUEST, str(e))
            return
        if cursor is None:
            self.render_error(
                http.HTTPStatus.BAD_REQUEST,
                "The address of a row needs its time (at) and flow id (id).",
            )
            return
        try:
            columns = await self.query_pool.run(
                lambda connection: queries.row_columns(connection, cursor)
            )
        except TooManyQueriesError:
            self.render_error(http.HTTPStatus.SERVICE_UNAVAILABLE, _BUSY)
        except DATABASE_ERRORS as e:
            self.render_error(http.HTTPStatus.SERVICE_UNAVAILABLE, queries.explain(e))
        else:
            if not columns:
                self.render_error(
                    http.HTTPStatus.NOT_FOUND,
                    "This row does not exist, or it has not been written yet.",
                )
                return
            flow_id = str(cursor.flow_id)
            in_mitmweb = self.view.get_by_id(flow_id) is not None
            self.render("row.html", columns=columns, flow_id=flow_id if in_mitmweb else None)


def _read_list(
    connection: Connection[Any], selection: Selection, after: Cursor | None, seconds: float
) -> tuple[RowPage, list[RecordedGap], NodesSummary | None, datetime | None, dict[str, Mark]]:
    """Return the rows, the recent gaps, the proxies, when advisories were compared, and what they say."""
    rows = queries.list_rows(connection, selection, MAX_ROWS, after, seconds)
    compared = compared_at(connection)
    purls = [row.purl for row in rows.rows if row.purl] if compared is not None else []
    return (
        rows,
        recent_gaps(connection, _MAX_GAPS),
        nodes_summary(connection, UTC),
        compared,
        marks(connection, purls),
    )


def _cursor(handler: _PageHandler) -> Cursor | None:
    """Return the position that the URL gives with `at` and `id`, or None if it gives none.

    Raises:
        SelectionError: the position is invalid.
    """
    at, flow_id = (handler.get_query_argument(name, "") for name in ("at", "id"))
    if not at and not flow_id:
        return None
    try:
        started_at = datetime.fromisoformat(at)
        if started_at.tzinfo is None:
            started_at = started_at.replace(tzinfo=UTC)
        return Cursor(started_at, UUID(flow_id))
    except ValueError:
        raise SelectionError(
            "The address has no valid position in the log; start again from the newest rows."
        ) from None


def _link(target: str, filters: dict[str, str], position: Any = None) -> str:
    """Build a URL with the search and, if given, a position: a row or a cursor."""
    query = dict(filters)
    if position is not None:
        query |= {"at": position.started_at.isoformat(), "id": str(position.flow_id)}
    return f"{target}?{urlencode(query)}" if query else target
