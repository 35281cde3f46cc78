"""Send numbered requests through a proxy at a steady rate, and record the outcome of each.

The requests come from a separate process, so that the test's own work does not affect the times.
"""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Self

from tests.support.fixed_response import FixedResponseProtocol

if TYPE_CHECKING:
    from collections.abc import Callable

_ROOT = Path(__file__).parents[2]
_RESPONSE = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 2\r\n\r\nok"
_RESPONSE_SECONDS = 30.0  # timeout for one response
_RECONNECT_SECONDS = 0.05  # between attempts to reach a proxy that is down


class Request(NamedTuple):
    """One request that was sent at least in part; times are monotonic seconds."""

    number: int
    generation: int
    sent_at: float
    ended_at: float
    answered: bool  # whether a complete 2xx response was received


class Traffic:
    """Runs the client process inside its `with` block; it sends nothing before `set_target`.

    Args:
        file: The file for the outcomes of the requests.
        rate: Requests per second over all connections.
        connections: The number of connections.
    """

    def __init__(self, file: Path, rate: float, connections: int) -> None:
        self._file = file
        self._arguments = [str(file), str(rate), str(connections)]

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.traffic", *self._arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=_ROOT,
        )
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def set_target(self, generation: int, port: int) -> None:
        """Open all further connections to the proxy at this port."""
        assert self._process.stdin
        self._process.stdin.write(f"{generation} {port}\n")
        self._process.stdin.flush()

    def stop(self) -> None:
        """Stop sending, and wait until every request has ended. Idempotent."""
        if self._process.poll() is None:
            self._process.communicate(timeout=_RESPONSE_SECONDS + 10)
        if self._process.stdout:
            self._process.stdout.close()

    def requests(self) -> list[Request]:
        """Return the outcome of every request. Call `stop` first."""
        lines = (line.split() for line in self._file.read_text().splitlines())
        return [
            Request(int(n), int(generation), float(sent), float(ended), answered == "1")
            for n, generation, sent, ended, answered in lines
        ]


class _Clients:
    """Connections that send at a fixed interval, independently of each other."""

    def __init__(self, interval: float, record: Callable[[Request], None]) -> None:
        self.target: tuple[int, int] | None = None
        self.origin_port = 0
        self.stopping = asyncio.Event()
        self._interval = interval
        self._record = record
        self._numbers = 0

    async def run(self, index: int, count: int) -> None:
        due = time.monotonic() + self._interval * index / count
        while not self.stopping.is_set():
            if self.target is None:
                await self._pause(_RECONNECT_SECONDS)
                continue
            generation, port = self.target
            try:
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                await self._pause(_RECONNECT_SECONDS)
                continue
            with contextlib.closing(writer), contextlib.suppress(OSError, EOFError, TimeoutError):
                while not self.stopping.is_set():
                    await self._pause(due - time.monotonic())
                    due = max(due + self._interval, time.monotonic())
                    await self._send_request(reader, writer, generation)

    async def _send_request(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, generation: int
    ) -> None:
        self._numbers += 1
        number, sent_at, answered = self._numbers, time.monotonic(), False
        try:
            async with asyncio.timeout(_RESPONSE_SECONDS):
                host = f"127.0.0.1:{self.origin_port}"
                head = f"GET http://{host}/n/{number} HTTP/1.1\r\nHost: {host}\r\n\r\n"
                writer.write(head.encode())
                response = (await reader.readuntil(b"\r\n\r\n")).lower()
                size = int(response.partition(b"content-length: ")[2].split(b"\r\n")[0])
                await reader.readexactly(size)
                answered = response.split(b" ")[1].startswith(b"2")
        finally:
            self._record(Request(number, generation, sent_at, time.monotonic(), answered))

    async def _pause(self, seconds: float) -> None:
        if seconds > 0:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.stopping.wait(), seconds)


async def _main(file: Path, rate: float, connections: int) -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: FixedResponseProtocol(_RESPONSE), "127.0.0.1", 0)
    with file.open("w", encoding="utf-8") as outcomes:

        def record(request: Request) -> None:
            outcomes.write(" ".join(str(int(v) if v is True or v is False else v) for v in request))
            outcomes.write("\n")

        clients = _Clients(connections / rate, record)
        clients.origin_port = server.sockets[0].getsockname()[1]

        def read_targets() -> None:
            for line in sys.stdin:
                generation, port = line.split()
                clients.target = (int(generation), int(port))
            loop.call_soon_threadsafe(clients.stopping.set)

        reader = threading.Thread(target=read_targets)
        reader.start()
        await asyncio.gather(*(clients.run(i, connections) for i in range(connections)))
        server.close()
    reader.join()


if __name__ == "__main__":
    asyncio.run(_main(Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])))
