"""A report from rollups equals the report from rows, also after the rows were pruned."""

from __future__ import annotations

import random
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import msgspec
import psycopg
import pytest
from msgspec import structs

from exporter import Settings
from exporter.read.log_size import LogSize, log_size_text
from exporter.read.report import make_report
from exporter.read.rolled_up import rolled_up
from exporter.read.selection import Selection
from exporter.read.session import open_database
from exporter.retention.prune import prune
from exporter.retention.rollups import merge_months, roll_up
from exporter.write.database import Database
from tests.support.access_log import temporary_schema, write_entries
from tests.support.command import call
from tests.support.samples import make_entry

if TYPE_CHECKING:
    from collections.abc import Iterator

    from exporter import AccessLogEntry
    from tests.support.postgres import Postgres

pytestmark = pytest.mark.slow

# Columns of the tables of merged months that a report reads.
_MERGED = (
    ("artifact", "bytes"),
    ("total", "response_bytes"),
    ("total", "requests"),
    ("host", "requests"),
)
NOW = datetime(2026, 3, 12, 9, 40, tzinfo=UTC)
DAYS = 12


def make_entries(until: datetime, days: float, count: int) -> list[AccessLogEntry]:
    """Return all kinds of entries, at random times."""
    chance = random.Random(11)
    entries = []
    for number in range(count):
        known = chance.random() < 0.8
        artifact = known and chance.random() < 0.6
        status = chance.choice([200] * 8 + [206, 304, 404, 503, None])
        entries.append(
            make_entry(
                number,
                started_at=(until - chance.random() * timedelta(days=days)).isoformat(),
                client_ip=chance.choice([None, "192.0.2.1", "192.0.2.2", "2001:db8::1"]),
                proxy_user=chance.choice([None, *(f"build-{n}" for n in range(20))]),
                host=f"h{chance.randrange(9)}.example" if not known else "files.example",
                remote=chance.choice(["pypi", "npm"]) if known else None,
                artifact_kind="artifact" if artifact else "index",
                purl=f"pkg:pypi/p{chance.randrange(40)}@1" if artifact else None,
                status_code=status,
                error_type=chance.choice(["dns", None]) if status is None else None,
                request_bytes=chance.choice([None, 10, 2000]),
                response_bytes=chance.choice([None, 0, chance.randrange(10**9)]),
                duration_ms=chance.choice([None, 0.0, round(chance.lognormvariate(4, 2), 3)]),
                cache_status=chance.choice([None, "HIT", "MISS", "STALE"]),
                cache_source=chance.choice(["x-cache", "age"]),
            )
        )
        if number % 40 == 0:  # as of an import: nobody knows who made the request
            entries[-1] = entries[-1]._replace(
                remote=None, host="imported.example", client_ip=None, proxy_user=None
            )
        if artifact and status == 206 and number % 2:
            entries[-1] = entries[-1]._replace(artifact_complete=False)
    return entries


def write(dsn: str, entries: list[AccessLogEntry]) -> None:
    """Write entries, each at the time of its request."""
    write_entries(dsn, *entries)
    with psycopg.connect(dsn) as connection:
        connection.execute("UPDATE access_log SET logged_at = started_at")


@pytest.fixture(scope="module")
def table(any_postgres: Postgres) -> Iterator[str]:
    with temporary_schema(any_postgres) as dsn:
        write(dsn, make_entries(NOW, DAYS, 1500))
        yield dsn


SPANS = [
    Selection(since=NOW - timedelta(days=days), until=NOW - timedelta(hours=hours))
    for days, hours in ((1, 0), (2, 0), (3, 26), (6.9, 0), (30, 0))
]


def report_of(dsn: str, selection: Selection) -> dict[str, Any]:
    with open_database(Settings().with_dsn(dsn)) as connection:
        report: dict[str, Any] = msgspec.to_builtins(make_report(connection, selection, NOW))
    del report["log"]
    return report


def roll_up_all(dsn: str) -> int:
    with psycopg.connect(dsn, autocommit=True) as connection:
        return len(list(roll_up(connection))) + len(list(merge_months(connection)))


def test_report_from_rollups_equals_report_from_rows(table: str) -> None:
    from_rows = [report_of(table, span) for span in SPANS]
    assert roll_up_all(table) == DAYS + 1 + 2  # days, and months
    assert roll_up_all(table) == 0
    assert [report_of(table, span) for span in SPANS] == from_rows
    with psycopg.connect(table) as connection:
        span = rolled_up(connection, NOW - timedelta(days=30), NOW)
        for table_name, column in _MERGED:
            connection.execute(
                f"UPDATE access_log_rollup_month_{table_name} SET {column} = 10 * {column}".encode()
            )
    assert (len(span.months), len(span.single_rollups)) == (1, 11)  # February, and days of March
    wrong = report_of(table, SPANS[-1])
    assert {name for name, value in wrong.items() if value != from_rows[-1][name]} >= {
        "fetched",
        "cache",
        "remotes",
        "callers",
    }
    with psycopg.connect(table) as connection:
        connection.execute("TRUNCATE access_log_rollup CASCADE")


def test_months_that_an_earlier_version_merged_are_merged_again(table: str) -> None:
    roll_up_all(table)
    expected = report_of(table, SPANS[-1])
    with psycopg.connect(table) as connection:
        connection.execute("TRUNCATE access_log_rollup_month_host")
        connection.execute("UPDATE access_log_rollup_month SET users = NULL, clients = NULL")
    assert report_of(table, SPANS[-1]) == expected
    assert roll_up_all(table) == 2
    assert report_of(table, SPANS[-1]) == expected
    with psycopg.connect(table) as connection:
        connection.execute("TRUNCATE access_log_rollup CASCADE")


def test_hours_of_today_are_rolled_up(any_dsn: str) -> None:
    now = datetime.now(UTC)
    write(any_dsn, make_entries(now, 1.5, 800))
    spans = [Selection(since=now - timedelta(hours=hours), until=now) for hours in (5, 24, 400)]
    with open_database(Settings().with_dsn(any_dsn)) as connection:
        from_rows = [make_report(connection, span, now) for span in spans]
        assert roll_up_all(any_dsn)
        assert rolled_up(connection, now - timedelta(days=2), now).rollups
        reports = [make_report(connection, span, now) for span in spans]
    assert [structs.replace(it, log=None) for it in reports] == [
        structs.replace(it, log=None) for it in from_rows
    ]


def test_late_rows_count_at_once(table: str) -> None:
    roll_up_all(table)
    before = report_of(table, SPANS[-1])
    with psycopg.connect(table) as connection:
        connection.execute(
            "INSERT INTO access_log (started_at, flow_id, node, response_bytes, status_code)"
            " VALUES (%s, gen_random_uuid(), 'late', 5, 200)",
            (NOW - timedelta(days=5),),
        )
    after = report_of(table, SPANS[-1])
    assert after["requests"] == before["requests"] + 1
    assert after["bytes"] == before["bytes"] + 5
    roll_up_all(table)
    assert report_of(table, SPANS[-1]) == after
    with psycopg.connect(table) as connection:
        connection.execute("DELETE FROM access_log WHERE node = 'late'")
        connection.execute("TRUNCATE access_log_rollup CASCADE")


def test_long_report_begins_with_a_whole_day(table: str) -> None:
    roll_up_all(table)
    since = NOW - timedelta(days=8)
    whole = report_of(table, Selection(since=since.replace(hour=0, minute=0), until=NOW))
    assert report_of(table, Selection(since=since, until=NOW)) == whole
    filtered = report_of(table, Selection(since=since, until=NOW, method="GET"))
    assert datetime.fromisoformat(filtered["since"]) == since


def test_pruned_days_stay_in_the_report(any_postgres: Postgres, table: str) -> None:
    roll_up_all(table)
    span = Selection(since=datetime(2026, 3, 1, tzinfo=UTC), until=NOW)
    part_of_a_pruned_day = Selection(
        since=datetime(2026, 3, 2, 8, tzinfo=UTC), until=datetime(2026, 3, 4, 8, tzinfo=UTC)
    )
    whole_days = Selection(
        since=datetime(2026, 3, 2, tzinfo=UTC), until=datetime(2026, 3, 5, tzinfo=UTC)
    )
    expected, expected_days = report_of(table, span), report_of(table, whole_days)
    with psycopg.connect(table, autocommit=True) as connection:
        assert list(prune(connection, datetime(2026, 3, 10, tzinfo=UTC), None))
        (left,) = connection.execute("SELECT count(*) FROM access_log").fetchone() or (0,)
    assert 0 < left < expected["requests"]

    assert report_of(table, span) == expected
    assert report_of(table, part_of_a_pruned_day) == expected_days
    late = make_entry(9000, started_at="2026-03-03T10:00:00+00:00", proxy_user="late")
    database = Database(Settings().with_dsn(table).database)
    assert database.write([late]) == []
    database.close()
    assert report_of(table, span)["requests"] == expected["requests"] + 1
    assert any_postgres


def test_size_of_the_log(table: str) -> None:
    done = call("--dsn", table, "report")
    assert (done.returncode, done.stderr) == (0, "")
    (line,) = [line for line in done.stdout.splitlines() if "Log: " in line]
    assert "rows since 2026-" in line
    assert line.rstrip().endswith("all kept")


def test_text_of_the_size() -> None:
    at = datetime(2026, 1, 2, 3, tzinfo=UTC)
    assert log_size_text(LogSize(at, 1_234_000, 41_000, 90)) == (
        "Log: 1.2 MB, 41.0 kB a day; rows since 2026-01-02, kept for 90 days"
    )
    assert log_size_text(LogSize(None, 0, 0, 0)) == "Log: 0 B; no rows, all kept"
