"""A mitmproxy script that keeps the bare facts of each flow: the least that any log needs in its hooks.

It decides nothing: all header fields are kept, cookies too, no end is told from another, nothing is cut, and
what it keeps is thrown away. It shows how much of the time of our hooks is the price of true rows.
"""

from __future__ import annotations

import mmap
from collections import deque
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mitmproxy.http import HTTPFlow

_facts = attrgetter(
    "id",
    "client_conn.peername",
    "request.data.timestamp_start",
    "request.data.method",
    "request.data.scheme",
    "request.data.host",
    "request.data.port",
    "request.data.path",
    "request.data.http_version",
    "request.data.headers.fields",
    "response.data.headers.fields",
    "response.data.status_code",
    "response.data.timestamp_start",
    "response.data.timestamp_end",
)
_encode = msgspec.msgpack.Encoder().encode
_RING_BYTES = 1 << 20


class LeastHooks:
    """Notes that a flow has begun and ended; then reads, encodes and keeps it, in a queue and a ring."""

    def __init__(self) -> None:
        self._ended: dict[Any, bool] = {}
        self._queue: deque[bytes] = deque(maxlen=4096)
        self._ring = mmap.mmap(-1, _RING_BYTES)
        self._offset = 0

    def requestheaders(self, flow: HTTPFlow) -> None:
        """It has begun."""
        self._ended[flow] = False

    def responseheaders(self, flow: HTTPFlow) -> None:
        """Do nothing."""

    def response(self, flow: HTTPFlow) -> None:
        """It has ended."""
        self._ended[flow] = True

    def update(self, flows: Sequence[HTTPFlow]) -> None:
        """Keep what has ended."""
        for flow in flows:
            if self._ended.get(flow):
                del self._ended[flow]
                self._keep(_encode(_facts(flow)))

    def _keep(self, payload: bytes) -> None:
        self._queue.append(payload)
        if self._offset + len(payload) > _RING_BYTES:
            self._offset = 0
        end = self._offset + len(payload)
        self._ring[self._offset : end] = payload
        self._offset = end


addons = [LeastHooks()]
