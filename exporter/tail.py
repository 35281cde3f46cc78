"""Show the newest rows of access_log as aligned lines, and follow them; reads only."""

from __future__ import annotations

import threading
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Iterator

    from psycopg import Connection

POLL_SECONDS = 0.5
# A row bears the time its transaction began; another writer's may become visible later than ours.
_OVERLAP = timedelta(seconds=20)

_NEWEST = """
    SELECT * FROM (
      SELECT started_at, flow_id, logged_at, client_ip, proxy_user, method, scheme, host, port, path,
             status_code, error_type, response_bytes, duration_ms, purl
      FROM access_log ORDER BY logged_at DESC LIMIT %s
    ) AS newest ORDER BY logged_at, started_at
"""
_SINCE = """
    SELECT started_at, flow_id, logged_at, client_ip, proxy_user, method, scheme, host, port, path,
           status_code, error_type, response_bytes, duration_ms, purl
    FROM access_log WHERE logged_at >= %s ORDER BY logged_at, started_at
"""

_GAPS = "SELECT node, from_at, to_at, reason, entries FROM access_log_gap ORDER BY from_at, to_at"

_UNITS = ("B", "kB", "MB", "GB", "TB")
_KILO = 1000
_HEADER = f"{'time':<12}  {'status':>6}  {'method':<7}  {'bytes':>8}  {'ms':>8}  {'who':<16}  what"


class Row(NamedTuple):
    """What a line is made of; names and meaning as in access_log."""

    started_at: datetime
    flow_id: Any
    logged_at: datetime
    client_ip: Any
    proxy_user: str | None
    method: str | None
    scheme: str | None
    host: str | None
    port: int | None
    path: str | None
    status_code: int | None
    error_type: str | None
    response_bytes: int | None
    duration_ms: float | None
    purl: str | None

    @property
    def key(self) -> tuple[datetime, Any]:
        """What tells rows apart."""
        return self.started_at, self.flow_id


def newest(connection: Connection[Any], count: int) -> list[Row]:
    """The rows that reached Postgres last, oldest of them first."""
    return [Row(*row) for row in connection.execute(_NEWEST, (count,))]


class Follower:
    """Knows which rows are there when it is made, and finds those that come after, each once."""

    def __init__(self, connection: Connection[Any]) -> None:
        """Raises psycopg.Error when the server does not answer, as its methods do."""
        self._connection = connection
        row = connection.execute("SELECT clock_timestamp()").fetchone()
        self._last: datetime = row[0] if row else datetime.now(UTC)
        self._seen = {row.key: row.logged_at for row in self._look()}

    def rows(self, shown: list[Row]) -> Iterator[Row]:
        """Rows as they arrive, for ever, but those already `shown`; also of several writers.

        Blocks up to half a second between looks.
        """
        self._seen |= {row.key: row.logged_at for row in shown}
        pause = threading.Event()
        while True:
            for row in self._look():
                if row.key not in self._seen:
                    self._seen[row.key] = row.logged_at
                    self._last = max(self._last, row.logged_at)
                    yield row
            oldest = self._last - 2 * _OVERLAP
            self._seen = {key: at for key, at in self._seen.items() if at > oldest}
            pause.wait(POLL_SECONDS)

    def _look(self) -> list[Row]:
        return [Row(*row) for row in self._connection.execute(_SINCE, (self._last - _OVERLAP,))]


def all_gaps(connection: Connection[Any]) -> list[tuple[Any, ...]]:
    """The holes of the log in order: node, from, to, reason, entries."""
    return connection.execute(_GAPS).fetchall()


def gap_lines(gaps: list[tuple[Any, ...]]) -> Iterator[Text]:
    """The holes as aligned lines, and their sum."""
    if not gaps:
        yield Text("No gaps: every request that was seen has its row.", style="green")
        return
    yield Text(f"{'from':<23}  {'to':<23}  {'entries':>8}  {'reason':<13}  node", style="bold")
    for node, from_at, to_at, reason, entries in gaps:
        start, end = (f"{at.astimezone():%Y-%m-%d %H:%M:%S.%f}"[:23] for at in (from_at, to_at))
        yield Text(f"{start}  {end}  {entries:>8}  {printable(reason):<13}  {printable(node)}")
    yield Text(f"{sum(gap[4] for gap in gaps)} entries are missing in all.", style="red")


def header() -> Text:
    """The line above the rows."""
    return Text(_HEADER, style="bold")


def line(row: Row) -> Text:
    """One row as a line with its colours; what a client sent is made printable."""
    status = "-" if row.status_code is None else str(row.status_code)
    text = Text()
    text.append(f"{row.started_at.astimezone():%H:%M:%S.%f}"[:12])
    text.append(f"  {status:>6}", style=_status_style(row))
    text.append(f"  {printable(row.method or '-'):<7.7}")
    text.append(f"  {_size(row.response_bytes):>8}", style="dim")
    text.append(f"  {_milliseconds(row.duration_ms):>8}", style="dim")
    text.append(f"  {printable(row.proxy_user or str(row.client_ip or '-')):<16.16}", style="cyan")
    text.append(f"  {printable(row.purl or _url(row))}")
    if row.error_type:
        text.append(f"  {printable(row.error_type)}", style="red")
    return text


def printable(text: str) -> str:
    r"""Text a terminal may be shown: control characters and the like become \x1b."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _url(row: Row) -> str:
    default = {"http": 80, "https": 443}.get(row.scheme or "")
    port = "" if row.port in (None, default) else f":{row.port}"
    scheme = f"{row.scheme}://" if row.scheme else ""
    return f"{scheme}{row.host or ''}{port}{row.path or ''}"


def _status_style(row: Row) -> str:
    if row.status_code is None or row.status_code >= 500:  # noqa: PLR2004
        return "bold red"
    return {4: "yellow", 3: "blue", 2: "green"}.get(row.status_code // 100, "")


def _size(count: int | None) -> str:
    if count is None:
        return "-"
    size = float(count)
    for unit in _UNITS:
        if size < _KILO or unit == _UNITS[-1]:
            return f"{count} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= _KILO
    raise AssertionError


def _milliseconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}" if value >= 100 else f"{value:.1f}"  # noqa: PLR2004
