"""The page's queries on a real table: rows, traffic over time, gaps, time limits and errors."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import TYPE_CHECKING, Any
from uuid import UUID

import psycopg
import pytest

from exporter import Settings
from exporter.postgres.connection import DeadlineExceededError, connect
from exporter.postgres.schema import ensure_schema
from exporter.read.chart import MAX_BARS
from exporter.read.gaps import recent_gaps
from exporter.read.newest import Cursor
from exporter.read.page import RowPage, explain, list_rows, page_session, row_columns, traffic
from exporter.read.selection import Selection
from exporter.rows.entry import AccessLogEntry
from exporter.rows.text import timestamp
from exporter.write.database import Database
from tests.support.samples import make_entry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from psycopg import Connection

    Query = Callable[..., list[tuple[object, ...]]]

pytestmark = pytest.mark.slow

_SETTINGS = Settings().database
_NOON = datetime(2026, 3, 2, 12, tzinfo=UTC)
_MIN_TIME, _MAX_TIME = datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC)


@pytest.fixture
def write(any_dsn: str) -> Iterator[Callable[[list[AccessLogEntry]], None]]:
    database = Database(Settings().with_dsn(any_dsn).database)

    def run(entries: list[AccessLogEntry]) -> None:
        assert database.write(entries) == []

    yield run
    database.close()


@pytest.fixture
def table(any_dsn: str) -> Iterator[Connection[Any]]:
    with connect(any_dsn, _SETTINGS) as connection:
        ensure_schema(connection)
    with page_session(any_dsn, _SETTINGS, 5) as connection:
        yield connection


def entry(number: int, at: datetime, **changes: Any) -> AccessLogEntry:
    return make_entry(number, started_at=timestamp(at.timestamp()), **changes)


def _pages(
    connection: Connection[Any], selection: Selection, limit: int, seconds: float = 5
) -> Iterator[RowPage]:
    page = list_rows(connection, selection, limit, None, seconds)
    yield page
    while page.older is not None:
        page = list_rows(connection, selection, limit, page.older, seconds)
        yield page


@pytest.mark.parametrize("limit", [1, 3, 7, 50])
def test_pages_hold_each_row_once_newest_first(
    write: Callable[[list[AccessLogEntry]], None], any_dsn: str, limit: int
) -> None:
    # They span midnight, and three at a time have the same started_at.
    times = [_NOON + timedelta(hours=hour // 3 * 6) for hour in range(12)]
    entries = [entry(number, at) for number, at in enumerate(times)]
    write(entries)
    with page_session(any_dsn, _SETTINGS, 5) as connection:
        pages = list(_pages(connection, Selection(), limit))
    assert all(len(page.rows) == limit for page in pages[:-1])
    found = [(row.started_at, str(row.flow_id)) for page in pages for row in page.rows]
    assert found == sorted(
        ((datetime.fromisoformat(row.started_at), row.flow_id) for row in entries), reverse=True
    )


def test_pages_hold_only_selected_rows(
    write: Callable[[list[AccessLogEntry]], None], any_dsn: str
) -> None:
    write([entry(n, _NOON + timedelta(minutes=n), status_code=200 + n % 2 * 204) for n in range(9)])
    with page_session(any_dsn, _SETTINGS, 5) as connection:
        pages = list(_pages(connection, Selection(status="4xx"), 2))
    assert [[row.status_code for row in page.rows] for page in pages] == [[404, 404], [404, 404]]


@pytest.mark.parametrize("limit", [1, 3, 50])
def test_search_without_time_left_reports_how_far_it_got_and_the_next_page_continues(
    write: Callable[[list[AccessLogEntry]], None], any_dsn: str, limit: int
) -> None:
    times = [_NOON + timedelta(minutes=7 * n) for n in range(12)]
    write([entry(n, at, status_code=200 + n % 2 * 204) for n, at in enumerate(times)])
    with page_session(any_dsn, _SETTINGS, 5) as connection:
        pages = list(_pages(connection, Selection(status="4xx"), limit, seconds=0))
        (complete,) = _pages(connection, Selection(status="4xx", since=_NOON), 50)
    assert [row for page in pages for row in page.rows] == complete.rows
    assert len(complete.rows) == 6
    assert complete.searched_back_to is None
    assert any(page.searched_back_to for page in pages)
    assert all(
        row.started_at >= (page.searched_back_to or _MIN_TIME)
        for page in pages
        for row in page.rows
    )
    assert pages[-1].older is None


def test_row_has_all_columns_with_their_comments(
    write: Callable[[list[AccessLogEntry]], None], any_dsn: str
) -> None:
    row = entry(5, _NOON)
    write([row])
    cursor = Cursor(_NOON, UUID(row.flow_id))
    with page_session(any_dsn, _SETTINGS, 5) as connection:
        columns = {column.name: column for column in row_columns(connection, cursor)}
        assert (
            row_columns(connection, cursor._replace(started_at=_NOON + timedelta(seconds=1))) == []
        )
    assert set(columns) == {*AccessLogEntry._fields, "logged_at"}
    assert columns["path"].value == row.path
    assert all(column.comment for column in columns.values())
    assert columns["purl"].value is None


def test_traffic_counts_every_row_in_its_span(
    write: Callable[[list[AccessLogEntry]], None], any_dsn: str
) -> None:
    statuses = [200, 302, 404, 429, 500, None]
    write(
        [
            entry(
                n, _NOON - timedelta(minutes=17 * n), status_code=statuses[n % 6], response_bytes=10
            )
            for n in range(120)
        ]
    )
    with page_session(any_dsn, _SETTINGS, 5) as connection:
        found = traffic(connection, Selection(), now=_NOON + timedelta(seconds=1))
        not_found = traffic(connection, Selection(status="404"), now=_NOON + timedelta(seconds=1))
        hour = traffic(
            connection, Selection(since=_NOON - timedelta(hours=1), until=_NOON), now=_NOON
        )
    within = [n for n in range(120) if 17 * n * 60 <= 86_399]
    totals = [sum(counts) for counts in list(zip(*found.buckets, strict=True))[1:]]
    assert totals == [
        len(within),
        sum(n % 6 in {2, 3} for n in within),
        sum(n % 6 in {4, 5} for n in within),
        10 * len(within),
    ]
    assert found.sampled_percent is None
    assert len(found.buckets) == 25
    assert [bucket.at for bucket in found.buckets] == found.edges[:-1]
    steps = {b - a for a, b in pairwise(found.edges)}
    assert steps == {timedelta(hours=1)}
    assert all(edge == edge.replace(minute=0, second=0, microsecond=0) for edge in found.edges)
    assert sum(bucket.requests for bucket in not_found.buckets) == sum(n % 6 == 2 for n in within)
    assert sum(bucket.requests for bucket in hour.buckets) == 3, "17, 34 and 51 minutes before"
    assert {b - a for a, b in pairwise(hour.edges)} == {timedelta(minutes=1)}


def test_days_of_traffic_start_at_midnight_in_utc(
    write: Callable[[list[AccessLogEntry]], None], any_dsn: str
) -> None:
    midnight = datetime(2026, 3, 2, tzinfo=UTC)
    times = [midnight - timedelta(microseconds=1), midnight, midnight + timedelta(hours=23)]
    write([entry(n, at) for n, at in enumerate(times)])
    selection = Selection(since=_NOON - timedelta(days=20), until=_NOON + timedelta(days=2))
    with page_session(any_dsn, _SETTINGS, 5) as connection:
        found = traffic(connection, selection)
    counts = {bucket.at: bucket.requests for bucket in found.buckets if bucket.requests}
    assert counts == {midnight - timedelta(days=1): 1, midnight: 2}
    assert found.edges[0] == datetime(2026, 2, 10, tzinfo=UTC)


@pytest.mark.parametrize(
    ("since", "until"),
    [
        (_MIN_TIME, None),
        (None, _MIN_TIME),
        (_MAX_TIME, None),
        (None, _MAX_TIME),
        (_MIN_TIME, _MAX_TIME),
    ],
)
def test_extreme_times_are_accepted(
    table: Connection[Any], since: datetime | None, until: datetime | None
) -> None:
    selection = Selection(since=since, until=until)
    found = traffic(table, selection)
    assert len(found.buckets) <= MAX_BARS + 1
    assert list_rows(table, selection, 5, None, 5) == RowPage([], None)


@pytest.mark.not_on_citus("Citus reports the same cost for every query, so nothing is sampled")
def test_traffic_of_a_large_table_is_sampled_and_says_so(
    any_dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = 40_000
    with connect(any_dsn, _SETTINGS) as connection:
        ensure_schema(connection)
        connection.execute("SELECT access_log_ensure_partition('2026-03-01')")
        connection.execute(
            "INSERT INTO access_log (started_at, flow_id, status_code)"
            " SELECT '2026-03-01'::timestamptz + n * interval '2 s', gen_random_uuid(), 200"
            " FROM generate_series(1, %s) AS n",
            (rows,),
        )
        connection.execute("ANALYZE access_log")
    monkeypatch.setattr("exporter.read.page._SAMPLE_ABOVE_COST", 200.0)
    with page_session(any_dsn, _SETTINGS, 5) as connection:
        found = traffic(connection, Selection(), now=datetime(2026, 3, 2, tzinfo=UTC))
    assert found.sampled_percent is not None
    assert found.sampled_percent < 50
    assert sum(bucket.requests for bucket in found.buckets) == pytest.approx(rows, rel=0.25)


def test_session_is_read_only(table: Connection[Any]) -> None:
    with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
        table.execute("DELETE FROM access_log")


def test_slow_query_is_canceled_in_time_and_explained(any_dsn: str) -> None:
    began = time.monotonic()
    with (
        pytest.raises((psycopg.errors.QueryCanceled, DeadlineExceededError)) as caught,
        page_session(any_dsn, _SETTINGS, 0.2) as connection,
    ):
        connection.execute("SELECT pg_sleep(60)")
    assert time.monotonic() - began < 5
    assert explain(caught.value).startswith("The search took too long and was canceled")


@pytest.mark.not_on_citus("the log on the cluster is there already, and distributed")
def test_missing_table_and_unreachable_server_are_explained_without_secrets(any_dsn: str) -> None:
    with (
        pytest.raises(psycopg.Error) as caught,
        page_session(any_dsn, _SETTINGS, 5) as connection,
    ):
        list_rows(connection, Selection(), 1, None, 5)
    assert explain(caught.value).startswith("The table access_log does not exist yet")
    unreachable = "host=127.0.0.1 port=1 user=me password=hunter2"
    with pytest.raises(psycopg.Error) as caught, page_session(unreachable, _SETTINGS, 5):
        pass
    sentence = explain(caught.value)
    assert sentence.startswith("Cannot query the database: ")
    assert "hunter2" not in sentence


def test_role_without_read_access_is_told_what_to_do(any_dsn: str, table: Connection[Any]) -> None:
    assert table is not None
    role = "page_only_writes"
    with connect(any_dsn, _SETTINGS) as connection:
        schema = connection.execute("SELECT current_schema()::text").fetchone()
        assert schema
        connection.execute(f"CREATE ROLE {role} LOGIN".encode())
        connection.execute(f"GRANT USAGE ON SCHEMA {schema[0]} TO {role}".encode())
        try:
            as_writer = any_dsn.replace("user=postgres", f"user={role}")
            with (
                pytest.raises(psycopg.errors.InsufficientPrivilege) as caught,
                page_session(as_writer, _SETTINGS, 5) as session,
            ):
                list_rows(session, Selection(), 1, None, 5)
        finally:
            connection.execute(f"DROP OWNED BY {role}; DROP ROLE {role}".encode())
    assert "read.dsn" in explain(caught.value)


def test_newest_gaps_come_first(any_dsn: str) -> None:
    with connect(any_dsn, _SETTINGS) as connection:
        ensure_schema(connection)
        connection.execute(
            "INSERT INTO access_log_gap (gap_id, node, from_at, to_at, reason, entries)"
            " SELECT gen_random_uuid(), 'n', at, at, 'rejected', n"
            " FROM (SELECT n, now() - n * interval '1 day' AS at FROM generate_series(1, 9) AS n) AS days"
        )
    with page_session(any_dsn, _SETTINGS, 5) as connection:
        assert [gap.entries for gap in recent_gaps(connection, 3)] == [1, 2, 3]
