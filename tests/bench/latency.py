"""How long an event loop waits for the writer beside it: the times of an echo server in the same process."""

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
from tests.bench.figures import Figure, Place, Target
from tests.bench.sample import capture_exchanges
from tests.bench.sinks import BATCH_ENTRIES, Logging, OpenTelemetry

if TYPE_CHECKING:
    from collections.abc import Callable

    from exporter import Exchange
    from tests.bench.sinks import Sink

SECTION = "Latency"
ABOUT = """\
An asyncio echo server stands for mitmproxy's event loop: 64 bytes, some Python for each message,
four clients in another process that send as soon as they have their answer. In its process the writer
drains a backlog of 100,000 rows, or gets 500 flows a second, or nothing. Each round is compared with
the one beside it in which nothing is written."""
_UNIT = "ms"
_ROOT = Path(__file__).resolve().parents[2]
_ALONE = "alone"
_BACKLOG, _BACKLOG_NEW = "artifactapi drains a backlog", "artifactapi drains one of new URLs"
_STEADY = "artifactapi gets 500 flows/s"
_OTEL, _LOGGING = "opentelemetry-sdk drains a backlog", "logging drains a backlog"
_STEADY_RATE = 500
_TICK_SECONDS = 0.01


class _Echo(asyncio.Protocol):
    """Answers with what it got, after some work in Python."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        for _ in range(8):
            data = bytes(bytearray(data).replace(b"m", b"m"))
        self._transport.write(data)


class _Bench:
    """What a round needs."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.backlog = place.choose(100_000, 15_000)
        self._pools = {
            new: capture_exchanges(place.choose(20_000, 4_000), new_urls=new)
            for new in (False, True)
        }

    def exchanges(self, count: int, *, new_urls: bool) -> list[Exchange]:
        """So many, none of which was written before."""
        pool = cycle(self._pools[new_urls])
        return [replace(next(pool), flow_id=str(uuid.uuid4())) for _ in range(count)]

    def settings(self) -> Settings:
        """A buffer that holds the backlog; what is left of it at the end of a round is thrown away."""
        return msgspec.structs.replace(
            Settings().with_dsn(self.place.dsn),
            node="bench",
            buffer=BufferSettings(max_entries=1_000_000, max_bytes=1 << 32),
            batch=BatchSettings(max_entries=BATCH_ENTRIES),
            spool=SpoolSettings(max_bytes=0),
            shutdown=ShutdownSettings(drain_seconds=0.0),
        )


def measure(place: Place) -> list[Figure]:
    """Quantiles of each kind of round, and how much they are above those without a writer."""
    bench = _Bench(place)
    found = asyncio.run(_measure(bench))
    above = {
        name: tuple((r["p99"] - a["p99"]) for r, a in zip(rounds, found[_ALONE], strict=True))
        for name, rounds in found.items()
    }
    targets = {
        _BACKLOG: Target("<=", 0.5),
        _BACKLOG_NEW: Target("<=", 0.5),
        _STEADY: Target("<=", 0.1),
    }
    figures = [
        Figure(SECTION, f"p99 above alone: {name}", _UNIT, values, targets.get(name))
        for name, values in above.items()
        if name != _ALONE
    ]
    for which in ("p99", "p50"):
        figures += [
            Figure(SECTION, f"{which}: {name}", _UNIT, tuple(r[which] for r in rounds))
            for name, rounds in found.items()
        ]
    return figures


async def _measure(bench: _Bench) -> dict[str, list[dict[str, float]]]:
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
    seconds = bench.place.choose(1.0, 0.5)

    async def ask() -> dict[str, float]:
        assert clients.stdin
        assert clients.stdout
        clients.stdin.write(f"{seconds}\n".encode())
        answer: dict[str, float] = json.loads(await clients.stdout.readline())
        return answer

    kinds: dict[str, Callable[[], Any]] = {
        _ALONE: ask,
        _BACKLOG: lambda: _with_backlog(bench, ask, new_urls=False),
        _BACKLOG_NEW: lambda: _with_backlog(bench, ask, new_urls=True),
        _STEADY: lambda: _with_flows(bench, ask),
        _OTEL: lambda: _with_sink(bench, OpenTelemetry(bench.settings()), ask),
        _LOGGING: lambda: _with_sink(bench, Logging(bench.settings()), ask),
    }
    if bench.place.quick:
        del kinds[_OTEL], kinds[_LOGGING]
    await ask()
    found: dict[str, list[dict[str, float]]] = {name: [] for name in kinds}
    for _ in range(bench.place.choose(4, 2)):
        for name, kind in kinds.items():
            found[name].append(await kind())
    clients.stdin.close()
    await clients.wait()
    server.close()
    return found


async def _with_backlog(bench: _Bench, ask: Callable[[], Any], *, new_urls: bool) -> Any:
    exchanges = bench.exchanges(bench.backlog, new_urls=new_urls)
    exporter = Exporter(bench.settings())
    for exchange in exchanges:
        exporter.log_access(exchange)
    answer = await ask()
    await asyncio.to_thread(exporter.stop)
    return answer


async def _with_flows(bench: _Bench, ask: Callable[[], Any]) -> Any:
    exporter = Exporter(bench.settings())
    exchanges = iter(bench.exchanges(int(_STEADY_RATE * 3), new_urls=True))
    feeding = asyncio.create_task(_feed(exporter, exchanges))
    await asyncio.sleep(0.3)  # until the first batch is on its way
    answer = await ask()
    feeding.cancel()
    await asyncio.to_thread(exporter.stop)
    return answer


async def _feed(exporter: Exporter, exchanges: Any) -> None:
    loop = asyncio.get_running_loop()
    due = loop.time()
    for number, exchange in enumerate(exchanges, 1):
        exporter.log_access(exchange)
        if number % int(_STEADY_RATE * _TICK_SECONDS) == 0:
            due += _TICK_SECONDS
            await asyncio.sleep(max(0.0, due - loop.time()))


async def _with_sink(bench: _Bench, sink: Sink, ask: Callable[[], Any]) -> Any:
    exchanges = bench.exchanges(bench.backlog // 4, new_urls=False)
    with sink:
        for exchange in exchanges:
            sink.log_access(exchange)
        answer = await ask()
        await asyncio.to_thread(sink.settle)
    return answer
