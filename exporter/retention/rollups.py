"""Roll up the hours, days and months that are over, and again those that got late rows."""

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
# Months of which other rollups are merged than there are now.
_DUE_MONTHS = """
    SELECT month, ids
    FROM (SELECT date_trunc('month', from_at, 'UTC') AS month, array_agg(rollup_id ORDER BY rollup_id) AS ids
          FROM access_log_rollup_state WHERE is_complete GROUP BY 1) AS present
    LEFT JOIN access_log_rollup_month ON from_at = month
    WHERE month + interval '1 month' < now() - %(day_rest)s AND rollup_ids IS DISTINCT FROM ids
    ORDER BY month
"""
_DELETE_MONTH = "DELETE FROM access_log_rollup_month WHERE from_at = %s"
_INSERT_MONTH = "INSERT INTO access_log_rollup_month (from_at, rollup_ids) VALUES (%s, %s)"
_MERGES = (
    """
    INSERT INTO access_log_rollup_month_artifact
    SELECT month_id, purl, min(artifact.remote), sum(fetches), sum(bytes), sum(whole_bytes), max(largest_bytes)
    FROM access_log_rollup_month JOIN access_log_rollup_artifact AS artifact ON rollup_id = ANY (rollup_ids)
    WHERE from_at = %s GROUP BY 1, 2
    """,
    """
    INSERT INTO access_log_rollup_month_total
    SELECT month_id, coalesce(remote, host), status_code, error_type, cache_status, cache_source,
           sum(requests), sum(response_bytes), sum(partial_reads)
    FROM access_log_rollup_month JOIN access_log_rollup_total ON rollup_id = ANY (rollup_ids)
    WHERE from_at = %s GROUP BY 1, 2, 3, 4, 5, 6
    """,
    """
    INSERT INTO access_log_rollup_month_duration
    SELECT month_id, name, array_agg(bucket ORDER BY bucket), array_agg(requests ORDER BY bucket)
    FROM (SELECT month_id, name, pair.bucket, sum(pair.requests)::bigint AS requests
          FROM access_log_rollup_month JOIN access_log_rollup_duration AS duration ON rollup_id = ANY (rollup_ids)
          CROSS JOIN unnest(buckets, duration.requests) AS pair (bucket, requests)
          WHERE from_at = %s GROUP BY 1, 2, 3) AS counted
    GROUP BY 1, 2
    """,
)
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


def merge_months(connection: Connection[Any]) -> Iterator[datetime]:
    """Merge the rollups of each month that needs it; yield its start before. Each is one transaction.

    Raises:
        psycopg.Error: The server reported an error.
    """
    for month, ids in connection.execute(_DUE_MONTHS, {"day_rest": _DAY_REST}).fetchall():
        yield month
        with connection.transaction():
            connection.execute(_DELETE_MONTH, (month,))
            connection.execute(_INSERT_MONTH, (month, ids))
            for merge in _MERGES:
                connection.execute(merge.encode(), (month,))
