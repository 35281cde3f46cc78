"""Measure the CPU time per row after the hook, and the rows per second of one writer.

Each writer gets the same kind of exchanges at once, and is done when all are in the table. The
writers alternate. psql copies prepared rows in batches of 128, which is the upper limit.
"""

from __future__ import annotations

import subprocess
import time
from typing import TYPE_CHECKING

import msgspec

from exporter import Settings
from exporter.postgres.embedded import programs
from exporter.rows.entry_builder import EntryBuilder
from exporter.settings import BatchSettings, BufferSettings
from exporter.write.copy_batch import copy_text
from exporter.write.database import COLUMNS
from tests.bench.figures import Figure, Target, Workspace
from tests.bench.log_writers import (
    BATCH_ENTRIES,
    ArtifactapiWriter,
    ExecuteManyWriter,
    InsertInHookWriter,
    LoggingWriter,
    LogWriter,
    OpenTelemetryWriter,
)
from tests.bench.synthetic_flows import REPEATING_URLS, capture_exchanges

if TYPE_CHECKING:
    from pathlib import Path

    from exporter import Exchange

SECTION = "Writer"
EXPLANATION = """\
The CPU time per row after the hook: build the entry, identify its package, redact, format, COPY and count
the artifacts. Also the rows per second of one writer into the real table with its indexes, from the first
row until the last commit. The CPU time covers the writer's thread and the worker process that builds the
rows, or the threads of the alternative, but not PostgreSQL. Either the same few hundred URLs repeat, or
every URL is new. With `synchronous_commit` off, a commit does not wait for the disk, which is fast on this
machine. `psql` copies prepared files of 128 rows and counts no artifacts, so it is the upper limit. The
queues of OpenTelemetry and logging feed the same COPY. executemany and the INSERTs write the same rows to
the same table."""
_CPU = "us of CPU per row"
_RATE = "rows/s"
_REPEATING, _NEW, _ASYNC_COMMIT = "repeating URLs", "new URLs", "synchronous_commit off"
_PSQL = r"psql \copy of prepared rows"


class _Results:
    """The values of all rounds, by name."""

    def __init__(self) -> None:
        self.cpu: dict[str, list[float]] = {}
        self.rate: dict[str, list[float]] = {}

    def add(self, name: str, rows: int, seconds: float, cpu_seconds: float | None) -> None:
        """Add one round; the CPU time may be unknown."""
        self.rate.setdefault(name, []).append(rows / seconds)
        if cpu_seconds is not None:
            self.cpu.setdefault(name, []).append(cpu_seconds / rows * 1e6)


def measure(workspace: Workspace) -> list[Figure]:
    """Return the CPU time per row and the rows per second of each writer."""
    settings = _settings(workspace.dsn)
    rows, few_rows = workspace.choose((20_000, 2_000), (2_500, 200))
    async_commit = msgspec.structs.replace(
        settings, database=msgspec.structs.replace(settings.database, synchronous_commit=False)
    )
    results = _Results()
    for _ in range(workspace.choose(5, 2)):
        _run_artifactapi(settings, rows, results, _REPEATING)
        _run_psql(workspace, settings, rows, results)
        _run_artifactapi(settings, rows, results, _NEW)
        _run_artifactapi(async_commit, rows, results, _ASYNC_COMMIT)
        for kind, count in (
            (OpenTelemetryWriter, rows // 2),
            (LoggingWriter, rows // 2),
            (ExecuteManyWriter, few_rows),
            (InsertInHookWriter, few_rows),
        ):
            _run(kind(settings), count, results)
    return _figures(results)


def _run_artifactapi(settings: Settings, rows: int, results: _Results, kind: str) -> None:
    new_urls = kind == _NEW
    with ArtifactapiWriter(settings) as writer:
        warm_up = capture_exchanges(2 * REPEATING_URLS, new_urls=new_urls)
        _feed(writer, warm_up)
        exchanges = capture_exchanges(rows, new_urls=new_urls)
        cpu = writer.cpu_seconds()
        seconds = _feed(writer, exchanges)
        cpu = writer.cpu_seconds() - cpu
    results.add(f"{writer.name}, {kind}", rows, seconds, cpu)


def _run(writer: LogWriter, rows: int, results: _Results) -> None:
    with writer:
        _feed(writer, capture_exchanges(2 * REPEATING_URLS, new_urls=False))
        exchanges = capture_exchanges(rows, new_urls=False)
        cpu = time.process_time()
        seconds = _feed(writer, exchanges)
        cpu = time.process_time() - cpu
    results.add(writer.name, rows, seconds, cpu)


def _feed(writer: LogWriter, exchanges: list[Exchange]) -> float:
    """Write the exchanges; return the seconds until all are in the table."""
    start = time.perf_counter()
    for exchange in exchanges:
        if not writer.log_access(exchange):
            raise RuntimeError(f"{writer.name} dropped a row")
    writer.flush()
    return time.perf_counter() - start


def _run_psql(workspace: Workspace, settings: Settings, rows: int, results: _Results) -> None:
    builder = EntryBuilder(settings)
    entries = [builder.build(x) for x in capture_exchanges(rows, new_urls=False)]
    folder = workspace.folder / "batches"
    folder.mkdir(exist_ok=True)
    commands = []
    for number, start in enumerate(range(0, rows, BATCH_ENTRIES)):
        file = folder / str(number)
        file.write_text(copy_text(entries[start : start + BATCH_ENTRIES]))
        commands.append(f"\\copy access_log ({', '.join(COLUMNS)}) FROM '{file}' (NULL '')\n")
    script = folder / "script.sql"
    script.write_text("".join(commands))
    started_at = time.perf_counter()
    psql: list[str | Path] = [
        programs() / "psql",
        "-q",
        "-X",
        "-v",
        "ON_ERROR_STOP=1",
        "-d",
        workspace.dsn,
    ]
    subprocess.run([*psql, "-f", script], check=True)
    seconds = time.perf_counter() - started_at
    results.add(_PSQL, rows, seconds, None)


def _figures(results: _Results) -> list[Figure]:
    ours, ours_new = f"artifactapi, {_REPEATING}", f"artifactapi, {_NEW}"
    targets = {
        (ours, _CPU): Target("<=", 12),
        (ours_new, _CPU): Target("<=", 40),
        (ours, _RATE): Target(">=", 60_000),
        (ours_new, _RATE): Target(">=", 20_000),
    }
    figures = [
        Figure(SECTION, name, unit, tuple(values), targets.get((name, unit)))
        for unit, table in ((_CPU, results.cpu), (_RATE, results.rate))
        for name, values in table.items()
    ]
    rate = results.rate
    copy = rate[_PSQL]
    inserts = rate[InsertInHookWriter.name]
    figures += [
        Figure(
            SECTION,
            r"artifactapi's time relative to psql \copy",
            "x",
            tuple(c / r for r, c in zip(rate[ours], copy, strict=True)),
            Target("<=", 2),
        ),
        Figure(
            SECTION,
            "artifactapi's rate relative to single INSERTs",
            "x",
            tuple(r / s for r, s in zip(rate[ours], inserts, strict=True)),
            Target(">=", 15),
        ),
    ]
    return figures


def _settings(dsn: str) -> Settings:
    """Return settings with a buffer that holds a whole round, and short waits for a full batch."""
    return msgspec.structs.replace(
        Settings().with_dsn(dsn),
        node="bench",
        buffer=BufferSettings(max_entries=1_000_000, max_bytes=1 << 32),
        batch=BatchSettings(max_entries=BATCH_ENTRIES, max_seconds=0.05),
    )
