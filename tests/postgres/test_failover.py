"""Failover to a streaming standby, and servers that become read-only: no row is lost or doubled unnoticed."""

from __future__ import annotations

import functools
import threading
from typing import TYPE_CHECKING, Any, Self

import psycopg
import pytest
from msgspec.structs import replace

from exporter import Exporter, Settings
from exporter.settings import BatchSettings, DatabaseSettings
from tests.support.command import call
from tests.support.postgres import Postgres, available
from tests.support.samples import make_exchange
from tests.support.wait import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.slow

_PROGRAMS = available()[min(available(), key=int)]  # Debian's, if it is installed
_wait = functools.partial(eventually, timeout=30)
_ROWS = "SELECT count(*), count(DISTINCT flow_id) FROM access_log"


@pytest.fixture
def primary() -> Iterator[Postgres]:
    with Postgres(_PROGRAMS) as server:
        yield server


@pytest.fixture
def standby(primary: Postgres) -> Iterator[Postgres]:
    """A streaming standby of `primary`."""
    with Postgres(_PROGRAMS, primary) as server:
        _until_streaming(primary)
        yield server


def _value(server: Postgres, query: str) -> Any:
    with psycopg.connect(server.dsn(), autocommit=True) as connection:
        row = connection.execute(query.encode()).fetchone()
        return row[0] if row and len(row) == 1 else row


def _set(server: Postgres, name: str, value: str) -> None:
    """Change a setting of a server that runs."""
    with psycopg.connect(server.dsn(), autocommit=True) as connection:
        connection.execute("SET default_transaction_read_only = off")
        connection.execute(f"ALTER SYSTEM SET {name} = '{value}'".encode())
        connection.execute("SELECT pg_reload_conf()")
    _wait(lambda: _value(server, f"SHOW {name}") == value)


def _until_streaming(primary: Postgres) -> None:
    """Wait until the standby has all that was committed so far."""
    _wait(
        lambda: _value(
            primary,
            "SELECT coalesce(bool_and(replay_lsn >= pg_current_wal_lsn()), false)"
            " FROM pg_stat_replication WHERE state = 'streaming'",
        )
    )


def _exporter(*servers: Postgres) -> Exporter:
    hosts = ",".join("127.0.0.1" for _ in servers)
    ports = ",".join(str(server.port) for server in servers)
    database = DatabaseSettings(
        dsn=f"host={hosts} port={ports} user=postgres dbname=postgres target_session_attrs=read-write",
        connect_seconds=2.0,
        call_seconds=2.0,
        retry_max_seconds=0.2,
    )
    settings = Settings(node="gate", database=database)
    return Exporter(replace(settings, batch=BatchSettings(max_seconds=0.05)))


def _wait_written(exporter: Exporter, count: int) -> None:
    _wait(lambda: exporter.status()["written"] >= count)


class _Load:
    """Logs requests in the background inside the `with` block; `sent` is how many."""

    def __init__(self, exporter: Exporter) -> None:
        self.sent = 0
        self._exporter = exporter
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(0.001):
            assert self._exporter.log_access(make_exchange(self.sent))
            self.sent += 1


def _log_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The messages about the database, each without its details."""
    found = [record.getMessage() for record in caplog.records]
    return [text.split(";")[0].split(" after ")[0] for text in found if "PostgreSQL" in text]


_ONE_EVENT = [
    "artifactapi: PostgreSQL unavailable",
    "artifactapi: PostgreSQL available again",
]


def test_synchronous_failover_under_load_loses_and_doubles_nothing(
    primary: Postgres, standby: Postgres, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    _set(primary, "synchronous_standby_names", "*")
    exporter = _exporter(primary, standby)
    try:
        with _Load(exporter) as load:
            _wait(lambda: exporter.status()["written"] > 300)
            primary.kill()
            _wait(lambda: exporter.status()["away"])
            standby.promote()
            _wait(lambda: not exporter.status()["away"])
            goal = load.sent + 100
            _wait(lambda: exporter.status()["written"] > goal)
        _wait(lambda: exporter.status()["written"] == load.sent)
    finally:
        stopped = exporter.stop()
    assert stopped
    assert _value(standby, _ROWS) == (load.sent, load.sent)
    assert _value(standby, "SELECT sum(rows)::int FROM access_log_run_day") == load.sent
    assert call("--dsn", standby.dsn(), "audit").returncode == 0
    assert _log_of(caplog) == _ONE_EVENT, caplog.text


def test_audit_finds_the_rows_that_an_asynchronous_failover_has_lost(
    primary: Postgres, standby: Postgres, caplog: pytest.LogCaptureFixture
) -> None:
    exporter = _exporter(primary, standby)
    try:
        for number in range(100):
            exporter.log_access(make_exchange(number))
        _wait(lambda: exporter.status()["written"] == 100)
        _until_streaming(primary)
        standby.stop()  # it lags behind
        for number in range(100, 150):
            exporter.log_access(make_exchange(number))
        _wait(lambda: exporter.status()["written"] == 150)
        primary.kill()
        standby.start()
        standby.promote()
        for number in range(150, 180):
            exporter.log_access(make_exchange(number))
        _wait(lambda: exporter.status()["written"] == 180)
    finally:
        stopped = exporter.stop()
    assert stopped, "as far as the proxy knows"
    assert _value(standby, _ROWS) == (130, 130)
    done = call("--dsn", standby.dsn(), "audit")
    assert done.returncode == 1
    lost = "50 rows were lost by the server after it had confirmed them, as in a failover"
    assert done.stdout.splitlines() == [
        f"Not complete: in the whole log, {lost}.",
        "gate: 180 requests seen; 130 rows found; 50 lost by the server; no gaps",
    ]
    assert "PostgreSQL has lost 50 rows that it had confirmed" in caplog.text


def test_run_that_ended_before_an_asynchronous_failover_is_not_known_to_be_complete(
    primary: Postgres, standby: Postgres
) -> None:
    exporter = _exporter(primary, standby)
    exporter.log_access(make_exchange(1))
    _wait(lambda: exporter.status()["written"] == 1)
    _until_streaming(primary)
    standby.stop()
    exporter.log_access(make_exchange(2))
    assert exporter.stop()
    primary.kill()
    standby.start()
    standby.promote()
    with psycopg.connect(standby.dsn(), autocommit=True) as owner:  # as after a minute
        owner.execute("UPDATE access_log_run SET last_seen_at = last_seen_at - interval '1 minute'")
    done = call("--dsn", standby.dsn(), "audit")
    assert (done.returncode, done.stdout.startswith("Not known:")) == (2, True), done


def test_read_only_server_is_an_outage_until_it_accepts_writes_again(
    primary: Postgres, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    exporter = _exporter(primary)
    try:
        with _Load(exporter) as load:
            _wait(lambda: exporter.status()["written"] > 50)
            _set(primary, "default_transaction_read_only", "on")
            _wait(lambda: exporter.status()["away"])
            _wait(lambda: exporter.status()["spooled"] > 50)
            _set(primary, "default_transaction_read_only", "off")
            _wait(lambda: not exporter.status()["away"])
        _wait(lambda: exporter.status()["written"] == load.sent)
    finally:
        stopped = exporter.stop()
    assert stopped
    assert _value(primary, _ROWS) == (load.sent, load.sent)
    assert call("--dsn", primary.dsn(), "audit").returncode == 0
    assert _log_of(caplog) == _ONE_EVENT, caplog.text


def test_proxy_leaves_a_primary_that_was_demoted_and_returns(
    primary: Postgres, standby: Postgres, caplog: pytest.LogCaptureFixture
) -> None:
    """A planned switchover: the primary is stopped, has sent all that it has, and comes back as a standby."""
    caplog.set_level("INFO")
    exporter = _exporter(primary, standby)
    try:
        with _Load(exporter) as load:
            _wait(lambda: exporter.status()["written"] > 50)
            for old, new in ((primary, standby), (standby, primary)):
                old.stop("fast")
                new.promote()
                _wait(lambda: not exporter.status()["away"])
                old.configure(primary_conninfo=f"'host=127.0.0.1 port={new.port} user=postgres'")
                (old.data / "standby.signal").touch()
                old.start()
                _until_streaming(new)
                _wait_written(exporter, load.sent + 50)
        _wait(lambda: exporter.status()["written"] == load.sent)
    finally:
        stopped = exporter.stop()
    assert stopped
    assert _value(primary, _ROWS) == (load.sent, load.sent)
    assert _log_of(caplog) == 2 * _ONE_EVENT, caplog.text
