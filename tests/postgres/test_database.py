"""Test writes to a real PostgreSQL: each row once, bad rows rejected singly, errors classified."""

from __future__ import annotations

import gc
import socket
import threading
import time
from typing import TYPE_CHECKING, Any

import psutil
import psycopg
import pytest

from exporter import Settings, SettingsError, check_dsn
from exporter.postgres.connection import connect, describe
from exporter.postgres.dsn import connection_string, public_name, without_password
from exporter.postgres.faults import Fault, classify
from exporter.postgres.schema import ensure_schema
from exporter.settings import DatabaseSettings
from exporter.write.copy_batch import copy_text
from exporter.write.database import COLUMNS, Database, DatabaseUnavailable, insert_access_log_batch
from tests.support.citus import NEEDS_TRIGGERS
from tests.support.samples import make_entry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Query = Callable[..., list[tuple[object, ...]]]

pytestmark = pytest.mark.slow


@pytest.fixture
def database(dsn: str) -> Iterator[Database]:
    database = Database(Settings().with_dsn(dsn).database)
    yield database
    database.close()


def test_values_are_stored_unchanged(database: Database, query: Query) -> None:
    entry = make_entry(
        1,
        path="/tab\there\nnew \\N \\. \r end",
        error="quote \" and '",
        cache_age_s=-5,
        duration_ms=0.001,
    )
    assert database.write([entry]) == []
    (row,) = query(
        "SELECT path, error, cache_age_s, duration_ms, client_ip::text, flow_id::text FROM access_log"
    )
    assert row == (
        entry.path,
        entry.error,
        -5,
        pytest.approx(0.001),
        "192.0.2.7/32",
        entry.flow_id,
    )


def test_null_differs_from_the_text_backslash_n(database: Database, query: Query) -> None:
    database.write([make_entry(1, path=None), make_entry(2, path="\\N")])
    assert query("SELECT path FROM access_log ORDER BY started_at") == [(None,), ("\\N",)]


def test_batch_sent_twice_is_stored_once(database: Database, query: Query) -> None:
    batch = [make_entry(n) for n in range(128)]
    assert database.write(batch) == []
    assert database.write(batch) == []
    assert database.write([make_entry(n) for n in range(64, 256)]) == []
    assert query("SELECT count(*), count(DISTINCT flow_id) FROM access_log") == [(256, 256)]


@pytest.mark.parametrize(
    ("changes", "sqlstate"),
    [
        ({"port": 2**40}, "22003"),
        ({"status_code": 70_000}, "22003"),
        ({"client_ip": "fe80::1%eth0"}, "22P02"),
        ({"path": "a\x00b"}, "22021"),
        ({"flow_id": "none"}, "22P02"),
        ({"path": "\ud800"}, ""),
        ({"started_at": None}, "23502"),
    ],
)
def test_bad_row_is_rejected_and_the_others_are_written(
    database: Database, query: Query, changes: dict[str, Any], sqlstate: str
) -> None:
    if "started_at" in changes:
        changes = {"flow_id": None}
    batch = [make_entry(n) for n in range(10)]
    batch[6] = batch[6]._replace(**changes)
    (rejection,) = database.write(batch)
    assert rejection.entry == batch[6]
    assert rejection.sqlstate == sqlstate
    assert query("SELECT count(*) FROM access_log") == [(9,)]


def test_several_bad_rows_in_a_partly_written_batch(database: Database, query: Query) -> None:
    database.write([make_entry(n) for n in range(5)])
    batch = [make_entry(n) for n in range(20)]
    for bad in (3, 7, 19):
        batch[bad] = batch[bad]._replace(port=2**40)
    # Row 3 is stored: a valid version of it was written before.
    assert [r.entry for r in database.write(batch)] == [batch[7], batch[19]]
    assert query("SELECT count(*) FROM access_log") == [(18,)]


def test_extreme_dates_get_partitions(database: Database, query: Query) -> None:
    days = ["1970-01-01", "2200-12-31", "0001-01-01", "9999-12-31", "2024-02-29"]
    batch = [make_entry(n, started_at=f"{day} 23:59:59.999999+00") for n, day in enumerate(days)]
    assert database.write(batch) == []
    assert query("SELECT count(*) FROM access_log") == [(5,)]


def test_dropped_partition_is_recreated(database: Database, query: Query) -> None:
    database.write([make_entry(1)])
    query("DROP TABLE access_log_20231114")
    assert database.write([make_entry(2)]) == []
    assert query("SELECT count(*) FROM access_log") == [(1,)]


def test_rows_for_a_detached_partition_go_to_a_new_one(database: Database, query: Query) -> None:
    database.write([make_entry(1)])
    ((name,),) = query(
        "SELECT inhrelid::regclass::text FROM pg_inherits WHERE inhparent = 'access_log'::regclass"
    )
    for number in (2, 3):
        query(f"ALTER TABLE access_log DETACH PARTITION {name}")
        assert database.write([make_entry(number)]) == []
        assert query("SELECT count(*) FROM access_log") == [(1,)]
        name = f"{name}_2"
    assert database.write([make_entry(4)]) == []
    assert query("SELECT count(*) FROM access_log") == [(2,)]


_DROP_ALL = """
    DO $$
    DECLARE
      it text;
    BEGIN
      SELECT string_agg(oid::regclass::text, ', ') INTO it FROM pg_class
      WHERE relkind IN ('r', 'p') AND NOT relispartition AND relnamespace = current_schema()::regnamespace;
      EXECUTE format('DROP TABLE %s CASCADE', it);
      FOR it IN SELECT oid::regprocedure FROM pg_proc
                WHERE pronamespace = current_schema()::regnamespace LOOP
        EXECUTE format('DROP ROUTINE %s CASCADE', it);
      END LOOP;
    END $$
"""


def test_dropped_schema_is_recreated(database: Database, query: Query) -> None:
    database.write([make_entry(1)])
    query(_DROP_ALL)
    assert database.write([make_entry(2)]) == []
    assert query("SELECT count(*) FROM access_log") == [(1,)]


def test_connection_closed_while_idle_is_replaced_at_once(database: Database, query: Query) -> None:
    database.write([make_entry(1)])
    query(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'artifactapi'"
    )
    assert database.write([make_entry(2)]) == []
    assert database.reconnects == 1
    assert query("SELECT count(*) FROM access_log") == [(2,)]


def test_write_to_a_locked_table_ends_at_its_deadline(dsn: str, query: Query) -> None:
    settings = Settings().with_dsn(dsn)
    database = Database(settings.database)
    database.write([make_entry(1)])
    with psycopg.connect(dsn) as other:
        other.execute("LOCK TABLE access_log")
        database.deadline.give_up_at = time.monotonic() + 0.5
        started = time.monotonic()
        with pytest.raises(DatabaseUnavailable, match="did not answer in time"):
            database.write([make_entry(2)])
        assert time.monotonic() - started < 5
    database.deadline.give_up_at = float("inf")
    assert database.write([make_entry(2)]) == []
    database.close()
    assert query("SELECT count(*) FROM access_log") == [(2,)]


@pytest.mark.not_on_citus("a batch waits on a worker, whose locks the test does not see")
def test_uncommitted_batch_of_an_abandoned_session_is_not_duplicated(
    dsn: str, query: Query
) -> None:
    """As after a lost answer, the old session has inserted the same keys and commits later."""
    batch = [make_entry(n) for n in range(50)]
    database = Database(Settings().with_dsn(dsn).database)
    database.open()
    with connect(dsn, Settings().database) as abandoned:
        abandoned.execute("SELECT access_log_ensure_partition('2023-11-14')")
        results: list[object] = []
        with abandoned.transaction():
            insert_access_log_batch(abandoned, batch)
            retry = threading.Thread(target=lambda: results.append(database.write(batch)))
            retry.start()
            _until_waiting(query)
        retry.join(10)
    database.close()
    assert results == [[]]
    assert query("SELECT count(*) FROM access_log") == [(50,)]


def _until_waiting(query: Query) -> None:
    from tests.support.wait import eventually  # noqa: PLC0415

    eventually(
        lambda: query("SELECT 1 FROM pg_locks WHERE NOT granted AND locktype = 'transactionid'")
    )


def test_refused_connection_is_unavailable_and_hides_the_password() -> None:
    with socket.socket() as not_listening:
        not_listening.bind(("127.0.0.1", 0))
        port = not_listening.getsockname()[1]
        database = Database(
            Settings().with_dsn(f"postgresql://u:s3cret@127.0.0.1:{port}/x").database
        )
        with pytest.raises(DatabaseUnavailable) as caught:
            database.write([make_entry(1)])
    assert "refused" in str(caught.value)
    assert "s3cret" not in str(caught.value)


@pytest.mark.slow
def test_failed_connection_attempt_closes_its_socket() -> None:
    gc.disable()  # the socket must be closed without garbage collection, which may run late
    try:
        with socket.create_server(("127.0.0.1", 0)) as silent_server:
            sockets = len(psutil.Process().net_connections("all"))
            dsn = f"host=127.0.0.1 port={silent_server.getsockname()[1]} connect_timeout=2"
            database = Database(DatabaseSettings(dsn=dsn, connect_seconds=10))
            with pytest.raises(DatabaseUnavailable):
                database.open()
            assert len(psutil.Process().net_connections("all")) <= sockets
    finally:
        gc.enable()


def test_errors_are_classified_by_sqlstate() -> None:
    errors = psycopg.errors
    assert classify(errors.NumericValueOutOfRange()) is Fault.ROW
    assert classify(errors.ProgramLimitExceeded()) is Fault.ROW
    assert classify(errors.UniqueViolation()) is Fault.DUPLICATE
    assert classify(errors.CheckViolation("no partition of relation")) is Fault.PARTITION
    assert classify(errors.UndefinedTable()) is Fault.SCHEMA
    assert classify(errors.InsufficientPrivilege()) is Fault.CONFIGURATION
    assert classify(errors.DiskFull()) is Fault.BUSY
    assert classify(errors.ReadOnlySqlTransaction()) is Fault.UNAVAILABLE
    assert classify(errors.AdminShutdown()) is Fault.UNAVAILABLE
    assert classify(psycopg.OperationalError("gone")) is Fault.UNAVAILABLE


def test_copy_text_escapes_special_characters() -> None:
    plain, hostile = make_entry(1, host=None), make_entry(2, path="a\tb\\c\nd\re", duration_ms=1e-7)
    for entries in ([plain], [hostile], [plain, hostile], [make_entry(3, path="\\N"), plain]):
        lines = copy_text(entries).split("\n")
        assert lines.pop() == ""
        assert [line.count("\t") for line in lines] == [len(COLUMNS) - 1] * len(entries)
    assert "\ta\\tb\\\\c\\nd\\re\t" in copy_text([hostile])
    assert "\t\t443\t" in copy_text([plain])


def test_connection_string_overrides_default_parameters() -> None:
    settings = Settings().database
    with_defaults = connection_string("dbname=x", settings)
    assert "connect_timeout=5" in with_defaults
    assert "application_name=artifactapi" in with_defaults
    assert "connect_timeout=9" in connection_string("dbname=x connect_timeout=9", settings)


@pytest.mark.parametrize(("relaxed", "expected"), [(False, "on"), (True, "off")])
@NEEDS_TRIGGERS
def test_synchronous_commit_setting_applies_to_batches(
    dsn: str, query: Query, *, relaxed: bool, expected: str
) -> None:
    with connect(dsn, DatabaseSettings()) as connection:
        ensure_schema(connection)
        connection.execute("SELECT access_log_ensure_partition('2023-11-14')")
        connection.execute(
            "CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
            " NEW.node := current_setting('synchronous_commit'); RETURN NEW; END $$;"
            " CREATE TRIGGER note BEFORE INSERT ON access_log FOR EACH ROW EXECUTE FUNCTION note()"
        )
    database = Database(DatabaseSettings(dsn=dsn, synchronous_commit=not relaxed))
    assert database.write([make_entry()]) == []
    assert database._connection is not None
    assert database._connection.execute("SHOW synchronous_commit").fetchone() == ("on",)
    database.close()
    assert query("SELECT node FROM access_log") == [(expected,)]


def test_text_is_stored_unchanged_despite_pgclientencoding(
    dsn: str, query: Query, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGCLIENTENCODING", "LATIN1")
    database = Database(DatabaseSettings(dsn=dsn))
    purl = "pkg:generic/caf\u00e9"
    entry = make_entry(path="/caf\u00e9", artifact_kind="artifact", purl=purl, status_code=200)
    assert database.write([entry]) == []
    database.close()
    monkeypatch.delenv("PGCLIENTENCODING")
    assert query("SELECT path FROM access_log") == [("/caf\u00e9",)]
    assert query("SELECT purl FROM artifact") == [(purl,)]


def test_displayed_connection_strings_hide_the_password() -> None:
    uri = "postgresql://me:s3cret@db.example:5433/log?sslmode=require"
    assert public_name(uri) == "me@db.example:5433/log"
    assert public_name("service=prod") == "prod/"
    assert public_name("=") == "an unreadable connection string"
    assert "s3cret" not in without_password(uri)
    assert "s3cret" not in describe(
        psycopg.OperationalError("bad postgresql://me:s3cret@db/ password=s3cret")
    )


def test_displayed_connection_string_names_the_host_of_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert public_name("user=me dbname=log") == "me@local socket/log"
    monkeypatch.setenv("PGHOST", "one.example,two.example")
    monkeypatch.setenv("PGPORT", "5433")
    monkeypatch.setenv("PGPASSWORD", "s3cret")
    assert public_name("user=me dbname=log") == "me@one.example,two.example:5433/log"
    assert public_name("host=db.example dbname=log") == "db.example/log"


def test_insert_access_log_batch_is_all_or_nothing(dsn: str, query: Query) -> None:
    with connect(dsn, Settings().database) as connection:
        ensure_schema(connection)
        connection.execute("SELECT access_log_ensure_partition('2023-11-14')")
        with pytest.raises(psycopg.errors.NumericValueOutOfRange):
            insert_access_log_batch(connection, [make_entry(1), make_entry(2, port=2**40)])
        assert query("SELECT count(*) FROM access_log") == [(0,)]
        insert_access_log_batch(connection, [make_entry(1), make_entry(2)])
        assert query("SELECT count(*) FROM access_log") == [(2,)]


@pytest.mark.parametrize(
    "dsn",
    [
        "host",
        "postgresql://boss:pa/s3cret@127.0.0.1:55491/logs",
        "postgresql://boss:pa@s3cret@127.0.0.1/logs",
        "postgresql://boss:1/s3cret@h/logs",
    ],
)
def test_error_for_an_invalid_connection_string_hides_the_password(dsn: str) -> None:
    with pytest.raises(SettingsError) as caught:
        check_dsn(dsn)
    assert "s3cret" not in str(caught.value)


def test_common_connection_string_formats_are_accepted() -> None:
    for dsn in (
        "",
        "service=logs",
        "host=/run/postgresql dbname=x",
        "postgresql://u:p%40ss@[::1]:5432,h2:5433/x",
        "postgresql:///x?host=/run/postgresql",
    ):
        check_dsn(dsn)
