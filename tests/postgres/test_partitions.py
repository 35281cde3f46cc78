"""The days of access_log: their indexes, and partitions that someone else created."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import psycopg
import pytest

from exporter import Settings, insert_access_log_batch
from exporter.postgres.connection import connect
from exporter.postgres.indexes import build_missing_indexes
from exporter.postgres.schema import ensure_schema
from tests.support.access_log import write_entries
from tests.support.samples import make_entry

if TYPE_CHECKING:
    from pathlib import Path

Query = Callable[..., list[tuple[object, ...]]]

_DAY_MS = 86_400_000
_INDEXES = """
    SELECT indexrelid::regclass::text, indisvalid FROM pg_index
    WHERE indrelid = 'access_log'::regclass ORDER BY 1
"""
_OLD_INDEX = "access_log_package_idx"
_SMALL_ONLY = [
    ("access_log_logged_at_idx", True),
    ("access_log_package_version_idx", True),
    ("access_log_pkey", True),
    ("access_log_user_idx", True),
]


def write(dsn: str, *numbers: int) -> None:
    write_entries(dsn, *map(make_entry, numbers))


@pytest.fixture
def first_schema(any_dsn: str, tmp_path: Path) -> None:
    """Create the first version of the schema, with rows on two days, and upgrade it."""
    with connect(any_dsn, Settings().database) as connection:
        ensure_schema(connection, tmp_path)
        for day in ("2023-11-14", "2023-11-15"):
            connection.execute("SELECT access_log_ensure_partition(%s)", (day,))
        for entry in (make_entry(1), make_entry(1 + _DAY_MS)):  # the table lacks newer columns
            connection.execute(
                "INSERT INTO access_log (started_at, flow_id, node, proxy_user) VALUES (%s, %s, %s, %s)",
                (entry.started_at, entry.flow_id, entry.node, entry.proxy_user),
            )
        ensure_schema(connection)


def test_new_log_has_only_small_indexes(dsn: str, query: Query) -> None:
    write(dsn, 1)

    assert query(_INDEXES) == _SMALL_ONLY
    assert query(
        "SELECT count(*) FROM pg_indexes"
        " WHERE tablename = 'access_log_20231114' AND schemaname = current_schema()"
    ) == [(4,)]


@pytest.mark.usefixtures("first_schema")
@pytest.mark.not_on_citus("the log on the cluster is there already, and distributed")
def test_old_days_get_small_indexes_while_a_proxy_writes(any_dsn: str) -> None:
    with psycopg.connect(any_dsn, autocommit=True) as owner, psycopg.connect(any_dsn) as proxy:
        insert_access_log_batch(proxy, [make_entry(2)])  # commits later
        with pytest.raises(psycopg.errors.LockNotAvailable):
            list(build_missing_indexes(owner))
        write(any_dsn, 3)  # the interrupted build blocks nobody
        proxy.commit()

        assert list(build_missing_indexes(owner))
        assert owner.execute(_INDEXES).fetchall() == _SMALL_ONLY
        assert list(build_missing_indexes(owner)) == []
        assert owner.execute("SELECT count(*) FROM access_log").fetchone() == (4,)
        write(any_dsn, 4, 4 + 2 * _DAY_MS)
        counts = owner.execute(
            "SELECT count(*) FROM pg_indexes WHERE tablename LIKE 'access_log_2023%'"
            " GROUP BY tablename"
        ).fetchall()
        assert counts == [(4,)] * 3


@pytest.mark.usefixtures("first_schema")
@pytest.mark.not_on_citus("the log on the cluster is there already, and distributed")
def test_old_index_waits_behind_an_autovacuum_for_less_than_a_second(any_dsn: str) -> None:
    """Writers wait behind it meanwhile."""
    with psycopg.connect(any_dsn, autocommit=True) as owner, psycopg.connect(any_dsn) as vacuum:
        assert "access_log_20231114" in list(build_missing_indexes(owner))
        owner.execute(f"CREATE INDEX {_OLD_INDEX} ON access_log (package, version, started_at)")
        vacuum.execute("LOCK TABLE access_log_20231114 IN SHARE UPDATE EXCLUSIVE MODE")
        started = time.monotonic()
        with pytest.raises(psycopg.errors.LockNotAvailable):
            list(build_missing_indexes(owner))
        assert time.monotonic() - started < 1
        vacuum.rollback()
        assert list(build_missing_indexes(owner)) == []
        assert owner.execute(_INDEXES).fetchall() == _SMALL_ONLY


@pytest.mark.parametrize(
    "bounds",
    [
        "FROM ('2023-11-01') TO ('2023-12-01')",
        "FROM (MINVALUE) TO ('2024-01-01')",
        "FROM ('2023-11-01 12:00+05:30') TO (MAXVALUE)",
    ],
)
@pytest.mark.parametrize("zone", ["UTC", "Asia/Kolkata"])
@pytest.mark.not_on_citus("Citus shows the names of shards instead")
def test_rows_go_to_partitions_that_someone_else_created(
    dsn: str, query: Query, bounds: str, zone: str
) -> None:
    with connect(dsn, Settings().database) as connection:
        ensure_schema(connection)
    query(f"CREATE TABLE monthly PARTITION OF access_log FOR VALUES {bounds}")
    query(f"ALTER ROLE CURRENT_USER IN DATABASE postgres SET timezone = '{zone}'")
    try:
        write(dsn, 1, 1 + _DAY_MS)
    finally:
        query("ALTER ROLE CURRENT_USER IN DATABASE postgres RESET timezone")

    assert query("SELECT tableoid::regclass::text, count(*) FROM access_log GROUP BY 1") == [
        ("monthly", 2)
    ]
    assert query("SELECT name FROM access_log_partitions") == [("monthly",)]


def test_late_rows_of_a_detached_day_get_a_new_partition(any_dsn: str) -> None:
    write(any_dsn, 1)
    with psycopg.connect(any_dsn, autocommit=True) as owner:
        owner.execute("ALTER TABLE access_log DETACH PARTITION access_log_20231114")
        write(any_dsn, 2)
        assert owner.execute("SELECT name FROM access_log_partitions").fetchall() == [
            ("access_log_20231114_2",)
        ]
