"""Searching backwards in stretches: each row once, within the time budget."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta

import pytest
from psycopg.errors import QueryCanceled

from exporter.read.time_search import search_back

_NOON = datetime(2026, 3, 2, 12, tzinfo=UTC)
_EVERY_HOUR = [_NOON - timedelta(hours=hour) for hour in range(40 * 24 + 1)]
_DENSE = _NOON - timedelta(days=20)


class Log:
    """A log in a list. It records its searches, and takes a while for each hour of the older half."""

    def __init__(self, rows: list[datetime], seconds_per_hour: float = 0) -> None:
        self.searched: list[tuple[datetime, datetime]] = []
        self._rows = rows
        self._seconds_per_hour = seconds_per_hour

    def search(self, limit: int, seconds: float) -> tuple[list[datetime], datetime | None]:
        """Return the rows that were found, and how far back the search got."""
        return search_back(self._newest_before, self._search, limit, seconds)

    def _newest_before(self, until: datetime) -> datetime | None:
        return max((at for at in self._rows if at < until), default=None)

    def _search(
        self, since: datetime, until: datetime, limit: int, seconds: float | None
    ) -> list[datetime]:
        self.searched.append((since, until))
        busy_seconds = self._seconds_per_hour * max(
            0, (min(until, _DENSE) - since) / timedelta(hours=1)
        )
        started = time.monotonic()
        while time.monotonic() - started < busy_seconds:
            if seconds is not None and time.monotonic() - started > seconds:
                raise QueryCanceled
        return [at for at in self._rows if since <= at < until][:limit]


@pytest.mark.parametrize("limit", [1, 2, 7, 500, 10_000])
def test_newest_rows_come_first_and_each_once(limit: int) -> None:
    log = Log(_EVERY_HOUR)
    assert log.search(limit, 60) == (_EVERY_HOUR[:limit], None)
    assert len(log.searched) < 15, "the stretches grow"


def test_without_a_budget_one_stretch_is_searched() -> None:
    log = Log(_EVERY_HOUR)
    rows, searched_back_to = log.search(10, 0)
    assert rows == [_NOON]
    assert log.searched == [(searched_back_to, _NOON + timedelta.resolution)]


@pytest.mark.parametrize("rows", [_EVERY_HOUR, [at for at in _EVERY_HOUR if at < _DENSE]])
def test_search_stays_within_its_budget(rows: list[datetime]) -> None:
    log, seconds = Log(rows, seconds_per_hour=0.01), 0.3
    started = time.monotonic()
    found, searched_back_to = log.search(10_000, seconds)
    assert time.monotonic() - started < 3 * seconds
    assert searched_back_to is not None
    assert found == [at for at in rows if at >= searched_back_to]
    assert len(found) > 5


def test_times_without_rows_cost_nothing() -> None:
    rows = [_NOON, _NOON - timedelta(days=40_000)]
    log = Log(rows)
    assert log.search(10, 60) == (rows, None)
    assert len(log.searched) == 2


def test_log_with_one_row_or_none() -> None:
    assert Log([_NOON]).search(10, 60) == ([_NOON], None)
    assert Log([]).search(10, 60) == ([], None)


def test_first_day_of_the_calendar() -> None:
    rows = [_NOON, datetime(1, 1, 1, 0, 1, tzinfo=UTC)]
    assert Log(rows).search(10, 60) == (rows, None)
