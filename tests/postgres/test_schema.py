"""Creating and upgrading the schema, also from many connections at once, and its grants."""

from __future__ import annotations

import shutil
import threading
import uuid
from collections.abc import Callable
from typing import TYPE_CHECKING

import psycopg
import pytest
from click.testing import CliRunner

from addon.cli.main import main
from exporter import AccessLogEntry, Settings, insert_access_log_batch
from exporter.postgres.connection import connect
from exporter.postgres.schema import (
    MIGRATIONS,
    SCHEMA,
    SchemaError,
    ensure_schema,
    grants,
    schema_name,
)
from exporter.write.database import COLUMNS, Database, DatabaseUnavailable
from exporter.write.gaps import Gap
from tests.support.access_log import write_entries
from tests.support.citus import CLUSTER_DSN
from tests.support.command import call
from tests.support.samples import make_entry

if TYPE_CHECKING:
    from pathlib import Path

Query = Callable[..., list[tuple[object, ...]]]

NEWEST = 1 + len(list(MIGRATIONS.glob("*.sql")))
_VERSIONS = "SELECT version FROM access_log_schema ORDER BY 1"
# A distributed log refuses proxies of versions before it could be distributed.
_CREATED = [(1,), (10,)] if CLUSTER_DSN else [(1,)]


def database(dsn: str) -> Database:
    return Database(Settings().with_dsn(dsn).database)


def run_at_once(count: int, start: Callable[[int], None]) -> list[BaseException]:
    """Call `start` in `count` threads at the same time and return the exceptions."""
    failures: list[BaseException] = []
    ready = threading.Barrier(count)

    def run(number: int) -> None:
        try:
            ready.wait(10)
            start(number)
        except BaseException as e:  # noqa: BLE001 - the test checks all of them
            failures.append(e)

    threads = [threading.Thread(target=run, args=(n,)) for n in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return failures


@pytest.mark.slow
@pytest.mark.not_on_citus("the log on the cluster is there already, and distributed")
def test_ten_simultaneous_first_starts_create_one_schema_and_lose_no_rows(any_dsn: str) -> None:
    def first_start(number: int) -> None:
        # Ten days, so that the threads also compete for the partitions.
        write_entries(any_dsn, *[make_entry(number * 1000 + i * 86_400_000) for i in range(10)])

    assert not run_at_once(10, first_start)
    with psycopg.connect(any_dsn) as connection:
        assert connection.execute("SELECT count(*) FROM access_log").fetchone() == (100,)
        assert connection.execute(_VERSIONS).fetchall() == [(1,)]


def test_entry_fields_match_the_columns_of_the_table(dsn: str) -> None:
    database_ = database(dsn)
    database_.open()
    database_.close()
    with psycopg.connect(dsn) as connection:
        described = connection.execute("SELECT * FROM access_log").description
    names = [column.name for column in described or ()]
    assert [n for n in names if n != "logged_at"] == list(AccessLogEntry._fields)
    assert list(AccessLogEntry._fields) == list(COLUMNS)


def test_every_column_has_a_comment(dsn: str, query: Query) -> None:
    with connect(dsn, Settings().database) as connection:
        ensure_schema(connection)
    without_comment = query(
        "SELECT attrelid::regclass::text, attname FROM pg_attribute JOIN pg_class c ON c.oid = attrelid"
        " WHERE relnamespace = current_schema()::regnamespace AND attnum > 0 AND relkind IN ('p', 'r', 'v')"
        " AND relname <> 'access_log_schema' AND col_description(attrelid, attnum) IS NULL"
    )
    assert without_comment == []


@pytest.mark.not_on_citus("the log on the cluster is there already, and distributed")
def test_foreign_table_access_log_is_rejected_and_unchanged(dsn: str, query: Query) -> None:
    query("CREATE TABLE access_log (line text)")
    with pytest.raises(
        DatabaseUnavailable, match="A table access_log exists that artifactapi did not create"
    ) as caught:
        database(dsn).write([make_entry()])
    assert caught.value.configuration
    assert query("SELECT * FROM access_log") == []
    assert query("SELECT to_regclass('access_log_schema')") == [(None,)]


def test_newer_schema_is_rejected_and_unchanged(dsn: str, query: Query) -> None:
    with connect(dsn, Settings().database) as connection:
        ensure_schema(connection)
    query("INSERT INTO access_log_schema (version) VALUES (1000)")
    with pytest.raises(
        DatabaseUnavailable,
        match=rf"is at version 1000, but this artifactapi supports up to {NEWEST}; upgrade",
    ):
        database(dsn).write([make_entry()])
    assert query("SELECT count(*) FROM access_log") == [(0,)]


@pytest.mark.not_on_citus("the log on the cluster is there already, and distributed")
def test_migrations_run_once_in_order(dsn: str, query: Query, tmp_path: Path) -> None:
    (tmp_path / "002_add_a_note.sql").write_text("ALTER TABLE access_log ADD COLUMN note text;")
    (tmp_path / "003_fill_it.sql").write_text("ALTER TABLE access_log ALTER note SET DEFAULT 'n';")
    with connect(dsn, Settings().database) as connection:
        ensure_schema(connection, tmp_path)
        ensure_schema(connection, tmp_path)
    assert query(_VERSIONS) == [(1,), (2,), (3,)]
    assert query("SELECT note FROM access_log") == []


@pytest.mark.not_on_citus(
    "a distributed log refuses proxies of versions before it could be distributed"
)
def test_proxy_that_does_not_know_a_compatible_migration_still_writes(
    dsn: str, query: Query, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_entries(dsn, make_entry(1))
    assert query(_VERSIONS) == [(1,)]
    assert query("SELECT max(number) FROM access_log_migration") == [(NEWEST,)]
    monkeypatch.setattr("exporter.postgres.schema.MIGRATIONS", tmp_path)  # as in version 1
    write_entries(dsn, make_entry(2))
    assert query("SELECT count(*) FROM access_log") == [(2,)]


def test_schema_is_created_again_after_its_tables_were_dropped(dsn: str, query: Query) -> None:
    write_entries(dsn, make_entry(1))
    kept = ("access_log_migration",)
    for (name,) in query("SELECT tablename FROM pg_tables WHERE schemaname = current_schema()"):
        if name not in kept:
            query(f"DROP TABLE IF EXISTS {name} CASCADE")
    for (function,) in query(
        "SELECT oid::regprocedure::text FROM pg_proc WHERE pronamespace = current_schema()::regnamespace"
    ):
        query(f"DROP FUNCTION IF EXISTS {function}")
    write_entries(dsn, make_entry(2))
    assert query("SELECT count(*) FROM access_log") == [(1,)]
    assert query("SELECT max(number) FROM access_log_migration") == [(NEWEST,)]


@pytest.mark.not_on_citus("the log on the cluster is there already, and distributed")
def test_failed_migration_changes_nothing(dsn: str, query: Query, tmp_path: Path) -> None:
    with connect(dsn, Settings().database) as connection:
        ensure_schema(connection, tmp_path)
        (tmp_path / "002_break.sql").write_text("ALTER TABLE access_log ADD note text; SELECT 1/0;")
        with pytest.raises(psycopg.errors.DivisionByZero):
            ensure_schema(connection, tmp_path)
    assert query(_VERSIONS) == [(1,)]


@pytest.fixture
def upgrade(any_dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Create a database with rows, a user's view and grant; provide two more migrations."""
    with connect(any_dsn, Settings().database) as connection:
        ensure_schema(connection)
        connection.execute("CREATE VIEW mine AS SELECT purl, fetches FROM access_log_redundant")
        connection.execute("GRANT SELECT ON access_log_redundant TO PUBLIC")
        for number in (1, 2):
            fetch = make_entry(number, artifact_kind="artifact", purl="pkg:pypi/demo@1.0")
            connection.execute("SELECT access_log_ensure_partition('2023-11-14')")
            insert_access_log_batch(connection, [fetch])
    for migration in MIGRATIONS.glob("*.sql"):
        shutil.copy(migration, tmp_path)
    (tmp_path / f"{NEWEST + 1:03}_note.sql").write_text(
        "ALTER TABLE access_log ADD COLUMN note text;"
    )
    (tmp_path / f"{NEWEST + 2:03}_more_in_a_view.sql").write_text(
        "CREATE OR REPLACE VIEW access_log_redundant AS"
        " SELECT counted.*, day, 'new' AS added FROM access_log_days"
        " CROSS JOIN access_log_redundant(day, day + interval '1 day') AS counted;"
    )
    monkeypatch.setattr("exporter.postgres.schema.MIGRATIONS", tmp_path)


@pytest.mark.usefixtures("upgrade")
def test_ten_simultaneous_starts_upgrade_a_database_with_rows(any_dsn: str) -> None:
    failures = run_at_once(10, lambda number: write_entries(any_dsn, make_entry(1000 + number)))
    assert not failures
    with psycopg.connect(any_dsn) as connection:
        assert connection.execute(_VERSIONS).fetchall() == [*_CREATED, (NEWEST + 1,), (NEWEST + 2,)]
        assert connection.execute("SELECT count(*) FROM access_log").fetchone() == (12,)
        assert connection.execute("SELECT * FROM mine").fetchall() == [("pkg:pypi/demo@1.0", 2)]
        assert connection.execute("SELECT purl, added FROM access_log_redundant").fetchall() == [
            ("pkg:pypi/demo@1.0", "new")
        ]
        assert connection.execute(
            "SELECT has_table_privilege('pg_monitor', 'access_log_redundant', 'SELECT')"
        ).fetchone() == (True,)


@pytest.mark.usefixtures("upgrade")
def test_proxy_without_the_right_to_upgrade_says_who_has_it(any_dsn: str) -> None:
    with connect(any_dsn, Settings().database) as connection:
        schema = schema_name(connection)
        proxy, reader = f"{schema}_proxy", f"{schema}_reader"
        connection.execute(f"CREATE ROLE {proxy} LOGIN; CREATE ROLE {reader} LOGIN".encode())
        connection.execute(grants(schema, proxy, reader, is_distributed=bool(CLUSTER_DSN)).encode())
        as_proxy = any_dsn.replace("user=postgres", f"user={proxy}")
        try:
            with pytest.raises(
                DatabaseUnavailable,
                match=f"needs {NEWEST + 2}; run `artifactapi init` as the owner",
            ):
                write_entries(as_proxy, make_entry(3))
            ensure_schema(connection)
            write_entries(as_proxy, make_entry(3))
        finally:
            connection.execute(
                f"DROP OWNED BY {proxy}, {reader}; DROP ROLE {proxy}, {reader}".encode()
            )


def test_reader_role_can_use_every_view_and_read_only_function(dsn: str, query: Query) -> None:
    with connect(dsn, Settings().database) as connection:
        ensure_schema(connection)
        schema = schema_name(connection)
        reader = f"{schema}_reader"
        connection.execute(f"CREATE ROLE {reader}".encode())
        try:
            # Remove the rights of PUBLIC, so that only those of `grants` remain.
            connection.execute(
                f"REVOKE EXECUTE ON ALL FUNCTIONS IN SCHEMA {schema} FROM PUBLIC".encode()
            )
            connection.execute(
                grants(schema, reader, reader, is_distributed=bool(CLUSTER_DSN)).encode()
            )
            inaccessible = query(
                "SELECT relname FROM pg_class WHERE relnamespace = current_schema()::regnamespace"
                " AND relkind IN ('p', 'r', 'v') AND NOT has_table_privilege(%s, oid, 'SELECT')"
                " UNION ALL SELECT proname FROM pg_proc"
                " WHERE pronamespace = current_schema()::regnamespace"
                " AND proname <> 'access_log_roll_up'"  # only the owner
                " AND NOT has_function_privilege(%s, oid, 'EXECUTE')",
                reader,
                reader,
            )
        finally:
            connection.execute(f"DROP OWNED BY {reader}; DROP ROLE {reader}".encode())
    assert inaccessible == []


@pytest.mark.parametrize("name", ["003_hole.sql", "2_short.sql", "002-dash.sql"])
def test_misnamed_migration_is_rejected(dsn: str, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("")
    with connect(dsn, Settings().database) as connection, pytest.raises(SchemaError):
        ensure_schema(connection, tmp_path)


def test_proxy_role_can_only_write_and_reader_role_can_only_read(any_dsn: str) -> None:
    with connect(any_dsn, Settings().database) as connection:
        ensure_schema(connection)
        schema = schema_name(connection)
        proxy, reader = f"{schema}_proxy", f"{schema}_reader"
        connection.execute(f"CREATE ROLE {proxy} LOGIN; CREATE ROLE {reader} LOGIN".encode())
        connection.execute(grants(schema, proxy, reader, is_distributed=bool(CLUSTER_DSN)).encode())
        try:
            as_proxy = any_dsn.replace("user=postgres", f"user={proxy}")
            writer = database(as_proxy)
            assert writer.write([make_entry(1)]) == []
            # The first entry is a duplicate.
            assert writer.write([make_entry(1), make_entry(2)]) == []
            fetched = {"artifact_kind": "artifact", "purl": "pkg:pypi/demo@1.0"}
            assert writer.write([make_entry(3, **fetched)]) == []
            writer.write_gaps(
                [Gap(str(uuid.uuid4()), "n", "2026-01-01", "2026-01-01", "rejected", 1)]
            )
            writer.close()
            with psycopg.connect(as_proxy, autocommit=True) as session:
                for statement in (
                    "SELECT * FROM access_log",
                    "UPDATE access_log SET path = ''",
                    "DELETE FROM access_log",
                    "TRUNCATE access_log",
                    "DROP TABLE access_log",
                    "SELECT * FROM artifact",
                    "SELECT * FROM access_log_gap",
                    "SELECT * FROM access_log_remotes",
                    "SELECT * FROM access_log_remotes('2023-11-14')",
                    "DELETE FROM access_log_gap",
                    "SELECT * FROM artifact_by_node",
                    "UPDATE artifact_by_node SET fetches = 0",
                ):
                    with pytest.raises(psycopg.errors.InsufficientPrivilege):
                        session.execute(statement.encode())
            with psycopg.connect(
                any_dsn.replace("user=postgres", f"user={reader}"), autocommit=True
            ) as session:
                assert session.execute("SELECT count(*) FROM access_log").fetchone() == (3,)
                assert session.execute("SELECT fetches FROM access_log_first_seen").fetchone() == (
                    1,
                )
                assert session.execute("SELECT requests FROM access_log_remotes").fetchall() == [
                    (3,)
                ]
                session.execute("SET search_path = pg_catalog")
                counted = f"SELECT requests FROM {schema}.access_log_remotes('2023-11-14')"
                assert session.execute(counted.encode()).fetchall() == [(3,)]
                session.execute("RESET search_path")
                with pytest.raises(psycopg.errors.InsufficientPrivilege):
                    session.execute("DELETE FROM access_log")
        finally:
            connection.execute(
                f"DROP OWNED BY {proxy}, {reader}; DROP ROLE {proxy}, {reader}".encode()
            )


@pytest.mark.not_on_citus("the log on the cluster is there already, and distributed")
def test_a_role_that_may_not_create_the_schema_is_told_who_may(dsn: str) -> None:
    with psycopg.connect(dsn, autocommit=True) as connection:
        schema = connection.execute("SELECT current_schema()").fetchone()
        assert schema
        role = f"{schema[0]}_guest"
        connection.execute(f"CREATE ROLE {role} LOGIN; GRANT USAGE ON SCHEMA {schema[0]} TO {role}")
        try:
            done = call("--dsn", dsn.replace("user=postgres", f"user={role}"), "init")
            assert done.returncode == 1
            assert done.stderr == (
                "Error: There is no table access_log, and this role cannot create it; run `artifactapi"
                " init` as a role that may create tables here, such as the owner of the database.\n"
            )
        finally:
            connection.execute(f"DROP OWNED BY {role}; DROP ROLE {role}")


_READING = (
    *("tail", "report", "export csv", "gaps", "audit", "nodes"),
    *(
        "affected",
        "affected --keep advisories.txt",
        "prune --keep 1d",
        "verify requirements.txt --user build-1",
    ),
)


@pytest.mark.slow
@pytest.mark.not_on_citus("the log on the cluster is there already, and distributed")
def test_commands_that_read_neither_create_nor_upgrade_a_log(
    dsn: str, query: Query, tmp_path: Path
) -> None:
    """A wrong name must not leave tables in somebody else's database."""
    (tmp_path / "requirements.txt").write_text("demo==1.0\n")
    (tmp_path / "advisories.txt").write_text("pkg:pypi/demo@1.0\n")
    count = "SELECT count(*) FROM pg_class WHERE relnamespace = current_schema()::regnamespace"

    def answers(reason: str) -> None:
        before = query(count)
        for command in _READING:
            words = [str(tmp_path / word) if ".txt" in word else word for word in command.split()]
            done = CliRunner().invoke(main, ["--dsn", dsn, *words])
            assert (done.exit_code > 0, reason in done.output) == (True, True), (
                f"{command}: {done.output}"
            )
            assert query(count) == before, command

    answers("The database postgres has no log (schema test_")
    shutil.copy(MIGRATIONS / "002_smaller_indexes.sql", tmp_path)
    with connect(dsn, Settings().database) as connection:
        ensure_schema(connection, tmp_path)
    answers(
        f"The schema is at version 2, but this artifactapi needs {NEWEST}; run `artifactapi init`"
    )
    assert call("--dsn", dsn, "init").returncode == 0
    assert call("--dsn", dsn, "tail").returncode == 0


def test_schema_does_not_rely_on_if_not_exists() -> None:
    assert "IF NOT EXISTS" not in SCHEMA.read_text()
