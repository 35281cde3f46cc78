"""Read which proxies run, from the view access_log_nodes, and sum them up in one line."""

from __future__ import annotations

from datetime import datetime, tzinfo  # noqa: TC003 - msgspec reads the annotations
from typing import TYPE_CHECKING, Any, Literal

from msgspec import Struct
from rich.cells import cell_len, set_cell_size
from rich.text import Text

from .human import plural, printable
from .session import read_only

if TYPE_CHECKING:
    from collections.abc import Iterator

    from psycopg import Connection

    from ..postgres.connection import DeadlineConnection

_STATEMENT_SECONDS = 60.0
_NODES = """
    SELECT node, state, version, started_at, last_seen_at, ended_at, rows_per_s, seen, written, waiting, spooled,
           dropped, rejected, run_id::text
    FROM access_log_nodes ORDER BY node, started_at
"""
_SUMMARY = """
    SELECT running, silent, silent_since, lost
    FROM (SELECT count(*) FILTER (WHERE state = 'running') AS running,
                 count(*) FILTER (WHERE state = 'silent') AS silent,
                 min(last_seen_at) FILTER (WHERE state = 'silent') AS silent_since
          FROM access_log_nodes) AS proxies
    CROSS JOIN (SELECT coalesce(sum(entries), 0)::bigint AS lost
                FROM access_log_gap WHERE to_at > now() - interval '1 day') AS gaps
"""
_HAS_VIEW = "SELECT to_regclass('access_log_nodes') IS NOT NULL"
_COLUMNS = (
    *("node", "state", "version", "last seen"),
    *("rows/s", "written", "waiting", "spooled", "dropped", "rejected"),
)
_LEFT_COLUMNS = 4  # the others are numbers
_STATE_STYLES = {"running": "green", "silent": "yellow", "killed": "red", "unknown": "red"}


class Node(Struct, frozen=True):
    """A row of access_log_nodes. `state` is running, silent, stopped, killed or unknown."""

    node: str
    state: str
    version: str | None
    started_at: datetime
    last_seen_at: datetime
    ended_at: datetime | None
    rows_per_s: float | None
    seen: int
    written: int
    waiting: int
    spooled: int
    dropped: int
    rejected: int
    run_id: str


class NodesSummary(Struct, frozen=True):
    """All proxies in one sentence. `level` repeats the worst of it as a color."""

    level: Literal["green", "amber", "red"]
    sentence: str


def find_nodes(connection: DeadlineConnection) -> list[Node]:
    """Return the proxies of the last 7 days, by name. Raises psycopg.Error, DeadlineExceededError."""
    with read_only(connection, _STATEMENT_SECONDS):
        return [Node(*row) for row in connection.execute(_NODES)]


def nodes_summary(connection: Connection[Any], zone: tzinfo | None = None) -> NodesSummary | None:
    """Sum up the proxies in one sentence; None if the database knows none.

    Red: requests were lost within a day. Amber: a proxy is silent. Times are in `zone`; None: local
    time. Call it within `session.read_only`. Raises psycopg.Error.
    """
    if connection.execute(_HAS_VIEW).fetchone() == (False,):
        return None
    row = connection.execute(_SUMMARY).fetchone()
    running, silent, silent_since, lost = row or (0, 0, None, 0)
    parts = [f"{_proxies(running)} running"]
    if silent_since is not None:
        parts.append(f"{silent:,} silent since {silent_since.astimezone(zone):%Y-%m-%d %H:%M}")
    if lost:
        parts.append(f"{plural(lost, 'request')} lost within a day")
        return NodesSummary("red", f"{', '.join(parts)}; see the gaps.")
    if silent:
        return NodesSummary("amber", f"{', '.join(parts)}.")
    return NodesSummary("green", f"{parts[0]}.") if running else None


def node_lines(nodes: list[Node]) -> Iterator[Text]:
    """Format the proxies as aligned lines. Text from proxies is printable."""
    if not nodes:
        yield Text("No proxy has written to this database in the last 7 days.")
        return
    lines = [_COLUMNS, *map(_cells, nodes)]
    widths = [max(map(cell_len, column)) for column in zip(*lines, strict=True)]
    styles = ["bold", *(_STATE_STYLES.get(node.state, "") for node in nodes)]
    for cells, style in zip(lines, styles, strict=True):
        aligned = [
            set_cell_size(cell, width) if place < _LEFT_COLUMNS else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        yield Text("  ".join(aligned), style=style)


def _cells(node: Node) -> tuple[str, ...]:
    numbers = (node.written, node.waiting, node.spooled, node.dropped, node.rejected)
    return (
        printable(node.node),
        node.state,
        printable(node.version or "-"),
        f"{node.last_seen_at.astimezone():%Y-%m-%d %H:%M}",
        "-" if node.rows_per_s is None else f"{node.rows_per_s:,.1f}",
        *(f"{number:,}" for number in numbers),
    )


def _proxies(count: int) -> str:
    return "1 proxy" if count == 1 else f"{count:,} proxies"
