"""Generated traffic: reproducible, consistent, and never mixed with real rows."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import psycopg
import pytest
from click.testing import CliRunner

from exporter import Settings
from exporter.write.database import Database
from tests.bench.seed_rows import Plan, generate, load, main
from tests.support.samples import make_entry

if TYPE_CHECKING:
    from click.testing import Result

pytestmark = pytest.mark.slow

Query = Callable[..., list[tuple[object, ...]]]

_PLAN = Plan(4000, datetime(2026, 5, 31, 12, tzinfo=UTC), days=5, seed=7)


def seed_rows(dsn: str, *arguments: str) -> Result:
    return CliRunner().invoke(main, ["--dsn", dsn, *arguments])


@pytest.fixture
def seeded(dsn: str) -> None:
    done = seed_rows(dsn, "4000", "--days", "5", "--seed", "7", "--until", "2026-05-31T12:00:00")
    assert done.exit_code == 0, done.output
    assert done.output.startswith("4000 rows over 5 days written in ")


def test_a_seed_determines_the_rows() -> None:
    rows = [row.line for row in generate(_PLAN)]
    assert rows == [row.line for row in generate(_PLAN)]
    assert len(rows) == 4000
    assert not set(rows) & {row.line for row in generate(_PLAN._replace(seed=8))}


@pytest.mark.usefixtures("seeded")
def test_rows_span_all_days_and_have_every_kind(query: Query) -> None:
    assert query("SELECT count(*), count(DISTINCT flow_id) FROM access_log") == [(4000, 4000)]
    assert query(
        "SELECT bool_and(started_at BETWEEN '2026-05-26 12:00Z' AND '2026-05-31 12:00Z'),"
        " count(DISTINCT started_at::date), bool_and(logged_at > started_at) FROM access_log"
    ) == [(True, 6, True)]
    (kinds,) = query(
        "SELECT count(DISTINCT ecosystem), count(DISTINCT remote), count(DISTINCT cache_status),"
        " count(DISTINCT error_type), count(DISTINCT status_code), count(DISTINCT proxy_user),"
        " count(DISTINCT artifact_kind), count(DISTINCT node) FROM access_log"
    )
    assert kinds > (9, 9, 5, 7, 9, 100, 3, 2)
    for kind in (
        "remote IS NULL AND method IS NOT NULL",
        "method IS NULL AND error_type = 'tls_client' AND path IS NULL AND purl IS NULL",
        "status_code = 302 AND purl IS NOT NULL",
        "host LIKE 'objects.%' AND purl LIKE 'pkg:github/%' AND response_bytes > 0",
        "status_code = 404 AND package LIKE 'corp-%'",
        "sha256 IS NOT NULL AND length(sha256) = 32",
        "request_bytes > 0",
    ):
        assert query(f"SELECT count(*) > 0 FROM access_log WHERE {kind}") == [(True,)], kind
    assert query("SELECT count(*) FROM access_log WHERE host NOT LIKE '%.example'") == query(
        "SELECT count(*) FROM access_log WHERE host = '203.0.113.77'"
    )
    assert query("SELECT count(*) FROM access_log_gap") == [(2,)]


@pytest.mark.usefixtures("seeded")
def test_artifact_table_matches_the_rows(query: Query) -> None:
    columns = "purl, first_seen, last_seen, fetches, bytes, remote, first_user"
    counted = query(f"SELECT {columns} FROM artifact ORDER BY purl")
    assert len(counted) > 500
    assert counted == query(
        "SELECT purl, min(started_at), max(started_at), count(*), sum(response_bytes)::bigint,"
        " (array_agg(remote ORDER BY started_at))[1], (array_agg(proxy_user ORDER BY started_at))[1]"
        " FROM access_log_fetches GROUP BY purl ORDER BY purl"
    )


@pytest.mark.usefixtures("seeded")
def test_earlier_seed_rows_are_replaced_and_removed(dsn: str, query: Query) -> None:
    assert seed_rows(dsn, "100", "--days", "1").exit_code == 0
    assert query("SELECT count(*) FROM access_log") == [(100,)]
    assert seed_rows(dsn, "0").exit_code == 0
    for table in ("access_log", "access_log_gap", "artifact"):
        assert query(f"SELECT count(*) FROM {table}") == [(0,)]


def test_rows_of_real_proxies_are_kept(dsn: str, query: Query) -> None:
    real = Database(Settings().with_dsn(dsn).database)
    real.write([make_entry(1)])
    real.close()
    refused = seed_rows(dsn, "100", "--days", "1")
    assert refused.exit_code == 1
    assert "holds rows of real proxies" in refused.output
    assert query("SELECT node FROM access_log") == [("test",)]
    assert seed_rows(dsn, "100", "--days", "1", "--force").exit_code == 0
    assert query("SELECT count(*) FROM access_log") == [(101,)]
    assert (
        seed_rows(dsn, "100", "--days", "1", "--force").exit_code == 0
    )  # replaces the earlier ones
    assert query("SELECT count(*) FROM access_log") == [(101,)]
    assert seed_rows(dsn, "0").exit_code == 0
    assert query("SELECT node FROM access_log") == [("test",)]
    assert query("SELECT count(*) FROM access_log_gap") == [(0,)]


def test_progress_counts_the_rows(dsn: str, query: Query) -> None:
    assert seed_rows(dsn, "0").exit_code == 0
    with psycopg.connect(dsn, autocommit=True) as connection:
        counts = list(load(connection, _PLAN))
    assert counts == sorted(counts)
    assert counts[-1] == 4000
    assert query("SELECT count(*) FROM access_log") == [(4000,)]


def test_unreachable_server_gives_one_sentence(dsn: str) -> None:
    done = seed_rows(dsn.replace("port=", "port=1"), "10")
    assert done.exit_code == 1
    assert done.output.startswith("Error: ")
    assert "Traceback" not in done.output
