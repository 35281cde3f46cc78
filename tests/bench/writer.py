"""What a row costs after the hook, and how many rows a second one writer brings into the real table.

Each way takes in the same kind of exchanges in one go, and is done when all are in the table. The
ways alternate. psql gets rows that are ready, 128 at a time, which is the most one can hope for.
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
from tests.bench.figures import Figure, Place, Target
from tests.bench.sample import REPEATING_URLS, capture_exchanges
from tests.bench.sinks import (
    BATCH_ENTRIES,
    ExecuteMany,
    InsertInHook,
    Logging,
    OpenTelemetry,
    Ours,
    Sink,
)

if TYPE_CHECKING:
    from pathlib import Path

    from exporter import Exchange

SECTION = "Writer"
ABOUT = """\
What a row costs after the hook: build the entry, identify its package, redact, format, COPY, count
the artifacts; and how many rows a second one writer brings into the real table, with its indexes,
from the first row handed over until the last is committed. CPU is that of the writer's thread and of
the process that builds its rows, of the alternatives that of theirs; Postgres' own is not in it. The
same few hundred URLs repeat, or each is new. With `synchronous_commit` off a commit does not wait for
the disk, which here is fast. `psql` gets files of 128 rows that are ready and counts no artifacts: the
most one can hope for. OpenTelemetry's and logging's queues stand in front of the same COPY;
executemany and the INSERTs fill the same rows into the same table."""
_CPU = "us of CPU a row"
_RATE = "rows/s"
_REPEATING, _NEW, _RELAXED = "repeating URLs", "new URLs", "synchronous_commit off"


class _Round:
    """Figures of one round."""

    def __init__(self) -> None:
        self.cpu: dict[str, list[float]] = {}
        self.rate: dict[str, list[float]] = {}

    def add(self, name: str, rows: int, seconds: float, cpu_seconds: float | None) -> None:
        """So many rows took so long."""
        self.rate.setdefault(name, []).append(rows / seconds)
        if cpu_seconds is not None:
            self.cpu.setdefault(name, []).append(cpu_seconds / rows * 1e6)


def measure(place: Place) -> list[Figure]:
    """CPU a row and rows a second of each way."""
    settings = _settings(place.dsn)
    rows, few = place.choose((20_000, 2_000), (2_500, 200))
    relaxed = msgspec.structs.replace(
        settings, database=msgspec.structs.replace(settings.database, synchronous_commit=False)
    )
    found = _Round()
    for _ in range(place.choose(5, 2)):
        _run_ours(settings, rows, found, _REPEATING)
        _run_psql(place, settings, rows, found)
        _run_ours(settings, rows, found, _NEW)
        _run_ours(relaxed, rows, found, _RELAXED)
        for kind, count in (
            (OpenTelemetry, rows // 2),
            (Logging, rows // 2),
            (ExecuteMany, few),
            (InsertInHook, few),
        ):
            _run(kind(settings), count, found)
    return _figures(found)


def _run_ours(settings: Settings, rows: int, found: _Round, kind: str) -> None:
    new_urls = kind == _NEW
    with Ours(settings) as ours:
        warm_up = capture_exchanges(2 * REPEATING_URLS, new_urls=new_urls)
        _feed(ours, warm_up)
        exchanges = capture_exchanges(rows, new_urls=new_urls)
        cpu = ours.cpu_seconds()
        seconds = _feed(ours, exchanges)
        cpu = ours.cpu_seconds() - cpu
    found.add(f"{ours.name}, {kind}", rows, seconds, cpu)


def _run(sink: Sink, rows: int, found: _Round) -> None:
    with sink:
        _feed(sink, capture_exchanges(2 * REPEATING_URLS, new_urls=False))
        exchanges = capture_exchanges(rows, new_urls=False)
        cpu = time.process_time()
        seconds = _feed(sink, exchanges)
        cpu = time.process_time() - cpu
    found.add(sink.name, rows, seconds, cpu)


def _feed(sink: Sink, exchanges: list[Exchange]) -> float:
    """Seconds until all are in the table."""
    start = time.perf_counter()
    for exchange in exchanges:
        if not sink.log_access(exchange):
            raise RuntimeError(f"{sink.name} dropped a row")
    sink.settle()
    return time.perf_counter() - start


def _run_psql(place: Place, settings: Settings, rows: int, found: _Round) -> None:
    builder = EntryBuilder(settings)
    entries = [builder.build(x) for x in capture_exchanges(rows, new_urls=False)]
    folder = place.folder / "batches"
    folder.mkdir(exist_ok=True)
    commands = []
    for number, start in enumerate(range(0, rows, BATCH_ENTRIES)):
        file = folder / str(number)
        file.write_text(copy_text(entries[start : start + BATCH_ENTRIES]))
        commands.append(f"\\copy access_log ({', '.join(COLUMNS)}) FROM '{file}' (NULL '')\n")
    script = folder / "script.sql"
    script.write_text("".join(commands))
    start_at = time.perf_counter()
    psql: list[str | Path] = [
        programs() / "psql",
        "-q",
        "-X",
        "-v",
        "ON_ERROR_STOP=1",
        "-d",
        place.dsn,
    ]
    subprocess.run([*psql, "-f", script], check=True)
    seconds = time.perf_counter() - start_at
    found.add(r"psql \copy of rows that are ready", rows, seconds, None)


def _figures(found: _Round) -> list[Figure]:
    ours, ours_new = f"artifactapi, {_REPEATING}", f"artifactapi, {_NEW}"
    targets = {
        (ours, _CPU): Target("<=", 12),
        (ours_new, _CPU): Target("<=", 40),
        (ours, _RATE): Target(">=", 60_000),
        (ours_new, _RATE): Target(">=", 20_000),
    }
    figures = [
        Figure(SECTION, name, unit, tuple(values), targets.get((name, unit)))
        for unit, table in ((_CPU, found.cpu), (_RATE, found.rate))
        for name, values in table.items()
    ]
    rate = found.rate
    copy = rate[r"psql \copy of rows that are ready"]
    singly = rate[InsertInHook.name]
    figures += [
        Figure(
            SECTION,
            r"artifactapi's time, in times of psql \copy's",
            "x",
            tuple(c / r for r, c in zip(rate[ours], copy, strict=True)),
            Target("<=", 2),
        ),
        Figure(
            SECTION,
            "artifactapi's rate, in times of single INSERTs'",
            "x",
            tuple(r / s for r, s in zip(rate[ours], singly, strict=True)),
            Target(">=", 15),
        ),
    ]
    return figures


def _settings(dsn: str) -> Settings:
    """The defaults, but for a buffer that takes a whole round, and rows that wait until it is full."""
    return msgspec.structs.replace(
        Settings().with_dsn(dsn),
        node="bench",
        buffer=BufferSettings(max_entries=1_000_000, max_bytes=1 << 32),
        batch=BatchSettings(max_entries=BATCH_ENTRIES, max_seconds=0.05),
    )
