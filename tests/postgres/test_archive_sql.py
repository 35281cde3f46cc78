"""configs/archive.sql: its views over files in DuckDB return what the views in PostgreSQL return for the same rows."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import duckdb
import psycopg
import pytest

from exporter.archive.files import archive_day, archived_days
from tests.support.expected_results import nearly_equal
from tests.support.expected_views import cache, not_found, redundant, remotes, unknown_hosts
from tests.support.seeded_log import Plan, seeded_log

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.support.access_log import AccessLog, Row
    from tests.support.postgres import Postgres

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).resolve().parents[2] / "configs" / "archive.sql"
NOW = datetime(2026, 5, 31, 15, 30, tzinfo=UTC)
DAY = datetime(2026, 5, 29, tzinfo=UTC)
TIMES = {"day", "hour", "first_at", "last_at", "first_seen", "last_seen", "started_at", "logged_at"}
VIEWS = re.findall(
    r"^CREATE OR REPLACE VIEW (\w+)", SCRIPT.read_text(encoding="utf-8"), re.MULTILINE
)
SPANS = re.findall(
    r"^CREATE OR REPLACE MACRO (\w+)\(since", SCRIPT.read_text(encoding="utf-8"), re.MULTILINE
)


@pytest.fixture(scope="module")
def seeded(postgres: Postgres) -> Iterator[AccessLog]:
    with seeded_log(postgres, Plan(3000, NOW, days=5)) as log:
        yield log


@pytest.fixture(scope="module")
def folder(seeded: AccessLog, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rows of the log as an archive, with two files for one of the days."""
    folder = tmp_path_factory.mktemp("archive")
    with psycopg.connect(seeded.dsn, autocommit=True) as connection:
        connection.execute(
            "CREATE TEMP TABLE early AS SELECT * FROM access_log WHERE status_code = 200"
        )
        archive_day(connection, "early", DAY.date(), folder)
        for row in connection.execute(
            "SELECT DISTINCT started_at::date FROM access_log"
        ).fetchall():
            archive_day(connection, f"access_log_{row[0]:%Y%m%d}", row[0], folder)
    assert len(archived_days(folder)) == 6
    return folder


@pytest.fixture(scope="module")
def archive(folder: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    with duckdb.connect() as connection:
        connection.execute("SET TimeZone = 'UTC'")
        connection.execute("SET VARIABLE archive = ?", [str(folder)])
        connection.execute(SCRIPT.read_text(encoding="utf-8"))
        yield connection


def rows_of(archive: duckdb.DuckDBPyConnection, relation: str) -> list[tuple[Any, ...]]:
    """The rows of a relation, with times as PostgreSQL's driver returns them."""
    names = columns_of(archive, relation)
    columns = ", ".join(f"epoch_us({n}) AS {n}" if n in TIMES else n for n in names)
    found = archive.execute(f"SELECT {columns} FROM {relation}").fetchall()
    return [
        tuple(
            _time(value) if name in TIMES else value for name, value in zip(names, row, strict=True)
        )
        for row in found
    ]


def columns_of(archive: duckdb.DuckDBPyConnection, relation: str) -> list[str]:
    return [name for name, *_ in archive.execute(f"DESCRIBE SELECT * FROM {relation}").fetchall()]


def _time(microseconds: int) -> datetime:
    return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=microseconds)


def by_key(rows: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Sorted by all columns but floats, which differ by rounding."""
    return sorted(rows, key=lambda row: repr([v for v in row if not isinstance(v, float)]))


def assert_equal(found: list[tuple[Any, ...]], expected: list[tuple[Any, ...]]) -> None:
    assert len(found) == len(expected) > 3
    for one, other in zip(by_key(found), by_key(expected), strict=True):
        assert nearly_equal(one, other), (one, other)


@pytest.mark.parametrize("expected_rows", [remotes, cache, unknown_hosts, not_found, redundant])
def test_view_matches_the_rows(
    seeded: AccessLog,
    archive: duckdb.DuckDBPyConnection,
    expected_rows: Callable[[list[Row]], Iterator[tuple[Any, ...]]],
) -> None:
    found = rows_of(archive, f"access_log_{expected_rows.__name__}")
    assert_equal(found, list(expected_rows(seeded.rows())))


@pytest.mark.parametrize("name", VIEWS)
def test_view_equals_that_of_postgresql(
    seeded: AccessLog, archive: duckdb.DuckDBPyConnection, name: str
) -> None:
    with psycopg.connect(seeded.dsn) as connection:
        connection.execute("SET timezone = 'UTC'")
        cursor = connection.execute(f"SELECT * FROM {name}".encode())
        names = [column.name for column in cursor.description or ()]
        expected = [
            tuple(
                str(v) if n in {"client_ip", "server_ip"} and v else v
                for n, v in zip(names, row, strict=True)
            )
            for row in cursor.fetchall()
        ]
    assert columns_of(archive, name) == names
    assert_equal(rows_of(archive, name), expected)


@pytest.mark.parametrize("name", SPANS)
def test_function_equals_that_of_postgresql(
    seeded: AccessLog, archive: duckdb.DuckDBPyConnection, name: str
) -> None:
    for span in ("'2026-05-29 07:00:00Z', '2026-05-30 11:30:00Z'", "'2026-05-29'"):
        with psycopg.connect(seeded.dsn) as connection:
            connection.execute("SET timezone = 'UTC'")
            expected = connection.execute(f"SELECT * FROM {name}({span})".encode()).fetchall()
        assert_equal(rows_of(archive, f"{name}({span})"), expected)


def test_every_view_of_the_rows_is_there(seeded: AccessLog) -> None:
    with psycopg.connect(seeded.dsn) as connection:
        views = connection.execute(
            "SELECT DISTINCT view_name FROM information_schema.view_column_usage"
            " WHERE view_schema = current_schema() AND table_name IN"
            " ('access_log', 'access_log_fetches', 'access_log_days', 'artifact')"
            " AND view_name <> 'access_log_affected'"  # advisories are not archived
        ).fetchall()
        functions = connection.execute(
            "SELECT DISTINCT proname FROM pg_proc WHERE pronamespace = current_schema()::regnamespace"
            " AND proname LIKE 'access_log%%' AND prokind = 'f' AND proretset"
        ).fetchall()
    assert {name for (name,) in views} <= set(VIEWS)
    assert {name for (name,) in functions} == set(SPANS)


def test_script_uses_the_current_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    with duckdb.connect() as connection:
        for _ in range(2):  # idempotent
            connection.execute(SCRIPT.read_text(encoding="utf-8"))
        assert connection.execute("SELECT count(*) FROM access_log").fetchone() == (3000,)
