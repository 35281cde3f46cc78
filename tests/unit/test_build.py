"""Test the row builder: worker and proxy build equal rows, and no row is lost without a worker."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import psutil
import pytest
from msgspec.structs import replace

from exporter import Exporter, Settings
from exporter.postgres.connection import Deadline
from exporter.rows.entry_builder import EntryBuilder
from exporter.settings import BatchSettings, RedactSettings, SpoolSettings
from exporter.write import build
from exporter.write.build import RowBuilder
from exporter.write.copy_batch import CopyBatch
from exporter.write.encoding import decode, encode
from tests.support.samples import make_entry, make_exchange
from tests.support.wait import eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from exporter import AccessLogEntry
    from exporter.write.encoding import Encoded

    Query = Callable[..., list[tuple[object, ...]]]

_SETTINGS = Settings(node="test").with_dsn("host=nowhere.example password=s3cret")


@pytest.fixture
def deadline() -> Deadline:
    return Deadline()


@pytest.fixture
def row_builder(deadline: Deadline) -> Iterator[RowBuilder]:
    builder = RowBuilder(_SETTINGS, deadline)
    yield builder
    builder.close()


def make_exchanges(count: int) -> list[Encoded]:
    """Return exchanges that cycle through every kind of value."""
    wheel = {"host": "pypi.example", "target": b"/packages/demo-1.0-py3-none-any.whl"}
    kinds: list[dict[str, object]] = [
        {},
        {"host": "caf\udce9.example", "proxy_user": "\ud800", "error": "no \x00 \udcff"},
        {"client": ("::1", 1, 0, 0), "server": None, "response_fields": ((b"age", b"5"),)},
        {"target": b"/\xff\tx\\N\n?a=1", "method": b"P\nOST", "user_agent": None},
        {**wheel, "user_agent": b"x" * 2000},
        {"client": ("/run/proxy.sock",), "port": 0, "ended_at": None, "status_code": None},
    ]
    return [encode(make_exchange(n, **kinds[n % len(kinds)])) for n in range(count)]


def test_worker_takes_epochs_from_an_index(row_builder: RowBuilder) -> None:
    index = b"Package: g++\nVersion: 4:13.2-1\nFilename: pool/main/g/gcc/g++_13.2-1_amd64.deb\n"
    host = {"host": "deb.debian.example", "port": 80, "scheme": b"http"}
    path = b"/debian/dists/sid/main/binary-amd64/by-hash/SHA256/" + b"0a" * 32
    file = b"/debian/pool/main/g/gcc/g%2b%2b_13.2-1_amd64.deb"
    first = make_exchange(1, **host, target=path, body=index)
    second = make_exchange(2, **host, target=file)

    for batch in ([first, second], [second]):
        result = row_builder.build([encode(exchange) for exchange in batch]).result()
        assert isinstance(result.entries, CopyBatch)  # of the worker
        entry = list(result.entries)[-1]
        assert (entry.version, entry.purl) == (
            "4:13.2-1",
            "pkg:deb/debian/g%2B%2B@4:13.2-1?arch=amd64",
        )


def build_locally(exchanges: list[Encoded], settings: Settings = _SETTINGS) -> list[AccessLogEntry]:
    """Return the expected entries, built in this process."""
    entry_builder = EntryBuilder(settings)
    return [entry_builder.build(decode(exchange)) for exchange in exchanges]


def pid_of(row_builder: RowBuilder) -> int:
    assert row_builder._worker is not None
    return row_builder._worker.pid


def test_worker_and_proxy_build_equal_rows(row_builder: RowBuilder) -> None:
    for count in (1, 128, 1000):
        exchanges = make_exchanges(count)
        pending = row_builder.build(exchanges)
        entries, unreadable = pending.result()
        assert isinstance(entries, CopyBatch)
        expected = CopyBatch.of(build_locally(exchanges))
        assert (expected.statement != b"") is (count > 1)  # larger batches contain artifacts
        assert [*entries] == [*expected]
        assert (entries.text, entries.statement, entries.days, len(entries), unreadable) == (
            expected.text,
            expected.statement,
            expected.days,
            count,
            [],
        )
    assert row_builder.failures == 0
    assert row_builder._pending is None


def test_worker_hashes_whole_bodies(row_builder: RowBuilder, tmp_path: Path) -> None:
    remotes = tmp_path / "remotes.yaml"
    remotes.write_text(
        "remotes:\n  - {name: mirror, host: mirror.example, path: /pypi, format: pypi}\n"
    )
    settings = replace(_SETTINGS, remotes=replace(_SETTINGS.remotes, file=str(remotes)))
    row_builder.reconfigure(settings)
    wheel = {"host": "mirror.example", "target": b"/pypi/packages/demo-1.0-py3-none-any.whl"}
    exchanges = [
        encode(make_exchange(1, body=b"", **wheel)),
        encode(make_exchange(2, **wheel)),
        encode(make_exchange(3, body=b"x" * 5_000_000, **wheel)),
    ]
    pending = row_builder.build(exchanges)
    entries, _ = pending.result()
    assert isinstance(entries, CopyBatch)
    assert [*entries] == build_locally(exchanges, settings)
    assert [entry.sha256 is not None for entry in entries] == [True, False, True]


@pytest.mark.slow
def test_killed_worker_loses_no_row(
    row_builder: RowBuilder, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "_RESTART_SECONDS", 0.0)
    monkeypatch.setattr(row_builder, "_restart_seconds", 0.0)
    for number in range(6):
        exchanges = make_exchanges(20 + number)
        row_builder.start_worker()
        if number % 2:
            os.kill(pid_of(row_builder), signal.SIGKILL)
        pending = row_builder.build(exchanges)
        if number == 4:
            os.kill(pid_of(row_builder), signal.SIGKILL)
        entries, unreadable = pending.result()
        assert [*entries] == build_locally(exchanges)
        assert not unreadable
    assert row_builder.failures >= 3  # in round 4 the answer may arrive before the kill
    assert 1 <= len([r for r in caplog.records if "worker process stopped" in r.message]) <= 4
    caplog.set_level("INFO")
    pending = row_builder.build(make_exchanges(3))
    assert isinstance(pending.result().entries, CopyBatch)
    assert "worker process restarted" in caplog.text


@pytest.mark.slow
def test_worker_that_does_not_answer_is_killed_at_its_timeout(row_builder: RowBuilder) -> None:
    pending = row_builder.build(make_exchanges(1))
    pending.result()
    os.kill(pid_of(row_builder), signal.SIGSTOP)
    exchanges = make_exchanges(10)
    started = time.monotonic()
    pending = row_builder.build(exchanges)
    entries, _ = pending.result()
    assert 1.9 < time.monotonic() - started < 4
    assert [*entries] == build_locally(exchanges)
    assert row_builder.failures == 1


@pytest.mark.slow
def test_worker_that_reads_nothing_is_killed_at_its_timeout(row_builder: RowBuilder) -> None:
    row_builder.start_worker()
    os.kill(pid_of(row_builder), signal.SIGSTOP)
    exchanges = [encode(make_exchange(1, body=b"x" * 50_000_000))]
    started = time.monotonic()
    pending = row_builder.build(exchanges)
    entries, _ = pending.result()
    assert time.monotonic() - started < 5  # 2 s to detect it; the rest allows for a busy machine
    assert [*entries] == build_locally(exchanges)


@pytest.mark.slow
def test_worker_gets_half_of_the_time_until_the_deadline(
    row_builder: RowBuilder, deadline: Deadline
) -> None:
    row_builder.start_worker()
    os.kill(pid_of(row_builder), signal.SIGSTOP)
    exchanges = make_exchanges(10)
    pending = row_builder.build(exchanges)
    started = time.monotonic()
    deadline.give_up_at = started + 3.0
    entries, _ = pending.result()
    assert 1.5 < time.monotonic() - started < 2.9
    assert [*entries] == build_locally(exchanges)


def test_worker_waits_without_a_loop_although_an_addon_has_set_a_default_timeout(
    row_builder: RowBuilder,
) -> None:
    socket.setdefaulttimeout(5.0)
    try:
        exchanges = make_exchanges(100)
        row_builder.build(exchanges).result()
    finally:
        socket.setdefaulttimeout(None)
    eventually(lambda: psutil.Process(pid_of(row_builder)).status() == psutil.STATUS_SLEEPING)
    large = [encode(make_exchange(n, target=b"/" + b"x" * 8000)) for n in range(1000)]
    entries, _ = row_builder.build(large).result()
    assert [*entries] == build_locally(large)
    assert row_builder.failures == 0


def test_what_cannot_be_sent_to_the_worker_is_built_without_it(row_builder: RowBuilder) -> None:
    exchanges: list[Encoded] = [encode(make_exchange(1)), (encode(make_exchange(2))[0], "body")]  # type: ignore[list-item]
    entries, unreadable = row_builder.build(exchanges).result()
    assert [entry.flow_id[:8] for entry in entries] == ["00000001", "00000002"]
    assert not unreadable
    assert row_builder.failures == 1


@pytest.mark.slow
def test_stop_writes_all_rows_although_the_worker_hangs(dsn: str, query: Query) -> None:
    without_spool = replace(_SETTINGS.with_dsn(dsn), spool=SpoolSettings(max_bytes=0))
    exporter = Exporter(without_spool)
    eventually(lambda: query("SELECT to_regclass('access_log') IS NOT NULL") == [(True,)])
    os.kill(pid_of(exporter._writer.builder), signal.SIGSTOP)
    for number in range(3000):
        exporter.log_access(make_exchange(number))
    started = time.monotonic()
    assert exporter.stop()
    assert time.monotonic() - started < 6
    assert query("SELECT count(*) FROM access_log") == [(3000,)]


def test_worker_does_not_run_code_that_changed_on_disk(
    row_builder: RowBuilder, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The proxy builds the rows, because a new version may order the columns differently."""
    monkeypatch.setattr(build, "_DIGEST", "digest of other code")
    exchanges = make_exchanges(10)
    pending = row_builder.build(exchanges)
    entries, _ = pending.result()
    assert [*entries] == build_locally(exchanges)
    assert not isinstance(entries, CopyBatch)
    assert "worker runs: the code on disk is not what the proxy has loaded; restart" in caplog.text


def test_reason_for_a_failed_worker_start_appears_only_in_the_log(
    row_builder: RowBuilder,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(build, "_CODE", "import missing_module")
    pending = row_builder.build(make_exchanges(1))
    entries, _ = pending.result()
    assert len(entries) == 1
    assert "worker runs: ModuleNotFoundError: No module named 'missing_module'" in caplog.text
    assert capfd.readouterr() == ("", "")


def test_proxy_builds_rows_if_the_interpreter_is_missing(
    row_builder: RowBuilder, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    for _ in range(3):
        exchanges = make_exchanges(10)
        pending = row_builder.build(exchanges)
        entries, _ = pending.result()
        assert [*entries] == build_locally(exchanges)
    assert row_builder.failures == 1  # not retried for every batch
    assert len([r for r in caplog.records if "No such file" in r.message]) == 1


def test_only_the_unreadable_exchange_of_a_batch_is_lost(row_builder: RowBuilder) -> None:
    exchanges = [encode(make_exchange(n, host=None if n == 2 else "h.example")) for n in (1, 2, 3)]
    pending = row_builder.build(exchanges)
    entries, unreadable = pending.result()
    assert isinstance(entries, CopyBatch)
    assert [entry.flow_id[:8] for entry in entries] == ["00000001", "00000003"]
    (failure,) = unreadable
    assert failure.kind == "AttributeError"
    assert "'NoneType' object has no attribute 'rpartition'" in failure.trace


def test_reconfigure_applies_to_pending_rows(row_builder: RowBuilder) -> None:
    exchanges = make_exchanges(10)
    pending = row_builder.build(exchanges)
    new_settings = replace(_SETTINGS, node="other", redact=RedactSettings(query="drop"))
    row_builder.reconfigure(new_settings)
    entries, _ = pending.result()
    assert isinstance(entries, CopyBatch)
    assert [*entries] == build_locally(exchanges, new_settings)


def test_worker_survives_signals_meant_for_the_proxy(row_builder: RowBuilder) -> None:
    pending = row_builder.build(make_exchanges(1))
    pending.result()  # the worker ignores signals from its first answer on
    pid = pid_of(row_builder)
    os.kill(pid, signal.SIGINT)
    os.kill(pid, signal.SIGTERM)
    os.kill(pid, signal.SIGHUP)
    assert os.getsid(pid) == pid  # its own session: Ctrl-C in a terminal does not reach it
    pending = row_builder.build(make_exchanges(1))
    assert isinstance(pending.result().entries, CopyBatch)
    assert pid_of(row_builder) == pid


def test_copy_batch_supports_index_slice_and_iteration() -> None:
    entries = [make_entry(number) for number in range(3)]
    batch = CopyBatch.of(entries)
    assert (batch[0], batch[1:], [*batch]) == (entries[0], entries[1:], entries)
    assert all(isinstance(entry, type(entries[0])) for entry in batch)


@pytest.mark.slow
def test_each_row_is_written_once_while_workers_are_killed_repeatedly(
    dsn: str, query: Query, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "_RESTART_SECONDS", 0.1)
    exporter = Exporter(replace(_SETTINGS.with_dsn(dsn), batch=BatchSettings(max_seconds=0.05)))
    proxy = psutil.Process()
    killed: set[int] = set()
    for number in range(20_000):
        exporter.log_access(make_exchange(number))
        if number % 500 == 0:
            for child in proxy.children():
                if child.pid not in killed and build._CODE in " ".join(child.cmdline()):
                    killed.add(child.pid)
                    child.kill()
            eventually(lambda: exporter.status()["waiting"] < 5_000)
    assert exporter.stop()
    assert len(killed) > 1
    status = exporter.status()
    assert (status["seen"], status["written"]) == (20_000, 20_000)
    assert status["failures"] > 0
    assert query("SELECT count(*), count(DISTINCT flow_id) FROM access_log") == [(20_000, 20_000)]


def test_worker_exits_when_the_proxy_is_killed(dsn: str, tmp_path: Path) -> None:
    script = tmp_path / "proxy.py"
    script.write_text(
        "import sys, time\n"
        "from exporter import Exporter, Settings\n"
        "exporter = Exporter(Settings().with_dsn(sys.argv[1]))\n"
        "print(flush=True)\n"
        "sys.stdin.read()\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(build._ROOT)}
    with subprocess.Popen(
        [sys.executable, script, dsn],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as proxy:
        (worker,) = eventually(psutil.Process(proxy.pid).children)
        proxy.kill()
    eventually(lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE)
