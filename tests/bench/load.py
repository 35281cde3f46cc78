"""A small origin, and clients that ask it through a proxy as fast as that answers, in a process of its own.

Both speak just enough HTTP/1.1, so that what they cost is little beside a proxy.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from pathlib import Path
from typing import Self

from tests.support.fixed_response import FixedResponseProtocol

_ROOT = Path(__file__).resolve().parents[2]
_BODY = b"x" * 600
_ANSWER = (
    b"HTTP/1.1 200 OK\r\nContent-Type: application/octet-stream\r\nContent-Length: %d\r\n"
    b'ETag: "0123456789abcdef"\r\nAge: 120\r\nX-Cache: HIT\r\n\r\n%s' % (len(_BODY), _BODY)
)
_CONNECTIONS = 8
_REPEATING_URLS = 500
_PATIENCE_SECONDS = 300.0
_DIGEST = "9d/be/10918a2eac4ae9f02f6cfe6414b7a155ccd8f7f9d4380d62fd5b955065c3"


class Load:
    """The process, while its `with` lasts."""

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.bench.load"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=_ROOT,
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate(timeout=_PATIENCE_SECONDS)

    def run(self, port: int, requests: int) -> float:
        """Send so many requests through the proxy at this port; seconds it took."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(f"{port} {requests}\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError("the clients ended")
        return float(answer)


class _Client(asyncio.Protocol):
    """Asks for the next URL once it has all of an answer."""

    def __init__(self, work: _Work) -> None:
        self._work = work
        self._is_done = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._data = b""
        self._ask()

    def data_received(self, data: bytes) -> None:
        self._data += data
        if self._data.endswith(_BODY):
            if not self._data.startswith(b"HTTP/1.1 200"):
                self._work.fail(f"the proxy answered {self._data[:60]!r}")
            self._data = b""
            self._work.answered()
            self._ask()

    def connection_lost(self, error: Exception | None) -> None:
        if not self._is_done:
            self._work.fail(f"the proxy closed a connection: {error}")

    def _ask(self) -> None:
        head = self._work.next_head()
        if head is None:
            self._is_done = True
            self._transport.close()
        else:
            self._transport.write(head)


class _Work:
    """So many requests, shared by all clients."""

    def __init__(self, origin: int, requests: int, first: int) -> None:
        self.left_to_answer = requests
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._left_to_send = requests
        self._origin = origin
        self._number = first

    def next_head(self) -> bytes | None:
        """What to send next, None for nothing: every second URL is new."""
        if not self._left_to_send:
            return None
        self._left_to_send -= 1
        self._number += 1
        n = self._number if self._number % 2 else self._number % _REPEATING_URLS
        host = f"127.0.0.1:{self._origin}"
        path = f"/pypi/packages/{_DIGEST}/package_{n}-1.{n % 50}.0-py3-none-any.whl"
        return (
            f"GET http://{host}{path} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: pip/25.0\r\n"
            "Accept: */*\r\nAccept-Encoding: identity\r\n\r\n"
        ).encode()

    def answered(self) -> None:
        """One more."""
        self.left_to_answer -= 1
        if not self.left_to_answer and not self.done.done():
            self.done.set_result(None)

    def fail(self, reason: str) -> None:
        """Give up."""
        if not self.done.done():
            self.done.set_exception(RuntimeError(reason))


async def _main() -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: FixedResponseProtocol(_ANSWER), "127.0.0.1", 0)
    origin = server.sockets[0].getsockname()[1]
    sent = 0
    while line := await asyncio.to_thread(sys.stdin.readline):
        port, requests = map(int, line.split())
        work = _Work(origin, requests, sent)
        sent += requests
        start = time.perf_counter()
        for _ in range(_CONNECTIONS):
            await loop.create_connection(lambda: _Client(work), "127.0.0.1", port)  # noqa: B023
        await asyncio.wait_for(work.done, _PATIENCE_SECONDS)
        sys.stdout.write(f"{time.perf_counter() - start}\n")
        sys.stdout.flush()
    server.close()


if __name__ == "__main__":
    asyncio.run(_main())
