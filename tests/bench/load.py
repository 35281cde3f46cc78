"""Run an origin and clients that send requests through a proxy as fast as it responds, in a separate process.

Both implement only the HTTP/1.1 they need, so that they cost little compared with the proxy. The origin also
listens with TLS, for clients of others.
"""

from __future__ import annotations

import asyncio
import itertools
import ssl
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Self

from tests.support.certificates import certificate
from tests.support.fixed_response import FixedResponseProtocol

if TYPE_CHECKING:
    from collections.abc import Iterator

_ROOT = Path(__file__).resolve().parents[2]
_BODY = b"x" * 600
_RESPONSE = (
    b"HTTP/1.1 200 OK\r\nContent-Type: application/octet-stream\r\nContent-Length: %d\r\n"
    b'ETag: "0123456789abcdef"\r\nAge: 120\r\nX-Cache: HIT\r\n\r\n%s' % (len(_BODY), _BODY)
)
_CONNECTIONS = 8
_REPEATING_URLS = 500
_TIMEOUT_SECONDS = 300.0
_DIGEST = "9d/be/10918a2eac4ae9f02f6cfe6414b7a155ccd8f7f9d4380d62fd5b955065c3"


def paths(first: int = 0) -> Iterator[str]:
    """Yield paths of packages without end. Every second one is new."""
    for number in itertools.count(first + 1):
        n = number if number % 2 else number % _REPEATING_URLS
        yield f"/pypi/packages/{_DIGEST}/package_{n}-1.{n % 50}.0-py3-none-any.whl"


def settings_file(folder: Path) -> Path:
    """Write a settings file with which these paths are packages."""
    remotes, settings = folder / "remotes.yaml", folder / "settings.yaml"
    remotes.write_text("remotes:\n  - {name: bench, host: 127.0.0.1, path: /pypi, format: pypi}\n")
    settings.write_text(f"remotes: {{file: '{remotes}'}}\n")
    return settings


class Load:
    """Runs the process inside its `with` block.

    Attributes:
        tls_port: Where the origin listens with TLS and a certificate that nobody trusts.
    """

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.bench.load"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=_ROOT,
        )
        assert self._process.stdout
        self.tls_port = int(self._process.stdout.readline())
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate(timeout=_TIMEOUT_SECONDS)

    def run(self, port: int, requests: int, *, keep: bool = False) -> float:
        """Send this number of requests through the proxy; return the seconds that it took.

        With `keep`, over the same connections as the last time.
        """
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(f"{port} {requests} {keep:d}\n")
        self._process.stdin.flush()
        seconds = self._process.stdout.readline()
        if not seconds:
            raise RuntimeError("the client process ended")
        return float(seconds)


class _Client(asyncio.Protocol):
    """Requests the next URL after each complete response."""

    def __init__(self, *, keep: bool) -> None:
        self._keep = keep
        self._is_done = True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._data = b""

    def start(self, work: _Work) -> None:
        """Send requests until all are sent."""
        self._work = work
        self._is_done = False
        self._send_next()

    def data_received(self, data: bytes) -> None:
        self._data += data
        if self._data.endswith(_BODY):
            if not self._data.startswith(b"HTTP/1.1 200"):
                self._work.fail(f"the proxy answered {self._data[:60]!r}")
            self._data = b""
            self._work.count_response()
            self._send_next()

    def connection_lost(self, error: Exception | None) -> None:
        if not self._is_done:
            self._work.fail(f"the proxy closed a connection: {error}")

    def _send_next(self) -> None:
        head = self._work.next_head()
        if head is None:
            self._is_done = True
            if not self._keep:
                self._transport.close()
        else:
            self._transport.write(head)


class _Work:
    """The requests of one run, shared by all clients."""

    def __init__(self, origin: int, requests: int, first: int) -> None:
        self._paths = paths(first)
        self._unanswered = requests
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._unsent = requests
        self._origin = origin

    def next_head(self) -> bytes | None:
        """Return the next request, or None if all were sent."""
        if not self._unsent:
            return None
        self._unsent -= 1
        host = f"127.0.0.1:{self._origin}"
        return (
            f"GET http://{host}{next(self._paths)} HTTP/1.1\r\nHost: {host}\r\nUser-Agent: pip/25.0\r\n"
            "Accept: */*\r\nAccept-Encoding: identity\r\n\r\n"
        ).encode()

    def count_response(self) -> None:
        """Count a response; the run is done after the last one."""
        self._unanswered -= 1
        if not self._unanswered and not self.done.done():
            self.done.set_result(None)

    def fail(self, reason: str) -> None:
        """End the run with an error."""
        if not self.done.done():
            self.done.set_exception(RuntimeError(reason))


async def _main() -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: FixedResponseProtocol(_RESPONSE), "127.0.0.1", 0)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with tempfile.TemporaryDirectory() as folder:
        tls.load_cert_chain(certificate(Path(folder)))
    tls_server = await loop.create_server(
        lambda: FixedResponseProtocol(_RESPONSE), "127.0.0.1", 0, ssl=tls
    )
    sys.stdout.write(f"{tls_server.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    origin = server.sockets[0].getsockname()[1]
    sent = 0
    kept: dict[int, list[_Client]] = {}  # by the port of the proxy
    while line := await asyncio.to_thread(sys.stdin.readline):
        port, requests, keep = map(int, line.split())
        work = _Work(origin, requests, sent)
        sent += requests
        start = time.perf_counter()
        clients = kept.get(port, []) if keep else []
        while len(clients) < _CONNECTIONS:
            _, client = await loop.create_connection(
                lambda: _Client(keep=bool(keep)),  # noqa: B023
                "127.0.0.1",
                port,
            )
            clients.append(client)
        for client in clients:
            client.start(work)
        if keep:
            kept[port] = clients
        await asyncio.wait_for(work.done, _TIMEOUT_SECONDS)
        sys.stdout.write(f"{time.perf_counter() - start}\n")
        sys.stdout.flush()
    server.close()
    tls_server.close()


if __name__ == "__main__":
    asyncio.run(_main())
