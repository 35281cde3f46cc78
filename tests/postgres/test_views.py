"""The views by hour and day, and the functions behind them: correct, and reading only the requested days."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import psycopg
import pytest

from tests.support.expected_results import nearly_equal
from tests.support.expected_views import cache, not_found, redundant, remotes, unknown_hosts
from tests.support.seeded_log import Plan, seeded_log

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.access_log import AccessLog, Row
    from tests.support.postgres import Postgres

pytestmark = pytest.mark.slow

NOW = datetime(2026, 5, 31, 15, 30, tzinfo=UTC)
DAY = datetime(2026, 5, 29, tzinfo=UTC)
_BY_DAY = ("cache", "unknown_hosts", "not_found", "redundant")
_MAX_BOUNDARY_ROWS = 2  # rows read from a day to find the start or end of the log

Query = Callable[..., list[tuple[Any, ...]]]


@pytest.fixture(scope="module")
def seeded(any_postgres: Postgres) -> Iterator[AccessLog]:
    with seeded_log(any_postgres, Plan(4000, NOW, days=5)) as log:
        yield log


@pytest.fixture
def query(seeded: AccessLog) -> Iterator[Query]:
    """Run SQL in one transaction, with days in UTC."""
    with psycopg.connect(seeded.dsn) as connection:
        connection.execute("SET LOCAL timezone = 'UTC'")
        yield lambda sql, *values: connection.execute(sql.encode(), values).fetchall()


@pytest.mark.parametrize("expected_rows", [remotes, cache, unknown_hosts, not_found, redundant])
def test_view_matches_the_rows(
    seeded: AccessLog, query: Query, expected_rows: Callable[[list[Row]], Iterator[tuple[Any, ...]]]
) -> None:
    expected = sorted(expected_rows(seeded.rows()), key=repr)
    found = sorted(query(f"SELECT * FROM access_log_{expected_rows.__name__}"), key=repr)
    assert len(found) == len(expected) > 5
    same = {row[:-3] if expected_rows is remotes else row: row for row in expected}
    for row in found:
        assert nearly_equal(row, same[row[:-3] if expected_rows is remotes else row])


@pytest.mark.parametrize("name", _BY_DAY)
def test_day_of_a_view_equals_its_function(query: Query, name: str) -> None:
    view = query(f"SELECT * FROM access_log_{name} WHERE day = %s ORDER BY 1, 2, 3", DAY)
    counted = query(f"SELECT * FROM access_log_{name}(%s, %s)", DAY, DAY + timedelta(days=1))
    days = [tuple(value for value in row if value != DAY) for row in view]
    assert days
    assert sorted(days, key=repr) == sorted(counted, key=repr)


@pytest.mark.parametrize(
    "relation",
    [
        *(f"access_log_{name} WHERE day = '2026-05-29 00:00Z'" for name in _BY_DAY),
        "access_log_remotes WHERE hour >= '2026-05-29 00:00Z' AND hour < '2026-05-30 00:00Z'",
        *(
            f"access_log_{name}('2026-05-29 00:00Z', '2026-05-30 00:00Z')"
            for name in (*_BY_DAY, "remotes")
        ),
    ],
)
@pytest.mark.not_on_citus("the workers read the rows, and the coordinator counts none")
def test_only_requested_days_are_read(query: Query, relation: str) -> None:
    read = (
        "SELECT right(relname, 2) FROM pg_stat_xact_user_tables"
        " WHERE schemaname = current_schema() AND relname ~ '^access_log_[0-9]{8}$'"
        f" AND seq_tup_read + coalesce(idx_tup_fetch, 0) > {_MAX_BOUNDARY_ROWS}"
    )
    assert query(f"SELECT count(*) > 0 FROM {relation}") == [(True,)]
    assert query(read) == [("29",)]


def test_functions_run_without_jit(query: Query) -> None:
    functions = (
        "SELECT proname FROM pg_proc WHERE pronamespace = current_schema()::regnamespace"
        " AND proname LIKE 'access_log%%' AND prokind = 'f' AND proretset"
    )
    assert len(query(functions)) == 5
    assert query(f"{functions} AND NOT coalesce('jit=off' = ANY(proconfig), false)") == []


def test_every_function_has_a_comment(query: Query) -> None:
    without_comment = (
        "SELECT proname FROM pg_proc WHERE pronamespace = current_schema()::regnamespace"
        " AND obj_description(oid, 'pg_proc') IS NULL"
    )
    assert query(without_comment) == []
