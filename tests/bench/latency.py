"""Measure how much the writer delays an event loop in the same process, with an echo server."""

from __future__ import annotations

import asyncio
import asyncio.subprocess
import json
import sys
import uuid
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec.structs import replace

from exporter import Exporter, Settings
from exporter.settings import (
    BatchSettings,
    BufferSettings,
    ShutdownSettings,
    SpoolSettings,
)
from tests.bench.figures import Figure, Target, Workspace
from tests.bench.log_writers import BATCH_ENTRIES, LoggingWriter, OpenTelemetryWriter
from tests.bench.synthetic_flows import capture_exchanges

if TYPE_CHECKING:
    from collections.abc import Callable

    from exporter import Exchange
    from tests.bench.log_writers import LogWriter

SECTION = "Latency"
EXPLANATION = """\
An asyncio echo server stands in for mitmproxy's event loop. It runs some Python for each 64-byte message.
Four clients in another process send the next message when they receive the reply. In the server's process,
the writer drains a backlog of 100,000 rows, or gets 500 flows per second, or is absent ("alone"). "p99
increase" is the difference from the neighboring round without a writer."""
_UNIT = "ms"
_ROOT = Path(__file__).resolve().parents[2]
_ALONE = "alone"
_BACKLOG = "artifactapi drains a backlog"
_BACKLOG_NEW = "artifactapi drains a backlog of new URLs"
_STEADY = "artifactapi gets 500 flows/s"
_OTEL, _LOGGING = "opentelemetry-sdk drains a backlog", "logging drains a backlog"
_STEADY_RATE = 500
_TICK_SECONDS = 0.01


class _Echo(asyncio.Protocol):
    """Echoes each message after some work in Python."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        for _ in range(8):
            data = bytes(bytearray(data).replace(b"m", b"m"))
        self._transport.write(data)


class _RoundFactory:
    """Makes the exchanges and the settings of a round."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self.backlog = workspace.choose(100_000, 15_000)
        self._pools = {
            new: capture_exchanges(workspace.choose(20_000, 4_000), new_urls=new)
            for new in (False, True)
        }

    def exchanges(self, count: int, *, new_urls: bool) -> list[Exchange]:
        """Return this number of exchanges with new flow IDs."""
        pool = cycle(self._pools[new_urls])
        return [replace(next(pool), flow_id=str(uuid.uuid4())) for _ in range(count)]

    def settings(self) -> Settings:
        """Return settings with a buffer for the whole backlog; a shutdown discards the rest of it."""
        return msgspec.structs.replace(
            Settings().with_dsn(self.workspace.dsn),
            node="bench",
            buffer=BufferSettings(max_entries=1_000_000, max_bytes=1 << 32),
            batch=BatchSettings(max_entries=BATCH_ENTRIES),
            spool=SpoolSettings(max_bytes=0),
            shutdown=ShutdownSettings(drain_seconds=0.0),
        )


def measure(workspace: Workspace) -> list[Figure]:
    """Return the quantiles of each kind of round, and their increase over rounds without a writer."""
    factory = _RoundFactory(workspace)
    results = asyncio.run(_measure(factory))
    increases = {
        name: tuple((r["p99"] - a["p99"]) for r, a in zip(rounds, results[_ALONE], strict=True))
        for name, rounds in results.items()
    }
    targets = {
        _BACKLOG: Target("<=", 0.5),
        _BACKLOG_NEW: Target("<=", 0.5),
        _STEADY: Target("<=", 0.1),
    }
    figures = [
        Figure(SECTION, f"p99 increase: {name}", _UNIT, values, targets.get(name))
        for name, values in increases.items()
        if name != _ALONE
    ]
    for key in ("p99", "p50"):
        figures += [
            Figure(SECTION, f"{key}: {name}", _UNIT, tuple(r[key] for r in rounds))
            for name, rounds in results.items()
        ]
    return figures


async def _measure(factory: _RoundFactory) -> dict[str, list[dict[str, float]]]:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(_Echo, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    clients = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.bench.echo_clients", str(port)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        cwd=_ROOT,
    )
    assert clients.stdin
    seconds = factory.workspace.choose(1.0, 0.5)

    async def run_round() -> dict[str, float]:
        assert clients.stdin
        assert clients.stdout
        clients.stdin.write(f"{seconds}\n".encode())
        quantiles: dict[str, float] = json.loads(await clients.stdout.readline())
        return quantiles

    kinds: dict[str, Callable[[], Any]] = {
        _ALONE: run_round,
        _BACKLOG: lambda: _with_backlog(factory, run_round, new_urls=False),
        _BACKLOG_NEW: lambda: _with_backlog(factory, run_round, new_urls=True),
        _STEADY: lambda: _with_flows(factory, run_round),
        _OTEL: lambda: _with_log_writer(
            factory, OpenTelemetryWriter(factory.settings()), run_round
        ),
        _LOGGING: lambda: _with_log_writer(factory, LoggingWriter(factory.settings()), run_round),
    }
    if factory.workspace.quick:
        del kinds[_OTEL], kinds[_LOGGING]
    await run_round()
    results: dict[str, list[dict[str, float]]] = {name: [] for name in kinds}
    for _ in range(factory.workspace.choose(4, 2)):
        for name, kind in kinds.items():
            results[name].append(await kind())
    clients.stdin.close()
    await clients.wait()
    server.close()
    return results


async def _with_backlog(
    factory: _RoundFactory, run_round: Callable[[], Any], *, new_urls: bool
) -> Any:
    exchanges = factory.exchanges(factory.backlog, new_urls=new_urls)
    exporter = Exporter(factory.settings())
    for exchange in exchanges:
        exporter.log_access(exchange)
    result = await run_round()
    await asyncio.to_thread(exporter.stop)
    return result


async def _with_flows(factory: _RoundFactory, run_round: Callable[[], Any]) -> Any:
    exporter = Exporter(factory.settings())
    exchanges = iter(factory.exchanges(int(_STEADY_RATE * 3), new_urls=True))
    feeder = asyncio.create_task(_feed(exporter, exchanges))
    await asyncio.sleep(0.3)  # until the first batch is being written
    result = await run_round()
    feeder.cancel()
    await asyncio.to_thread(exporter.stop)
    return result


async def _feed(exporter: Exporter, exchanges: Any) -> None:
    loop = asyncio.get_running_loop()
    due = loop.time()
    for number, exchange in enumerate(exchanges, 1):
        exporter.log_access(exchange)
        if number % int(_STEADY_RATE * _TICK_SECONDS) == 0:
            due += _TICK_SECONDS
            await asyncio.sleep(max(0.0, due - loop.time()))


async def _with_log_writer(
    factory: _RoundFactory, writer: LogWriter, run_round: Callable[[], Any]
) -> Any:
    exchanges = factory.exchanges(factory.backlog // 4, new_urls=False)
    with writer:
        for exchange in exchanges:
            writer.log_access(exchange)
        result = await run_round()
        await asyncio.to_thread(writer.flush)
    return result
