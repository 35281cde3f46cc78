"""Read one HTTP request from a socket and answer it. Loads prometheus_client and h11."""

from __future__ import annotations

import asyncio
import logging
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import h11
from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.exposition import choose_encoder

from .families import LogCollector

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Mapping

logger = logging.getLogger(__name__)

_PATH = "/metrics"
_MAX_HEAD_BYTES = 16 * 1024  # of a request
_READ_BYTES = 4096
_PLAIN = "text/plain; charset=utf-8"


class Responder:
    """Answers with the metrics of the log and of this process. One thread uses it."""

    def __init__(self, status: Callable[[], Mapping[str, Any]]) -> None:
        """`status`: see `Exporter.status`."""
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(LogCollector(status))
        ProcessCollector(registry=self._registry)  # memory, CPU and open files; on Linux
        self._has_warned = False

    async def respond(self, client: socket.socket) -> None:
        """Answer one request, and no other. Raises OSError if the client is gone."""
        connection = h11.Connection(h11.SERVER, max_incomplete_event_size=_MAX_HEAD_BYTES)
        try:
            request = await _read_request(client, connection)
        except h11.RemoteProtocolError as e:
            status = HTTPStatus(e.error_status_hint)
            await _send(client, connection, status, _PLAIN, b"Not a valid HTTP request.\n")
            return
        if request is not None:
            status, content_type, body = self._answer(request)
            is_head = request.method == b"HEAD"
            await _send(client, connection, status, content_type, body, is_head=is_head)

    def _answer(self, request: h11.Request) -> tuple[HTTPStatus, str, bytes]:
        if request.target.partition(b"?")[0] != _PATH.encode():
            return HTTPStatus.NOT_FOUND, _PLAIN, f"The metrics are at {_PATH}.\n".encode()
        if request.method not in {b"GET", b"HEAD"}:
            return HTTPStatus.METHOD_NOT_ALLOWED, _PLAIN, b"Use GET.\n"
        accept = ",".join(
            value.decode("latin-1") for name, value in request.headers if name == b"accept"
        )
        try:
            encode, content_type = choose_encoder(accept)
            return HTTPStatus.OK, content_type, encode(self._registry)
        except Exception as e:  # noqa: BLE001 - a bug of ours must end neither the thread nor the proxy
            if not self._has_warned:
                logger.warning("artifactapi: no metrics: %s (%s)", e, type(e).__name__)
            self._has_warned = True
            return HTTPStatus.INTERNAL_SERVER_ERROR, _PLAIN, b"See the log of the proxy.\n"


async def _read_request(client: socket.socket, connection: h11.Connection) -> h11.Request | None:
    """The head of the request; None if the client closed the connection before."""
    loop = asyncio.get_running_loop()
    while (event := connection.next_event()) is h11.NEED_DATA:
        connection.receive_data(await loop.sock_recv(client, _READ_BYTES))
    return event if isinstance(event, h11.Request) else None


async def _send(
    client: socket.socket,
    connection: h11.Connection,
    status: HTTPStatus,
    content_type: str,
    body: bytes,
    *,
    is_head: bool = False,
) -> None:
    """Send a response that ends the connection. `is_head`: without the body (RFC 9110, 9.3.2)."""
    headers = [
        ("Content-Type", content_type),
        ("Content-Length", str(len(body))),
        ("Connection", "close"),
    ]
    if status == HTTPStatus.METHOD_NOT_ALLOWED:
        headers.append(("Allow", "GET, HEAD"))
    response = h11.Response(status_code=status, headers=headers, reason=status.phrase.encode())
    parts = (response, h11.Data(b"" if is_head else body), h11.EndOfMessage())
    content = b"".join(connection.send(part) or b"" for part in parts)
    await asyncio.get_running_loop().sock_sendall(client, content)
