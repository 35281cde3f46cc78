"""Many proxies behind PgBouncer in transaction mode: rows, ledger and housekeeping."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

import psycopg
import pytest
from msgspec.structs import replace

from exporter import Exporter, Settings
from exporter.postgres.connection import connect
from exporter.postgres.schema import ensure_schema
from exporter.retention.housekeeping import Housekeeping
from exporter.run import Run
from exporter.settings import BatchSettings, DatabaseSettings, RetentionSettings
from exporter.write.build import RowBuilder
from exporter.write.database import Database, DatabaseUnavailable
from exporter.write.ledger import RunCounts, RunLedger
from tests.support.citus import Cluster
from tests.support.command import call
from tests.support.pgbouncer import MISSING, PROGRAM, PgBouncer
from tests.support.relay import Relay
from tests.support.samples import make_entry, make_exchange
from tests.support.wait import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.support.postgres import Postgres

pytestmark = [pytest.mark.slow, pytest.mark.skipif(PROGRAM is None, reason=MISSING)]

Query = Callable[..., list[tuple[object, ...]]]

_PROXIES = 20
_POOL_SIZE = 5
_numbers = itertools.count()
_ROWS = "SELECT count(*), count(DISTINCT flow_id) FROM access_log"
_BAD_PATH = "/bad"


@pytest.fixture(scope="module")
def pgbouncer(postgres: Postgres) -> Iterator[PgBouncer]:
    with PgBouncer(postgres, _POOL_SIZE) as pgbouncer:
        yield pgbouncer


@pytest.fixture
def database_name(postgres: Postgres | Cluster) -> Iterator[str]:
    """An empty database: PgBouncer does not pass on the schema that a connection string names.

    On a cluster, it has a distributed log.
    """
    name = f"pooled_{os.getpid()}_{next(_numbers)}"  # other processes use the same cluster
    if isinstance(postgres, Cluster):
        with postgres.database(name):
            yield name
        return
    with psycopg.connect(postgres.dsn(), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}".encode())
        yield name
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)".encode())


@pytest.fixture
def direct(postgres: Postgres, database_name: str) -> Iterator[psycopg.Connection]:
    """A connection to the database without PgBouncer."""
    with psycopg.connect(postgres.dsn(database_name), autocommit=True) as connection:
        yield connection


def _rows(connection: psycopg.Connection, query: str) -> list[tuple[object, ...]]:
    return connection.execute(query.encode()).fetchall()


@pytest.mark.parametrize("resets", [False, True])
def test_twenty_proxies_share_five_connections_and_no_row_is_lost_or_doubled(
    postgres: Postgres,
    database_name: str,
    direct: psycopg.Connection,
    monkeypatch: pytest.MonkeyPatch,
    *,
    resets: bool,
) -> None:
    """PgBouncer restarts twice under load, once killed; PostgreSQL refuses one row of each proxy."""
    # Twenty more processes would only add load: without a worker, the writer's thread builds the rows.
    monkeypatch.setattr(RowBuilder, "start_worker", lambda _: None)
    with connect(postgres.dsn(database_name), DatabaseSettings()) as owner:
        ensure_schema(owner)
        owner.execute(f"ALTER TABLE access_log ADD CHECK (path <> '{_BAD_PATH}')".encode())
    reset = {"server_reset_query_always": "1"} if resets else {}
    most_sessions = 0
    with PgBouncer(postgres, _POOL_SIZE, **reset) as pgbouncer:
        database = DatabaseSettings(dsn=pgbouncer.dsn(database_name), retry_max_seconds=0.2)
        settings = Settings(database=database, batch=BatchSettings(max_seconds=0.05))
        exporters = [
            Exporter(replace(settings, node=f"gate-{number}")) for number in range(_PROXIES)
        ]
        sent = 0

        def log(count: int) -> None:
            nonlocal sent, most_sessions
            for number in range(sent, sent + count):
                exporters[number % _PROXIES].log_access(make_exchange(number))
                if number % 100 == 0:
                    threading.Event().wait(0.002)
            sent += count
            most_sessions = max(most_sessions, _sessions(direct))

        def written() -> int:
            return sum(exporter.status()["written"] for exporter in exporters)

        try:
            log(4000)
            eventually(lambda: written() == 4000, timeout=30)
            for number, exporter in enumerate(exporters):
                exporter.log_access(
                    make_exchange(1_000_000 + number, target=f"{_BAD_PATH}?x=1".encode())
                )
            for how in (signal.SIGTERM, signal.SIGKILL):
                goal = written() + 200
                while written() < goal:  # in the middle of batches
                    log(40)
                pgbouncer.stop(how)
                log(1000)
                eventually(lambda: all(each.status()["away"] for each in exporters), timeout=30)
                pgbouncer.start()
                eventually(lambda: not any(each.status()["away"] for each in exporters), timeout=30)
            log(1000)
            eventually(lambda: written() == sent, timeout=30)
        finally:
            stopped = [exporter.stop() for exporter in exporters]
    assert all(stopped)
    assert most_sessions <= _POOL_SIZE
    assert _rows(direct, _ROWS) == [(sent, sent)]
    assert _rows(direct, "SELECT reason, sum(entries) FROM access_log_gap GROUP BY 1") == [
        ("rejected", _PROXIES)
    ]
    assert _rows(direct, "SELECT sum(rows), sum(lost) FROM access_log_run_day") == [
        (sent, _PROXIES)
    ]
    done = call("--dsn", postgres.dsn(database_name), "audit")
    assert done.returncode == 1, "the gaps are holes, and known"
    assert f"{_PROXIES} requests" in done.stdout.splitlines()[0], done.stdout


def _sessions(connection: psycopg.Connection) -> int:
    ((count,),) = connection.execute(
        "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'artifactapi'"
        " AND datname = current_database()"
    ).fetchall()
    return int(count)


def test_batch_whose_answer_was_lost_behind_pgbouncer_is_stored_and_counted_once(
    pgbouncer: PgBouncer, database_name: str, direct: psycopg.Connection
) -> None:
    struck = 0
    with Relay(("127.0.0.1", pgbouncer.port), postgres=True) as relay:
        dsn = f"host=127.0.0.1 port={relay.address[1]} user=postgres dbname={database_name}"
        settings = DatabaseSettings(dsn=dsn, call_seconds=0.5)
        ledger = RunLedger(Run.start("gate"), lambda: RunCounts(0, 0, 0, 0, 0))
        database = Database(settings, ledger=ledger)
        database.open()
        for batch in range(12):
            entries = [make_entry(batch * 100 + n) for n in range(10)]
            relay.cut_at_message("to_client", batch)
            for _ in range(20):
                with contextlib.suppress(DatabaseUnavailable):
                    assert database.write(entries) == []
                    break
            struck += relay.struck
            relay.mend()
            assert _rows(direct, _ROWS) == [(batch * 10 + 10, batch * 10 + 10)]
        database.close()
    assert struck
    assert _rows(direct, "SELECT sum(rows) FROM access_log_run_day") == [(120,)]


def test_housekeeping_needs_a_connection_to_postgresql_itself(
    pgbouncer: PgBouncer,
    postgres: Postgres,
    database_name: str,
    direct: psycopg.Connection,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    """In transaction mode, its locks and settings of a session would stay in other proxies' sessions."""
    old = make_entry(1)
    pooled, itself = pgbouncer.dsn(database_name), postgres.dsn(database_name)
    writer = Database(Settings().with_dsn(pooled).database)
    assert writer.write([old]) == []
    writer.close()
    settings = replace(Settings().with_dsn(pooled), retention=RetentionSettings(days=1))
    housekeeping = Housekeeping(settings, first_seconds=0.0)
    try:
        eventually(lambda: "leads to a connection pooler" in caplog.text)
    finally:
        housekeeping.stop()
    assert "run `artifactapi prune`" in caplog.text
    for command in (("init",), ("prune", "--keep", "1d")):
        if command == ("init",):  # it has an index to build
            direct.execute("DROP INDEX artifact_package_idx")
        done = call("--dsn", pooled, *command)
        assert (done.returncode, "leads to PostgreSQL itself" in done.stderr) == (1, True), done
    assert _rows(direct, _ROWS) == [(1, 1)]
    assert _rows(direct, "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'") == [(0,)]
    with connect(pooled, settings.database) as session:
        assert _rows(session, "SHOW lock_timeout") == [("0",)]

    archive = ("--archive", str(tmp_path))
    done = call("--dsn", itself, "prune", "--keep", "1d", *archive)
    assert (done.returncode, done.stdout.splitlines()[-1][:5]) == (0, "1 row"), done
    assert _rows(direct, _ROWS) == [(0, 0)]

    # These need only transactions.
    day = old.started_at[:10]
    for arguments, text in (
        (("tail", *archive), "registry.example"),
        (("restore", "--day", day, *archive), "1 row of "),
        (("restore", "--day", day, *archive), "0 rows of "),
        (("prune", "--keep", "1d", "--dry-run"), "1 row from before "),
    ):
        done = call("--dsn", pooled, *arguments)
        assert (done.returncode, text in done.stdout) == (0, True), done
    assert _rows(direct, _ROWS) == [(1, 1)]
    assert _rows(direct, "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'") == [(0,)]


def test_commands_that_read_work_through_pgbouncer(
    pgbouncer: PgBouncer, database_name: str
) -> None:
    dsn = pgbouncer.dsn(database_name)
    writer = Database(Settings().with_dsn(dsn).database)
    assert writer.write([make_entry(n) for n in range(3)]) == []
    writer.close()
    for command in ("tail", "report --since 2023-11-01", "export csv"):
        done = call("--dsn", dsn, *command.split())
        assert (done.returncode, done.stderr) == (0, ""), command
        assert "registry.example" in done.stdout, command


@pytest.mark.not_on_citus("the log on the cluster is there already, and distributed")
def test_schema_of_the_connection_string_is_not_ignored(
    postgres: Postgres, database_name: str, direct: psycopg.Connection
) -> None:
    direct.execute("CREATE SCHEMA logs")
    options = " options=-csearch_path=logs"
    with PgBouncer(postgres, 2) as strict:
        database = Database(Settings().with_dsn(strict.dsn(database_name) + options).database)
        with pytest.raises(DatabaseUnavailable, match="options"):
            database.write([make_entry(1)])
        database.close()
    with PgBouncer(postgres, 2, ignore_startup_parameters="options") as lax:
        dsn = lax.dsn(database_name)
        database = Database(Settings().with_dsn(dsn + options).database)
        with pytest.raises(DatabaseUnavailable, match="ALTER ROLE") as caught:
            database.write([make_entry(1)])
        assert caught.value.configuration
        database.close()
        assert _rows(direct, "SELECT to_regclass('public.access_log')") == [(None,)]

        direct.execute(
            f"ALTER ROLE postgres IN DATABASE {database_name} SET search_path = logs".encode()
        )
        lax.stop()
        lax.start()
        database = Database(Settings().with_dsn(dsn).database)
        assert database.write([make_entry(1)]) == []
        database.close()
    assert _rows(direct, "SELECT count(*) FROM logs.access_log") == [(1,)]
