"""An origin for load: answers each request head with the same bytes; reads no body and checks nothing."""

from __future__ import annotations

import asyncio


class FixedResponseProtocol(asyncio.Protocol):
    """One connection of such an origin, over HTTP/1 and kept alive."""

    def __init__(self, answer: bytes) -> None:
        """`answer` is a whole response: head and body."""
        self._answer = answer
        self._data = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """As asyncio.Protocol."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """As asyncio.Protocol; heads may come in pieces, or several at once."""
        *heads, self._data = (self._data + data).split(b"\r\n\r\n")
        self._transport.write(self._answer * len(heads))
