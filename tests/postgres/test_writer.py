"""Test the writer with a real PostgreSQL: batching, counters, retries and shutdown."""

from __future__ import annotations

import contextlib
import socket
import stat
import time
from typing import TYPE_CHECKING, Any

import msgspec
import psycopg
import pytest
from msgspec.structs import replace

from exporter import Exporter, Settings, redirect_spool, waiting_rows
from exporter.settings import (
    BatchSettings,
    BufferSettings,
    DatabaseSettings,
    RemotesSettings,
    ShutdownSettings,
    SpoolSettings,
)
from exporter.write.database import Database
from exporter.write.retry import retry_delays
from exporter.write.writer import Writer
from tests.support.access_log import temporary_schema
from tests.support.samples import make_exchange
from tests.support.wait import eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from exporter import AccessLogEntry
    from exporter.write.database import Rejection
    from tests.support.postgres import Postgres

    Query = Callable[..., list[tuple[object, ...]]]

pytestmark = pytest.mark.slow

_COUNT = "SELECT count(*) FROM access_log"


def settings(dsn: str, **sections: object) -> Settings:
    return replace(Settings(node="test").with_dsn(dsn), **sections)


def sum_of_outcomes(status: dict[str, int]) -> int:
    return sum(status[k] for k in ("written", "dropped", "rejected", "waiting", "spooled"))


@pytest.mark.slow
def test_single_entry_is_written_within_max_seconds(dsn: str, query: Query) -> None:
    exporter = Exporter(settings(dsn))
    eventually(lambda: query("SELECT to_regclass('access_log') IS NOT NULL") == [(True,)])
    started = time.monotonic()
    exporter.log_access(make_exchange())
    eventually(lambda: query(_COUNT) == [(1,)], timeout=10)
    # `max_seconds` is 2. The third second allows for the commit on a busy machine.
    assert time.monotonic() - started < 3
    assert exporter.stop()


def test_entry_128_fills_the_batch_and_triggers_the_write(dsn: str, query: Query) -> None:
    exporter = Exporter(settings(dsn, batch=BatchSettings(max_seconds=3600)))
    eventually(lambda: query("SELECT to_regclass('access_log') IS NOT NULL") == [(True,)])
    for number in range(127):
        exporter.log_access(make_exchange(number))
    with pytest.raises(AssertionError):
        eventually(lambda: exporter.status()["written"], timeout=0.5)
    exporter.log_access(make_exchange(127))
    eventually(lambda: query(_COUNT) == [(128,)])
    assert exporter.stop()


def test_partial_batch_is_written_after_max_seconds(dsn: str, query: Query) -> None:
    exporter = Exporter(settings(dsn, batch=BatchSettings(max_seconds=0.2)))
    for number in range(127):
        exporter.log_access(make_exchange(number))
    eventually(lambda: query(_COUNT) == [(127,)] if exporter.status()["written"] else False)
    assert exporter.stop()


def test_thousand_entries_are_written_once_in_order(dsn: str, query: Query) -> None:
    exporter = Exporter(settings(dsn))
    for number in range(1000):
        assert exporter.log_access(make_exchange(number, port=number + 1))
    assert exporter.stop()
    assert query("SELECT array_agg(port ORDER BY started_at) FROM access_log") == [
        (list(range(1, 1001)),)
    ]
    assert query(
        "SELECT max(n) FROM (SELECT count(*) AS n FROM access_log GROUP BY logged_at) AS t"
    ) <= [(128,)]
    status = exporter.status()
    assert (status["seen"], status["written"], status["waiting"]) == (1000, 1000, 0)


def test_counters_always_add_up_to_the_entries_seen(dsn: str) -> None:
    exporter = Exporter(settings(dsn, buffer=BufferSettings(max_entries=300)))
    for number in range(3000):
        exporter.log_access(make_exchange(number, flow_id="", started_at=float(number % 900)))
        status = exporter.status()
        assert sum_of_outcomes(status) == status["seen"] == number + 1
        assert status["waiting"] >= 0
    exporter.stop()
    status = exporter.status()
    assert status["waiting"] == 0
    assert status["seen"] == 3000 == status["written"] + status["dropped"]


def test_full_buffer_drops_new_entries_and_records_a_gap(dsn: str, query: Query) -> None:
    bounds = {"buffer": BufferSettings(max_entries=10), "batch": BatchSettings(max_seconds=3600)}
    exporter = Exporter(settings(dsn, **bounds))
    eventually(lambda: query("SELECT to_regclass('access_log') IS NOT NULL") == [(True,)])
    accepted = [exporter.log_access(make_exchange(number)) for number in range(25)]
    assert accepted == [True] * 10 + [False] * 15
    assert exporter.stop()
    assert query("SELECT flow_id::text FROM access_log ORDER BY started_at") == [
        (make_exchange(number).flow_id,) for number in range(10)
    ]
    assert exporter.status()["dropped"] == 15
    (gap,) = query("SELECT node, from_at, to_at, reason, entries FROM access_log_gap")
    assert gap[0] == "test"
    assert gap[3:] == ("buffer_full", 15)
    assert [f"{at:%S.%f}" for at in gap[1:3]] == ["20.010000", "20.024000"]


def test_entries_wait_on_disk_while_postgres_is_unavailable(
    dsn: str, query: Query, postgres: Postgres, home: Path
) -> None:
    reachable = DatabaseSettings(dsn=dsn, retry_max_seconds=0.2)
    unreachable = replace(reachable, dsn=dsn.replace(str(postgres.port), "1"))
    exporter = Exporter(settings(dsn, database=unreachable))
    for number in range(200):
        exporter.log_access(make_exchange(number))
    # A crash of the proxy cannot lose rows that are on disk.
    eventually(lambda: exporter.status()["spooled"] >= 128)
    assert exporter.status()["written"] == 0
    (file,) = (home / "spool").rglob("*.spool")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    # A new DSN takes effect without a restart.
    exporter.reconfigure(settings(dsn, database=reachable))
    eventually(lambda: exporter.status()["written"] == 200)
    assert query(_COUNT) == [(200,)]
    assert exporter.stop()
    assert list((home / "spool").iterdir()) == []


@pytest.mark.slow
def test_entries_wait_in_memory_if_the_spool_is_off(
    dsn: str, postgres: Postgres, query: Query
) -> None:
    database = DatabaseSettings(dsn=dsn, retry_max_seconds=0.2)
    without_spool = settings(
        dsn, spool=SpoolSettings(max_bytes=0), buffer=BufferSettings(max_entries=300)
    )
    exporter = Exporter(
        replace(without_spool, database=replace(database, dsn=dsn.replace(str(postgres.port), "1")))
    )
    eventually(lambda: exporter.status()["last_error"])
    for number in range(1000):
        exporter.log_access(make_exchange(number))
    eventually(lambda: exporter.status()["retries"] > 2)
    status = exporter.status()
    assert 300 <= status["waiting"] <= 300 + 128
    exporter.reconfigure(replace(without_spool, database=database))
    eventually(lambda: exporter.status()["waiting"] == 0)
    assert exporter.stop()
    assert query(_COUNT)[0][0] == exporter.status()["written"]
    assert query("SELECT sum(entries), min(reason), max(reason) FROM access_log_gap") == [
        (exporter.status()["dropped"], "buffer_full", "buffer_full")
    ]


def test_stop_without_postgres_spools_rows_for_the_next_run(
    dsn: str, query: Query, home: Path
) -> None:
    unreachable = settings("host=127.0.0.1 port=1", shutdown=ShutdownSettings(drain_seconds=1))
    exporter = Exporter(unreachable)
    for number in range(300):
        exporter.log_access(make_exchange(number))
    started = time.monotonic()
    assert exporter.stop()
    assert time.monotonic() - started < 2
    status = exporter.status()
    assert (status["spooled"], status["dropped"], status["waiting"]) == (300, 0, 0)
    assert redirect_spool(settings(dsn)) == 1  # the server is back, at another address
    following = Exporter(settings(dsn, batch=BatchSettings(max_seconds=0.1)))
    eventually(
        lambda: query(_COUNT) == [(300,)] if following.status()["recovered"] == 300 else False
    )
    assert following.status()["seen"] == following.status()["written"] == 0
    assert following.stop()
    assert list((home / "spool").iterdir()) == []


def test_stop_without_postgres_and_spool_is_bounded_and_counts_lost_rows() -> None:
    unreachable = settings("host=127.0.0.1 port=1", shutdown=ShutdownSettings(drain_seconds=0.5))
    exporter = Exporter(replace(unreachable, spool=SpoolSettings(max_bytes=0)))
    for number in range(300):
        exporter.log_access(make_exchange(number))
    started = time.monotonic()
    assert not exporter.stop()
    assert time.monotonic() - started < 2
    status = exporter.status()
    assert (status["seen"], status["dropped"], status["waiting"]) == (300, 300, 0)


@contextlib.contextmanager
def exporter_of_silent_server(drain_seconds: float) -> Iterator[Exporter]:
    """Yield an exporter without a spool, whose server accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield Exporter(
            settings(
                f"host=127.0.0.1 port={server.getsockname()[1]} user=nobody",
                spool=SpoolSettings(max_bytes=0),
                shutdown=ShutdownSettings(drain_seconds=drain_seconds),
            )
        )


@pytest.mark.slow
def test_stop_counts_buffered_rows_as_dropped_when_time_runs_out() -> None:
    with exporter_of_silent_server(drain_seconds=0.5) as exporter:
        for number in range(50_000):
            wheel = b"/packages/demo_%d-1.0-py3-none-any.whl" % number
            exporter.log_access(make_exchange(number, host="pypi.example", target=wheel))
        assert not exporter.stop()
    status = exporter.status()
    assert (status["seen"], status["dropped"], status["waiting"]) == (50_000, 50_000, 0)


@pytest.mark.slow
def test_stop_counts_what_cannot_be_read_when_time_runs_out() -> None:
    with exporter_of_silent_server(drain_seconds=0.4) as exporter:
        for number in range(20_000):
            changes = {} if number % 1000 else {"started_at": None}
            exporter.log_access(make_exchange(number, **changes))
        assert not exporter.stop()
    status = exporter.status()
    assert status["waiting"] == 0
    assert status["dropped"] + status["rejected"] == 20_000


def test_stop_counts_unspooled_rows_as_dropped_when_time_runs_out() -> None:
    unreachable_dsn = "host=127.0.0.1 port=1 user=nobody"
    exporter = Exporter(settings(unreachable_dsn, shutdown=ShutdownSettings(drain_seconds=0.2)))
    for number in range(60_000):
        wheel = b"/packages/demo_%d-1.0-py3-none-any.whl" % number
        exporter.log_access(make_exchange(number, host="pypi.example", target=wheel))
    assert not exporter.stop()
    status = exporter.status()
    assert status["waiting"] == 0
    assert status["spooled"] > 0
    assert status["spooled"] + status["dropped"] == 60_000


def test_import_waits_for_no_room_that_there_cannot_be() -> None:
    buffer = BufferSettings(max_bytes=65_536)
    exporter = Exporter(settings("host=127.0.0.1 port=1 user=nobody", buffer=buffer))
    try:
        started = time.monotonic()
        index = make_exchange(1, target=b"/debian/dists/sid/main/Packages", body=b"x" * 100_000)
        assert exporter.wait_for_room(index)  # without its body
        assert exporter.log_access(index)
        assert not exporter.wait_for_room(make_exchange(2, target=b"x" * 100_000))
        assert time.monotonic() - started < 5
    finally:
        exporter.stop()


def test_stop_is_bounded_while_the_table_is_locked(dsn: str, query: Query) -> None:
    exporter = Exporter(settings(dsn, shutdown=ShutdownSettings(drain_seconds=0.5)))
    eventually(lambda: query("SELECT to_regclass('access_log') IS NOT NULL") == [(True,)])
    with psycopg.connect(dsn) as other:
        other.execute("LOCK TABLE access_log")
        exporter.log_access(make_exchange())
        started = time.monotonic()
        assert exporter.stop()
        assert time.monotonic() - started < 2.5
    assert exporter.status()["spooled"] == 1


def test_stop_is_idempotent(dsn: str) -> None:
    exporter = Exporter(settings(dsn))
    exporter.log_access(make_exchange())
    assert exporter.stop()
    assert exporter.stop()


def test_rejected_rows_are_counted_and_each_kind_is_logged_once(
    dsn: str, query: Query, caplog: pytest.LogCaptureFixture
) -> None:
    exporter = Exporter(settings(dsn, batch=BatchSettings(max_seconds=0.1)))
    eventually(lambda: query("SELECT to_regclass('access_log') IS NOT NULL") == [(True,)])
    query("ALTER TABLE access_log ADD CONSTRAINT no_teapots CHECK (status_code <> 418)")
    for number in range(20):
        exporter.log_access(make_exchange(number, status_code=418 if number % 10 == 3 else 200))
    assert exporter.stop()
    assert query(_COUNT) == [(18,)]
    assert exporter.status()["rejected"] == 2
    assert query("SELECT reason, sum(entries) FROM access_log_gap GROUP BY 1") == [("rejected", 2)]
    assert len([r for r in caplog.records if "PostgreSQL rejected a row" in r.message]) == 1


def test_retry_delays_double_up_to_the_maximum_with_jitter() -> None:
    bounds = DatabaseSettings(retry_min_seconds=0.1, retry_max_seconds=1.0)
    for delay, limit in zip(retry_delays(bounds), [0.1, 0.2, 0.4, 0.8, 1.0, 1.0], strict=False):
        assert limit / 2 <= delay <= limit


@pytest.mark.slow
def test_internal_error_is_logged_once_and_the_batch_is_retried(
    dsn: str, query: Query, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    exporter = Exporter(settings(dsn, batch=BatchSettings(max_seconds=0.05)))
    eventually(lambda: query("SELECT to_regclass('access_log') IS NOT NULL") == [(True,)])
    write, failures = Database.write, iter(range(3))

    def fail_three_times(
        self: Database, entries: Sequence[AccessLogEntry], *origin: Any, **spooled: Any
    ) -> list[Rejection]:
        if next(failures, None) is not None:
            raise SystemExit(1)
        return write(self, entries, *origin, **spooled)

    monkeypatch.setattr(Database, "write", fail_three_times)
    exporter.log_access(make_exchange())
    eventually(lambda: query(_COUNT) == [(1,)])
    assert exporter.stop()
    assert exporter.status()["failures"] == 3
    assert len([r for r in caplog.records if "internal error; the log goes on" in r.message]) == 1


@pytest.mark.slow
def test_only_unreadable_exchanges_are_lost(dsn: str, query: Query) -> None:
    exporter = Exporter(settings(dsn))
    for number in range(3):
        exporter.log_access(make_exchange(number, host=None if number == 1 else "host.example"))
    exporter.count_unreadable(1.7e9)
    assert not exporter.stop() or exporter.status()["rejected"] == 1
    assert query(_COUNT) == [(2,)]
    assert query("SELECT reason, sum(entries) FROM access_log_gap GROUP BY 1") == [
        ("unreadable", 2)
    ]
    assert sum_of_outcomes(exporter.status()) == exporter.status()["seen"] == 4


@pytest.mark.slow
def test_new_settings_apply_even_if_the_remotes_file_is_now_invalid(
    dsn: str, postgres: Postgres, query: Query, tmp_path: Path
) -> None:
    file = tmp_path / "remotes.yaml"
    file.write_text("remotes: []\n")
    batch, remotes = BatchSettings(max_seconds=0.05), RemotesSettings(file=str(file))
    with temporary_schema(postgres) as first_dsn:
        exporter = Exporter(settings(first_dsn, batch=batch, remotes=remotes))
        eventually(lambda: exporter.log_access(make_exchange(1)))
        eventually(lambda: exporter.status()["written"] == 1)
        file.write_text("remotes: {\n")
        exporter.reconfigure(settings(dsn, batch=batch, remotes=remotes))
        eventually(lambda: exporter.status()["failures"] == 1)
        exporter.log_access(make_exchange(2))
        eventually(lambda: exporter.status()["written"] == 2)
        assert exporter.stop()
    assert query("SELECT left(flow_id::text, 8) FROM access_log") == [("00000002",)]


def test_ended_writer_thread_is_restarted(
    dsn: str, query: Query, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Writer, "_run", lambda _: None)
    exporter = Exporter(settings(dsn, batch=BatchSettings(max_seconds=0.05)))
    monkeypatch.undo()
    eventually(lambda: not exporter._writer._thread.is_alive())
    for number in range(200):
        exporter.log_access(make_exchange(number))
    eventually(lambda: exporter.status()["written"] == 200)
    assert query(_COUNT) == [(200,)]
    assert exporter.stop()


def test_available_again_is_not_logged_before_postgres_answers(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    unreachable = DatabaseSettings(dsn="host=127.0.0.1 port=1", retry_max_seconds=0.1)
    exporter = Exporter(
        Settings(database=unreachable, shutdown=ShutdownSettings(drain_seconds=0.5))
    )
    eventually(lambda: exporter.status()["retries"] > 3)
    exporter.log_access(make_exchange())
    exporter.stop()
    texts = [record.getMessage() for record in caplog.records]
    assert sum("PostgreSQL unavailable" in text for text in texts) == 1
    assert not any("available again" in text for text in texts)


@pytest.mark.slow
def test_disconnect_while_idle_is_not_an_outage(
    dsn: str, query: Query, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    exporter = Exporter(settings(dsn, batch=BatchSettings(max_seconds=0.05)))
    for number in range(3):
        exporter.log_access(make_exchange(number))
        eventually(lambda number=number: exporter.status()["written"] == number + 1)  # type: ignore[misc]
        query(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'artifactapi'"
        )
    exporter.log_access(make_exchange(3))
    eventually(lambda: exporter.status()["written"] == 4)
    status = exporter.status()
    assert exporter.stop()
    assert (status["away"], status["last_error"], status["retries"]) == (False, None, 3)
    assert not [r for r in caplog.records if r.levelname == "WARNING"]


@pytest.mark.slow
def test_changed_cause_is_logged_at_once_and_recovery_clears_the_error(
    dsn: str, postgres: Postgres, caplog: pytest.LogCaptureFixture
) -> None:
    short_timeouts = {"retry_max_seconds": 0.1, "connect_seconds": 1.0}
    unreachable = DatabaseSettings(dsn="host=127.0.0.1 port=1", **short_timeouts)  # type: ignore[arg-type]
    base = Settings(node="test", batch=BatchSettings(max_seconds=0.05))
    exporter = Exporter(msgspec.structs.replace(base, database=unreachable))
    exporter.log_access(make_exchange())
    eventually(lambda: exporter.status()["retries"] > 2)
    assert exporter.status()["last_error_at"] is not None
    unknown_user = DatabaseSettings(dsn=f"{postgres.dsn()} user=nobody_at_all", **short_timeouts)  # type: ignore[arg-type]
    exporter.reconfigure(msgspec.structs.replace(base, database=unknown_user))
    eventually(lambda: "nobody_at_all" in (exporter.status()["last_error"] or ""))
    eventually(lambda: exporter.status()["retries"] > 6)
    exporter.reconfigure(msgspec.structs.replace(base, database=DatabaseSettings(dsn=dsn)))
    eventually(lambda: exporter.status()["written"] == 1)
    eventually(lambda: exporter.status()["last_error"] is None)
    assert exporter.status()["last_error_at"] is None
    assert exporter.stop()
    texts = [record.getMessage() for record in caplog.records]
    assert sum("PostgreSQL unavailable" in text for text in texts) == 1
    assert sum("the cause changed" in text and "nobody_at_all" in text for text in texts) == 1


@pytest.mark.slow
def test_spooled_rows_wait_for_their_own_database(
    dsn: str, query: Query, caplog: pytest.LogCaptureFixture
) -> None:
    unreachable = DatabaseSettings(dsn="host=127.0.0.1 port=1 dbname=logs", retry_max_seconds=0.1)
    before = Exporter(Settings(node="test", database=unreachable))
    before.log_access(make_exchange(1))
    before.stop()
    assert before.status()["spooled"] == 1
    other = Exporter(settings(dsn, batch=BatchSettings(max_seconds=0.05)))
    other.log_access(make_exchange(2))
    eventually(lambda: other.status()["written"] == 1)
    assert other.stop()
    assert query(_COUNT) == [(1,)]
    (warning,) = [r.getMessage() for r in caplog.records if "wait on disk" in r.getMessage()]
    assert "127.0.0.1:1/logs" in warning
    assert "artifactapi spool --redirect" in warning
    assert redirect_spool(settings(dsn)) == 1
    after = Exporter(settings(dsn))
    eventually(lambda: query(_COUNT) == [(2,)])
    assert after.stop()
    assert waiting_rows(settings(dsn)) == []
