"""What a full buffer takes of the memory, and what is left of that once it is empty again."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import socket
import threading
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import TYPE_CHECKING, NamedTuple

import msgspec
import psutil

from addon.flow.tracker import FlowTracker
from exporter import Exporter, Settings
from exporter.settings import BufferSettings, DatabaseSettings, SpoolSettings
from tests.bench.figures import Figure, Place, Target
from tests.bench.sample import Exchanged, drive, make_flows, make_master
from tests.support.wait import eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SECTION = "Memory"
ABOUT = """\
Resident memory of a process with the exporter, above what it had after 10,000 rows of the same kind.
Postgres is made silent and the spool switched off; then real flows come, with pauses as a proxy makes
them, until the buffer, with its default bounds, drops the first. Then Postgres is back, all is written,
and what the process has kept is read; then the same again, which shows whether what was kept is at
least used again. The largest entries have a path, a query, a host, a User-Agent and 32 header fields
longer than any column. The second process, which builds the rows, takes some 60 MiB beside that."""
_UNIT = "MiB"
_MIB = 1 << 20
_LEFT = Target("<=", 8)
_PATIENCE_SECONDS = 240.0
_LONG = 10_000
_PAUSE_SECONDS = 0.05

_numbers = itertools.count()


class Grown(NamedTuple):
    """By how many bytes the process was larger than before."""

    full: int
    left: int
    full_again: int
    entries: int


def measure(place: Place) -> list[Figure]:
    """Growth and what is left of it, for usual and for the largest entries."""
    kinds: dict[str, Callable[[], list[Exchanged]]] = {
        "usual entries": _usual,
        "the largest entries": _largest,
    }
    if place.quick:
        del kinds["the largest entries"]
    limit = Target("<=", place.choose(64, 8))
    figures = []
    for name, make in kinds.items():
        # Each in a fresh process: what one has left behind would hide what the other takes.
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
            found = fresh.submit(_fill_and_drain, place, make).result()
        for what, size, target in (
            (f"a full buffer of {name} ({found.entries:,})", found.full, limit),
            (f"once empty: {name}", found.left, _LEFT),
            (f"full again: {name}", found.full_again, limit),
        ):
            figures.append(Figure(SECTION, what, _UNIT, (size / _MIB,), target))
    return figures


def _fill_and_drain(place: Place, make: Callable[[], list[Exchanged]]) -> Grown:
    settings = msgspec.structs.replace(
        Settings(database=DatabaseSettings(connect_seconds=1.0, retry_max_seconds=1.0)).with_dsn(
            place.dsn
        ),
        node="bench",
        spool=SpoolSettings(max_bytes=0),
    )
    if place.quick:
        small = BufferSettings(max_entries=8192, max_bytes=8 * _MIB)
        settings = msgspec.structs.replace(settings, buffer=small)
    loop = asyncio.new_event_loop()
    master = make_master(loop)
    flows = FlowTracker()
    master.addons.add(flows)
    exporter = Exporter(settings)
    flows.log_access = exporter.log_access
    pause = threading.Event()

    def pass_through() -> int:
        flows = make()
        loop.run_until_complete(drive(master.addons, flows))
        return len(flows)

    def fill() -> int:
        dropped = exporter.status()["dropped"]
        while exporter.status()["dropped"] == dropped:
            pass_through()
            pause.wait(_PAUSE_SECONDS)
        return _resident_bytes()

    def drain() -> None:
        exporter.reconfigure(settings)
        eventually(lambda: not exporter.status()["waiting"], _PATIENCE_SECONDS)

    try:
        warm_up = place.choose(10_000, 1_000)
        while warm_up > 0:
            warm_up -= pass_through()
            drain()
        base = _resident_bytes()
        with _silent_server() as dsn:
            silent = settings.with_dsn(dsn)
            exporter.reconfigure(silent)
            full, entries = fill(), exporter.status()["waiting"]
            drain()
            empty = _resident_bytes()
            exporter.reconfigure(silent)
            full_again = fill()
        drain()
    finally:
        exporter.stop()
        loop.close()
    return Grown(full - base, max(0, empty - base), full_again - base, entries)


def _resident_bytes() -> int:
    gc.collect()
    resident: int = psutil.Process().memory_info().rss
    return resident


@contextlib.contextmanager
def _silent_server() -> Iterator[str]:
    """Something that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        yield f"host=127.0.0.1 port={server.getsockname()[1]} user=nobody dbname=none"


def _usual() -> list[Exchanged]:
    return make_flows(500, new_urls=True)


def _largest() -> list[Exchanged]:
    found = make_flows(10, new_urls=True)
    for flow, response in found:
        letters = f"{next(_numbers):08d}"
        path, query = f"/{letters}{'p' * _LONG}", f"{letters}{'q' * _LONG}"
        flow.request.data.path = f"{path}?{query}".encode()
        flow.request.data.host = letters + "h" * _LONG
        flow.request.headers["User-Agent"] = letters + "u" * _LONG
        response.headers.fields = tuple(
            (b"X-Cache", letters.encode() + b"v" * _LONG) for _ in range(32)
        )
    return found
