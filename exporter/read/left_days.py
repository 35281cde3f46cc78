"""Tell that days of a selection have left the table for the archive, so that nobody takes a part for the whole."""

from __future__ import annotations

from datetime import UTC, timedelta
from typing import TYPE_CHECKING

import psycopg

from .session import read_only

if TYPE_CHECKING:
    from ..postgres.connection import DeadlineConnection
    from .selection import Selection

_SECONDS = 5.0  # it reads one row per day
# Those that were deleted without an archive have no files; earlier versions did not record that.
_LAST = """
    SELECT max(until_at) FROM access_log_rollup
    WHERE pruned_at IS NOT NULL AND archive_files IS DISTINCT FROM '{}'
    AND until_at > coalesce(%s, '-infinity'::timestamptz) AND from_at < coalesce(%s, 'infinity'::timestamptz)
"""


def left_days_notice(
    connection: DeadlineConnection, selection: Selection, archive: str
) -> str | None:
    """Return one sentence if days of the selection's time span are only in files. None: the table has all, or unknown.

    Args:
        connection: Outside a transaction.
        selection: Its time span counts, not its other filters.
        archive: The setting retention.archive, which may be empty.

    Raises:
        psycopg.Error, DeadlineExceededError: the query failed or lost its connection.
    """
    try:
        with read_only(connection, _SECONDS):
            ((until,),) = connection.execute(_LAST, (selection.since, selection.until)).fetchall()
    except (psycopg.errors.InsufficientPrivilege, psycopg.errors.QueryCanceled):
        return None
    if until is None:
        return None
    last = (until - timedelta(microseconds=1)).astimezone(UTC)
    return (
        f"Days until {last:%Y-%m-%d} (UTC) have left the table; add --archive {archive or 'DIR'}"
        " to include the files they are in."
    )
