"""Read the gaps in the log from access_log_gap, and print them. exporter/write/gaps.py records them."""

from __future__ import annotations

from datetime import datetime  # noqa: TC003 - msgspec reads the annotations
from typing import TYPE_CHECKING, Any

from msgspec import Struct
from rich.text import Text

from .human import printable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from psycopg import Connection

_ALL = """
    SELECT node, reason, entries, from_at, to_at FROM access_log_gap ORDER BY from_at, to_at
"""
_RECENT = """
    SELECT node, reason, entries, from_at, to_at FROM access_log_gap
    WHERE to_at > now() - interval '7 days' ORDER BY to_at DESC LIMIT %s
"""
_TOTALS = """
    SELECT node, reason, sum(entries)::bigint AS entries, min(from_at) AS from_at, max(to_at) AS to_at
    FROM access_log_gap WHERE to_at >= %(since)s AND from_at < %(until)s
    GROUP BY 1, 2 ORDER BY 3 DESC, 1, 2
"""


class RecordedGap(Struct, frozen=True):
    """A row of access_log_gap, or the sum of several: a span in which entries were lost."""

    node: str
    reason: str
    entries: int
    from_at: datetime
    to_at: datetime


def all_gaps(connection: Connection[Any]) -> list[RecordedGap]:
    """Return all gaps, oldest first. Raises psycopg.Error, as the next two do."""
    return [RecordedGap(*row) for row in connection.execute(_ALL)]


def recent_gaps(connection: Connection[Any], limit: int) -> list[RecordedGap]:
    """Return at most `limit` gaps of the last seven days, newest first."""
    return [RecordedGap(*row) for row in connection.execute(_RECENT, (limit,))]


def gap_totals(connection: Connection[Any], since: datetime, until: datetime) -> list[RecordedGap]:
    """Sum up the gaps that overlap a time span, by node and reason; most lost entries first."""
    found = connection.execute(_TOTALS, {"since": since, "until": until})
    return [RecordedGap(*row) for row in found]


def gap_lines(gaps: list[RecordedGap]) -> Iterator[Text]:
    """Format gaps as aligned lines, followed by the total."""
    if not gaps:
        yield Text("No gaps: no proxy knows of a request without a row.", style="green")
        return
    yield Text(f"{'from':<23}  {'to':<23}  {'entries':>8}  {'reason':<13}  node", style="bold")
    for gap in gaps:
        start, end = (
            f"{at.astimezone():%Y-%m-%d %H:%M:%S.%f}"[:23] for at in (gap.from_at, gap.to_at)
        )
        reason, node = printable(gap.reason), printable(gap.node)
        yield Text(f"{start}  {end}  {gap.entries:>8}  {reason:<13}  {node}")
    yield Text(f"{sum(gap.entries for gap in gaps)} entries are missing in total.", style="red")
