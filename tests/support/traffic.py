"""Send steady, numbered requests through a proxy, from a process of its own, and tell what became of each.

A process of its own, so that nothing else a test does is seen in the times it measures.
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
_ANSWER = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: 2\r\n\r\nok"
_PATIENCE = 30.0  # seconds for one answer
_AGAIN_SECONDS = 0.05  # between attempts to reach a proxy that is not there


class Request(NamedTuple):
    """One request that was sent, wholly or in part; times are monotonic seconds."""

    number: int
    generation: int
    sent_at: float
    ended_at: float
    answered: bool  # a 2xx was received completely


class Traffic:
    """The process, while its `with` lasts; it sends nothing before `go_to`.

    Args:
        file: Where it notes what became of each request.
        rate: Requests a second, of all connections together.
        connections: How many are kept open.
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

    def go_to(self, generation: int, port: int) -> None:
        """Take the proxy at this port for every connection that is opened from now on."""
        assert self._process.stdin
        self._process.stdin.write(f"{generation} {port}\n")
        self._process.stdin.flush()

    def stop(self) -> None:
        """Send nothing more, and wait until all that was sent has ended. Idempotent."""
        if self._process.poll() is None:
            self._process.communicate(timeout=_PATIENCE + 10)
        if self._process.stdout:
            self._process.stdout.close()

    def requests(self) -> list[Request]:
        """What became of each, once stopped."""
        lines = (line.split() for line in self._file.read_text().splitlines())
        return [
            Request(int(n), int(generation), float(sent), float(ended), answered == "1")
            for n, generation, sent, ended, answered in lines
        ]


class _Clients:
    """Connections that each send at their own beat, whatever the others do."""

    def __init__(self, interval: float, note: Callable[[Request], None]) -> None:
        self.target: tuple[int, int] | None = None
        self.origin = 0
        self.stopping = asyncio.Event()
        self._interval = interval
        self._note = note
        self._numbers = 0

    async def run(self, index: int, count: int) -> None:
        due = time.monotonic() + self._interval * index / count
        while not self.stopping.is_set():
            if self.target is None:
                await self._pause(_AGAIN_SECONDS)
                continue
            generation, port = self.target
            try:
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                await self._pause(_AGAIN_SECONDS)
                continue
            with contextlib.closing(writer), contextlib.suppress(OSError, EOFError, TimeoutError):
                while not self.stopping.is_set():
                    await self._pause(due - time.monotonic())
                    due = max(due + self._interval, time.monotonic())
                    await self._ask(reader, writer, generation)

    async def _ask(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, generation: int
    ) -> None:
        self._numbers += 1
        number, sent_at, answered = self._numbers, time.monotonic(), False
        try:
            async with asyncio.timeout(_PATIENCE):
                host = f"127.0.0.1:{self.origin}"
                head = f"GET http://{host}/n/{number} HTTP/1.1\r\nHost: {host}\r\n\r\n"
                writer.write(head.encode())
                answer = (await reader.readuntil(b"\r\n\r\n")).lower()
                size = int(answer.partition(b"content-length: ")[2].split(b"\r\n")[0])
                await reader.readexactly(size)
                answered = answer.split(b" ")[1].startswith(b"2")
        finally:
            self._note(Request(number, generation, sent_at, time.monotonic(), answered))

    async def _pause(self, seconds: float) -> None:
        if seconds > 0:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.stopping.wait(), seconds)


async def _main(file: Path, rate: float, connections: int) -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: FixedResponseProtocol(_ANSWER), "127.0.0.1", 0)
    with file.open("w", encoding="utf-8") as notes:

        def note(request: Request) -> None:
            notes.write(" ".join(str(int(v) if v is True or v is False else v) for v in request))
            notes.write("\n")

        clients = _Clients(connections / rate, note)
        clients.origin = server.sockets[0].getsockname()[1]

        def read_orders() -> None:
            for line in sys.stdin:
                generation, port = line.split()
                clients.target = (int(generation), int(port))
            loop.call_soon_threadsafe(clients.stopping.set)

        reading = threading.Thread(target=read_orders)
        reading.start()
        await asyncio.gather(*(clients.run(i, connections) for i in range(connections)))
        server.close()
    reading.join()


if __name__ == "__main__":
    asyncio.run(_main(Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])))
