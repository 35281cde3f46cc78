"""Roll up the days that are over, and again those that got late rows."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

import psycopg

if TYPE_CHECKING:
    from collections.abc import Iterator
    from datetime import datetime

    from psycopg import Connection

# A day is rolled up this long after its end, so that usual late rows do not make that necessary again.
_REST = timedelta(hours=2)

# Days with rows that are in no rollup, or that may have got rows since.
_DUE = """
    SELECT day
    FROM (SELECT min(started_at) AS oldest, max(started_at) AS newest FROM access_log) AS span
    CROSS JOIN generate_series(date_trunc('day', oldest, 'UTC'), least(newest, now()), interval '1 day') AS day
    LEFT JOIN access_log_rollup_state
      ON from_at = day AND until_at = day + interval '1 day' AND pruned_at IS NULL
    WHERE day + interval '1 day' < now() - %s AND is_complete IS NOT TRUE
    AND EXISTS (SELECT FROM access_log WHERE started_at >= day AND started_at < day + interval '1 day')
    ORDER BY day
"""
_ROLL_UP = "SELECT access_log_roll_up('access_log', %s, %s)"


def roll_up_days(connection: Connection[Any]) -> Iterator[datetime]:
    """Roll up each day that needs it; yield its start before. Each is one transaction.

    Raises:
        psycopg.Error: The server reported an error.
    """
    found = connection.execute(_DUE, (_REST,)).fetchall()
    for (day,) in found:
        yield day
        connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ  # one snapshot
        try:
            with connection.transaction():
                connection.execute(_ROLL_UP, (day, day + timedelta(days=1)))
        finally:
            connection.isolation_level = None
