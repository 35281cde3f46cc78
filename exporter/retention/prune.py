"""Prune the log: archive, detach and drop the days that are older than they need to be kept."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

import psycopg

from ..archive.files import archive_day, claim_archive
from ..archive.parquet import ArchiveError
from ..day import day_span
from ..postgres.citus import in_sequence
from ..postgres.locks import short_lock_waits
from .days import (
    DependentsError,
    check_dependents,
    detach,
    drop,
    left_partitions,
    old_partitions,
    unmark,
)
from .repeats import remove_repeats
from .rollups import Span, roll_up_leaving

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from psycopg import Connection

    from .days import Partition


_LOG_ID = "SELECT access_log_id()"


class KeptDaysError(Exception):
    """Some days, or rows of them, could not be removed; others were. The message is one sentence."""

    def __init__(self, problems: Sequence[tuple[str, Exception]]) -> None:
        """`problems`: at least one name of what is still there, and why."""
        (first, reason), *others = problems
        more = f" and {len(others)} more" if others else ""
        super().__init__(f"{first}{more} could not be removed: {reason}")
        self.problems = list(problems)


class PrunedPartition(NamedTuple):
    """What left the log."""

    name: str
    from_at: datetime
    until_at: datetime
    rows: int
    bytes: int  # with its indexes


def oldest_kept(days: int, now: datetime | None = None) -> datetime:
    """The start of the oldest day (UTC) to keep: today and `days` whole days before it."""
    now = (now or datetime.now(UTC)).astimezone(UTC)
    return now.replace(hour=0, minute=0, second=0, microsecond=0) - timedelta(days=days)


def prunable(connection: Connection[Any], before: datetime) -> Iterator[PrunedPartition]:
    """Tell what `prune` would remove. Changes nothing; counts the rows of each day when asked for it."""
    for partition in _candidates(connection, before):
        rows = partition.count_rows(connection)
        yield PrunedPartition(
            partition.name, partition.from_at, partition.until_at, rows, partition.bytes
        )


def prune(
    connection: Connection[Any], before: datetime, archive: Path | None
) -> Iterator[PrunedPartition]:
    """Remove each partition that holds only rows from before this time; yield it afterwards.

    If one cannot be archived or dropped, it stays, and the others leave. Proxies and readers go on meanwhile.
    If interrupted at any point, the next call continues: a row is in access_log, in a partition that was detached for
    this, or in the archive. The totals of each day stay in its rollup.

    Args:
        connection: In autocommit mode; its role must own the tables.
        before: A start of a day (UTC).
        archive: Folder for the rows; None deletes them.

    Raises:
        KeptDaysError: At the end. Days could not be archived, or something that somebody created needs them; they are
            still in the table, or detached.
        LogInUseError: A long transaction uses the log, which keeps every day.
        psycopg.Error: A lock was not available within a second, or the server reported another error.
    """
    problems: list[tuple[str, Exception]] = []
    with short_lock_waits(connection):
        unmark(connection)  # what a run left that was killed
        for partition in _candidates(connection, before):
            try:
                rows = _remove(connection, partition, archive)
            except (ArchiveError, DependentsError) as e:
                problems.append((partition.name, e))
                continue
            yield PrunedPartition(
                partition.name, partition.from_at, partition.until_at, rows, partition.bytes
            )
    if problems:
        raise KeptDaysError(problems)


def _remove(connection: Connection[Any], partition: Partition, archive: Path | None) -> int:
    """Archive, detach and drop a partition; return the number of its rows."""
    check_dependents(connection, partition)
    if archive is not None:
        _remove_repeats(connection, partition, archive)
        contents = partition.contents(connection)
        _archive(connection, partition, archive)
    if partition.state == "attached":
        roll_up_leaving(connection, [Span(*day_span(day)) for day in partition.days])
    if partition.state != "detached":
        try:
            detach(connection, partition)
        except psycopg.Error:
            if not connection.closed:
                unmark(connection)
            raise
        if archive is not None and partition.contents(connection) != contents:
            _archive(connection, partition, archive)  # rows that arrived in between
    return drop(connection, partition, archive)


def _candidates(connection: Connection[Any], before: datetime) -> list[Partition]:
    return [*left_partitions(connection), *old_partitions(connection, before)]


def _remove_repeats(connection: Connection[Any], partition: Partition, archive: Path) -> None:
    """So that only new rows are archived. Those that arrive later are removed before the partition is dropped."""
    for day in partition.days:
        with connection.transaction():
            in_sequence(connection)
            remove_repeats(connection, partition.table, day, archive)


def _archive(connection: Connection[Any], partition: Partition, folder: Path) -> None:
    """Archive each day of the partition."""
    ((log_id,),) = connection.execute(_LOG_ID).fetchall()
    claim_archive(folder, log_id)
    for day in partition.days:
        archive_day(connection, partition.table, day, folder)
