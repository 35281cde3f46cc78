"""Measure what many proxies cost one PostgreSQL server, and whether they wait for each other.

Each writer is a thread with the connection, the batches and the ledger of a proxy. Its batches are prepared
before, so that the threads spend their time in PostgreSQL. ARTIFACTAPI_TEST_CITUS names the coordinator of a
cluster, whose processes must run on this machine.
"""

from __future__ import annotations

import contextlib
import statistics
import threading
import time
import uuid
from typing import TYPE_CHECKING, Any, NamedTuple

import psutil
import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo

from exporter import Settings
from exporter.postgres.schema import ensure_schema
from exporter.rows.entry_builder import EntryBuilder
from exporter.run import Run
from exporter.write.copy_batch import CopyBatch
from exporter.write.database import Database
from exporter.write.ledger import RunCounts, RunLedger
from tests.bench.figures import Figure, Workspace
from tests.bench.log_writers import BATCH_ENTRIES
from tests.bench.machine import cpu_seconds
from tests.bench.synthetic_flows import capture_exchanges
from tests.support.citus import CLUSTER_DSN, distributed

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from exporter import AccessLogEntry

SECTION = "Fleet"
EXPLANATION = """\
The CPU time of all processes of PostgreSQL per row, and how long writers wait for each other's locks, for 1, 4
and 20 proxies that write batches of 128 rows as fast as they can. All fetch the same few hundred URLs, so each
of them counts the same artifacts. `paced` is 20 proxies with 2 batches a second each. The share of waiting is
that of the writers' time in PostgreSQL, sampled. If a Citus cluster is named, the same is measured there, with
the log distributed."""
_WRITERS = (1, 4, 20)
_PACED_SECONDS = 0.5  # between two batches of a proxy
_SAMPLE_SECONDS = 0.005
_WAITING = """
    SELECT count(*) FILTER (WHERE wait_event_type = 'Lock'), count(*) FROM pg_stat_activity
    WHERE application_name LIKE 'fleet-%' AND state <> 'idle'
"""
_DEADLOCKS = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"


class _Run(NamedTuple):
    """What some writers have done."""

    rows: int
    seconds: float
    cpu_us_per_row: float
    waiting_share: float  # of the sessions that were not idle, those that waited for a lock
    batch_seconds: list[float]
    deadlocks: int


def measure(workspace: Workspace) -> list[Figure]:
    """Return the CPU time per row, the rates and the waits."""
    entries = _entries(workspace.choose(16 * BATCH_ENTRIES, 4 * BATCH_ENTRIES))
    rounds = workspace.choose(3, 1)
    batches = workspace.choose(400, 40)  # of all writers together
    figures = []
    results: dict[str, list[_Run]] = {}
    for _ in range(rounds):
        for count in _WRITERS:
            run = _run(workspace.dsn, entries, count, batches // count)
            name = f"{count} {'writer' if count == 1 else 'writers'}"
            results.setdefault(name, []).append(run)
        run = _run(
            workspace.dsn, entries, _WRITERS[-1], workspace.choose(12, 3), pause=_PACED_SECONDS
        )
        results.setdefault(f"{_WRITERS[-1]} writers, paced", []).append(run)
    for name, runs in results.items():
        figures += _figures(name, runs)
    if CLUSTER_DSN:
        with _schema(CLUSTER_DSN, "fleet") as dsn:
            distributed(dsn)
            for count in _WRITERS:
                runs = [_run(dsn, entries, count, batches // count) for _ in range(rounds)]
                figures += _figures(f"{count} writers, Citus", runs)
    return figures


def _figures(name: str, runs: Sequence[_Run]) -> list[Figure]:
    return [
        Figure(SECTION, name, "us of CPU per row", tuple(run.cpu_us_per_row for run in runs)),
        Figure(SECTION, name, "rows/s", tuple(run.rows / run.seconds for run in runs)),
        Figure(
            SECTION, name, "% waiting for locks", tuple(100 * run.waiting_share for run in runs)
        ),
        Figure(
            SECTION,
            f"{name}: batch",
            "ms",
            tuple(1000 * statistics.median(run.batch_seconds) for run in runs),
        ),
        Figure(SECTION, f"{name}: deadlocks", "", tuple(float(run.deadlocks) for run in runs)),
    ]


def _entries(count: int) -> list[AccessLogEntry]:
    builder = EntryBuilder(Settings(node="fleet"))
    return [builder.build(exchange) for exchange in capture_exchanges(count, new_urls=False)]


@contextlib.contextmanager
def _schema(dsn: str, name: str) -> Iterator[str]:
    """Create a schema, and drop it afterwards."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(sql.SQL("CREATE SCHEMA {}").format(sql.Identifier(name)))
        try:
            yield make_conninfo(dsn, options=f"-csearch_path={name}")
        finally:
            connection.execute(sql.SQL("DROP SCHEMA {} CASCADE").format(sql.Identifier(name)))


def _run(
    dsn: str, entries: Sequence[AccessLogEntry], writers: int, batches: int, pause: float = 0.0
) -> _Run:
    """Let each writer write its batches; all begin at the same time. `pause`: seconds between two batches."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        ensure_schema(connection)
        deadlocks = _value(connection, _DEADLOCKS)
        fleet = [_Writer(dsn, number, entries, batches, pause) for number in range(writers)]
        ready, go = threading.Barrier(writers + 1), threading.Event()
        threads = [threading.Thread(target=writer.run, args=(ready, go)) for writer in fleet]
        for thread in threads:
            thread.start()
        ready.wait()
        clock = _ServerClock(connection)
        started = time.perf_counter()
        go.set()
        waiting = active = 0
        while any(thread.is_alive() for thread in threads):
            counts = connection.execute(_WAITING).fetchone() or (0, 0)
            waiting, active = waiting + counts[0], active + counts[1]
            threading.Event().wait(_SAMPLE_SECONDS)
        seconds = time.perf_counter() - started
        cpu = clock.seconds()
        for writer in fleet:
            writer.close()
        rows = writers * batches * BATCH_ENTRIES
        return _Run(
            rows,
            seconds,
            cpu / rows * 1e6,
            waiting / max(1, active),
            [seconds for writer in fleet for seconds in writer.batch_seconds],
            _value(connection, _DEADLOCKS) - deadlocks,
        )


class _Writer:
    """What a proxy's writer thread does, with batches that are ready."""

    def __init__(
        self,
        dsn: str,
        number: int,
        entries: Sequence[AccessLogEntry],
        batches: int,
        pause: float,
    ) -> None:
        node = f"fleet-{number}"
        self.batch_seconds: list[float] = []
        self._pause = pause
        self._batches = [
            CopyBatch.of(
                [
                    entry._replace(flow_id=str(uuid.uuid4()), node=node)
                    for entry in _part(entries, (number + batch) * BATCH_ENTRIES)
                ]
            )
            for batch in range(batches)
        ]
        settings = Settings().with_dsn(make_conninfo(dsn, application_name=node))
        ledger = RunLedger(Run.start(node), lambda: RunCounts(0, 0, 0, 0, 0))
        self._database = Database(settings.database, ledger=ledger)
        self._database.open()

    def run(self, ready: threading.Barrier, go: threading.Event) -> None:
        """Write all batches."""
        ready.wait()
        go.wait()
        for batch in self._batches:
            started = time.perf_counter()
            assert self._database.write(batch) == []
            self.batch_seconds.append(time.perf_counter() - started)
            threading.Event().wait(self._pause)

    def close(self) -> None:
        """Close the connection."""
        self._database.close()


def _part(entries: Sequence[AccessLogEntry], start: int) -> Sequence[AccessLogEntry]:
    start %= len(entries)
    return entries[start : start + BATCH_ENTRIES]


class _ServerClock:
    """The CPU time of all processes of the servers, since its construction."""

    def __init__(self, connection: psycopg.Connection[Any]) -> None:
        postmasters = {_postmaster(connection)}
        with contextlib.suppress(psycopg.errors.UndefinedTable):
            nodes = connection.execute("SELECT nodename, nodeport FROM pg_dist_node").fetchall()
            for host, port in nodes:
                dsn = make_conninfo(connection.info.dsn, host=host, port=port)
                with psycopg.connect(dsn) as other:
                    postmasters.add(_postmaster(other))
        self._postmasters = [psutil.Process(pid) for pid in postmasters]
        self._start = self._read()

    def seconds(self) -> float:
        """Of processes that run, and of those that have ended since."""
        now = self._read()
        return sum(seconds - self._start.get(key, 0.0) for key, seconds in now.items())

    def _read(self) -> dict[tuple[int, str], float]:
        found = {}
        for postmaster in self._postmasters:
            times = postmaster.cpu_times()
            ended = times.children_user + times.children_system
            found[postmaster.pid, "ended children"] = ended
            for process in (postmaster, *postmaster.children(recursive=True)):
                with contextlib.suppress(psutil.NoSuchProcess, OSError):
                    found[process.pid, "process"] = cpu_seconds(process.pid)
        return found


def _postmaster(connection: psycopg.Connection[Any]) -> int:
    """The process id of the server, which must run on this machine."""
    backend = psutil.Process(int(_value(connection, "SELECT pg_backend_pid()")))
    assert "postgres" in backend.name(), "the server's processes are not on this machine"
    return backend.ppid()


def _value(connection: psycopg.Connection[Any], query: str) -> Any:
    ((value,),) = connection.execute(query.encode()).fetchall()
    return value
