"""Measure the table: how large it is, how it grows, and since when it has rows."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import psycopg
from msgspec import Struct

from .human import plural, size
from .session import time_limited

if TYPE_CHECKING:
    from psycopg import Connection

_SECONDS = 1.0  # it takes milliseconds, unless a day is just being detached
_DAYS = 7  # for the growth
_QUERY = """
    SELECT (SELECT min(started_at) FROM access_log),
           coalesce(sum(access_log_size(partition_oid)), 0)::bigint,
           (coalesce(sum(access_log_size(partition_oid))
                     FILTER (WHERE from_at >= date_trunc('day', now(), 'UTC') - %s * interval '1 day'
                             AND until_at <= now()), 0) / %s)::bigint
    FROM access_log_partitions
"""


class LogSize(Struct, frozen=True):
    """The table access_log with its indexes."""

    oldest_at: datetime | None  # started_at of its first row; None: it is empty
    bytes: int
    daily_bytes: int  # mean of the last seven days before today
    kept_days: int  # days before today whose rows are kept, by the settings; 0: all


def log_size(connection: Connection[Any], kept_days: int) -> LogSize | None:
    """Measure the table, within `session.read_only`. None if a day is locked, or this role cannot read it.

    Raises:
        psycopg.Error, DeadlineExceededError: the query failed or lost its connection.
    """
    try:
        with time_limited(connection, _SECONDS):
            ((oldest_at, total, daily),) = connection.execute(_QUERY, (_DAYS, _DAYS)).fetchall()
    except (psycopg.errors.QueryCanceled, psycopg.errors.InsufficientPrivilege):
        return None
    return LogSize(oldest_at, total, daily, kept_days)


def log_size_text(log: LogSize) -> str:
    """Describe it in one line, such as "Log: 1.2 GB, 40.1 MB a day; rows since 2026-08-29, all kept"."""
    text = f"Log: {size(log.bytes)}"
    if log.daily_bytes:
        text += f", {size(log.daily_bytes)} a day"
    since = f"rows since {log.oldest_at.astimezone(UTC):%Y-%m-%d}" if log.oldest_at else "no rows"
    kept = f"kept for {plural(log.kept_days, 'day')}" if log.kept_days else "all kept"
    return f"{text}; {since}, {kept}"
