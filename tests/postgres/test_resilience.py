"""Test outages of PostgreSQL: no row is lost or duplicated, and every call ends by its deadline."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import threading
import time
from typing import TYPE_CHECKING

import psutil
import psycopg
import pytest
from msgspec.structs import replace

from exporter import Exporter, Settings
from exporter.postgres.connection import connect
from exporter.settings import BatchSettings, DatabaseSettings, ShutdownSettings
from exporter.write.database import Database, DatabaseUnavailable
from tests.support.certificates import certificate
from tests.support.postgres import Postgres, available
from tests.support.relay import Relay
from tests.support.samples import make_entry, make_exchange
from tests.support.wait import eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    Query = Callable[..., list[tuple[object, ...]]]

pytestmark = pytest.mark.slow

_COUNT = "SELECT count(*), count(DISTINCT flow_id) FROM access_log"
_SLACK_SECONDS = 0.2  # how much later than its deadline a call may end
_NOISE_SECONDS = 0.5  # extra delay on a busy machine


@pytest.fixture
def relay(postgres: Postgres) -> Iterator[Relay]:
    with Relay(("127.0.0.1", postgres.port), postgres=True) as relay:
        yield relay


def through(relay: Relay, dsn: str, postgres: Postgres, **changes: float) -> DatabaseSettings:
    """Return settings that connect through the relay."""
    dsn = dsn.replace(f"port={postgres.port}", f"port={relay.address[1]}")
    bounds = DatabaseSettings(dsn=dsn, call_seconds=1.0, connect_seconds=1.0, retry_max_seconds=0.2)
    return replace(bounds, **changes)


def write_with_retries(database: Database, entries: list[object]) -> int:
    """Write until it succeeds and return the number of attempts."""
    for attempt in range(1, 20):
        try:
            assert database.write(entries) == []  # type: ignore[arg-type]
        except DatabaseUnavailable:
            continue
        return attempt
    raise AssertionError("not written in twenty attempts")


@pytest.mark.parametrize("direction", ["to_server", "to_client"])
@pytest.mark.parametrize("fault", ["cut", "cut inside", "swallow"])
def test_connection_lost_at_any_message_neither_loses_nor_duplicates_rows(
    dsn: str, query: Query, postgres: Postgres, relay: Relay, direction: str, fault: str
) -> None:
    """Break the connection at each message: before COPY, during it, after CommandComplete, and so on."""
    database = Database(through(relay, dsn, postgres, call_seconds=0.5))
    database.open()
    interrupted = 0  # writes that the fault hit
    for batch in range(40):
        entries = [make_entry(batch * 100 + n) for n in range(10)]
        if fault == "swallow":
            relay.swallow_from_message(direction, batch)  # type: ignore[arg-type]
        else:
            relay.cut_at_message(direction, batch, inside=fault == "cut inside")  # type: ignore[arg-type]
        reconnects = database.reconnects
        attempts = write_with_retries(database, entries)  # type: ignore[arg-type]
        attempts += database.reconnects - reconnects
        assert query(_COUNT) == [(batch * 10 + 10, batch * 10 + 10)]
        relay.mend()
        interrupted += attempts > 1
        if attempts == 1 and batch > 3:
            break  # a write has no more messages
    database.close()
    assert interrupted >= 2


@pytest.mark.parametrize("fault", ["blackhole", "zero_window"])
def test_write_over_a_stalled_connection_ends_at_its_deadline(
    dsn: str, query: Query, postgres: Postgres, relay: Relay, fault: str
) -> None:
    database = Database(through(relay, dsn, postgres))
    database.open()
    getattr(relay, fault)()
    started = time.monotonic()
    with pytest.raises(DatabaseUnavailable, match="in time"):
        database.write([make_entry(n, path="x" * 2000) for n in range(128)])
    assert time.monotonic() - started < 1.0 + _SLACK_SECONDS + _NOISE_SECONDS
    started = time.monotonic()
    with pytest.raises(DatabaseUnavailable):  # this time, connecting hangs
        database.write([make_entry(1)])
    assert time.monotonic() - started < 1.0 + _SLACK_SECONDS + _NOISE_SECONDS
    relay.mend()
    write_with_retries(database, [make_entry(n, path="x" * 2000) for n in range(128)])
    database.close()
    assert query(_COUNT) == [(128, 128)]


def test_write_to_a_frozen_server_ends_at_its_deadline(own_postgres: Postgres) -> None:
    bounds = DatabaseSettings(dsn=own_postgres.dsn(), call_seconds=1.0, connect_seconds=1.0)
    database = Database(bounds)
    database.open()
    postmaster = psutil.Process(own_postgres.pid)
    processes = [postmaster, *postmaster.children()]
    for process in processes:
        process.send_signal(signal.SIGSTOP)
    try:
        for _ in range(2):  # first the write, then connecting
            started = time.monotonic()
            with pytest.raises(DatabaseUnavailable):
                database.write([make_entry(1)])
            assert time.monotonic() - started < 1.0 + _SLACK_SECONDS + _NOISE_SECONDS
    finally:
        for process in processes:
            process.send_signal(signal.SIGCONT)
    write_with_retries(database, [make_entry(1)])
    database.close()
    assert _query_row(own_postgres, _COUNT) == (1, 1)


def test_connecting_to_a_silent_server_ends_at_its_deadline() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent_server:
        bounds = DatabaseSettings(
            dsn=f"host=127.0.0.1 port={silent_server.getsockname()[1]}", connect_seconds=0.5
        )
        started = time.monotonic()
        with pytest.raises(DatabaseUnavailable, match="in time"):
            Database(bounds).write([make_entry(1)])
        assert time.monotonic() - started < 0.5 + _SLACK_SECONDS + _NOISE_SECONDS


def test_connecting_with_a_slow_dns_lookup_ends_at_its_deadline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    release = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: release.wait(30) and [])
    database = Database(DatabaseSettings(dsn="host=db.example dbname=x", connect_seconds=0.5))
    started = time.monotonic()
    with pytest.raises(DatabaseUnavailable, match="in time"):
        database.write([make_entry(1)])
    assert time.monotonic() - started < 0.5 + _SLACK_SECONDS + _NOISE_SECONDS
    release.set()


@pytest.mark.parametrize("fault", ["cut", "blackhole", "zero_window", "locked"])
def test_stop_is_bounded_and_loses_no_row_during_any_fault(
    dsn: str, query: Query, postgres: Postgres, relay: Relay, fault: str
) -> None:
    settings = Settings(
        node="test",
        database=through(relay, dsn, postgres, call_seconds=8.0, connect_seconds=5.0),
        batch=BatchSettings(max_seconds=0.05),
        shutdown=ShutdownSettings(drain_seconds=1.0),
    )
    exporter = Exporter(settings)
    exporter.log_access(make_exchange(0))
    eventually(lambda: exporter.status()["written"] == 1)
    with psycopg.connect(dsn) as other:
        if fault == "locked":
            other.execute("LOCK TABLE access_log")
        else:
            getattr(relay, fault)()
        for number in range(1, 1001):
            exporter.log_access(make_exchange(number))
        started = time.monotonic()
        exporter.stop()
        assert time.monotonic() - started < 1.0 + 1.0 + _NOISE_SECONDS
    status = exporter.status()
    assert (status["waiting"], status["dropped"]) == (0, 0)
    assert status["written"] + status["spooled"] == 1001
    relay.mend()
    after = Exporter(settings)
    eventually(lambda: query(_COUNT) == [(1001, 1001)])
    assert after.stop()


def test_slow_connection_only_delays_the_write(
    dsn: str, query: Query, postgres: Postgres, relay: Relay
) -> None:
    database = Database(through(relay, dsn, postgres, call_seconds=20.0, connect_seconds=20.0))
    relay.delay(0.05)
    assert database.write([make_entry(n) for n in range(128)]) == []
    relay.trickle()
    assert database.write([make_entry(1000)]) == []
    database.close()
    assert query(_COUNT) == [(129, 129)]


def test_server_soon_detects_an_abandoned_session(dsn: str) -> None:
    with connect(dsn, Settings().database) as connection:
        shown = [
            connection.execute(f"SHOW {name}".encode()).fetchone()
            for name in ("tcp_keepalives_idle", "tcp_keepalives_interval", "tcp_keepalives_count")
        ]
        assert shown == [("15",), ("5",), ("2",)]
        assert connection.execute("SHOW client_connection_check_interval").fetchone() == ("5s",)


@pytest.fixture
def own_postgres() -> Iterator[Postgres]:
    """A server for this test only, which the test may break."""
    with Postgres(available()["18"]) as server:
        yield server


def _query_row(server: Postgres, sql: str) -> tuple[object, ...] | None:
    with psycopg.connect(server.dsn(), autocommit=True) as connection:
        return connection.execute(sql.encode()).fetchone()


def _exporter(dsn: str) -> Exporter:
    database = DatabaseSettings(
        dsn=dsn, connect_seconds=2.0, call_seconds=2.0, retry_max_seconds=0.2
    )
    return Exporter(Settings(node="test", database=database, batch=BatchSettings(max_seconds=0.05)))


def test_repeated_server_kills_lose_no_row(
    own_postgres: Postgres, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    exporter = _exporter(own_postgres.dsn())
    sent = 0
    for _ in range(3):
        written = exporter.status()["written"] + 50
        while exporter.status()["written"] < written:
            exporter.log_access(make_exchange(sent))
            sent += 1
            threading.Event().wait(0.002)
        own_postgres.kill()
        while exporter.status()["spooled"] < 50:
            exporter.log_access(make_exchange(sent))
            sent += 1
            threading.Event().wait(0.002)
        eventually(lambda: exporter.status()["away"])
        own_postgres.start()
        eventually(lambda: not exporter.status()["away"])
    eventually(lambda: exporter.status()["written"] == sent)
    assert exporter.stop()
    assert _query_row(own_postgres, _COUNT) == (sent, sent)
    assert _query_row(own_postgres, "SELECT count(*) FROM access_log_gap") == (0,)
    texts = [record.getMessage() for record in caplog.records]
    assert sum("PostgreSQL unavailable" in text for text in texts) == 3
    assert sum("available again" in text for text in texts) == 3


def test_refused_logins_and_writes_lose_no_row_and_log_no_password(
    own_postgres: Postgres, caplog: pytest.LogCaptureFixture
) -> None:
    admin = psycopg.connect(own_postgres.dsn(), autocommit=True)
    admin.execute("CREATE ROLE proxy LOGIN SUPERUSER PASSWORD 'right-s3cret'")
    rules = own_postgres.data / "pg_hba.conf"
    rules.write_text("host all proxy 127.0.0.1/32 scram-sha-256\n" + rules.read_text())
    admin.execute("SELECT pg_reload_conf()")
    wrong_password_dsn = own_postgres.dsn().replace(
        "user=postgres", "user=proxy password=wrong-s3cret"
    )
    exporter = _exporter(wrong_password_dsn)
    exporter.log_access(make_exchange(1))
    eventually(lambda: "password authentication failed" in (exporter.status()["last_error"] or ""))
    admin.execute("ALTER ROLE proxy PASSWORD 'wrong-s3cret'")
    eventually(lambda: exporter.status()["written"] == 1)
    for refuse, allow in (
        ("ALTER ROLE proxy SET default_transaction_read_only = on", "ALTER ROLE proxy RESET ALL"),
        (
            "ALTER ROLE proxy CONNECTION LIMIT 0 NOSUPERUSER",
            "ALTER ROLE proxy CONNECTION LIMIT -1 SUPERUSER",
        ),
        ("ALTER DATABASE postgres RENAME TO renamed", "ALTER DATABASE renamed RENAME TO postgres"),
    ):
        admin.close()
        admin = psycopg.connect(own_postgres.dsn("template1"), autocommit=True)
        _terminate_sessions(admin)
        admin.execute(refuse.encode())
        _terminate_sessions(admin)
        written = exporter.status()["written"]
        exporter.log_access(make_exchange(written + 10))
        eventually(lambda: exporter.status()["spooled"])
        admin.execute(allow.encode())
        eventually(lambda written=written: exporter.status()["written"] == written + 1)  # type: ignore[misc]
    admin.close()
    assert exporter.stop()
    assert "s3cret" not in caplog.text


def _terminate_sessions(admin: psycopg.Connection[tuple[object, ...]]) -> None:
    admin.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'artifactapi'"
    )


@pytest.fixture
def tls_postgres() -> Iterator[Postgres]:
    """A server from Debian's package, because the one in our dependency is built without TLS."""
    versions = {version: folder for version, folder in available().items() if version != "18"}
    if not versions:
        pytest.skip("no PostgreSQL with TLS; install Debian's postgresql")
    with Postgres(max(versions.items())[1]) as server:
        yield server


def test_certificate_of_another_host_is_rejected(tls_postgres: Postgres, tmp_path: Path) -> None:
    valid_dsn = _restart_with_certificate(tls_postgres, certificate(tmp_path, "good"))
    database = Database(DatabaseSettings(dsn=valid_dsn))
    assert database.write([make_entry(1)]) == []
    database.close()
    invalid_dsn = _restart_with_certificate(tls_postgres, certificate(tmp_path, "wrong-host"))
    with pytest.raises(DatabaseUnavailable, match="certificate"):
        Database(DatabaseSettings(dsn=invalid_dsn)).write([make_entry(2)])


def _restart_with_certificate(server: Postgres, pem: Path) -> str:
    """Restart the server with this certificate and return a connection string that verifies it."""
    file = server.data / pem.name
    shutil.copy(pem, file)
    file.chmod(0o600)
    os.chown(file, server.data.stat().st_uid, -1)
    server.configure(ssl="on", ssl_cert_file=f"'{pem.name}'", ssl_key_file=f"'{pem.name}'")
    server.stop()
    server.start()
    return f"{server.dsn(host='localhost')} sslmode=verify-full sslrootcert={pem}"


def test_full_disk_of_the_server_loses_no_row(own_postgres: Postgres, tmp_path: Path) -> None:
    """The table lies on an 8 MB file system that another file fills."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small file system")
    disk = tmp_path / "disk"
    disk.mkdir()
    for parent in disk.parents:
        if not parent.stat().st_mode & 0o001:
            parent.chmod(parent.stat().st_mode | 0o001)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", disk], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting a file system is not permitted on this machine")
    exporter = None
    try:
        os.chown(disk, own_postgres.data.stat().st_uid, -1)
        disk.chmod(0o700)
        with psycopg.connect(own_postgres.dsn(), autocommit=True) as admin:
            admin.execute(f"CREATE TABLESPACE small LOCATION '{disk}'".encode())
            admin.execute("ALTER ROLE postgres SET default_tablespace = small")
        exporter = _exporter(own_postgres.dsn())
        exporter.log_access(make_exchange(0))
        eventually(lambda: exporter.status()["written"] == 1)
        filler = disk / "filler"
        free = shutil.disk_usage(disk).free
        filler.write_bytes(bytes(free))
        for number in range(1, 1001):
            exporter.log_access(make_exchange(number, target=b"/" + b"x" * 2000))
        eventually(
            lambda: (
                "No space" in (exporter.status()["last_error"] or "")
                or exporter.status()["spooled"] > 500
            )
        )
        assert exporter.status()["rejected"] == 0
        filler.unlink()
        eventually(lambda: exporter.status()["written"] == 1001)
        assert exporter.stop()
        assert _query_row(own_postgres, _COUNT) == (1001, 1001)
    finally:
        if exporter is not None:
            exporter.stop()
        own_postgres.stop()
        subprocess.run(["umount", disk], check=True)
