"""How long it takes from a response until its row can be seen."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

import msgspec
import psycopg

from exporter import Exporter, Settings
from tests.bench.figures import Figure, Place, Target, quantile
from tests.bench.sample import capture_exchanges
from tests.support.wait import eventually

if TYPE_CHECKING:
    from exporter import Exchange

SECTION = "Delay"
ABOUT = """\
From the moment the hook hands a flow on to the moment another connection counts its row, at a steady
rate with the default settings. The table is asked every five milliseconds."""
_UNIT = "s"
_LOOK_SECONDS = 0.005
_MORE_SECONDS = 2.5
_PATIENCE_SECONDS = 10.0


def measure(place: Place) -> list[Figure]:
    """Median and 99th percentile at two rates."""
    slow = _delays(place, rate=10, seconds=place.choose(15.0, 4.0))
    fast = _delays(place, rate=500, seconds=place.choose(8.0, 1.0))
    return [
        Figure(SECTION, "p50 at 10 flows/s", _UNIT, (quantile(slow, 0.5),), Target("<=", 1.1)),
        Figure(SECTION, "p99 at 10 flows/s", _UNIT, (quantile(slow, 0.99),), Target("<=", 2.2)),
        Figure(SECTION, "p50 at 500 flows/s", _UNIT, (quantile(fast, 0.5),)),
        Figure(SECTION, "p99 at 500 flows/s", _UNIT, (quantile(fast, 0.99),), Target("<=", 0.3)),
    ]


def _delays(place: Place, rate: float, seconds: float) -> list[float]:
    """Seconds each row took; rows come in the order in which they were handed on."""
    watched = int(rate * seconds)
    # Those after them are there so that no row waits for more to come.
    first, *exchanges = capture_exchanges(1 + watched + int(rate * _MORE_SECONDS), new_urls=True)
    settings = msgspec.structs.replace(Settings().with_dsn(place.dsn), node="bench")
    exporter = Exporter(settings)
    handed: list[float] = []
    pause = threading.Event()

    def hand_on() -> None:
        due = time.perf_counter()
        for exchange in exchanges:
            due += 1 / rate
            pause.wait(max(0.0, due - time.perf_counter()))
            _hand_on(exporter, exchange, handed)

    with psycopg.connect(place.dsn, autocommit=True) as connection:
        before = _count(connection)
        exporter.log_access(first)  # by then all has started
        eventually(lambda: _count(connection) > before)
        before += 1
        thread = threading.Thread(target=hand_on)
        thread.start()
        seen: list[float] = []
        deadline = time.perf_counter() + seconds + _PATIENCE_SECONDS
        while len(seen) < watched and time.perf_counter() < deadline:
            count = _count(connection) - before
            seen += [time.perf_counter()] * (count - len(seen))
            pause.wait(_LOOK_SECONDS)
        thread.join()
    exporter.stop()
    if len(seen) < watched:
        raise RuntimeError(f"{watched - len(seen)} rows were not seen in time")
    return [late - early for early, late in zip(handed, seen[:watched], strict=False)]


def _hand_on(exporter: Exporter, exchange: Exchange, handed: list[float]) -> None:
    handed.append(time.perf_counter())
    exporter.log_access(exchange)


def _count(connection: psycopg.Connection) -> int:
    """The table is this section's alone, so that all of it can be counted in no time."""
    try:
        row = connection.execute("SELECT count(*) FROM access_log").fetchone()
    except psycopg.errors.UndefinedTable:  # the exporter is about to make it
        return 0
    return int(row[0]) if row else 0
