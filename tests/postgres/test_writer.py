"""The writer with a real Postgres: when it writes, what it counts, how it stops."""

from __future__ import annotations

import socket
import stat
import time
from typing import TYPE_CHECKING

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
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from exporter import AccessLogEntry
    from exporter.write.database import Rejection
    from tests.support.postgres import Postgres

    Query = Callable[..., list[tuple[object, ...]]]

_COUNT = "SELECT count(*) FROM access_log"


def settings(dsn: str, **sections: object) -> Settings:
    return replace(Settings(node="test").with_dsn(dsn), **sections)


def sum_of_parts(status: dict[str, int]) -> int:
    return sum(status[k] for k in ("written", "dropped", "rejected", "waiting", "spooled"))


def test_a_single_entry_is_there_within_two_seconds(dsn: str, query: Query) -> None:
    exporter = Exporter(settings(dsn))
    eventually(lambda: query("SELECT to_regclass('access_log') IS NOT NULL") == [(True,)])
    started = time.monotonic()
    exporter.log_access(make_exchange())
    eventually(lambda: query(_COUNT) == [(1,)], timeout=10)
    assert time.monotonic() - started < 3  # two and the commit, on a busy machine
    assert exporter.stop()


def test_127_entries_wait_for_the_time_and_128_go_at_once(dsn: str, query: Query) -> None:
    exporter = Exporter(settings(dsn, batch=BatchSettings(max_seconds=3600)))
    eventually(lambda: query("SELECT to_regclass('access_log') IS NOT NULL") == [(True,)])
    for number in range(127):
        exporter.log_access(make_exchange(number))
    with pytest.raises(AssertionError):
        eventually(lambda: exporter.status()["written"], timeout=0.5)
    exporter.log_access(make_exchange(127))
    eventually(lambda: query(_COUNT) == [(128,)])
    assert exporter.stop()


def test_127_entries_go_when_their_time_comes(dsn: str, query: Query) -> None:
    exporter = Exporter(settings(dsn, batch=BatchSettings(max_seconds=0.2)))
    for number in range(127):
        exporter.log_access(make_exchange(number))
    eventually(lambda: query(_COUNT) == [(127,)] if exporter.status()["written"] else False)
    assert exporter.stop()


def test_a_thousand_entries_come_in_order_once_each(dsn: str, query: Query) -> None:
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


def test_the_counters_add_up_at_every_moment(dsn: str) -> None:
    exporter = Exporter(settings(dsn, buffer=BufferSettings(max_entries=300)))
    for number in range(3000):
        exporter.log_access(make_exchange(number, flow_id="", started_at=float(number % 900)))
        status = exporter.status()
        assert sum_of_parts(status) == status["seen"] == number + 1
        assert status["waiting"] >= 0
    exporter.stop()
    status = exporter.status()
    assert status["waiting"] == 0
    assert status["seen"] == 3000 == status["written"] + status["dropped"]


def test_a_full_buffer_drops_the_newest_and_counts(dsn: str, query: Query) -> None:
    bounds = {"buffer": BufferSettings(max_entries=10), "batch": BatchSettings(max_seconds=3600)}
    exporter = Exporter(settings(dsn, **bounds))
    eventually(lambda: query("SELECT to_regclass('access_log') IS NOT NULL") == [(True,)])
    taken = [exporter.log_access(make_exchange(number)) for number in range(25)]
    assert taken == [True] * 10 + [False] * 15
    assert exporter.stop()
    assert query("SELECT flow_id::text FROM access_log ORDER BY started_at") == [
        (make_exchange(number).flow_id,) for number in range(10)
    ]
    assert exporter.status()["dropped"] == 15
    (gap,) = query("SELECT node, from_at, to_at, reason, entries FROM access_log_gap")
    assert gap[0] == "test"
    assert gap[3:] == ("buffer_full", 15)
    assert [f"{at:%S.%f}" for at in gap[1:3]] == ["20.010000", "20.024000"]


def test_entries_wait_for_a_postgres_that_is_away(
    dsn: str, query: Query, postgres: Postgres, home: Path
) -> None:
    retry = DatabaseSettings(dsn=dsn, retry_max_seconds=0.2)
    away = replace(retry, dsn=dsn.replace(str(postgres.port), "1"))
    exporter = Exporter(settings(dsn, database=away))
    for number in range(200):
        exporter.log_access(make_exchange(number))
    eventually(
        lambda: exporter.status()["spooled"] >= 128
    )  # on disk, where no crash can reach them
    assert exporter.status()["written"] == 0
    (file,) = (home / "spool").rglob("*.spool")
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    exporter.reconfigure(settings(dsn, database=retry))  # a new DSN takes effect without a restart
    eventually(lambda: exporter.status()["written"] == 200)
    assert query(_COUNT) == [(200,)]
    assert exporter.stop()
    assert list((home / "spool").iterdir()) == []


def test_entries_wait_in_memory_where_the_disk_may_not_be_used(
    dsn: str, postgres: Postgres, query: Query
) -> None:
    database = DatabaseSettings(dsn=dsn, retry_max_seconds=0.2)
    memory = settings(dsn, spool=SpoolSettings(max_bytes=0), buffer=BufferSettings(max_entries=300))
    exporter = Exporter(
        replace(memory, database=replace(database, dsn=dsn.replace(str(postgres.port), "1")))
    )
    eventually(lambda: exporter.status()["last_error"])
    for number in range(1000):
        exporter.log_access(make_exchange(number))
    eventually(lambda: exporter.status()["retries"] > 2)
    status = exporter.status()
    assert 300 <= status["waiting"] <= 300 + 128
    exporter.reconfigure(replace(memory, database=database))
    eventually(lambda: exporter.status()["waiting"] == 0)
    assert exporter.stop()
    assert query(_COUNT)[0][0] == exporter.status()["written"]
    assert query("SELECT sum(entries), min(reason), max(reason) FROM access_log_gap") == [
        (exporter.status()["dropped"], "buffer_full", "buffer_full")
    ]


def test_a_stop_without_postgres_goes_to_disk_and_the_next_run_writes_it(
    dsn: str, query: Query, home: Path
) -> None:
    away = settings("host=127.0.0.1 port=1", shutdown=ShutdownSettings(drain_seconds=1))
    exporter = Exporter(away)
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


def test_a_stop_without_postgres_and_disk_is_bounded_and_counts_what_is_lost() -> None:
    nowhere = settings("host=127.0.0.1 port=1", shutdown=ShutdownSettings(drain_seconds=0.5))
    exporter = Exporter(replace(nowhere, spool=SpoolSettings(max_bytes=0)))
    for number in range(300):
        exporter.log_access(make_exchange(number))
    started = time.monotonic()
    assert not exporter.stop()
    assert time.monotonic() - started < 2
    status = exporter.status()
    assert (status["seen"], status["dropped"], status["waiting"]) == (300, 300, 0)


def test_a_stop_counts_a_full_buffer_that_there_is_no_time_to_write() -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        port = deaf.getsockname()[1]
        exporter = Exporter(
            settings(
                f"host=127.0.0.1 port={port} user=nobody",
                spool=SpoolSettings(max_bytes=0),
                shutdown=ShutdownSettings(drain_seconds=0.5),
            )
        )
        for number in range(50_000):
            wheel = b"/packages/demo_%d-1.0-py3-none-any.whl" % number
            exporter.log_access(make_exchange(number, host="pypi.example", target=wheel))
        assert not exporter.stop()
    status = exporter.status()
    assert (status["seen"], status["dropped"], status["waiting"]) == (50_000, 50_000, 0)


def test_a_stop_counts_what_there_was_no_time_to_bring_to_disk() -> None:
    nowhere = "host=127.0.0.1 port=1 user=nobody"
    exporter = Exporter(settings(nowhere, shutdown=ShutdownSettings(drain_seconds=0.2)))
    for number in range(60_000):
        wheel = b"/packages/demo_%d-1.0-py3-none-any.whl" % number
        exporter.log_access(make_exchange(number, host="pypi.example", target=wheel))
    assert not exporter.stop()
    status = exporter.status()
    assert status["waiting"] == 0
    assert status["spooled"] > 0
    assert status["spooled"] + status["dropped"] == 60_000


def test_a_stop_at_a_locked_table_is_bounded(dsn: str, query: Query) -> None:
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


def test_a_rejected_entry_is_counted_and_reported_once_a_kind(
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


def test_pauses_double_to_the_longest_with_chance_in_the_upper_half() -> None:
    bounds = DatabaseSettings(retry_min_seconds=0.1, retry_max_seconds=1.0)
    for pause, longest in zip(retry_delays(bounds), [0.1, 0.2, 0.4, 0.8, 1.0, 1.0], strict=False):
        assert longest / 2 <= pause <= longest


def test_a_bug_of_ours_is_said_once_and_the_batch_is_kept(
    dsn: str, query: Query, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    exporter = Exporter(settings(dsn, batch=BatchSettings(max_seconds=0.05)))
    eventually(lambda: query("SELECT to_regclass('access_log') IS NOT NULL") == [(True,)])
    write, failures = Database.write, iter(range(3))

    def fail_thrice(self: Database, entries: Sequence[AccessLogEntry]) -> list[Rejection]:
        if next(failures, None) is not None:
            raise SystemExit(1)
        return write(self, entries)

    monkeypatch.setattr(Database, "write", fail_thrice)
    exporter.log_access(make_exchange())
    eventually(lambda: query(_COUNT) == [(1,)])
    assert exporter.stop()
    assert exporter.status()["failures"] == 3
    assert len([r for r in caplog.records if "internal error; the log goes on" in r.message]) == 1


def test_an_exchange_nobody_can_read_costs_itself_alone(dsn: str, query: Query) -> None:
    exporter = Exporter(settings(dsn))
    for number in range(3):
        exporter.log_access(make_exchange(number, host=None if number == 1 else "host.example"))
    exporter.count_unreadable(1.7e9)
    assert not exporter.stop() or exporter.status()["rejected"] == 1
    assert query(_COUNT) == [(2,)]
    assert query("SELECT reason, sum(entries) FROM access_log_gap GROUP BY 1") == [
        ("unreadable", 2)
    ]
    assert sum_of_parts(exporter.status()) == exporter.status()["seen"] == 4


def test_other_settings_take_effect_also_where_a_file_they_name_is_wrong_by_now(
    dsn: str, postgres: Postgres, query: Query, tmp_path: Path
) -> None:
    file = tmp_path / "remotes.yaml"
    file.write_text("remotes: []\n")
    batch, remotes = BatchSettings(max_seconds=0.05), RemotesSettings(file=str(file))
    with temporary_schema(postgres) as elsewhere:
        exporter = Exporter(settings(elsewhere, batch=batch, remotes=remotes))
        eventually(lambda: exporter.log_access(make_exchange(1)))
        eventually(lambda: exporter.status()["written"] == 1)
        file.write_text("remotes: {\n")
        exporter.reconfigure(settings(dsn, batch=batch, remotes=remotes))
        eventually(lambda: exporter.status()["failures"] == 1)
        exporter.log_access(make_exchange(2))
        eventually(lambda: exporter.status()["written"] == 2)
        assert exporter.stop()
    assert query("SELECT left(flow_id::text, 8) FROM access_log") == [("00000002",)]


def test_a_thread_that_is_gone_is_started_again(
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


def test_postgres_is_not_called_back_before_it_has_answered(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    nowhere = DatabaseSettings(dsn="host=127.0.0.1 port=1", retry_max_seconds=0.1)
    exporter = Exporter(Settings(database=nowhere, shutdown=ShutdownSettings(drain_seconds=0.5)))
    eventually(lambda: exporter.status()["retries"] > 3)
    exporter.log_access(make_exchange())
    exporter.stop()
    texts = [record.getMessage() for record in caplog.records]
    assert sum("PostgreSQL unavailable" in text for text in texts) == 1
    assert not any("available again" in text for text in texts)


def test_an_idle_disconnect_is_not_an_outage(
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


def test_a_changed_cause_is_logged_at_once_and_the_error_is_cleared_after_recovery(
    dsn: str, postgres: Postgres, caplog: pytest.LogCaptureFixture
) -> None:
    quick = {"retry_max_seconds": 0.1, "connect_seconds": 1.0}
    nobody = DatabaseSettings(dsn="host=127.0.0.1 port=1", **quick)  # type: ignore[arg-type]
    base = Settings(node="test", batch=BatchSettings(max_seconds=0.05))
    exporter = Exporter(msgspec.structs.replace(base, database=nobody))
    exporter.log_access(make_exchange())
    eventually(lambda: exporter.status()["retries"] > 2)
    assert exporter.status()["last_error_at"] is not None
    stranger = DatabaseSettings(dsn=f"{postgres.dsn()} user=nobody_at_all", **quick)  # type: ignore[arg-type]
    exporter.reconfigure(msgspec.structs.replace(base, database=stranger))
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


def test_rows_on_disk_wait_for_the_database_they_were_meant_for(
    dsn: str, query: Query, caplog: pytest.LogCaptureFixture
) -> None:
    nobody = DatabaseSettings(dsn="host=127.0.0.1 port=1 dbname=logs", retry_max_seconds=0.1)
    before = Exporter(Settings(node="test", database=nobody))
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
