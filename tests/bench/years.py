"""Measure a year of rows: rollups, the archive, pruning, reports, and a writer that goes on meanwhile."""

from __future__ import annotations

import threading
import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import psycopg

from exporter import Settings, insert_access_log_batch
from exporter.postgres.schema import ensure_schema
from exporter.read.report import make_report
from exporter.read.selection import Selection
from exporter.read.session import open_database
from exporter.retention.prune import oldest_kept, prune
from exporter.retention.rollups import merge_months, roll_up
from exporter.rows.entry_builder import EntryBuilder
from tests.bench.figures import Figure, Target, Workspace, quantile
from tests.bench.log_writers import BATCH_ENTRIES
from tests.bench.seed_rows import Plan, load
from tests.bench.synthetic_flows import capture_exchanges

if TYPE_CHECKING:
    from collections.abc import Iterator
    from datetime import date

    from psycopg import Connection

    from exporter import AccessLogEntry

SECTION = "Years"
EXPLANATION = """\
A year of rows: thirty days are generated, and copied to the days before them with new keys. 90 days are kept;
the others are archived as Parquet files and dropped. The times per day are those of one rollup, and of one
archived and dropped day. Meanwhile another connection writes batches of 128 rows. The reports end now; with
rollups, those of 30 and 365 days read no rows but today's. The size of the rollups is relative to the size
of the rows with their indexes."""
_GENERATED_DAYS = 30
_FILL_SECONDS = 900.0  # then the year is shorter, and the figures name the number of rows
_REPORT_DAYS = (1, 30, 365)
_FAST = "SET maintenance_work_mem = '256MB'; SET synchronous_commit = off"
_BYTES = """
    SELECT coalesce(sum(pg_total_relation_size(oid)), 0)::float8 FROM pg_class
    WHERE relnamespace = current_schema()::regnamespace AND relkind = 'r' AND relname ~ %s
"""
_COLUMNS = """
    SELECT string_agg(quote_ident(attname), ', ' ORDER BY attnum) FROM pg_attribute
    WHERE attrelid = 'access_log'::regclass AND attnum > 0 AND attname NOT IN ('started_at', 'flow_id', 'logged_at')
"""


def measure(workspace: Workspace) -> list[Figure]:
    """Return sizes, and the times of housekeeping, reports and batches."""
    with psycopg.connect(workspace.dsn, autocommit=True) as connection:
        ensure_schema(connection)
        kept_days = workspace.choose(90, 30)
        rows, days = _fill(
            connection, workspace.choose(30_000_000, 8_000), workspace.choose(365, 40)
        )
        connection.execute("VACUUM ANALYZE")
        row_bytes = _value(connection, _BYTES, r"^access_log_2\d{7}") / rows
        from_rows = _reports(workspace.dsn, "from rows", None)
        alone = _Batches(workspace.dsn)
        with alone:
            threading.Event().wait(workspace.choose(10.0, 1.0))
        rollups: list[float] = []
        pruned: list[float] = []
        months: list[float] = []
        archive = workspace.folder / "archive"
        beside = _Batches(workspace.dsn)
        with beside:
            rollups += _durations(roll_up(connection))
            pruned += _durations(prune(connection, oldest_kept(kept_days), archive))
            months += _durations(merge_months(connection))
        rollup_bytes = _value(connection, _BYTES, "^access_log_rollup")
    archive_bytes = sum(file.stat().st_size for file in archive.rglob("*.parquet"))
    archived_rows = rows * len(pruned) / days
    return [
        Figure(SECTION, f"rows in {days} days", "rows", (float(rows),)),
        Figure(SECTION, "a row with its indexes", "bytes", (row_bytes,), Target("<=", 560)),
        Figure(
            SECTION,
            "rollups relative to rows",
            "%",
            (100 * rollup_bytes / (row_bytes * rows),),
            Target("<=", 2),
        ),
        Figure(SECTION, "an archived row", "bytes", (archive_bytes / archived_rows,)),
        Figure(SECTION, "rollup of a day", "s", tuple(rollups)),
        Figure(SECTION, "archive and drop of a day", "s", tuple(pruned)),
        Figure(SECTION, "merge of a month", "s", tuple(months)),
        *alone.figures("alone"),
        *beside.figures("beside housekeeping"),
        *from_rows,
        *_reports(workspace.dsn, "from rollups", Target("<=", 1), rounds=3),
    ]


class _Batches:
    """A writer that commits batches as fast as it can inside the `with` block."""

    def __init__(self, dsn: str) -> None:
        self.seconds: list[float] = []
        self._dsn = dsn
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def figures(self, name: str) -> list[Figure]:
        """The time of a batch, and the rows per second."""
        rate = BATCH_ENTRIES * len(self.seconds) / sum(self.seconds)
        return [
            Figure(SECTION, f"batch, {name}: p99", "ms", (quantile(self.seconds, 0.99) * 1000,)),
            Figure(SECTION, f"one writer, {name}", "rows/s", (rate,)),
        ]

    def _run(self) -> None:
        builder = EntryBuilder(Settings(node="bench"))
        with psycopg.connect(self._dsn, autocommit=True) as connection:
            connection.execute("SELECT access_log_ensure_partition(current_date + 1)")
            while not self._stop.is_set():
                exchanges = capture_exchanges(BATCH_ENTRIES, new_urls=False)
                entries = [_a_day_later(builder.build(exchange)) for exchange in exchanges]
                start = time.perf_counter()
                insert_access_log_batch(connection, entries)
                self.seconds.append(time.perf_counter() - start)


def _a_day_later(entry: AccessLogEntry) -> AccessLogEntry:
    """Move the entry out of the span of the reports."""
    at = datetime.fromisoformat(entry.started_at) + timedelta(days=1)
    return entry._replace(started_at=at.isoformat())


def _fill(connection: Connection[Any], rows: int, wanted_days: int) -> tuple[int, int]:
    """Write rows over these days, or as many days as there is time for; return both numbers."""
    deadline = time.monotonic() + _FILL_SECONDS
    connection.execute(_FAST)
    until = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    generated = rows * _GENERATED_DAYS // wanted_days
    for _ in load(connection, Plan(generated, until, _GENERATED_DAYS)):
        pass
    days = _GENERATED_DAYS
    columns = _value(connection, _COLUMNS)
    while days < wanted_days and time.monotonic() < deadline:
        days += 1
        _copy_day(connection, until.date() - timedelta(days=days), days, columns)
    return int(_value(connection, "SELECT count(*) FROM access_log")), days


def _copy_day(connection: Connection[Any], day: date, number: int, columns: str) -> None:
    shift = _GENERATED_DAYS * ((number - 1) // _GENERATED_DAYS)
    name, source = f"access_log_{day:%Y%m%d}", f"access_log_{day + timedelta(days=shift):%Y%m%d}"
    with connection.transaction():
        connection.execute(f"CREATE TABLE {name} (LIKE access_log INCLUDING DEFAULTS)".encode())
        connection.execute(
            f"INSERT INTO {name} (started_at, flow_id, logged_at, {columns})"
            f" SELECT started_at - interval '{shift} days', gen_random_uuid(),"
            f" started_at - interval '{shift} days', {columns} FROM {source}".encode()
        )
        connection.execute(
            f"ALTER TABLE access_log ATTACH PARTITION {name}"
            f" FOR VALUES FROM ('{day}Z') TO ('{day + timedelta(days=1)}Z')".encode()
        )


def _durations(steps: Iterator[object]) -> list[float]:
    """Run to the end; return the seconds that each step took."""
    seconds = []
    start = time.perf_counter()
    for _ in steps:
        now = time.perf_counter()
        seconds.append(now - start)
        start = now
    return seconds


def _reports(dsn: str, name: str, target: Target | None, rounds: int = 1) -> list[Figure]:
    figures = []
    with open_database(Settings().with_dsn(dsn)) as connection:
        for days in _REPORT_DAYS:
            selection = Selection(since=datetime.now(UTC) - timedelta(days=days))
            seconds = []
            for _ in range(rounds):
                start = time.perf_counter()
                make_report(connection, selection)
                seconds.append(time.perf_counter() - start)
            limit = target if days > 1 else None
            figures.append(
                Figure(SECTION, f"report of {days} days, {name}", "s", tuple(seconds), limit)
            )
    return figures


def _value(connection: Connection[Any], query: str, *values: object) -> Any:
    ((value,),) = connection.execute(query.encode(), values or None).fetchall()
    return value
