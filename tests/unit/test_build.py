"""The process that builds batches: what it says is what this one would, and without it nothing is lost."""

from __future__ import annotations

import os
import signal
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
from tests.support.samples import make_entry, make_exchange
from tests.support.wait import eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from exporter import AccessLogEntry, Exchange

    Query = Callable[..., list[tuple[object, ...]]]

_SETTINGS = Settings(node="test").with_dsn("host=nowhere.example password=s3cret")


@pytest.fixture
def deadline() -> Deadline:
    return Deadline()


@pytest.fixture
def row_builder(deadline: Deadline) -> Iterator[RowBuilder]:
    found = RowBuilder(_SETTINGS, deadline)
    yield found
    found.close()


def exchanges(count: int) -> list[Exchange]:
    """Some of each kind of value."""
    wheel = {"host": "pypi.example", "target": b"/packages/demo-1.0-py3-none-any.whl"}
    kinds: list[dict[str, object]] = [
        {},
        {"host": "caf\udce9.example", "proxy_user": "\ud800", "error": "no \x00 \udcff"},
        {"client": ("::1", 1, 0, 0), "server": None, "response_fields": ((b"age", b"5"),)},
        {"target": b"/\xff\tx\\N\n?a=1", "method": b"P\nOST", "user_agent": None},
        {**wheel, "size": 10**6},
        {"client": ("/run/proxy.sock",), "port": 0, "ended_at": None, "status_code": None},
    ]
    return [make_exchange(number, **kinds[number % len(kinds)]) for number in range(count)]


def here(found: list[Exchange], settings: Settings = _SETTINGS) -> list[AccessLogEntry]:
    own = EntryBuilder(settings)
    return [own.build(exchange) for exchange in found]


def pid_of(row_builder: RowBuilder) -> int:
    assert row_builder._worker is not None
    return row_builder._worker.pid


def test_the_process_says_what_this_one_would(row_builder: RowBuilder) -> None:
    for count in (1, 128, 1000):
        found = exchanges(count)
        pending = row_builder.build(found)
        entries, unreadable = pending.result()
        assert isinstance(entries, CopyBatch)
        expected = CopyBatch.of(here(found))
        assert (expected.statement != b"") is (count > 1)  # some of them are artifacts
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


def test_the_process_hashes_whole_bodies(row_builder: RowBuilder, tmp_path: Path) -> None:
    remotes = tmp_path / "remotes.yaml"
    remotes.write_text(
        "remotes:\n  - {name: mirror, host: mirror.example, path: /pypi, format: pypi}\n"
    )
    settings = replace(_SETTINGS, remotes=replace(_SETTINGS.remotes, file=str(remotes)))
    row_builder.reconfigure(settings)
    wheel = {"host": "mirror.example", "target": b"/pypi/packages/demo-1.0-py3-none-any.whl"}
    found = [
        make_exchange(1, body=b"", **wheel),
        make_exchange(2, **wheel),
        make_exchange(3, body=b"x" * 5_000_000, **wheel),
    ]
    pending = row_builder.build(found)
    entries, _ = pending.result()
    assert isinstance(entries, CopyBatch)
    assert [*entries] == here(found, settings)
    assert [entry.sha256 is not None for entry in entries] == [True, False, True]


def test_a_process_that_is_gone_costs_no_row(
    row_builder: RowBuilder, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "_RESTART_SECONDS", 0.0)
    monkeypatch.setattr(row_builder, "_restart_seconds", 0.0)
    for number in range(6):
        found = exchanges(20 + number)
        row_builder.start_worker()
        if number % 2:
            os.kill(pid_of(row_builder), signal.SIGKILL)
        pending = row_builder.build(found)
        if number == 4:
            os.kill(pid_of(row_builder), signal.SIGKILL)
        entries, unreadable = pending.result()
        assert [*entries] == here(found)
        assert not unreadable
    assert row_builder.failures >= 3  # number 4 may have been answered before
    assert 1 <= len([r for r in caplog.records if "worker process stopped" in r.message]) <= 4
    caplog.set_level("INFO")
    pending = row_builder.build(exchanges(3))
    assert isinstance(pending.result().entries, CopyBatch)
    assert "worker process restarted" in caplog.text


@pytest.mark.slow
def test_a_process_that_hangs_is_ended_in_time(row_builder: RowBuilder) -> None:
    pending = row_builder.build(exchanges(1))
    pending.result()
    os.kill(pid_of(row_builder), signal.SIGSTOP)
    found = exchanges(10)
    started = time.monotonic()
    pending = row_builder.build(found)
    entries, _ = pending.result()
    assert 1.9 < time.monotonic() - started < 4
    assert [*entries] == here(found)
    assert row_builder.failures == 1


@pytest.mark.slow
def test_a_process_that_takes_nothing_is_ended_in_time(row_builder: RowBuilder) -> None:
    row_builder.start_worker()
    os.kill(pid_of(row_builder), signal.SIGSTOP)
    found = [make_exchange(1, body=b"x" * 50_000_000)]
    started = time.monotonic()
    pending = row_builder.build(found)
    entries, _ = pending.result()
    assert time.monotonic() - started < 5  # two to notice, the rest for a busy machine
    assert [*entries] == here(found)


@pytest.mark.slow
def test_at_a_stop_it_gets_half_of_the_time(row_builder: RowBuilder, deadline: Deadline) -> None:
    row_builder.start_worker()
    os.kill(pid_of(row_builder), signal.SIGSTOP)
    found = exchanges(10)
    pending = row_builder.build(found)
    started = time.monotonic()
    deadline.give_up_at = started + 3.0
    entries, _ = pending.result()
    assert 1.5 < time.monotonic() - started < 2.9
    assert [*entries] == here(found)


@pytest.mark.slow
def test_a_stop_beside_a_process_that_hangs_writes_all(dsn: str, query: Query) -> None:
    memory = replace(_SETTINGS.with_dsn(dsn), spool=SpoolSettings(max_bytes=0))
    exporter = Exporter(memory)
    eventually(lambda: query("SELECT to_regclass('access_log') IS NOT NULL") == [(True,)])
    os.kill(pid_of(exporter._writer.builder), signal.SIGSTOP)
    for number in range(3000):
        exporter.log_access(make_exchange(number))
    started = time.monotonic()
    assert exporter.stop()
    assert time.monotonic() - started < 6
    assert query("SELECT count(*) FROM access_log") == [(3000,)]


def test_code_that_was_changed_on_disk_is_not_run(
    row_builder: RowBuilder, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new version may order a row's columns in another way."""
    monkeypatch.setattr(build, "_DIGEST", "what was loaded")
    found = exchanges(10)
    pending = row_builder.build(found)
    entries, _ = pending.result()
    assert [*entries] == here(found)
    assert not isinstance(entries, CopyBatch)
    assert "worker runs: the code on disk is not what the proxy has loaded; restart" in caplog.text


def test_why_it_did_not_start_is_said_in_the_log_and_nowhere_else(
    row_builder: RowBuilder,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(build, "_CODE", "import nowhere")
    pending = row_builder.build(exchanges(1))
    entries, _ = pending.result()
    assert len(entries) == 1
    assert "worker runs: ModuleNotFoundError: No module named 'nowhere'" in caplog.text
    assert capfd.readouterr() == ("", "")


def test_without_a_python_rows_are_built_here(
    row_builder: RowBuilder, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    for _ in range(3):
        found = exchanges(10)
        pending = row_builder.build(found)
        entries, _ = pending.result()
        assert [*entries] == here(found)
    assert row_builder.failures == 1  # it is not tried again for each batch
    assert len([r for r in caplog.records if "No such file" in r.message]) == 1


def test_what_cannot_be_sent_is_built_here(row_builder: RowBuilder) -> None:
    class Odd(str):
        __slots__ = ()

    found = [make_exchange(1), make_exchange(2, host=Odd("odd.example"))]
    pending = row_builder.build(found)
    entries, unreadable = pending.result()
    assert [entry.host for entry in entries] == ["registry.example", "odd.example"]
    assert not unreadable


def test_an_exchange_nobody_can_read_costs_itself_alone(row_builder: RowBuilder) -> None:
    found = [make_exchange(1), make_exchange(2, host=None), make_exchange(3)]
    pending = row_builder.build(found)
    entries, unreadable = pending.result()
    assert isinstance(entries, CopyBatch)
    assert [entry.flow_id[:8] for entry in entries] == ["00000001", "00000003"]
    (failure,) = unreadable
    assert failure.kind == "AttributeError"
    assert "rpartition" in failure.trace


def test_other_settings_reach_what_is_under_way(row_builder: RowBuilder) -> None:
    found = exchanges(10)
    pending = row_builder.build(found)
    other = replace(_SETTINGS, node="other", redact=RedactSettings(query="drop"))
    row_builder.reconfigure(other)
    entries, _ = pending.result()
    assert isinstance(entries, CopyBatch)
    assert [*entries] == here(found, other)


def test_signals_for_the_proxy_do_not_end_it(row_builder: RowBuilder) -> None:
    pending = row_builder.build(exchanges(1))
    pending.result()  # by now it has begun to ignore them
    pid = pid_of(row_builder)
    os.kill(pid, signal.SIGINT)
    os.kill(pid, signal.SIGTERM)
    os.kill(pid, signal.SIGHUP)
    assert os.getsid(pid) == pid  # nor does a terminal's Ctrl-C reach it
    pending = row_builder.build(exchanges(1))
    assert isinstance(pending.result().entries, CopyBatch)
    assert pid_of(row_builder) == pid


def test_a_batch_keeps_its_entries_packed_until_they_are_looked_at() -> None:
    entries = [make_entry(number) for number in range(3)]
    batch = CopyBatch.of(entries)
    assert (batch[0], batch[1:], [*batch]) == (entries[0], entries[1:], entries)
    assert all(isinstance(it, type(entries[0])) for it in batch)


@pytest.mark.slow
def test_rows_come_once_each_while_it_is_killed_again_and_again(
    dsn: str, query: Query, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "_RESTART_SECONDS", 0.1)
    exporter = Exporter(replace(_SETTINGS.with_dsn(dsn), batch=BatchSettings(max_seconds=0.05)))
    me = psutil.Process()
    killed: set[int] = set()
    for number in range(20_000):
        exporter.log_access(make_exchange(number))
        if number % 500 == 0:
            for child in me.children():
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


def test_it_ends_with_a_proxy_that_is_killed(dsn: str, tmp_path: Path) -> None:
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
