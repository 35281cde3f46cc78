"""Measure the delay from a response until its row is visible."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

import msgspec
import psycopg

from exporter import Exporter, Settings
from tests.bench.figures import Figure, Target, Workspace, quantile
from tests.bench.synthetic_flows import capture_exchanges
from tests.support.wait import eventually

if TYPE_CHECKING:
    from exporter import Exchange

SECTION = "Delay"
EXPLANATION = """\
The time from the hook until another connection sees the row, at a steady rate and with the default
settings. The connection queries the table every five milliseconds."""
_UNIT = "s"
_POLL_SECONDS = 0.005
_EXTRA_SECONDS = 2.5
_TIMEOUT_SECONDS = 10.0


def measure(workspace: Workspace) -> list[Figure]:
    """Return the median and the 99th percentile at two rates."""
    slow = _delays(workspace, rate=10, seconds=workspace.choose(15.0, 4.0))
    fast = _delays(workspace, rate=500, seconds=workspace.choose(8.0, 1.0))
    return [
        Figure(SECTION, "p50 at 10 flows/s", _UNIT, (quantile(slow, 0.5),), Target("<=", 1.1)),
        Figure(SECTION, "p99 at 10 flows/s", _UNIT, (quantile(slow, 0.99),), Target("<=", 2.2)),
        Figure(SECTION, "p50 at 500 flows/s", _UNIT, (quantile(fast, 0.5),)),
        Figure(SECTION, "p99 at 500 flows/s", _UNIT, (quantile(fast, 0.99),), Target("<=", 0.3)),
    ]


def _delays(workspace: Workspace, rate: float, seconds: float) -> list[float]:
    """Return the seconds that each row took. Rows arrive in the order of their exchanges."""
    watched = int(rate * seconds)
    # Extra exchanges follow, so that the last watched rows do not wait for a full batch.
    first, *exchanges = capture_exchanges(1 + watched + int(rate * _EXTRA_SECONDS), new_urls=True)
    settings = msgspec.structs.replace(Settings().with_dsn(workspace.dsn), node="bench")
    exporter = Exporter(settings)
    logged_at: list[float] = []
    pause = threading.Event()

    def log_all() -> None:
        due = time.perf_counter()
        for exchange in exchanges:
            due += 1 / rate
            pause.wait(max(0.0, due - time.perf_counter()))
            _log(exporter, exchange, logged_at)

    with psycopg.connect(workspace.dsn, autocommit=True) as connection:
        before = _count(connection)
        exporter.log_access(first)  # its row shows that the exporter is running
        eventually(lambda: _count(connection) > before)
        before += 1
        thread = threading.Thread(target=log_all)
        thread.start()
        seen_at: list[float] = []
        deadline = time.perf_counter() + seconds + _TIMEOUT_SECONDS
        while len(seen_at) < watched and time.perf_counter() < deadline:
            count = _count(connection) - before
            seen_at += [time.perf_counter()] * (count - len(seen_at))
            pause.wait(_POLL_SECONDS)
        thread.join()
    exporter.stop()
    if len(seen_at) < watched:
        raise RuntimeError(f"{watched - len(seen_at)} rows did not appear in time")
    return [end - start for start, end in zip(logged_at, seen_at[:watched], strict=False)]


def _log(exporter: Exporter, exchange: Exchange, logged_at: list[float]) -> None:
    logged_at.append(time.perf_counter())
    exporter.log_access(exchange)


def _count(connection: psycopg.Connection) -> int:
    """Count all rows; the table is small, because this section has its own schema."""
    try:
        row = connection.execute("SELECT count(*) FROM access_log").fetchone()
    except psycopg.errors.UndefinedTable:  # the exporter has not created it yet
        return 0
    return int(row[0]) if row else 0
