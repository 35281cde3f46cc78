"""Read the gaps in the log from access_log_gap, and print them. exporter/write/gaps.py records them."""

from __future__ import annotations

from datetime import datetime  # noqa: TC003 - msgspec reads the annotations
from typing import TYPE_CHECKING, Any

from msgspec import Struct
from psycopg import sql
from rich.text import Text

from .human import are, plural, printable
from .selection import glob_condition
from .session import read_only

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import LiteralString

    from psycopg import Connection

    from ..postgres.connection import DeadlineConnection
    from .selection import Selection

_COLUMNS = sql.SQL("node, reason, entries, from_at, to_at")
_OLDEST_FIRST = sql.SQL("""
    SELECT {columns} FROM access_log_gap WHERE {where} ORDER BY from_at, to_at, gap_id
""")
_NEWEST_FIRST = sql.SQL("""
    SELECT {columns} FROM access_log_gap
    WHERE to_at > now() - interval '7 days' ORDER BY to_at DESC LIMIT %s
""")
_BIGGEST_FIRST = sql.SQL("""
    SELECT {columns}, count(*) OVER (), (sum(entries) OVER ())::bigint FROM access_log_gap
    WHERE {where} ORDER BY entries DESC, from_at DESC, gap_id LIMIT %(limit)s
""")
_STATEMENT_SECONDS = 60.0


class RecordedGap(Struct, frozen=True):
    """A row of access_log_gap: a span in which entries were lost."""

    node: str
    reason: str
    entries: int
    from_at: datetime
    to_at: datetime


class GapSummary(Struct, frozen=True):
    """How many gaps there are, how many entries they lost, and the biggest of them."""

    gaps: int
    entries: int
    biggest: list[RecordedGap]


def find_gaps(connection: DeadlineConnection, selection: Selection) -> list[RecordedGap]:
    """Return the gaps of the selected node that overlap the selected time, oldest first.

    The other filters do not apply to gaps.

    Raises:
        psycopg.Error, DeadlineExceededError: the query failed, took too long, or lost its connection.
    """
    where, values = _where(selection)
    with read_only(connection, _STATEMENT_SECONDS):
        found = connection.execute(_OLDEST_FIRST.format(columns=_COLUMNS, where=where), values)
        return [RecordedGap(*row) for row in found]


def recent_gaps(connection: Connection[Any], limit: int) -> list[RecordedGap]:
    """Return at most `limit` gaps of the last seven days, newest first. Raises psycopg.Error."""
    found = connection.execute(_NEWEST_FIRST.format(columns=_COLUMNS), (limit,))
    return [RecordedGap(*row) for row in found]


def gap_summary(connection: Connection[Any], selection: Selection, limit: int) -> GapSummary:
    """Sum up the gaps that `find_gaps` would return, and list the `limit` biggest.

    Call it within `session.read_only`. Raises psycopg.Error.
    """
    where, values = _where(selection)
    statement = _BIGGEST_FIRST.format(columns=_COLUMNS, where=where)
    rows = connection.execute(statement, {**values, "limit": limit}).fetchall()
    count, entries = rows[0][-2:] if rows else (0, 0)
    return GapSummary(count, entries, [RecordedGap(*row[:-2]) for row in rows])


def _where(selection: Selection) -> tuple[sql.Composed, dict[str, Any]]:
    """Return a condition on the columns of access_log_gap, and the values that it binds."""
    conditions: list[LiteralString] = ["true"]
    values: dict[str, Any] = {}
    if selection.since is not None:
        conditions.append("to_at >= %(since)s")
        values["since"] = selection.since
    if selection.until is not None:
        conditions.append("from_at < %(until)s")
        values["until"] = selection.until
    if selection.node is not None:
        condition, values["where_node"] = glob_condition("node", "node", selection.node)
        conditions.append(condition)
    return sql.SQL(" AND ").join(map(sql.SQL, conditions)), values


def gap_lines(gaps: list[RecordedGap]) -> Iterator[Text]:
    """Format gaps as aligned lines, followed by the total."""
    if not gaps:
        yield Text("No gaps: no proxy knows of a request without a row.", style="green")
        return
    yield Text(f"{'from':<23}  {'to':<23}  {'requests':>8}  {'reason':<13}  node", style="bold")
    for gap in gaps:
        start, end = (
            f"{at.astimezone():%Y-%m-%d %H:%M:%S.%f}"[:23] for at in (gap.from_at, gap.to_at)
        )
        reason, node = printable(gap.reason), printable(gap.node)
        yield Text(f"{start}  {end}  {gap.entries:>8,}  {reason:<13}  {node}")
    total = sum(gap.entries for gap in gaps)
    yield Text(f"{plural(total, 'request')} {are(total)} missing in total.", style="red")
