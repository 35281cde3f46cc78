"""Terms that are defined both in SQL and in Python mean the same in both."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import psycopg
import pytest

from exporter import Settings
from exporter.postgres.connection import connect
from exporter.postgres.schema import ensure_schema
from exporter.read.lines import caller
from exporter.read.newest import Row
from exporter.read.status import is_failure, is_refusal
from exporter.rows.cache_status import FROM_CACHE
from exporter.rows.entry_builder import EntryBuilder
from exporter.write.artifacts import fetches
from exporter.write.database import Database
from tests.support.samples import make_entry, make_exchange

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Query = Callable[..., list[tuple[Any, ...]]]

_STATUS_CODES = [None, *range(1000)]
_CACHE_STATUSES = [None, *sorted(FROM_CACHE), "MISS", "BYPASS", "EXPIRED", "hit", ""]


@pytest.fixture
def query(any_dsn: str) -> Iterator[Query]:
    """Run SQL on an empty log."""
    with connect(any_dsn, Settings().database) as connection:
        ensure_schema(connection)
    with psycopg.connect(any_dsn, autocommit=True) as connection:
        yield lambda sql, *values: connection.execute(sql.encode(), values or None).fetchall()


def test_failed_and_refused_mean_the_same_in_sql_and_python(query: Query) -> None:
    found = query(
        "SELECT code, access_log_failed(code), coalesce(access_log_refused(code), false)"
        " FROM unnest(%s::smallint[]) WITH ORDINALITY AS given (code, place) ORDER BY place",
        _STATUS_CODES,
    )
    assert found == [(code, is_failure(code), is_refusal(code)) for code in _STATUS_CODES]


def test_no_request_both_failed_and_was_refused() -> None:
    assert not [code for code in _STATUS_CODES if is_failure(code) and is_refusal(code)]


def test_from_cache_means_the_same_in_sql_and_python(query: Query) -> None:
    found = query(
        "SELECT status, access_log_from_cache(status)"
        " FROM unnest(%s::text[]) WITH ORDINALITY AS given (status, place) ORDER BY place",
        _CACHE_STATUSES,
    )
    assert found == [
        (status, None if status is None else status in FROM_CACHE) for status in _CACHE_STATUSES
    ]


def test_a_fetch_means_the_same_in_sql_and_python(any_dsn: str, query: Query) -> None:
    values = (None, False, True)
    purl = "pkg:pypi/demo@1.0"
    entries = [make_entry(n, purl=purl, artifact_complete=values[n % 3]) for n in range(9)]
    database = Database(Settings().with_dsn(any_dsn).database)
    assert database.write(entries) == []
    database.close()
    found = {str(flow_id) for (flow_id,) in query("SELECT flow_id FROM access_log_fetches")}
    assert found == {entry.flow_id for entry in fetches(entries)}
    assert len(found) == 3


def test_only_a_whole_artifact_counts_as_a_fetch() -> None:
    wheel, page = b"/packages/demo-1.0-py3-none-any.whl", b"/simple/demo/"
    for target, method, error_type, status in itertools.product(
        [wheel, page],
        [b"GET", b"HEAD", b"POST", b"PUT", b"get"],
        [None, "dns", "client_disconnected"],
        [None, 100, 200, 201, 204, 206, 207, 301, 302, 304, 400, 404, 416, 500, 503],
    ):
        entry = EntryBuilder(Settings()).build(
            make_exchange(
                host="pypi.example",
                target=target,
                method=method,
                error_type=error_type,
                status_code=status,
            )
        )
        is_whole = (
            target == wheel and method == b"GET" and error_type is None and status in {200, 304}
        )
        assert (entry.artifact_complete is True) is is_whole


def test_a_caller_means_the_same_in_sql_and_python(query: Query) -> None:
    found = query(
        "SELECT proxy_user, client_ip, access_log_caller(proxy_user, client_ip)"
        " FROM unnest(ARRAY[NULL, 'build-42']) AS proxy_user,"
        " unnest(ARRAY[NULL, '192.0.2.7', '2001:db8::1']::inet[]) AS client_ip"
    )
    assert len(found) == 6
    blank = Row(*[None] * len(Row._fields))  # type: ignore[arg-type]
    for proxy_user, client_ip, expected in found:
        row = blank._replace(proxy_user=proxy_user, client_ip=client_ip)
        assert caller(row) == (expected or "-")


_COUNTS = """
    SELECT count(*) FILTER (WHERE access_log_failed(status_code)),
           count(*) FILTER (WHERE access_log_refused(status_code)),
           count(*) FILTER (WHERE access_log_from_cache(cache_status)),
           count(DISTINCT access_log_caller(proxy_user, client_ip))
    FROM access_log
"""
_FETCHES = "SELECT count(*) FROM access_log_fetches"


@pytest.mark.parametrize("statement", [_COUNTS, _FETCHES])
def test_postgres_inlines_the_definitions_and_reads_only_the_days_it_needs(
    query: Query, statement: str
) -> None:
    for day in (1, 2, 3):
        query(f"SELECT access_log_ensure_partition('2026-03-0{day}')")
    where = "started_at >= '2026-03-02 12:00Z' AND started_at < '2026-03-03 00:00Z'"
    plan = "\n".join(line for (line,) in query(f"EXPLAIN (VERBOSE) {statement} WHERE {where}"))
    for name in ("failed", "refused", "from_cache", "caller", "fetches"):
        assert f"access_log_{name}" not in plan
    assert "access_log_20260302" in plan
    assert "access_log_20260301" not in plan
    assert "access_log_20260303" not in plan
