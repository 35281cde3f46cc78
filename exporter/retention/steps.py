"""What keeps the table in order, step by step: indexes, rollups, and days that are old enough to leave."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from psycopg import sql

from ..archive.parquet import ArchiveError
from ..postgres.citus import in_sequence
from ..postgres.indexes import build_missing_indexes
from .prune import KeptDaysError, PrunedPartition, prune
from .repeats import late_days, remove_repeats
from .rollups import merge_months, roll_up
from .text_indexes import build_text_indexes

if TYPE_CHECKING:
    from collections.abc import Iterator
    from datetime import datetime
    from pathlib import Path

    from psycopg import Connection

    from ..settings import DatabaseSettings


def keep_in_order(
    connection: Connection[Any],
    settings: DatabaseSettings,
    before: datetime | None,
    archive: Path | None,
) -> Iterator[PrunedPartition]:
    """Do what is due; yield each partition that has left. If interrupted, the next call continues.

    Only one session at a time may do this; see `locks.HOUSEKEEPING`.

    Args:
        connection: In autocommit mode; its role must own the tables.
        settings: Of this database.
        before: Remove rows from before this start of a day (UTC); None removes none.
        archive: Folder for the removed rows; None deletes them.

    Raises:
        KeptDaysError: At the end, after all other steps. See `prune`.
        LogInUseError, psycopg.Error: See `prune`.
    """
    for _ in build_missing_indexes(connection):
        pass
    repeats = [] if archive is None else _remove_repeats(connection, archive)
    for _ in roll_up(connection):
        pass
    problems: list[tuple[str, Exception]] = []
    if before is not None:
        try:
            yield from prune(connection, before, archive)
        except KeptDaysError as e:
            problems = e.problems
    for _ in merge_months(connection):  # pruned days have a new rollup
        pass
    for _ in build_text_indexes(connection, settings):  # of the days that stay
        pass
    if problems or repeats:
        raise KeptDaysError([*problems, *repeats])


def _remove_repeats(connection: Connection[Any], archive: Path) -> list[tuple[str, Exception]]:
    """Remove rows that had left the table before, before they are rolled up. Return what failed."""
    problems: list[tuple[str, Exception]] = []
    for day in late_days(connection):
        try:
            with connection.transaction():
                in_sequence(connection)
                remove_repeats(connection, sql.Identifier("access_log"), day, archive)
        except ArchiveError as e:
            problems.append((f"Rows of {day} that the archive may have already", e))
    return problems
