"""An origin server for load tests. It sends the same bytes for every request head and checks nothing."""

from __future__ import annotations

import asyncio


class FixedResponseProtocol(asyncio.Protocol):
    """One HTTP/1 keep-alive connection. It does not read request bodies."""

    def __init__(self, response: bytes) -> None:
        """`response` is complete: head and body."""
        self._response = response
        self._data = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Answer each complete request head; heads may arrive in pieces or several at once."""
        *heads, self._data = (self._data + data).split(b"\r\n\r\n")
        self._transport.write(self._response * len(heads))
