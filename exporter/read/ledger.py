"""Read the ledger of runs, and count the rows of access_log to compare them with it. Decides nothing.

exporter/write/ledger.py keeps the ledger. docs/architecture.md says what it proves.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from datetime import UTC, date, datetime, timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

from psycopg import sql

from ..day import day_span, midnight
from .archived import with_archive
from .selection import Selection
from .session import read_only

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from psycopg import Connection

    from ..postgres.connection import DeadlineConnection
    from .archived import ArchiveLoader

_STATEMENT_SECONDS = 3600.0  # counting a day of a billion rows takes minutes

type NodeDay = tuple[str, date]  # a node and a day (UTC)

_RUNS = """
    SELECT run_id::text, node, version, access_log_run_state(end_reason, last_seen_at), started_at, last_seen_at,
           ended_at, seen, written, spooled, vanished
    FROM access_log_run ORDER BY started_at, run_id
"""
_COUNTED = """
    SELECT run_id::text, origin_run_id::text, node, day, rows, lost FROM access_log_run_day
"""
_GAPS = """
    SELECT coalesce(run_id, '00000000-0000-0000-0000-000000000000')::text, node,
           (from_at AT TIME ZONE 'UTC')::date, (to_at AT TIME ZONE 'UTC')::date, reason, sum(entries)::bigint
    FROM access_log_gap GROUP BY 1, 2, 3, 4, 5
"""
_PRUNED = (
    "SELECT coalesce(node, ''), day, sum(requests)::bigint FROM access_log_pruned GROUP BY 1, 2"
)
_REPEATED = "SELECT node, day, sum(requests)::bigint FROM access_log_repeated GROUP BY 1, 2"
_PARTITIONS = """
    SELECT partition_oid::bigint, from_at, until_at, greatest(reltuples, 0)::bigint
    FROM access_log_partitions JOIN pg_class ON pg_class.oid = partition_oid
    WHERE (until_at > %(since)s AND from_at < %(until)s) OR from_at IS NULL
    ORDER BY from_at NULLS LAST
"""
_DAY = sql.SQL("(started_at AT TIME ZONE 'UTC')::date")
_COUNT = sql.SQL("""
    SELECT coalesce(node, ''), {day}, count(*) FROM access_log
    WHERE started_at >= %(since)s AND started_at < %(until)s AND {where} GROUP BY node, 2
""")


class Run(NamedTuple):
    """A row of access_log_run. `state` is running, silent, stopped, killed or unknown."""

    run_id: str
    node: str
    version: str | None
    state: str
    started_at: datetime
    last_seen_at: datetime
    ended_at: datetime | None
    seen: int
    written: int
    spooled: int
    vanished: int = 0


class Counted(NamedTuple):
    """A row of access_log_run_day."""

    run_id: str
    origin_run_id: str
    node: str
    day: date
    rows: int
    lost: int


class GapSum(NamedTuple):
    """The entries of all gaps of one run, node and reason, from one day to another."""

    origin_run_id: str
    node: str
    from_day: date
    to_day: date
    reason: str
    entries: int


class Partition(NamedTuple):
    """A partition of access_log, with a rough number of its rows. Without bounds: a default partition."""

    oid: int
    from_at: datetime | None
    until_at: datetime | None
    rows: int


class Days(NamedTuple):
    """Whole days (UTC) from `first` to `last`; None: from the first or to the last there is."""

    first: date | None = None
    last: date | None = None

    @classmethod
    def covering(cls, since: datetime | None, until: datetime | None) -> Days:
        """All days of which this span has a part."""
        last = None if until is None else until.astimezone(UTC) - timedelta(microseconds=1)
        return cls(since.astimezone(UTC).date() if since else None, last.date() if last else None)

    def __contains__(self, day: object) -> bool:
        if not isinstance(day, date):
            return False
        return (self.first is None or day >= self.first) and (self.last is None or day <= self.last)

    def overlap(self, first: date, last: date) -> bool:
        """Whether any of the days from `first` to `last` is among them."""
        return (self.first is None or last >= self.first) and (
            self.last is None or first <= self.last
        )

    @property
    def bounds(self) -> dict[str, Any]:
        """The span as parameters `since` and `until` (exclusive) of a query."""
        return {
            "since": midnight(self.first) if self.first else "-infinity",
            "until": day_span(self.last)[1] if self.last and self.last < date.max else "infinity",
        }


class Evidence(NamedTuple):
    """What the database holds, from one snapshot."""

    runs: list[Run]
    counted: list[Counted]
    gaps: list[GapSum]
    table: dict[NodeDay, int]  # rows found by counting
    pruned: dict[NodeDay, int]
    now: datetime
    has_archive: bool = False  # `table` includes the rows that are only in the archive
    repeated: Mapping[NodeDay, int] = {}  # rows that `counted` has twice


def collect(
    connection: DeadlineConnection,
    days: Days,
    progress: Callable[[int, int], None],
    archive: Path | None = None,
) -> Evidence:
    """Read the ledger, and count the rows of these days.

    Args:
        connection: In autocommit mode, outside a transaction.
        days: Which days to count.
        progress: Called with the rows counted so far and a rough total: before the first partition and
            after each.
        archive: The folder of archived days to check and count as well. A row that is in the table and
            in a file counts once.

    Raises:
        ArchiveError: the archive cannot be read, or a file is damaged.
        psycopg.Error, DeadlineExceededError: a query failed or lost its connection.
    """
    with contextlib.ExitStack() as transaction:
        loader = archive and transaction.enter_context(
            with_archive(connection, archive, with_views=False)
        )
        transaction.enter_context(read_only(connection, _STATEMENT_SECONDS))
        runs = [Run(*row) for row in connection.execute(_RUNS)]
        counted = [Counted(*row) for row in connection.execute(_COUNTED)]
        gaps = [GapSum(*row) for row in connection.execute(_GAPS)]
        (now,) = connection.execute("SELECT now()").fetchone() or (datetime.now(UTC),)
        pruned = pruned_rows(connection)
        repeated = {(node, day): rows for node, day, rows in connection.execute(_REPEATED)}
        found = partitions(connection, days)
        done, total = 0, sum(partition.rows for partition in found)
        table: Counter[NodeDay] = Counter()
        for partition in found:
            progress(done, total)
            table.update(dict(count_rows(connection, days, partition)))
            done += partition.rows
        progress(total, total)
        if loader:
            table.update(_archived_rows(loader, days, {day for _, day in table}))
    return Evidence(runs, counted, gaps, dict(table), pruned, now, archive is not None, repeated)


def _archived_rows(loader: ArchiveLoader, days: Days, days_in_table: set[date]) -> Counter[NodeDay]:
    """Count the rows that are in files and not in the table."""
    found: Counter[NodeDay] = Counter()
    for span in loader.days(Selection()):
        if span.day in days:
            counted = loader.count_missing(span, in_table=span.day in days_in_table)
            found.update({(node, span.day): rows for node, rows in counted.items()})
    return found


def pruned_rows(connection: Connection[Any]) -> dict[NodeDay, int]:
    """Return how many rows `artifactapi prune` removed, by node and day.

    Call it within `read_only`. Raises psycopg.Error.
    """
    return {(node, day): rows for node, day, rows in connection.execute(_PRUNED)}


def partitions(connection: Connection[Any], days: Days) -> list[Partition]:
    """Return the partitions that hold these days. Call it within `read_only`. Raises psycopg.Error."""
    return [Partition(*row) for row in connection.execute(_PARTITIONS, days.bounds)]


def count_rows(
    connection: Connection[Any], days: Days, partition: Partition
) -> Iterator[tuple[NodeDay, int]]:
    """Count the rows of a partition on these days, by node and day. Reads the whole partition.

    Call it within `read_only`. Raises psycopg.Error, DeadlineExceededError.
    """
    values: dict[str, Any] = days.bounds
    where: sql.Composable = sql.SQL("true")
    day: sql.Composable = _DAY
    if partition.from_at is None or partition.until_at is None:
        where = sql.SQL("tableoid = {}").format(sql.Literal(partition.oid))
    else:
        values["since"] = _later(values["since"], partition.from_at)
        values["until"] = _earlier(values["until"], partition.until_at)
        if partition.until_at - partition.from_at <= timedelta(days=1):
            # Computing the day of each row would take as long as counting it.
            day = sql.SQL("{}::date").format(sql.Literal(partition.from_at.astimezone(UTC).date()))
    for node, of_day, rows in connection.execute(_COUNT.format(day=day, where=where), values):
        yield (node, of_day), rows


def _later(bound: Any, at: datetime) -> datetime:
    return at if isinstance(bound, str) else max(bound, at)


def _earlier(bound: Any, at: datetime) -> datetime:
    return at if isinstance(bound, str) else min(bound, at)
