"""Search a log from its newest row back, as far as a given time reaches; knows no table and no filter."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from psycopg.errors import QueryCanceled

if TYPE_CHECKING:
    from collections.abc import Callable

SEARCH_SECONDS = 0.6  # how long whoever names no time is kept waiting
_FIRST = timedelta(minutes=10)
_GROWTH = 4
_LONGEST = timedelta(days=7)  # however little it took to search a time in which nothing happened
_LEAST_SHARE = 0.1  # of the time: with less left no other stretch is begun
_LEAST_SECONDS = 0.001
MOST_SHARE = 2  # of the time that is left: then a stretch is given up
_BEFORE_ALL = datetime.min.replace(tzinfo=UTC)
_EVER_AFTER = datetime.max.replace(tzinfo=UTC)


def search_back[Row](
    newest: Callable[[datetime], datetime | None],
    ask: Callable[[datetime, datetime, int, float | None], list[Row]],
    limit: int,
    seconds: float,
) -> tuple[list[Row], datetime | None]:
    """The newest `limit` rows that match, and back to when was searched; None: far enough, or all.

    It is searched in stretches, each as long as, by the one before, the time that is left allows,
    and at most four times as long as that one. One stretch is searched however little time there is.
    It may take up to twice `seconds` where there was much more in the last one than expected.

    Args:
        newest: When the newest row before a moment was, whether it matches or not.
        ask: Matching rows from one moment up to another, the newest first, so many at most; raises
            QueryCanceled after so many seconds, where that is given.
        limit: How many rows are enough.
        seconds: How long to go on.
    """
    give_up_at = time.monotonic() + seconds
    length, since, may_take = _FIRST, _EVER_AFTER, None
    rows: list[Row] = []
    while (at := newest(since)) is not None:
        began = time.monotonic()
        until = at + timedelta.resolution
        since = until - min(length, until - _BEFORE_ALL)
        try:
            rows += ask(since, until, limit - len(rows), may_take)
        except QueryCanceled:
            if may_take is None:
                raise
            return rows, until
        if len(rows) == limit:
            break
        now = time.monotonic()
        left, took = give_up_at - now, max(now - began, _LEAST_SECONDS)
        if left < seconds * _LEAST_SHARE:
            return rows, since
        may_take = MOST_SHARE * left
        length = min(_LONGEST, length * min(_GROWTH, left / took))
    return rows, None
