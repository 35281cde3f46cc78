"""Where the messages of PostgreSQL's protocol begin and end in a stream of bytes."""

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

_STARTUPS = {
    80877102: "cancelrequest",
    80877103: "sslrequest",
    80877104: "gssencrequest",
}


@dataclass
class Handshake:
    """What the two directions of a connection must know of each other.

    Attributes:
        asked: How many requests for encryption still wait for their answer of one bare byte.
        encrypted: Whether what follows can no longer be read.
    """

    asked: int = 0
    encrypted: bool = False


@dataclass
class Splitter:
    """Cuts one direction of a connection into messages.

    Attributes:
        frontend: Whether this is the client's direction, whose first messages have no letter.
    """

    frontend: bool
    handshake: Handshake
    _bytes: bytearray = field(default_factory=bytearray)
    _started: bool = False

    def feed(self, data: bytes) -> Iterator[tuple[str, bytes]]:
        """Take bytes; yield each message they complete, with its letter or name."""
        self._bytes += data
        while found := self._next():
            yield found

    def rest(self) -> bytes:
        """Return the message that was begun and not ended."""
        return bytes(self._bytes)

    def _next(self) -> tuple[str, bytes] | None:
        if self.handshake.encrypted:
            return ("encrypted", self._take(len(self._bytes))) if self._bytes else None
        if self.frontend and not self._started:
            return self._startup()
        if not self.frontend and self.handshake.asked:
            return self._answer() if self._bytes else None
        return self._lettered()

    def _take(self, size: int) -> bytes:
        taken = bytes(self._bytes[:size])
        del self._bytes[:size]
        return taken

    def _startup(self) -> tuple[str, bytes] | None:
        if len(self._bytes) < 8:
            return None
        size, code = struct.unpack_from("!ii", self._bytes)
        if len(self._bytes) < size:
            return None
        name = _STARTUPS.get(code, "startup")
        if name in ("sslrequest", "gssencrequest"):
            self.handshake.asked += 1
        self._started = name == "startup"
        return name, self._take(size)

    def _answer(self) -> tuple[str, bytes]:
        self.handshake.asked -= 1
        answer = self._take(1)
        self.handshake.encrypted = answer in (b"S", b"G")
        return f"answer:{answer.decode('latin-1')}", answer

    def _lettered(self) -> tuple[str, bytes] | None:
        if len(self._bytes) < 5:
            return None
        (size,) = struct.unpack_from("!i", self._bytes, 1)
        if len(self._bytes) < size + 1:
            return None
        return chr(self._bytes[0]), self._take(size + 1)
