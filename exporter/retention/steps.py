"""What keeps the table in order, step by step: indexes, rollups, and days that are old enough to leave."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..postgres.indexes import build_missing_indexes
from .prune import KeptDaysError, PrunedPartition, prune
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
    for _ in roll_up(connection):
        pass
    kept: KeptDaysError | None = None
    if before is not None:
        try:
            yield from prune(connection, before, archive)
        except KeptDaysError as e:
            kept = e
    for _ in merge_months(connection):  # pruned days have a new rollup
        pass
    for _ in build_text_indexes(connection, settings):  # of the days that stay
        pass
    if kept is not None:
        raise kept
