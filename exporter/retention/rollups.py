"""Roll up the parts of today, the days and the months, and again those that got late rows."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

import psycopg

from ..postgres.citus import in_sequence

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from psycopg import Connection

# A span is rolled up this long after its end, so that usual late rows do not make that necessary again.
# access_log_has_grown counts the rows of the 10 minutes before a rollup as late, so more than that.
_DAY_REST, _HOUR_REST, _QUARTER_REST = (
    timedelta(hours=2),
    timedelta(minutes=20),
    timedelta(minutes=15),
)

# Days with rows that are in no rollup, or that may have got rows since. 24 hours, because a day (UTC) has as many:
# '1 day' has more or less when the clock of the session's time zone changes.
_DUE_DAYS = """
    SELECT day, day + interval '24 hours'
    FROM (SELECT min(started_at) AS oldest, max(started_at) AS newest FROM access_log) AS span
    CROSS JOIN generate_series(date_trunc('day', oldest, 'UTC'), least(newest, now()), interval '24 hours') AS day
    LEFT JOIN access_log_rollup_state
      ON from_at = day AND until_at = day + interval '24 hours' AND pruned_at IS NULL
    WHERE day + interval '24 hours' < now() - %s AND is_complete IS NOT TRUE
    AND access_log_has_grown(day, day + interval '24 hours', '-infinity')
    ORDER BY day
"""
# The same for shorter spans, since the end of the last longer one that is or was due.
_DUE_PARTS = """
    SELECT part, part + %(step)s
    FROM generate_series(date_trunc(%(longer)s, now() - %(longer_rest)s, 'UTC'), now(), %(step)s) AS part
    LEFT JOIN access_log_rollup_state ON from_at = part AND until_at = part + %(step)s AND pruned_at IS NULL
    WHERE part + %(step)s < now() - %(rest)s AND is_complete IS NOT TRUE
    AND access_log_has_grown(part, part + %(step)s, '-infinity')
    ORDER BY part
"""
_HOURS = {
    "step": timedelta(hours=1),
    "rest": _HOUR_REST,
    "longer": "day",
    "longer_rest": _DAY_REST,
}
_QUARTERS = {
    "step": timedelta(minutes=15),
    "rest": _QUARTER_REST,
    "longer": "hour",
    "longer_rest": _HOUR_REST,
}
# Months of which other days are merged than are rolled up now, or no callers by an earlier version. The current one
# grows every day.
_DUE_MONTHS = """
    SELECT month, ids
    FROM (SELECT date_trunc('month', from_at, 'UTC') AS month, array_agg(rollup_id ORDER BY rollup_id) AS ids
          FROM access_log_rollup_state WHERE is_complete AND until_at - from_at = interval '24 hours'
          GROUP BY 1) AS present
    LEFT JOIN access_log_rollup_month ON from_at = month
    WHERE rollup_ids IS DISTINCT FROM ids OR users IS NULL
    ORDER BY month
"""
_DELETE_MONTH = "DELETE FROM access_log_rollup_month WHERE from_at = %s"
_INSERT_MONTH = """
    INSERT INTO access_log_rollup_month (from_at, rollup_ids, users, clients)
    SELECT %(month)s, %(ids)s,
           ARRAY(SELECT DISTINCT unnest(users) FROM access_log_rollup WHERE rollup_id = ANY (%(ids)s)),
           ARRAY(SELECT DISTINCT unnest(clients) FROM access_log_rollup WHERE rollup_id = ANY (%(ids)s))
"""
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
    """
    WITH each AS MATERIALIZED (
      SELECT month_id, host, requests, sent_bytes, first_at, callers
      FROM access_log_rollup_month JOIN access_log_rollup_host ON rollup_id = ANY (rollup_ids)
      WHERE from_at = %s AND host IS NOT NULL
    ), counted AS (
      SELECT month_id, host, sum(requests) AS requests, sum(sent_bytes) AS sent_bytes, min(first_at) AS first_at
      FROM each GROUP BY 1, 2
    ), called AS (
      SELECT host, array_agg(DISTINCT caller) AS callers FROM each CROSS JOIN unnest(callers) AS caller GROUP BY 1
    )
    INSERT INTO access_log_rollup_month_host
    SELECT month_id, host, requests, sent_bytes, first_at, coalesce(callers, '{}')
    FROM counted LEFT JOIN called USING (host)
    """,
)
_ROLL_UP = "SELECT access_log_roll_up('access_log', %s, %s)"
_COUNTS = """
    SELECT (SELECT count(*) FROM access_log WHERE started_at >= %(from_at)s AND started_at < %(until_at)s),
           (SELECT requests FROM access_log_rollup
            WHERE from_at = %(from_at)s AND until_at = %(until_at)s AND pruned_at IS NULL)
"""


class Span(NamedTuple):
    """A day (UTC), an hour or a quarter of an hour."""

    from_at: datetime
    until_at: datetime


def roll_up(connection: Connection[Any]) -> Iterator[Span]:
    """Roll up each span that needs it; yield it before. Each is one transaction.

    The rollup of a day replaces those of its hours, and that of an hour those of its quarters.

    Raises:
        psycopg.Error: The server reported an error.
    """
    due = connection.execute(_DUE_DAYS, (_DAY_REST,)).fetchall()
    for parts in (_HOURS, _QUARTERS):
        due += connection.execute(_DUE_PARTS, parts).fetchall()
    for span in map(Span._make, due):
        yield span
        _roll_up_span(connection, span)


def roll_up_leaving(connection: Connection[Any], spans: Iterable[Span]) -> None:
    """Roll up days of the table that are about to be detached, unless their rollups count all their rows.

    So reports count them between the moments in which they are detached and dropped.

    Raises:
        psycopg.Error: The server reported an error.
    """
    for span in spans:
        ((rows, counted),) = connection.execute(_COUNTS, span._asdict()).fetchall()
        if rows and rows != counted:
            _roll_up_span(connection, span)


def _roll_up_span(connection: Connection[Any], span: Span) -> None:
    connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ  # one snapshot
    try:
        with connection.transaction():
            in_sequence(connection)
            connection.execute(_ROLL_UP, span)
    finally:
        connection.isolation_level = None


def merge_months(connection: Connection[Any]) -> Iterator[datetime]:
    """Merge the rollups of each month that needs it; yield its start before. Each is one transaction.

    Raises:
        psycopg.Error: The server reported an error.
    """
    for month, ids in connection.execute(_DUE_MONTHS).fetchall():
        yield month
        with connection.transaction():
            in_sequence(connection)
            connection.execute(_DELETE_MONTH, (month,))
            connection.execute(_INSERT_MONTH, {"month": month, "ids": ids})
            for merge in _MERGES:
                connection.execute(merge.encode(), (month,))
