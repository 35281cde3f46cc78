"""Split a stream of bytes into the messages of PostgreSQL's protocol.

It does not interpret the messages. See the PostgreSQL manual, "Message Formats".
"""

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
    """State that both directions of a connection share.

    Attributes:
        pending: The number of encryption requests without their one-byte answer.
        encrypted: Whether the rest of the connection is encrypted, so that it cannot be split.
    """

    pending: int = 0
    encrypted: bool = False


_KEPT_FIELDS = b"SVMD"  # severity twice, message and detail


def without_cause(error: bytes) -> bytes:
    """An ErrorResponse as Citus sends it if a worker refuses a COPY: state XX000 and no context."""
    fields = [field for field in error[5:].split(b"\0") if field and field[0] in _KEPT_FIELDS]
    body = b"".join([field + b"\0" for field in (*fields, b"CXX000")]) + b"\0"
    return b"E" + struct.pack("!i", len(body) + 4) + body


@dataclass
class Splitter:
    """Splits one direction of a connection into messages.

    Attributes:
        frontend: Whether the client sends in this direction. Its first messages have no type letter.
    """

    frontend: bool
    handshake: Handshake
    _bytes: bytearray = field(default_factory=bytearray)
    _started: bool = False

    def feed(self, data: bytes) -> Iterator[tuple[str, bytes]]:
        """Add bytes; yield the type letter (or name) and bytes of each message they complete."""
        self._bytes += data
        while message := self._next():
            yield message

    def rest(self) -> bytes:
        """Return the bytes of an incomplete message."""
        return bytes(self._bytes)

    def _next(self) -> tuple[str, bytes] | None:
        if self.handshake.encrypted:
            return ("encrypted", self._take(len(self._bytes))) if self._bytes else None
        if self.frontend and not self._started:
            return self._startup()
        if not self.frontend and self.handshake.pending:
            return self._answer() if self._bytes else None
        return self._typed()

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
            self.handshake.pending += 1
        self._started = name == "startup"
        return name, self._take(size)

    def _answer(self) -> tuple[str, bytes]:
        self.handshake.pending -= 1
        answer = self._take(1)
        self.handshake.encrypted = answer in (b"S", b"G")
        return f"answer:{answer.decode('latin-1')}", answer

    def _typed(self) -> tuple[str, bytes] | None:
        if len(self._bytes) < 5:
            return None
        (size,) = struct.unpack_from("!i", self._bytes, 1)
        if len(self._bytes) < size + 1:
            return None
        return chr(self._bytes[0]), self._take(size + 1)
