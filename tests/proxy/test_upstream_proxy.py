"""The row of a request whose upstream proxy refuses to open a tunnel says what the client received."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from typing import TYPE_CHECKING

import pytest

from tests.support.http2_client import Http2Client
from tests.support.logged_proxy import LoggedProxy, logged_proxy
from tests.support.socket_server import SocketServer
from tests.support.wait import eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.support.access_log import Row
    from tests.support.postgres import Postgres


class RefusingProxy(SocketServer):
    """An upstream proxy that answers every CONNECT with the same bytes."""

    answer = b""

    async def _serve(self, client: socket.socket) -> None:
        reader, writer = await asyncio.open_connection(sock=client)
        try:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(self.answer)
            await writer.drain()
            await reader.read()
        finally:
            writer.close()

    def disconnect(self) -> None:
        """Close all connections."""
        self.call(self._close_connections())

    async def _close_connections(self) -> None:
        for task in list(self._tasks):
            task.cancel()


@pytest.fixture(scope="module")
def refusing() -> Iterator[RefusingProxy]:
    with RefusingProxy() as running:
        yield running


@pytest.fixture(scope="module")
def proxied(
    postgres: Postgres, refusing: RefusingProxy, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LoggedProxy]:
    """A proxy that sends everything through the refusing one."""
    host, port = refusing.address
    mode = f"upstream:http://{host}:{port}"
    with logged_proxy(postgres, tmp_path_factory.mktemp("proxy"), "--mode", mode) as running:
        yield running


def client_hello() -> bytes:
    """The first message of a TLS client."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = ssl.create_default_context().wrap_bio(
        incoming, outgoing, server_hostname="silent.example"
    )
    with contextlib.suppress(ssl.SSLWantReadError):
        tls.do_handshake()
    return outgoing.read()


def request_over_http1(proxied: LoggedProxy, agent: str) -> int | None:
    with proxied.client() as client:
        opened = client.connect("pypi.example", 443)
        assert opened
        assert opened.status == 200
        client.start_tls("pypi.example", proxied.proxy.ca_path)
        client.request("GET", "/", "Host: pypi.example", f"User-Agent: {agent}")
        response = client.read_response()
    return response.status if response else None


def request_over_http2(proxied: LoggedProxy, agent: str) -> int | None:
    with Http2Client.through(
        proxied.proxy.address, "pypi.example", 443, proxied.proxy.ca_path
    ) as client:
        (stream,) = client.wait(client.request("/", ("user-agent", agent)))
    return stream.status


# The reason phrases are the upstream proxy's own words; they must not change the error type.
@pytest.mark.parametrize(
    "status_line",
    [
        "403 No",
        "407 Proxy Authentication Required",
        "302 Found",
        "502 Certificate verify failed",
        "503 timed out: connection closed",
        "101 from client, refusing",
    ],
)
@pytest.mark.parametrize("request_over", [request_over_http1, request_over_http2])
def test_a_refused_connect_is_a_failed_connection(
    proxied: LoggedProxy,
    refusing: RefusingProxy,
    status_line: str,
    request_over: Callable[[LoggedProxy, str], int | None],
) -> None:
    refusing.answer = f"HTTP/1.1 {status_line}\r\nContent-Length: 0\r\n\r\n".encode()
    agent = proxied.new_agent()
    status = request_over(proxied, agent)
    row: Row = proxied.row_for_agent(agent)
    assert status == 502
    assert (row["status_code"], row["error_type"]) == (502, "connect")
    assert row["host"] == "pypi.example"


def test_an_upstream_proxy_that_speaks_nonsense(
    proxied: LoggedProxy, refusing: RefusingProxy
) -> None:
    refusing.answer = b"220 mail.example from client, refusing TLS\r\n\r\n"
    agent = proxied.new_agent()
    assert request_over_http1(proxied, agent) == 502
    row = proxied.row_for_agent(agent)
    assert (row["status_code"], row["error_type"]) == (502, "connect")


def test_client_that_leaves_before_the_upstream_proxy_answers(
    proxied: LoggedProxy, refusing: RefusingProxy
) -> None:
    """It did not reject our certificate: mitmproxy had not shown it yet."""
    refusing.answer = b""  # and waits for the end of the connection
    with proxied.client() as client:
        opened = client.connect("silent.example", 443)
        assert opened
        client.send(client_hello())
        eventually(lambda: refusing.connections)
    refusing.disconnect()
    row = proxied.wait_row("host = 'silent.example'")
    assert (row["status_code"], row["error_type"]) == (None, "client_disconnected")


def test_client_that_leaves_while_the_proxy_connects(postgres: Postgres, tmp_path: Path) -> None:
    """Nothing answers the SYN, because the backlog of the socket is full."""
    with (
        socket.socket() as full,
        contextlib.ExitStack() as waiting,
        logged_proxy(postgres, tmp_path) as direct,
    ):
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        host, port = full.getsockname()
        for _ in range(3):
            filler = waiting.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex((host, port))
        with direct.client() as client:
            client.send(f"CONNECT {host}:{port} HTTP/1.1\r\n\r\n".encode())
            eventually(lambda: "client connect" in direct.proxy.output())
        row = direct.wait_row("method = 'CONNECT'")
        assert (row["status_code"], row["error_type"]) == (None, "client_disconnected")
