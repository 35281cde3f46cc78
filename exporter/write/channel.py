"""Messages between the proxy and its worker process, over a socket.

multiprocessing.Connection reads a message in many parts. Each read gives up the GIL, and then waits until
the event loop gives it back.
"""

from __future__ import annotations

import select
import socket
import struct
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

_HEAD = struct.Struct("!Q")  # length of the message that follows
_JOINED_BYTES = 1024 * 1024  # a longer message is not copied to be sent together with its head


class Channel:
    """One end of the socket. One thread uses it. Its methods raise OSError if the other end is gone."""

    def __init__(self, end: socket.socket) -> None:
        """Takes over the socket, whose timeouts apply to each call of the system."""
        self._socket = end

    @property
    def has_message(self) -> bool:
        """Whether `receive` would find a message, or its beginning, or the other end closed."""
        return bool(select.select([self._socket], [], [], 0)[0])

    def send(self, message: bytes) -> None:
        """Send a message. Raises BlockingIOError if the other end does not read in time."""
        head = _HEAD.pack(len(message))
        if len(message) <= _JOINED_BYTES:
            self._socket.sendall(head + message)
        else:
            self._socket.sendall(head)
            self._socket.sendall(message)

    def receive(self, on_timeout: Callable[[], None] = lambda: None) -> bytearray:
        """Receive a message. Raises EOFError if the other end is closed.

        `on_timeout` is called after each timeout of the socket. What it raises ends the call, and after that
        this end is of no more use.
        """
        (length,) = _HEAD.unpack(self._read(_HEAD.size, on_timeout))
        return self._read(length, on_timeout)

    def close(self) -> None:
        """Close this end."""
        self._socket.close()

    def _read(self, length: int, on_timeout: Callable[[], None]) -> bytearray:
        data = bytearray(length)
        rest = memoryview(data)
        while rest:
            try:
                count = self._socket.recv_into(rest, 0, socket.MSG_WAITALL)
            except BlockingIOError:
                on_timeout()
                continue
            if not count:
                raise EOFError
            rest = rest[count:]
        return data
