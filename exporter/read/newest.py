"""Find the newest rows of a selection, by start or by arrival. Used by the page and by `tail`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, LiteralString, NamedTuple

from psycopg import sql

from . import time_search
from .session import JSON_ROW, time_limited

if TYPE_CHECKING:
    from datetime import datetime
    from uuid import UUID

    from psycopg import Connection

    from .selection import Selection

# The first half of the cursor condition lets PostgreSQL prune partitions.
_ROWS = sql.SQL("""
    SELECT * FROM (
      SELECT {columns} FROM {relation} WHERE {where} AND {cursor} AND {stretch}
    ) AS newest
    ORDER BY {time} DESC, {tiebreaker} DESC LIMIT %(limit)s
""")
_CURSOR = sql.SQL("{time} <= %(at)s AND ({time}, {tiebreaker}) < (%(at)s, %(id)s)")
# OFFSET 0 is an optimization fence. Without it the planner would count on reaching the LIMIT soon,
# but few rows of a stretch match, or none.
_STRETCH = sql.SQL("{time} >= %(from)s AND {time} < %(to)s OFFSET 0")
_NEWEST_TIME = sql.SQL("""
    SELECT max({time}) FROM access_log WHERE {span} AND {cursor} AND {time} < %(to)s
""")
_TRUE = sql.SQL("true")


class Row(NamedTuple):
    """The columns of access_log that a list shows."""

    started_at: datetime
    flow_id: UUID
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
    cache_status: str | None
    purl: str | None
    json: str | None  # all columns as one line of JSON, if requested

    @property
    def key(self) -> tuple[datetime, UUID]:
        """The primary key."""
        return self.started_at, self.flow_id


class RowOrder(NamedTuple):
    """The columns that rows are sorted by, newest first."""

    time: LiteralString
    tiebreaker: LiteralString


BY_START = RowOrder("started_at", "flow_id")
BY_ARRIVAL = RowOrder("logged_at", "started_at")


class Cursor(NamedTuple):
    """A position in rows ordered by start: just after the row with this key."""

    started_at: datetime
    flow_id: UUID


class NewestRows(NamedTuple):
    """The newest rows, newest first."""

    rows: list[Row]
    searched_back_to: datetime | None  # None: the search was complete; else it stopped at this time


def newest(
    connection: Connection[Any],
    selection: Selection,
    limit: int,
    order: RowOrder,
    *,
    after: Cursor | None = None,
    search_seconds: float | None = None,
    as_json: bool = False,
    relation: LiteralString = "access_log",
) -> NewestRows:
    """Return at most `limit` of the selected rows, newest first.

    Args:
        connection: Within `session.read_only`.
        selection: Which rows.
        limit: Maximum number of rows.
        order: What newest means.
        after: Skip all rows up to this position. Needs the order BY_START.
        search_seconds: If the selection has filters, search backwards in time for about this long,
            see time_search.py. None: run one query over all rows of the selection's time span.
        as_json: Whether to fill in `Row.json`.
        relation: Where the rows are, if not in the table. Needs `search_seconds` None.

    Raises:
        psycopg.Error, DeadlineExceededError: the query failed, took too long, or lost its connection.
    """
    names = {"time": sql.Identifier(order.time), "tiebreaker": sql.Identifier(order.tiebreaker)}
    where, values = selection.where()
    cursor: sql.SQL | sql.Composed = _TRUE
    if after is not None:
        cursor = _CURSOR.format(**names)
        values |= {"at": after.started_at, "id": after.flow_id}

    def query(stretch: sql.SQL | sql.Composed, limit: int, **bounds: datetime) -> list[Row]:
        statement = _ROWS.format(
            columns=columns(as_json=as_json),
            relation=sql.Identifier(relation),
            where=where,
            cursor=cursor,
            stretch=stretch,
            **names,
        )
        found = connection.execute(statement, {**values, **bounds, "limit": limit})
        return [Row(*row) for row in found]

    if search_seconds is None or not selection.filters():
        return NewestRows(query(_TRUE, limit), None)

    span, _ = selection.time_only().where()
    newest_time = _NEWEST_TIME.format(span=span, cursor=cursor, time=names["time"])
    stretch = _STRETCH.format(time=names["time"])

    def newest_before(until: datetime) -> datetime | None:
        return single_time(connection, newest_time, {**values, "to": until})

    def search(since: datetime, until: datetime, limit: int, seconds: float | None) -> list[Row]:
        with time_limited(connection, seconds):
            return query(stretch, limit, **{"from": since, "to": until})

    return NewestRows(*time_search.search_back(newest_before, search, limit, search_seconds))


def columns(*, as_json: bool = False) -> sql.Composed:
    """Return what to SELECT for a Row."""
    json = JSON_ROW if as_json else sql.SQL("NULL")
    return sql.SQL(", ").join(
        [*map(sql.Identifier, Row._fields[:-1]), sql.SQL("{} AS json").format(json)]
    )


def single_time(
    connection: Connection[Any], statement: sql.SQL | sql.Composed, values: dict[str, Any]
) -> datetime | None:
    """Run a query whose result is one time."""
    row = connection.execute(statement, values).fetchone()
    time: datetime | None = row[0] if row else None
    return time
