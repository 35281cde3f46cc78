"""The holes of the log, as the table has them and as a person reads them; what makes them is gaps.py's job."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.text import Text

from .human import printable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from psycopg import Connection

_GAPS = "SELECT node, from_at, to_at, reason, entries FROM access_log_gap ORDER BY from_at, to_at"


def all_gaps(connection: Connection[Any]) -> list[tuple[Any, ...]]:
    """The holes of the log in order: node, from, to, reason, entries. Raises psycopg.Error."""
    return connection.execute(_GAPS).fetchall()


def gap_lines(gaps: list[tuple[Any, ...]]) -> Iterator[Text]:
    """The holes as aligned lines, and their sum."""
    if not gaps:
        yield Text("No gaps: no proxy knows of a request without its row.", style="green")
        return
    yield Text(f"{'from':<23}  {'to':<23}  {'entries':>8}  {'reason':<13}  node", style="bold")
    for node, from_at, to_at, reason, entries in gaps:
        start, end = (f"{at.astimezone():%Y-%m-%d %H:%M:%S.%f}"[:23] for at in (from_at, to_at))
        yield Text(f"{start}  {end}  {entries:>8}  {printable(reason):<13}  {printable(node)}")
    yield Text(f"{sum(gap[4] for gap in gaps)} entries are missing in all.", style="red")
