"""Search a log backwards from its newest row until a time budget is used up. Knows no table and no filter."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from psycopg.errors import QueryCanceled

if TYPE_CHECKING:
    from collections.abc import Callable

SEARCH_SECONDS = 0.6  # budget of a search without a start time
MAX_OVERRUN = 2  # a stretch is canceled after this multiple of the remaining time
_FIRST_STRETCH = timedelta(minutes=10)
_MAX_STRETCH = timedelta(days=7)  # even if the stretch before, perhaps an empty one, took no time
_MAX_GROWTH = 4
_MIN_REMAINING_SHARE = 0.1  # with less of the budget left, no other stretch starts
_MIN_SECONDS = 0.001
_MIN_TIME = datetime.min.replace(tzinfo=UTC)
_MAX_TIME = datetime.max.replace(tzinfo=UTC)


def search_back[Row](
    newest_before: Callable[[datetime], datetime | None],
    search: Callable[[datetime, datetime, int, float | None], list[Row]],
    limit: int,
    seconds: float,
) -> tuple[list[Row], datetime | None]:
    """Return the newest `limit` matching rows, and how far back the search got.

    The second value is None if all rows were searched or `limit` rows were found.

    The search goes in stretches of time. Each starts at the newest row that is left, so times without
    rows cost nothing. Its length depends on how fast the last stretch was, and is at most four times
    as long. The first stretch is always searched in full. The search can take up to twice `seconds`
    if the last stretch has far more rows than expected.

    Args:
        newest_before: Returns the time of the newest row before a time, matching or not.
        search: Returns the matching rows between two times, newest first, at most as many as its
            third argument. Raises QueryCanceled after the seconds in its fourth, unless that is None.
        limit: How many rows are enough.
        seconds: The time budget.
    """
    give_up_at = time.monotonic() + seconds
    length, since, stretch_seconds = _FIRST_STRETCH, _MAX_TIME, None
    rows: list[Row] = []
    while (newest := newest_before(since)) is not None:
        started = time.monotonic()
        until = newest + timedelta.resolution
        since = until - min(length, until - _MIN_TIME)
        try:
            rows += search(since, until, limit - len(rows), stretch_seconds)
        except QueryCanceled:
            if stretch_seconds is None:
                raise
            return rows, until
        if len(rows) == limit:
            break
        now = time.monotonic()
        remaining, elapsed = give_up_at - now, max(now - started, _MIN_SECONDS)
        if remaining < seconds * _MIN_REMAINING_SHARE:
            return rows, since
        stretch_seconds = MAX_OVERRUN * remaining
        length = min(_MAX_STRETCH, length * min(_MAX_GROWTH, remaining / elapsed))
    return rows, None
