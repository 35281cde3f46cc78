"""Rolling upgrades: proxies of this version and of earlier ones write to one database, before and after migrations."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from msgspec.structs import replace
from psycopg import sql

from exporter import Exporter, Settings, insert_access_log_batch
from exporter.postgres.connection import connect
from exporter.postgres.indexes import build_missing_indexes
from exporter.postgres.schema import MIGRATIONS, ensure_schema, schema_name
from exporter.retention.rollups import roll_up
from exporter.settings import BatchSettings
from exporter.write.artifacts import fetches
from exporter.write.database import Database
from tests.support.access_log import write_entries
from tests.support.command import call
from tests.support.older_version import OlderVersion, version_before
from tests.support.samples import make_entry, make_exchange
from tests.support.wait import eventually

if TYPE_CHECKING:
    from pathlib import Path

    from exporter import AccessLogEntry

Query = Callable[..., list[tuple[object, ...]]]

pytestmark = pytest.mark.not_on_citus("a log of an earlier version is distributed by test_citus.py")

_MIGRATIONS = sorted(path.name for path in MIGRATIONS.glob("*.sql"))
_WITHOUT_LEDGER = "002_smaller_indexes.sql"
_ARTIFACT_BY_NODE = "011_artifact_by_node.sql"
_PACKED_ROLLUPS = "015_packed_rollups.sql"
_ROWS = "SELECT node, count(*), count(DISTINCT flow_id) FROM access_log GROUP BY 1 ORDER BY 1"
_DAYS = ("2023-11-14", "2023-11-15")
_DAY_MS = 86_400_000
# What a migration must not do to a table with rows: rewrite it, read all of it for an index, or validate it.
_STORAGE = """
    SELECT 'storage', oid, relfilenode FROM pg_class WHERE oid = ANY (%(tables)s)
    UNION ALL
    SELECT 'index', indrelid, indexrelid FROM pg_index WHERE indrelid = ANY (%(tables)s)
    UNION ALL
    SELECT 'constraint', conrelid, pg_constraint.oid
    FROM pg_constraint LEFT JOIN pg_attribute ON attrelid = conrelid AND attnum = conkey[1]
    WHERE convalidated AND conrelid = ANY (%(tables)s)
      AND NOT (contype = 'n' AND atthasmissing)  -- of a new column, whose default nobody has to read
"""
_TABLES_WITH_ROWS = ("access_log_20231114", "access_log_20231115", "access_log_gap", "artifact")


def start_exporter(dsn: str, node: str) -> Exporter:
    settings = Settings(node=node).with_dsn(dsn)
    return Exporter(replace(settings, batch=BatchSettings(max_seconds=0.05)))


def log(exporter: Exporter, numbers: range) -> None:
    for number in numbers:
        assert exporter.log_access(make_exchange(number))


# --- with an earlier version


@pytest.fixture(scope="module", params=[_WITHOUT_LEDGER, _MIGRATIONS[-1]])
def older(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> OlderVersion:
    """The version before a migration: before the first one, and before the newest."""
    return version_before(request.param, tmp_path_factory.mktemp("older"))


@pytest.mark.slow
def test_every_row_arrives_while_proxies_are_upgraded_one_by_one_and_back(
    older: OlderVersion, dsn: str, query: Query, home: Path, request: pytest.FixtureRequest
) -> None:
    with older.proxy(dsn, "old-1", home) as first:
        first.log(0, 200)
        eventually(lambda: query("SELECT to_regclass('access_log') IS NOT NULL") == [(True,)])
        eventually(lambda: query(_ROWS) == [("old-1", 200, 200)])
        assert _applied(query) < len(_MIGRATIONS) + 1

        first.log(200, 5000)  # while the next proxy upgrades the schema
        newer = start_exporter(dsn, "new-1")
        log(newer, range(10_000, 10_300))
        eventually(lambda: query(_ROWS) == [("new-1", 300, 300), ("old-1", 5000, 5000)], timeout=30)
        first.log(5000, 5100)
        log(newer, range(10_300, 10_400))
        assert newer.stop()
    with older.proxy(dsn, "old-2", home) as second:  # somebody takes the upgrade of a proxy back
        second.log(20_000, 20_150)
    assert query(_ROWS) == [("new-1", 400, 400), ("old-1", 5100, 5100), ("old-2", 150, 150)]
    assert _applied(query) == len(_MIGRATIONS) + 1
    done = call("--dsn", dsn, "audit")
    if _WITHOUT_LEDGER in request.node.name:
        assert "no proxy counted" in done.stdout, done
    else:
        assert (done.returncode, done.stdout.splitlines()[0]) == (
            0,
            "Complete: in the whole log, each of the 5,650 requests that the proxies saw has its row.",
        )


@pytest.mark.slow
@pytest.mark.parametrize("older", [_WITHOUT_LEDGER], indirect=True)
def test_upgraded_proxy_that_may_not_upgrade_the_schema_waits_for_its_owner(
    older: OlderVersion, dsn: str, query: Query, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("exporter.write.retry._CONFIGURATION_RETRY_SECONDS", 0.1)
    with older.proxy(dsn, "old", home) as first:
        first.log(0, 10)
    with connect(dsn, Settings().database) as owner:
        schema = schema_name(owner)
        proxy, reader = f"{schema}_proxy", f"{schema}_reader"
        owner.execute(f"CREATE ROLE {proxy} LOGIN; CREATE ROLE {reader} LOGIN".encode())
        owner.execute(older.grants(schema, proxy, reader).encode())
        exporter = start_exporter(dsn.replace("user=postgres", f"user={proxy}"), "new")
        try:
            log(exporter, range(100, 200))
            problem = "run `artifactapi init` as the owner"
            eventually(lambda: problem in (exporter.status()["last_error"] or ""))
            eventually(lambda: exporter.status()["spooled"] == 100)
            ensure_schema(owner)
            eventually(lambda: exporter.status()["written"] == 100)
        finally:
            stopped = exporter.stop()
            owner.execute(f"DROP OWNED BY {proxy}, {reader}; DROP ROLE {proxy}, {reader}".encode())
    assert stopped
    assert query(_ROWS) == [("new", 100, 100), ("old", 10, 10)]


def _applied(query: Query) -> int:
    """The number of the last migration that the database has."""
    if query("SELECT to_regclass('access_log_migration') IS NULL") == [(True,)]:
        return 1
    ((number,),) = query("SELECT max(number) FROM access_log_migration")
    assert isinstance(number, int)
    return number


# --- what migrations may do to a log that is written


def insert_as_older_version(connection: psycopg.Connection[Any], entry: AccessLogEntry) -> None:
    """Insert a row into the columns that the table has."""
    columns = connection.execute("SELECT * FROM access_log LIMIT 0").description or ()
    values = {it.name: value for it in columns if (value := getattr(entry, it.name, None))}
    connection.execute(
        sql.SQL("INSERT INTO access_log ({}) VALUES ({})").format(
            sql.SQL(", ").join(map(sql.Identifier, values)),
            sql.SQL(", ").join(map(sql.Placeholder, values)),
        ),
        values,
    )
    for it in fetches([entry]):
        counted = (it.purl, it.remote, it.proxy_user, it.started_at, it.started_at, 1, 1234)
        connection.execute(
            "SELECT artifact_record(ARRAY[%s], ARRAY[%s], ARRAY[%s], ARRAY[%s::timestamptz],"
            " ARRAY[%s::timestamptz], ARRAY[%s::bigint], ARRAY[%s::bigint])",
            counted,
        )


@pytest.fixture
def first_schema(dsn: str, tmp_path: Path) -> Path:
    """Create the first version of the schema with rows. Returns an empty folder for migrations."""
    folder = tmp_path / "migrations"
    folder.mkdir()
    with connect(dsn, Settings().database) as connection:
        ensure_schema(connection, folder)
        for day in _DAYS:
            connection.execute("SELECT access_log_ensure_partition(%s)", (day,))
        fetched = {"artifact_kind": "artifact", "purl": "pkg:pypi/demo@1.0"}
        for number in (1, 1 + _DAY_MS):
            insert_as_older_version(connection, make_entry(number, **fetched))
        connection.execute(
            "INSERT INTO access_log_gap (gap_id, node, from_at, to_at, reason, entries)"
            " VALUES (gen_random_uuid(), 'test', now(), now(), 'rejected', 1)"
        )
    return folder


def test_no_migration_reads_or_rewrites_a_table_with_rows(
    dsn: str, query: Query, first_schema: Path
) -> None:
    oids = [query("SELECT %s::regclass::oid", name)[0][0] for name in _TABLES_WITH_ROWS]
    tables: dict[str, Any] = {"tables": oids}
    with connect(dsn, Settings().database) as connection:
        for name in _MIGRATIONS:
            shutil.copy(MIGRATIONS / name, first_schema)
            before = set(connection.execute(_STORAGE, tables).fetchall())
            ensure_schema(connection, first_schema)
            after = set(connection.execute(_STORAGE, tables).fetchall())
            assert after == before, f"{name} would lock writers out while it reads a large table"

        assert sorted(build_missing_indexes(connection)) == sorted(
            2 * ["access_log_20231114", "access_log_20231115", "artifact_by_node"]
        )
        assert list(build_missing_indexes(connection)) == []
    assert query(
        "SELECT indisvalid FROM pg_index WHERE indexrelid = 'artifact_package_idx'::regclass"
    ) == [(True,)]
    assert query("SELECT count(*) FROM pg_index WHERE NOT indisvalid") == [(0,)]


@pytest.mark.parametrize(
    ("name", "kind", "columns"),
    [
        ("artifact_package_idx", "INDEX", "access_log_package_key(purl)"),
        ("artifact_by_node_key", "UNIQUE INDEX", "purl, node"),
    ],
)
def test_interrupted_build_of_an_index_of_artifacts_begins_again(
    dsn: str, query: Query, first_schema: Path, name: str, kind: str, columns: str
) -> None:
    with connect(dsn, Settings().database) as connection:
        ensure_schema(connection)
        with psycopg.connect(dsn) as proxy:
            fetched = {"artifact_kind": "artifact", "purl": "pkg:pypi/demo@1.0"}
            insert_access_log_batch(proxy, [make_entry(2, **fetched)])  # not committed
            connection.execute("SET lock_timeout = '100ms'")
            with pytest.raises(psycopg.errors.LockNotAvailable):
                connection.execute(
                    f"CREATE {kind} CONCURRENTLY {name} ON artifact_by_node ({columns})".encode()
                )
            connection.execute("RESET lock_timeout")
        assert list(build_missing_indexes(connection)).count("artifact_by_node") == 2
    assert query(
        "SELECT bool_and(indisvalid), string_agg(relname, ' ' ORDER BY relname)"
        " FROM pg_index JOIN pg_class ON oid = indexrelid WHERE indrelid = 'artifact_by_node'::regclass"
    ) == [(True, "artifact_by_node_pkey artifact_package_idx")]
    assert not list(first_schema.iterdir())


def test_migration_that_waits_for_a_lock_gives_up_within_a_second_and_keeps_what_is_done(
    dsn: str, query: Query, first_schema: Path
) -> None:
    writer = Database(Settings().with_dsn(dsn).database)
    with psycopg.connect(dsn) as reader, connect(dsn, Settings().database) as connection:
        reader.execute("SELECT count(*) FROM access_log_gap")  # as a long report; 003 changes it
        started = time.monotonic()
        with pytest.raises(psycopg.errors.LockNotAvailable):
            ensure_schema(connection)
        assert time.monotonic() - started < 1
        assert query("SELECT max(number) FROM access_log_migration") == [(2,)]
        insert_as_older_version(connection, make_entry(2))
        reader.rollback()
        try:
            assert writer.write([make_entry(3)]) == []
        finally:
            writer.close()
    assert query("SELECT count(*) FROM access_log") == [(4,)]
    assert query("SELECT max(number) FROM access_log_migration") == [(len(_MIGRATIONS) + 1,)]
    assert not list(first_schema.iterdir())


# --- each proxy counts artifacts in rows of its own

_COUNTED = "SELECT first_user, fetches, bytes FROM artifact"
_ROWS_BY_NODE = "SELECT node, fetches FROM artifact_by_node ORDER BY 1"


def fetch(number: int, node: str, **changes: Any) -> AccessLogEntry:
    fetched = {"artifact_kind": "artifact", "purl": "pkg:pypi/demo@1.0", "proxy_user": node}
    return make_entry(number, **(fetched | changes), node=node)


def test_artifacts_are_counted_before_and_after_each_node_has_rows_of_its_own(
    dsn: str, query: Query, first_schema: Path
) -> None:
    write_entries(dsn, fetch(100, "a"), fetch(101, "b"))  # upgrades the schema
    assert query(_ROWS_BY_NODE) == [("", 4)]
    assert query(_COUNTED) == [("build-42", 4, 4 * 1234)]
    write_entries(dsn, fetch(102, "b", purl="pkg:pypi/other@1.0"))
    with connect(dsn, Settings().database) as connection:
        assert "artifact_by_node" in list(build_missing_indexes(connection))
    write_entries(dsn, fetch(0, "a"), fetch(103, "b"))
    times = "'{2000-01-01}', '{2000-01-01}'"
    query(
        f"SELECT artifact_record('{{pkg:pypi/demo@1.0}}', '{{pypi}}', '{{u}}', {times}, '{{1}}', '{{1}}')"
    )
    assert query(f"{_COUNTED} ORDER BY purl") == [("u", 7, 6 * 1234 + 1), ("b", 1, 1234)]
    assert query(_ROWS_BY_NODE) == [("", 5), ("a", 1), ("b", 1), ("b", 1)]
    assert not list(first_schema.iterdir())


def test_who_read_the_table_of_artifacts_reads_the_view(
    dsn: str, query: Query, first_schema: Path
) -> None:
    role, reader = "pg_monitor", "pg_signal_backend"
    query(f"GRANT SELECT ON artifact TO {role} WITH GRANT OPTION")
    query(f"GRANT SELECT (purl) ON artifact TO {reader}")
    query(
        "CREATE VIEW mine WITH (security_barrier=true) AS"
        " SELECT purl, sum(fetches) AS fetches FROM artifact GROUP BY 1"
    )
    query("COMMENT ON VIEW mine IS 'ours'")
    comments = query(
        "SELECT attname, col_description(attrelid, attnum) FROM pg_attribute"
        " WHERE attrelid = 'artifact'::regclass AND attnum > 0"
    )
    with connect(dsn, Settings().database) as connection:
        ensure_schema(connection)
        assert "artifact_by_node" in list(build_missing_indexes(connection))
    write_entries(dsn, fetch(100, "a"), fetch(101, "b"))
    assert query("SELECT * FROM mine") == [("pkg:pypi/demo@1.0", 4)]
    assert query("SELECT purl, fetches FROM access_log_first_seen") == [("pkg:pypi/demo@1.0", 4)]
    assert query(
        "SELECT reloptions, obj_description(oid), pg_get_viewdef(oid) LIKE '%%FROM artifact\n%%' FROM pg_class"
        " WHERE oid = 'mine'::regclass"
    ) == [(["security_barrier=true"], "ours", True)]
    assert (
        query(
            "SELECT attname, col_description(attrelid, attnum) FROM pg_attribute"
            " WHERE attrelid = 'artifact'::regclass AND attnum > 0"
        )
        == comments
    )
    assert query(
        f"SELECT has_table_privilege('{role}', 'artifact', 'SELECT WITH GRANT OPTION'),"
        f" has_table_privilege('{reader}', 'artifact', 'SELECT'),"
        f" has_column_privilege('{reader}', 'artifact', 'purl', 'SELECT'),"
        f" has_column_privilege('{reader}', 'artifact', 'fetches', 'SELECT')"
    ) == [(True, False, True, False)]
    assert not list(first_schema.iterdir())


def test_batch_that_waits_for_the_migration_counts_once(
    dsn: str, query: Query, first_schema: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has read the old function, and then finds a view where the table was."""
    for name in _MIGRATIONS:
        if name < _ARTIFACT_BY_NODE:
            shutil.copy(MIGRATIONS / name, first_schema)
    migration = (MIGRATIONS / _ARTIFACT_BY_NODE).read_bytes()
    monkeypatch.setattr("exporter.postgres.schema.MIGRATIONS", first_schema)
    writer = Database(Settings().with_dsn(dsn).database)
    writer.open()
    with ThreadPoolExecutor(1) as pool, psycopg.connect(dsn) as owner:
        owner.execute(migration)
        batch = pool.submit(writer.write, [fetch(100 + n, "a") for n in range(5)])
        eventually(lambda: query("SELECT count(*) FROM pg_locks WHERE NOT granted") == [(1,)])
        owner.commit()
        assert batch.result(10) == []
    writer.close()
    assert query("SELECT count(*) FROM access_log WHERE node = 'a'") == [(5,)]
    assert query(_COUNTED) == [("build-42", 7, 7 * 1234)]


def test_key_that_is_built_waits_for_a_reader_and_is_not_built_again(
    dsn: str, query: Query, first_schema: Path
) -> None:
    with connect(dsn, Settings().database) as connection:
        ensure_schema(connection)
        with psycopg.connect(dsn) as reader:
            reader.execute("SELECT count(*) FROM artifact_by_node")  # as a long report
            with pytest.raises(psycopg.errors.LockNotAvailable):
                list(build_missing_indexes(connection))
            write_entries(dsn, fetch(100, "a"))
        built = query("SELECT 'artifact_by_node_key'::regclass::oid")
        assert list(build_missing_indexes(connection)) == []
    assert query("SELECT 'artifact_by_node_pkey'::regclass::oid") == built
    write_entries(dsn, fetch(101, "b"))
    assert query(_ROWS_BY_NODE) == [("", 3), ("b", 1)]
    assert not list(first_schema.iterdir())


def test_own_view_of_rollups_reads_new_ones(dsn: str, query: Query, tmp_path: Path) -> None:
    for name in _MIGRATIONS:
        if name < _PACKED_ROLLUPS:
            shutil.copy(MIGRATIONS / name, tmp_path)
    with connect(dsn, Settings().database) as connection:
        ensure_schema(connection, tmp_path)
        connection.execute(
            "CREATE VIEW mine AS SELECT purl, sum(fetches)::integer AS fetches"
            " FROM access_log_rollup JOIN access_log_rollup_artifact AS its USING (rollup_id) GROUP BY 1"
        )
        write_entries(dsn, fetch(1, "a"), fetch(2, "b"), fetch(_DAY_MS, "a"))
        assert len(list(roll_up(connection))) == 2
    assert query("SELECT * FROM mine") == [("pkg:pypi/demo@1.0", 3)]
