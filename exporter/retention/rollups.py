"""Roll up the days and hours that are over, and again those that got late rows."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

import psycopg

if TYPE_CHECKING:
    from collections.abc import Iterator

    from psycopg import Connection

# A day or hour is rolled up this long after its end, so that usual late rows do not make that necessary
# again. access_log_has_grown counts the rows of the hour before a rollup as late, so more than an hour.
_DAY_REST, _HOUR_REST = timedelta(hours=2), timedelta(minutes=70)

# Days with rows that are in no rollup, or that may have got rows since.
_DUE_DAYS = """
    SELECT day, day + interval '1 day'
    FROM (SELECT min(started_at) AS oldest, max(started_at) AS newest FROM access_log) AS span
    CROSS JOIN generate_series(date_trunc('day', oldest, 'UTC'), least(newest, now()), interval '1 day') AS day
    LEFT JOIN access_log_rollup_state
      ON from_at = day AND until_at = day + interval '1 day' AND pruned_at IS NULL
    WHERE day + interval '1 day' < now() - %(day_rest)s AND is_complete IS NOT TRUE
    AND EXISTS (SELECT FROM access_log WHERE started_at >= day AND started_at < day + interval '1 day')
    ORDER BY day
"""
# The same for the hours since the last of these days.
_DUE_HOURS = """
    SELECT hour, hour + interval '1 hour'
    FROM generate_series(date_trunc('day', now() - %(day_rest)s, 'UTC'), now(), interval '1 hour') AS hour
    LEFT JOIN access_log_rollup_state
      ON from_at = hour AND until_at = hour + interval '1 hour' AND pruned_at IS NULL
    WHERE hour + interval '1 hour' < now() - %(hour_rest)s AND is_complete IS NOT TRUE
    AND EXISTS (SELECT FROM access_log WHERE started_at >= hour AND started_at < hour + interval '1 hour')
    ORDER BY hour
"""
_ROLL_UP = "SELECT access_log_roll_up('access_log', %s, %s)"


class Span(NamedTuple):
    """A day (UTC) or an hour."""

    from_at: datetime
    until_at: datetime


def roll_up(connection: Connection[Any]) -> Iterator[Span]:
    """Roll up each day and hour that needs it; yield it before. Each is one transaction.

    The rollup of a day replaces those of its hours.

    Raises:
        psycopg.Error: The server reported an error.
    """
    rests = {"day_rest": _DAY_REST, "hour_rest": _HOUR_REST}
    found = [
        Span(*row)
        for query in (_DUE_DAYS, _DUE_HOURS)
        for row in connection.execute(query, rests).fetchall()
    ]
    for span in found:
        yield span
        connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ  # one snapshot
        try:
            with connection.transaction():
                connection.execute(_ROLL_UP, span)
        finally:
            connection.isolation_level = None
