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
from exporter.rows.entry import EntryBuilder
from exporter.settings import BatchSettings, RedactSettings, SpoolSettings
from exporter.write import builder
from exporter.write.builder import BatchBuilder
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
def batch_builder(deadline: Deadline) -> Iterator[BatchBuilder]:
    found = BatchBuilder(_SETTINGS, deadline)
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


def pid_of(batch_builder: BatchBuilder) -> int:
    assert batch_builder._worker is not None
    return batch_builder._worker.pid


def test_the_process_says_what_this_one_would(batch_builder: BatchBuilder) -> None:
    for count in (1, 128, 1000):
        found = exchanges(count)
        batch_builder.begin(found)
        entries, unreadable = batch_builder.finish()
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
    assert batch_builder.failures == 0
    assert not batch_builder.is_busy


def test_the_process_hashes_whole_bodies(batch_builder: BatchBuilder, tmp_path: Path) -> None:
    remotes = tmp_path / "remotes.yaml"
    remotes.write_text(
        "remotes:\n  - {name: mirror, host: mirror.example, path: /pypi, format: pypi}\n"
    )
    settings = replace(_SETTINGS, remotes=replace(_SETTINGS.remotes, file=str(remotes)))
    batch_builder.reconfigure(settings)
    wheel = {"host": "mirror.example", "target": b"/pypi/packages/demo-1.0-py3-none-any.whl"}
    found = [
        make_exchange(1, body=b"", **wheel),
        make_exchange(2, **wheel),
        make_exchange(3, body=b"x" * 5_000_000, **wheel),
    ]
    batch_builder.begin(found)
    entries, _ = batch_builder.finish()
    assert isinstance(entries, CopyBatch)
    assert [*entries] == here(found, settings)
    assert [entry.sha256 is not None for entry in entries] == [True, False, True]


def test_a_process_that_is_gone_costs_no_row(
    batch_builder: BatchBuilder, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(builder, "_RESTART_SECONDS", 0.0)
    monkeypatch.setattr(batch_builder, "_restart_seconds", 0.0)
    for number in range(6):
        found = exchanges(20 + number)
        batch_builder.start()
        if number % 2:
            os.kill(pid_of(batch_builder), signal.SIGKILL)
        batch_builder.begin(found)
        if number == 4:
            os.kill(pid_of(batch_builder), signal.SIGKILL)
        entries, unreadable = batch_builder.finish()
        assert [*entries] == here(found)
        assert not unreadable
    assert batch_builder.failures >= 3  # number 4 may have been answered before
    assert 1 <= len([r for r in caplog.records if "is given up" in r.message]) <= 4
    caplog.set_level("INFO")
    batch_builder.begin(exchanges(3))
    assert isinstance(batch_builder.finish().entries, CopyBatch)
    assert "has a second process to build rows again" in caplog.text


def test_a_process_that_hangs_is_ended_in_time(batch_builder: BatchBuilder) -> None:
    batch_builder.begin(exchanges(1))
    batch_builder.finish()
    os.kill(pid_of(batch_builder), signal.SIGSTOP)
    found = exchanges(10)
    started = time.monotonic()
    batch_builder.begin(found)
    entries, _ = batch_builder.finish()
    assert 1.9 < time.monotonic() - started < 4
    assert [*entries] == here(found)
    assert batch_builder.failures == 1


def test_a_process_that_takes_nothing_is_ended_in_time(batch_builder: BatchBuilder) -> None:
    batch_builder.start()
    os.kill(pid_of(batch_builder), signal.SIGSTOP)
    found = [make_exchange(1, body=b"x" * 50_000_000)]
    started = time.monotonic()
    batch_builder.begin(found)
    entries, _ = batch_builder.finish()
    assert time.monotonic() - started < 5  # two to notice, the rest for a busy machine
    assert [*entries] == here(found)


def test_at_a_stop_it_gets_half_of_the_time(
    batch_builder: BatchBuilder, deadline: Deadline
) -> None:
    batch_builder.start()
    os.kill(pid_of(batch_builder), signal.SIGSTOP)
    found = exchanges(10)
    batch_builder.begin(found)
    started = time.monotonic()
    deadline.give_up_at = started + 3.0
    entries, _ = batch_builder.finish()
    assert 1.5 < time.monotonic() - started < 2.9
    assert [*entries] == here(found)


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
    batch_builder: BatchBuilder, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new version may order a row's columns in another way."""
    monkeypatch.setattr(builder, "_DIGEST", "what was loaded")
    found = exchanges(10)
    batch_builder.begin(found)
    entries, _ = batch_builder.finish()
    assert [*entries] == here(found)
    assert not isinstance(entries, CopyBatch)
    assert "given up: the code on disk is not what the proxy has loaded; start the" in caplog.text


def test_why_it_did_not_start_is_said_in_the_log_and_nowhere_else(
    batch_builder: BatchBuilder,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(builder, "_CODE", "import nowhere")
    batch_builder.begin(exchanges(1))
    entries, _ = batch_builder.finish()
    assert len(entries) == 1
    assert "given up: ModuleNotFoundError: No module named 'nowhere'. Until" in caplog.text
    assert capfd.readouterr() == ("", "")


def test_without_a_python_rows_are_built_here(
    batch_builder: BatchBuilder, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    for _ in range(3):
        found = exchanges(10)
        batch_builder.begin(found)
        entries, _ = batch_builder.finish()
        assert [*entries] == here(found)
    assert batch_builder.failures == 1  # it is not tried again for each batch
    assert len([r for r in caplog.records if "No such file" in r.message]) == 1


def test_what_cannot_be_sent_is_built_here(batch_builder: BatchBuilder) -> None:
    class Odd(str):
        __slots__ = ()

    found = [make_exchange(1), make_exchange(2, host=Odd("odd.example"))]
    batch_builder.begin(found)
    entries, unreadable = batch_builder.finish()
    assert [entry.host for entry in entries] == ["registry.example", "odd.example"]
    assert not unreadable


def test_an_exchange_nobody_can_read_costs_itself_alone(batch_builder: BatchBuilder) -> None:
    found = [make_exchange(1), make_exchange(2, host=None), make_exchange(3)]
    batch_builder.begin(found)
    entries, unreadable = batch_builder.finish()
    assert isinstance(entries, CopyBatch)
    assert [entry.flow_id[:8] for entry in entries] == ["00000001", "00000003"]
    (failure,) = unreadable
    assert failure.kind == "AttributeError"
    assert "rpartition" in failure.trace


def test_other_settings_reach_what_is_under_way(batch_builder: BatchBuilder) -> None:
    found = exchanges(10)
    batch_builder.begin(found)
    other = replace(_SETTINGS, node="other", redact=RedactSettings(query="drop"))
    batch_builder.reconfigure(other)
    entries, _ = batch_builder.finish()
    assert isinstance(entries, CopyBatch)
    assert [*entries] == here(found, other)


def test_signals_for_the_proxy_do_not_end_it(batch_builder: BatchBuilder) -> None:
    batch_builder.begin(exchanges(1))
    batch_builder.finish()  # by now it has begun to ignore them
    pid = pid_of(batch_builder)
    os.kill(pid, signal.SIGINT)
    os.kill(pid, signal.SIGTERM)
    os.kill(pid, signal.SIGHUP)
    assert os.getsid(pid) == pid  # nor does a terminal's Ctrl-C reach it
    batch_builder.begin(exchanges(1))
    assert isinstance(batch_builder.finish().entries, CopyBatch)
    assert pid_of(batch_builder) == pid


def test_a_batch_keeps_its_entries_packed_until_they_are_looked_at() -> None:
    entries = [make_entry(number) for number in range(3)]
    batch = CopyBatch.of(entries)
    assert (batch[0], batch[1:], [*batch]) == (entries[0], entries[1:], entries)
    assert all(isinstance(it, type(entries[0])) for it in batch)


def test_rows_come_once_each_while_it_is_killed_again_and_again(
    dsn: str, query: Query, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(builder, "_RESTART_SECONDS", 0.1)
    exporter = Exporter(replace(_SETTINGS.with_dsn(dsn), batch=BatchSettings(max_seconds=0.05)))
    me = psutil.Process()
    killed: set[int] = set()
    for number in range(20_000):
        exporter.log_access(make_exchange(number))
        if number % 500 == 0:
            for child in me.children():
                if child.pid not in killed and builder._CODE in " ".join(child.cmdline()):
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
    environment = {**os.environ, "PYTHONPATH": str(builder._ROOT)}
    with subprocess.Popen(
        [sys.executable, script, dsn],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as proxy:
        (worker,) = eventually(psutil.Process(proxy.pid).children)
        proxy.kill()
    eventually(lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE)
