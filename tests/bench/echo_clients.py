"""Run clients of an echo server in a separate process; each sends again when it gets its reply.

`python -m tests.bench.echo_clients PORT` reads the duration of a round in seconds from each input
line, and prints the quantiles of that round as JSON.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time

from tests.bench.figures import quantile

MESSAGE = b"m" * 64
_CLIENTS = 4


class _Client(asyncio.Protocol):
    """One connection."""

    def __init__(self) -> None:
        self.milliseconds: list[float] = []
        self._until = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def start(self, until: float) -> None:
        """Send messages until this time."""
        self.milliseconds.clear()
        self._until = until
        self._send()

    def data_received(self, _data: bytes) -> None:
        now = time.perf_counter()
        self.milliseconds.append((now - self._sent_at) * 1000)
        if now < self._until:
            self._send()

    def _send(self) -> None:
        self._sent_at = time.perf_counter()
        self._transport.write(MESSAGE)


async def _main(port: int) -> None:
    loop = asyncio.get_running_loop()
    clients = []
    for _ in range(_CLIENTS):
        _, client = await loop.create_connection(_Client, "127.0.0.1", port)
        clients.append(client)
    while line := await asyncio.to_thread(sys.stdin.readline):
        seconds = float(line)
        until = time.perf_counter() + seconds
        for client in clients:
            client.start(until)
        await asyncio.sleep(seconds + 0.1)
        times = [ms for client in clients for ms in client.milliseconds]
        result = {"p50": quantile(times, 0.5), "p99": quantile(times, 0.99), "count": len(times)}
        sys.stdout.write(json.dumps(result) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    asyncio.run(_main(int(sys.argv[1])))
