"""Run the queries of the page in mitmweb. They are read-only and limited in time. No HTML, no threads."""

from __future__ import annotations

import contextlib
import json
import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import UUID

from psycopg import sql

from ..postgres.connection import DeadlineExceededError, connect, describe
from .chart import bar_edges
from .newest import BY_START, Cursor, Row, newest
from .session import read_only

if TYPE_CHECKING:
    from collections.abc import Iterator

    from psycopg import Connection

    from ..postgres.connection import Deadline
    from ..settings import DatabaseSettings
    from .selection import Selection

TRAFFIC_SPAN = timedelta(hours=24)  # default
_GRACE_SECONDS = 0.5  # lets the server end a statement first, because its error gives the reason
# Above this cost, as the planner estimates it, the traffic is counted in a sample. A page read in
# order costs 1 and a row about 0.02; so this is about a million rows, and well under a second.
_SAMPLE_ABOVE_COST = 60_000.0

_SMALLEST_ID = UUID(int=0)  # as a cursor's flow_id: no row with the same started_at comes after it
_EPOCH = datetime.fromtimestamp(0, UTC)
_LATEST = datetime(9000, 1, 1, tzinfo=UTC)  # leaves room for a bucket that ends after it

_ROW = "SELECT * FROM access_log WHERE started_at = %s AND flow_id = %s"
_COMMENTS = """
    SELECT attname, col_description(attrelid, attnum) FROM pg_attribute
    WHERE attrelid = 'access_log'::regclass AND attnum > 0
"""
_TRAFFIC = sql.SQL("""
    SELECT width_bucket(started_at, %(edges)s::timestamptz[]) AS bucket, count(*),
           count(*) FILTER (WHERE access_log_refused(status_code)),
           count(*) FILTER (WHERE access_log_failed(status_code)),
           coalesce(sum(response_bytes), 0)
    FROM access_log {sample}
    WHERE started_at >= %(since)s AND started_at < %(until)s AND {where}
    GROUP BY 1
""")
_SAMPLE = sql.SQL("TABLESAMPLE SYSTEM ({}) REPEATABLE (1)")

# SQLSTATEs: PostgreSQL docs, appendix A.
_QUERY_CANCELED = "57014"
_INSUFFICIENT_PRIVILEGE = "42501"
_UNDEFINED_TABLE = "42P01"


class RowPage(NamedTuple):
    """One page of the list, newest row first."""

    rows: list[Row]
    older: Cursor | None  # where the next page starts; None: this is the last page
    searched_back_to: datetime | None = None  # None: the search was complete


class ColumnValue(NamedTuple):
    """One column of a row, with its comment from the schema."""

    name: str
    value: Any
    comment: str


class TrafficBucket(NamedTuple):
    """The traffic in one interval of time."""

    at: datetime
    requests: int
    refused: int
    failed: int
    response_bytes: int


class Traffic(NamedTuple):
    """The traffic in consecutive intervals, including those without requests.

    The intervals are the bars of chart.py, in UTC. `edges` says where each starts and the last ends.
    """

    buckets: list[TrafficBucket]
    edges: list[datetime]
    since: datetime
    until: datetime
    sampled_percent: (
        float | None
    )  # share of the table that the estimates are from; None: exact counts


@contextlib.contextmanager
def page_session(
    dsn: str, settings: DatabaseSettings, seconds: float, deadline: Deadline | None = None
) -> Iterator[Connection[Any]]:
    """Open a connection in a read-only transaction. All statements together get `seconds`.

    The limits are set in the transaction, not in the session: behind a pooler, the writer may get
    the same session next.

    Raises:
        psycopg.Error, DeadlineExceededError: see `explain`.
    """
    with connect(dsn, settings, deadline) as connection:
        connection.call_deadline = time.monotonic() + seconds + _GRACE_SECONDS
        with read_only(connection, seconds):
            yield connection


def list_rows(
    connection: Connection[Any],
    selection: Selection,
    limit: int,
    after: Cursor | None,
    search_seconds: float,
) -> RowPage:
    """Return the page that starts with the newest row, or after the last row of another page.

    If the selection has filters, the search takes about `search_seconds` at most.
    """
    found = newest(
        connection, selection, limit + 1, BY_START, after=after, search_seconds=search_seconds
    )
    if found.searched_back_to is not None:
        rest = Cursor(found.searched_back_to, _SMALLEST_ID)
        return RowPage(found.rows, rest, found.searched_back_to)
    has_more = len(found.rows) > limit
    rows = found.rows[:limit]
    return RowPage(rows, Cursor(*rows[-1].key) if has_more else None)


def row_columns(connection: Connection[Any], cursor: Cursor) -> list[ColumnValue]:
    """Return all columns of the row with this key, or an empty list if there is no such row."""
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
    """Count the selected requests over time. The span defaults to the last 24 hours.

    If the planner expects a full count to take too long, only a sample of the table's pages is
    read, and the counts are scaled up.
    """
    until = min(max(selection.until or now or datetime.now(UTC), _EPOCH), _LATEST)
    since = max(selection.since or until - TRAFFIC_SPAN, _EPOCH)
    edges = bar_edges(since, until, UTC)
    where, values = selection.where()
    values |= {"since": since, "until": until, "edges": edges}
    statement = _TRAFFIC.format(sample=sql.SQL(""), where=where)
    cost = _estimated_cost(connection, statement, values)
    percent = None
    if cost > _SAMPLE_ABOVE_COST:
        percent = max(0.01, round(100 * _SAMPLE_ABOVE_COST / cost, 2))
        statement = _TRAFFIC.format(sample=_SAMPLE.format(sql.Literal(percent)), where=where)
    counts = {bucket: row for bucket, *row in connection.execute(statement, values)}
    scale = 100 / percent if percent else 1
    buckets = [
        TrafficBucket(
            at, *(round(int(count) * scale) for count in counts.get(bucket, (0, 0, 0, 0)))
        )
        for bucket, at in enumerate(edges[:-1], start=1)
    ]
    return Traffic(buckets, edges, since, until, percent)


def explain(error: Exception) -> str:
    """Say in one sentence why a query failed, and what to do. Contains no secrets."""
    state = getattr(error, "sqlstate", None)
    if isinstance(error, DeadlineExceededError) or state == _QUERY_CANCELED:
        return (
            "The search took too long and was canceled; narrow it with a time, a host, a package or a user,"
            " or raise page.query_seconds."
        )
    if state == _INSUFFICIENT_PRIVILEGE:
        return (
            "This database role cannot read the log; set read.dsn to a role that can"
            " (artifactapi init prints its grants)."
        )
    if state == _UNDEFINED_TABLE:
        return (
            "The table access_log does not exist yet; the proxy creates it when it first connects."
        )
    return f"Cannot query the database: {describe(error).rstrip('.')}."


def _estimated_cost(
    connection: Connection[Any], statement: sql.Composed, values: dict[str, Any]
) -> float:
    """Return the planner's cost estimate, in its own unit."""
    row = connection.execute(sql.SQL("EXPLAIN (FORMAT JSON) ") + statement, values).fetchone()
    document = row[0] if row else "[]"
    plan = json.loads(document) if isinstance(document, str) else document
    return float(plan[0]["Plan"]["Total Cost"])
