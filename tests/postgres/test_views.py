"""The views by hour and day, and the functions behind them: true, and reading no more than asked."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import psycopg
import pytest

from tests.support.expected_results import (
    HITS,
    as_float4,
    callers,
    columns_key,
    day_of,
    failed,
    group_by,
    hour_of,
    is_fetch,
    nearly_equal,
    not_null,
    percentile,
    remote_or_host,
)
from tests.support.seeded_log import Plan, seeded_log

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.access_log import AccessLog, Row
    from tests.support.postgres import Postgres

NOW = datetime(2026, 5, 31, 15, 30, tzinfo=UTC)
DAY = datetime(2026, 5, 29, tzinfo=UTC)
_BY_DAY = ("cache", "unknown_hosts", "not_found", "redundant")
_UNUSED = 2  # rows of a day that is only asked for its first or last moment

Ask = Callable[..., list[tuple[Any, ...]]]


@pytest.fixture(scope="module")
def seeded(any_postgres: Postgres) -> Iterator[AccessLog]:
    with seeded_log(any_postgres, Plan(4000, NOW, days=5)) as log:
        yield log


@pytest.fixture
def ask(seeded: AccessLog) -> Iterator[Ask]:
    """Run SQL in one transaction, its days those of UTC."""
    with psycopg.connect(seeded.dsn) as connection:
        connection.execute("SET LOCAL timezone = 'UTC'")
        yield lambda sql, *values: connection.execute(sql.encode(), values).fetchall()


def total(rows: list[Row], column: str) -> int | None:
    values = not_null(rows, column)
    return sum(values) if values else None


def remotes(rows: list[Row]) -> Iterator[tuple[Any, ...]]:
    for (hour, remote), group in group_by(
        rows, lambda row: (hour_of(row["started_at"]), remote_or_host(row))
    ):
        durations = as_float4(not_null(group, "duration_ms"))
        yield (
            hour,
            remote,
            len(group),
            total(group, "response_bytes"),
            sum(map(failed, group)),
            *(percentile(durations, share) for share in (0.5, 0.95, 0.99)),
        )


def cache(rows: list[Row]) -> Iterator[tuple[Any, ...]]:
    told = (row for row in rows if row["cache_status"] is not None)
    for (day, *key), group in group_by(told, by_day("remote", "cache_source")):
        hits = [row for row in group if row["cache_status"] in HITS]
        sizes = total(group, "response_bytes"), total(hits, "response_bytes") or 0
        yield (day, *key, len(group), len(hits), *sizes)


def unknown_hosts(rows: list[Row]) -> Iterator[tuple[Any, ...]]:
    strangers = (row for row in rows if row["remote"] is None)
    for (day, *key), group in group_by(strangers, by_day("host", "port", "scheme")):
        moments = not_null(group, "started_at")
        sent = total(group, "request_bytes")
        yield (*key, len(group), callers(group), sent, min(moments), max(moments), day)


def not_found(rows: list[Row]) -> Iterator[tuple[Any, ...]]:
    lost = (row for row in rows if row["status_code"] in {404, 410} and row["package"] is not None)
    for (day, *key), group in group_by(lost, by_day("remote", "package")):
        moments = not_null(group, "started_at")
        yield (*key, len(group), callers(group), min(moments), max(moments), day)


def redundant(rows: list[Row]) -> Iterator[tuple[Any, ...]]:
    firsts = {
        purl: min(not_null(group, "started_at"))
        for purl, group in group_by(filter(is_fetch, rows), columns_key("purl"))
    }
    whole = (row for row in rows if is_fetch(row) and row["status_code"] == 200)
    for (day, purl), group in group_by(whole, by_day("purl")):
        again = [row for row in group if row["started_at"] > firsts[purl]]
        if again:
            clients = len(set(not_null(group, "client_ip")))
            avoidable = total(again, "response_bytes")
            yield (purl, min(not_null(group, "remote")), len(group), clients, avoidable, day)


def by_day(*columns: str) -> Callable[[Row], Any]:
    key = columns_key("started_at", *columns)

    def dated(row: Row) -> tuple[Any, ...]:
        started_at, *rest = key(row)
        return day_of(started_at), *rest

    return dated


@pytest.mark.parametrize("truth", [remotes, cache, unknown_hosts, not_found, redundant])
def test_a_view_says_what_the_rows_say(
    seeded: AccessLog, ask: Ask, truth: Callable[[list[Row]], Iterator[tuple[Any, ...]]]
) -> None:
    expected = sorted(truth(seeded.rows()), key=repr)
    found = sorted(ask(f"SELECT * FROM access_log_{truth.__name__}"), key=repr)
    assert len(found) == len(expected) > 5
    same = {row[:-3] if truth is remotes else row: row for row in expected}
    for row in found:
        assert nearly_equal(row, same[row[:-3] if truth is remotes else row])


@pytest.mark.parametrize("name", _BY_DAY)
def test_a_day_of_a_view_is_that_day_of_its_function(ask: Ask, name: str) -> None:
    view = ask(f"SELECT * FROM access_log_{name} WHERE day = %s ORDER BY 1, 2, 3", DAY)
    asked = ask(f"SELECT * FROM access_log_{name}(%s, %s)", DAY, DAY + timedelta(days=1))
    days = [tuple(value for value in row if value != DAY) for row in view]
    assert days
    assert sorted(days, key=repr) == sorted(asked, key=repr)


@pytest.mark.parametrize(
    "asked",
    [
        *(f"access_log_{name} WHERE day = '2026-05-29 00:00Z'" for name in _BY_DAY),
        "access_log_remotes WHERE hour >= '2026-05-29 00:00Z' AND hour < '2026-05-30 00:00Z'",
        *(
            f"access_log_{name}('2026-05-29 00:00Z', '2026-05-30 00:00Z')"
            for name in (*_BY_DAY, "remotes")
        ),
    ],
)
def test_other_days_are_not_read(ask: Ask, asked: str) -> None:
    read = (
        "SELECT right(relname, 2) FROM pg_stat_xact_user_tables"
        " WHERE schemaname = current_schema() AND relname ~ '^access_log_[0-9]{8}$'"
        f" AND seq_tup_read + coalesce(idx_tup_fetch, 0) > {_UNUSED}"
    )
    assert ask(f"SELECT count(*) > 0 FROM {asked}") == [(True,)]
    assert ask(read) == [("29",)]


def test_the_functions_never_wait_for_jit(ask: Ask) -> None:
    awake = (
        "SELECT proname FROM pg_proc WHERE pronamespace = current_schema()::regnamespace"
        " AND proname LIKE 'access_log%%' AND prokind = 'f' AND proretset"
    )
    assert len(ask(awake)) == 5
    assert ask(f"{awake} AND NOT coalesce('jit=off' = ANY(proconfig), false)") == []


def test_every_function_says_what_it_is_for(ask: Ask) -> None:
    silent = (
        "SELECT proname FROM pg_proc WHERE pronamespace = current_schema()::regnamespace"
        " AND obj_description(oid, 'pg_proc') IS NULL"
    )
    assert ask(silent) == []
