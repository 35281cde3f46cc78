"""Answer what the page asks about the log: read-only SQL that ends in time; no HTML, no threads."""

from __future__ import annotations

import contextlib
import json
import math
import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import UUID

from psycopg import sql

from ..postgres.connection import DeadlineExceededError, connect, describe
from . import time_search
from .session import read_only, time_limited
from .tail import Row, columns, moment

if TYPE_CHECKING:
    from collections.abc import Iterator

    from psycopg import Connection

    from ..postgres.connection import Deadline
    from ..settings import DatabaseSettings
    from .selection import Selection

TRAFFIC_SPAN = timedelta(hours=24)  # looked at where nobody says since when
_GRACE_SECONDS = 0.5  # the server ends a statement first: it says why
_BUCKETS = 48
# What a query may cost by the planner's estimate before the traffic is told from a sample. One page
# read in order is 1, a row some 0.02: here it stands for about a million rows, and well under a second.
_SAMPLE_ABOVE_COST = 60_000.0

_LEAST_ID = UUID(int=0)  # no row comes before it at the same moment
_EPOCH = datetime.fromtimestamp(0, UTC)
_LATEST = datetime(9000, 1, 1, tzinfo=UTC)  # leaves room to count on from
_SECOND = timedelta(seconds=1)
_MICROSECOND = timedelta(microseconds=1)

# The first half of the condition on the cursor is what partitions are pruned by.
_ROWS = sql.SQL("""
    SELECT * FROM (
      SELECT {columns} FROM access_log WHERE {where} AND {cursor} AND {stretch}
    ) AS newest
    ORDER BY started_at DESC, flow_id DESC LIMIT %(limit)s
""")
_CURSOR = sql.SQL("started_at <= %(at)s AND (started_at, flow_id) < (%(at)s, %(id)s)")
# OFFSET 0 has it planned as if all rows of the stretch were wanted: few match, if any.
_STRETCH = sql.SQL("started_at >= %(from)s AND started_at < %(to)s OFFSET 0")
_BEFORE = sql.SQL("""
    SELECT max(started_at) FROM access_log WHERE {span} AND {cursor} AND started_at < %(to)s
""")
_ROW = "SELECT * FROM access_log WHERE started_at = %s AND flow_id = %s"
_COMMENTS = """
    SELECT attname, col_description(attrelid, attnum) FROM pg_attribute
    WHERE attrelid = 'access_log'::regclass AND attnum > 0
"""
_TRAFFIC = sql.SQL("""
    SELECT date_bin(%(width)s, started_at, %(origin)s) AS bucket, count(*),
           count(*) FILTER (WHERE status_code BETWEEN 400 AND 499),
           count(*) FILTER (WHERE status_code IS NULL OR status_code >= 500),
           coalesce(sum(response_bytes), 0)
    FROM access_log {sample}
    WHERE started_at >= %(since)s AND started_at < %(until)s AND {where}
    GROUP BY 1
""")
_SAMPLE = sql.SQL("TABLESAMPLE SYSTEM ({}) REPEATABLE (1)")
_GAPS = """
    SELECT node, from_at, to_at, reason, entries FROM access_log_gap
    WHERE to_at > now() - interval '7 days' ORDER BY to_at DESC LIMIT %s
"""


class Cursor(NamedTuple):
    """A place between two rows: the next page begins after this one."""

    started_at: datetime
    flow_id: UUID


class Rows(NamedTuple):
    """A page of the list, newest first."""

    rows: list[Row]
    older: Cursor | None  # where the next page begins; None: these are the last
    searched_back_to: datetime | None = None  # what is older was not looked at; None: all was


class ColumnValue(NamedTuple):
    """One column of a row, with what the database says of its meaning."""

    name: str
    value: Any
    comment: str


class Bucket(NamedTuple):
    """What happened in one stretch of time."""

    at: datetime
    requests: int
    refused: int  # 4xx
    failed: int  # 5xx, or no response
    response_bytes: int


class Traffic(NamedTuple):
    """Equal stretches of time in order, all of them, also the empty."""

    buckets: list[Bucket]
    since: datetime
    until: datetime
    sampled_percent: float | None  # the counts are an estimate from so many; None: all counted


class Gap(NamedTuple):
    """A hole of the log; as in access_log_gap."""

    node: str
    from_at: datetime
    to_at: datetime
    reason: str
    entries: int


@contextlib.contextmanager
def reading(
    dsn: str, settings: DatabaseSettings, seconds: float, deadline: Deadline | None = None
) -> Iterator[Connection[Any]]:
    """A connection in a transaction that can change nothing; all its statements end in `seconds`.

    The transaction, and not the session, bears the limits: behind a pooler the session goes on
    to the writer.

    Raises:
        psycopg.Error, DeadlineExceededError: see `explain`.
    """
    with connect(dsn, settings, deadline) as connection:
        connection.call_deadline = time.monotonic() + seconds + _GRACE_SECONDS
        with read_only(connection, seconds):
            yield connection


def newest(
    connection: Connection[Any],
    selection: Selection,
    limit: int,
    after: Cursor | None = None,
    seconds: float = time_search.SEARCH_SECONDS,
) -> Rows:
    """At most `limit` rows, newest first, from the newest or `after` the last of another page.

    Rows that filters name are looked for in the newest first, for so many seconds.
    """
    where, values = selection.where()
    span, bound = selection.time_alone().where()
    cursor = _CURSOR if after else sql.SQL("true")
    place = {"at": after.started_at, "id": after.flow_id} if after else {}

    def ask(stretch: sql.SQL, limit: int, **bounds: datetime) -> list[Row]:
        query = _ROWS.format(columns=columns(), where=where, cursor=cursor, stretch=stretch)
        found = connection.execute(query, {**values, **place, **bounds, "limit": limit})
        return [Row(*row) for row in found]

    def search(since: datetime, until: datetime, limit: int, seconds: float | None) -> list[Row]:
        with time_limited(connection, seconds):
            return ask(_STRETCH, limit, **{"from": since, "to": until})

    if not selection.filters():
        return _page(ask(sql.SQL("true"), limit + 1), limit)
    before = _BEFORE.format(span=span, cursor=cursor)
    rows, searched_back_to = time_search.search_back(
        lambda until: moment(connection, before, {**bound, **place, "to": until}),
        search,
        limit + 1,
        seconds,
    )
    return _page(rows, limit, searched_back_to)


def _page(rows: list[Row], limit: int, searched_back_to: datetime | None = None) -> Rows:
    """At most `limit` of the rows, and where the next page begins."""
    if searched_back_to is not None:
        return Rows(rows, Cursor(searched_back_to, _LEAST_ID), searched_back_to)
    more = len(rows) > limit
    rows = rows[:limit]
    return Rows(rows, Cursor(rows[-1].started_at, rows[-1].flow_id) if more else None)


def one(connection: Connection[Any], cursor: Cursor) -> list[ColumnValue]:
    """All columns of one row in their order; empty where there is no such row."""
    found = connection.execute(_ROW, cursor)
    names = [column.name for column in found.description or ()]
    row = found.fetchone()
    if row is None:
        return []
    comments = dict(connection.execute(_COMMENTS).fetchall())
    return [
        ColumnValue(name, value, comments.get(name) or "")
        for name, value in zip(names, row, strict=True)
    ]


def traffic(
    connection: Connection[Any], selection: Selection, now: datetime | None = None
) -> Traffic:
    """How much there was when: of the selection's time, or else of the last day.

    Where counting every row would take too long by the planner's estimate, a part of the table's
    pages is read, and the counts are what that part says of the whole.
    """
    until = min(max(selection.until or now or datetime.now(UTC), _EPOCH), _LATEST)
    since = max(selection.since or until - TRAFFIC_SPAN, _EPOCH)
    width = timedelta(seconds=max(1, math.ceil((until - since) / _BUCKETS / _SECOND)))
    where, values = selection.where()
    values |= {"since": since, "until": until, "width": width, "origin": _EPOCH}
    statement = _TRAFFIC.format(sample=sql.SQL(""), where=where)
    cost = _cost(connection, statement, values)
    percent = None
    if cost > _SAMPLE_ABOVE_COST:
        percent = max(0.01, round(100 * _SAMPLE_ABOVE_COST / cost, 2))
        statement = _TRAFFIC.format(sample=_SAMPLE.format(sql.Literal(percent)), where=where)
    found = {row[0]: row for row in connection.execute(statement, values)}
    scale = 100 / percent if percent else 1
    first = (since - _EPOCH) // width  # bars stand still while the time goes on
    last = (until - _EPOCH - _MICROSECOND) // width
    times = [_EPOCH + number * width for number in range(first, last + 1)]
    buckets = [
        Bucket(at, *(round(int(value) * scale) for value in found.get(at, (at, 0, 0, 0, 0))[1:]))
        for at in times
    ]
    return Traffic(buckets, since, until, percent)


def recent_gaps(connection: Connection[Any], limit: int) -> list[Gap]:
    """The newest holes of the last seven days, newest first."""
    return [Gap(*row) for row in connection.execute(_GAPS, (limit,))]


def explain(error: Exception) -> str:
    """One sentence: why the database did not answer, and what to do; no secret in it."""
    state = getattr(error, "sqlstate", None)
    if isinstance(error, DeadlineExceededError) or state == "57014":
        return (
            "The search took too long and was ended; name a time, a host, a package or a user to narrow it,"
            " or raise page.query_seconds."
        )
    if state == "42501":
        return (
            "This database role may not read the log; name one that may in page.dsn"
            " (artifactapi init prints its grants)."
        )
    if state == "42P01":
        return "There is no table access_log yet; the proxy makes it when it first reaches the database."
    return f"The database could not be asked: {describe(error).rstrip('.')}."


def _cost(connection: Connection[Any], statement: sql.Composed, values: dict[str, Any]) -> float:
    """What the planner thinks of a query, in its own unit."""
    plan = connection.execute(sql.SQL("EXPLAIN (FORMAT JSON) ") + statement, values).fetchone()
    document = plan[0] if plan else "[]"
    found = json.loads(document) if isinstance(document, str) else document
    return float(found[0]["Plan"]["Total Cost"])
