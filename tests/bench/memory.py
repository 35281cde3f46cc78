"""Measure the memory that a full buffer takes, and how much of it remains when it is empty again."""

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
from tests.bench.figures import Figure, Target, Workspace
from tests.bench.synthetic_flows import PendingFlow, make_flows, make_master, run_flows
from tests.support.wait import eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SECTION = "Memory"
EXPLANATION = """\
The growth in resident memory of a process with the exporter, after a warm-up with 10,000 rows of the same
kind. First, PostgreSQL stops responding and the spool is off. Real flows arrive, with pauses like those of
a proxy, until the buffer with its default limits drops the first one. Then PostgreSQL is back, and the memory
is read again after all rows are written. A second pass shows whether the process reuses the memory that it
kept. The largest entries have a path, a query, a host, a User-Agent and 32 header fields longer than any
column. The worker process, which builds the rows, takes about 60 MiB in addition."""
_UNIT = "MiB"
_MIB = 1 << 20
_LEFT = Target("<=", 8)
_DRAIN_SECONDS = 240.0
_LONG = 10_000  # characters; more than any column keeps
_PAUSE_SECONDS = 0.05

_numbers = itertools.count()


class Growth(NamedTuple):
    """The growth of the process in bytes.

    Attributes:
        entries: The number of entries in the full buffer.
    """

    full: int
    left: int
    full_again: int
    entries: int


def measure(workspace: Workspace) -> list[Figure]:
    """Return the growth with a full and with an empty buffer, for typical and for the largest entries."""
    kinds: dict[str, Callable[[], list[PendingFlow]]] = {
        "typical entries": _typical,
        "the largest entries": _largest,
    }
    if workspace.quick:
        del kinds["the largest entries"]
    limit = Target("<=", workspace.choose(64, 8))
    figures = []
    for name, make in kinds.items():
        # Use a new process for each kind: memory left over from one would hide the growth of the other.
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as executor:
            growth = executor.submit(_fill_and_drain, workspace, make).result()
        for label, size, target in (
            (f"full buffer: {name} ({growth.entries:,})", growth.full, limit),
            (f"empty again: {name}", growth.left, _LEFT),
            (f"full again: {name}", growth.full_again, limit),
        ):
            figures.append(Figure(SECTION, label, _UNIT, (size / _MIB,), target))
    return figures


def _fill_and_drain(workspace: Workspace, make: Callable[[], list[PendingFlow]]) -> Growth:
    settings = msgspec.structs.replace(
        Settings(database=DatabaseSettings(connect_seconds=1.0, retry_max_seconds=1.0)).with_dsn(
            workspace.dsn
        ),
        node="bench",
        spool=SpoolSettings(max_bytes=0),
    )
    if workspace.quick:
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
        loop.run_until_complete(run_flows(master.addons, flows))
        return len(flows)

    def fill() -> int:
        dropped = exporter.status()["dropped"]
        while exporter.status()["dropped"] == dropped:
            pass_through()
            pause.wait(_PAUSE_SECONDS)
        return _resident_bytes()

    def drain() -> None:
        exporter.reconfigure(settings)
        eventually(lambda: not exporter.status()["waiting"], _DRAIN_SECONDS)

    try:
        warm_up = workspace.choose(10_000, 1_000)
        while warm_up > 0:
            warm_up -= pass_through()
            drain()
        base = _resident_bytes()
        with _unresponsive_server() as dsn:
            unresponsive = settings.with_dsn(dsn)
            exporter.reconfigure(unresponsive)
            full, entries = fill(), exporter.status()["waiting"]
            drain()
            empty = _resident_bytes()
            exporter.reconfigure(unresponsive)
            full_again = fill()
        drain()
    finally:
        exporter.stop()
        loop.close()
    return Growth(full - base, max(0, empty - base), full_again - base, entries)


def _resident_bytes() -> int:
    gc.collect()
    resident: int = psutil.Process().memory_info().rss
    return resident


@contextlib.contextmanager
def _unresponsive_server() -> Iterator[str]:
    """Listen on a port without ever accepting or responding; yield its connection string."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as server:
        yield f"host=127.0.0.1 port={server.getsockname()[1]} user=nobody dbname=none"


def _typical() -> list[PendingFlow]:
    return make_flows(500, new_urls=True)


def _largest() -> list[PendingFlow]:
    pending = make_flows(10, new_urls=True)
    for flow, response in pending:
        letters = f"{next(_numbers):08d}"
        path, query = f"/{letters}{'p' * _LONG}", f"{letters}{'q' * _LONG}"
        flow.request.data.path = f"{path}?{query}".encode()
        flow.request.data.host = letters + "h" * _LONG
        flow.request.headers["User-Agent"] = letters + "u" * _LONG
        response.headers.fields = tuple(
            (b"X-Cache", letters.encode() + b"v" * _LONG) for _ in range(32)
        )
    return pending
