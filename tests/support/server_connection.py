"""One HTTP/1 connection as an upstream sees it: requests read, bytes sent, an end made."""

import asyncio
import socket
import struct
from dataclasses import dataclass, field
from http import HTTPStatus
from urllib.parse import parse_qsl, urlsplit

HEAD_LIMIT = 16 * 1024 * 1024
_PATTERN = bytes(range(251)) * 256


def body(size: int, start: int = 0) -> bytes:
    """Return `size` bytes of the one endless body all responses are cut from."""
    offset = start % len(_PATTERN)
    copies = (offset + size) // len(_PATTERN) + 1
    return (_PATTERN * copies)[offset : offset + size]


def head(status: int, *headers: str) -> bytes:
    """Return a response head, with the usual phrase for a usual status."""
    phrase = HTTPStatus(status).phrase if status in HTTPStatus else "Unheard Of"
    lines = [f"HTTP/1.1 {status} {phrase}", *headers, "", ""]
    return "\r\n".join(lines).encode("latin-1")


@dataclass
class ReceivedRequest:
    """A request that reached the upstream; the body's part grows while it comes in."""

    method: str
    target: str
    version: str
    headers: list[tuple[str, str]]
    raw_head: bytes = field(repr=False)
    body_length: int = 0
    complete: bool = False

    @classmethod
    def parse(cls, raw_head: bytes) -> "ReceivedRequest":
        """Read a request head; a header name is lower-cased, nothing else is touched."""
        first, *lines = raw_head.decode("latin-1").removesuffix("\r\n\r\n").split("\r\n")
        method, target, version = first.split(" ", 2)
        pairs = [line.partition(":") for line in lines]
        headers = [(name.lower(), value.strip()) for name, _, value in pairs]
        return cls(method, target, version, headers, raw_head)

    @property
    def path(self) -> str:
        """The target's path, whatever form the target has."""
        return urlsplit(self.target).path

    @property
    def query(self) -> dict[str, str]:
        """The target's query, the last of equal names."""
        return dict(parse_qsl(urlsplit(self.target).query, keep_blank_values=True))

    def header(self, name: str, default: str = "") -> str:
        """Return the first header of this lower-case name."""
        return next((value for key, value in self.headers if key == name), default)


class ServerConnection:
    """A connection with the request now being answered on it.

    Attributes:
        arrival: The request being answered.
        gate: Set once the test lets slow responses go on.
    """

    arrival: ReceivedRequest

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, gate: asyncio.Event
    ) -> None:
        self.reader = reader
        self.gate = gate
        self._writer = writer

    @property
    def size(self) -> int:
        """How large a body the request asks for."""
        return int(self.arrival.query.get("size", "1000"))

    @property
    def open(self) -> bool:
        """Whether another request may come."""
        keep = self.arrival.header("connection").lower() != "close"
        return keep and self.arrival.version != "HTTP/1.0" and not self._writer.is_closing()

    async def read_head(self) -> ReceivedRequest:
        """Wait for the next request."""
        self.arrival = ReceivedRequest.parse(await self.reader.readuntil(b"\r\n\r\n"))
        return self.arrival

    async def read_body(self) -> None:
        """Read what is left of the request, counting it."""
        if self.arrival.header("expect").lower() == "100-continue":
            await self.send(head(100))
        if self.arrival.header("transfer-encoding").lower() == "chunked":
            await self._read_chunks()
        else:
            await self._count(int(self.arrival.header("content-length", "0")))
        self.arrival.complete = True

    async def send(self, data: bytes) -> None:
        """Send bytes as they are."""
        self._writer.write(data)
        await self._writer.drain()

    async def send_body(self, size: int, start: int = 0) -> None:
        """Send a part of the endless body, unless the request was a HEAD."""
        if self.arrival.method == "HEAD":
            return
        step = len(_PATTERN)
        for offset in range(start, start + size, step):
            await self.send(body(min(step, start + size - offset), offset))

    async def respond(self, status: int, data: bytes = b"", *headers: str) -> None:
        """Send a whole, sized response; of a HEAD, the head."""
        shown = b"" if self.arrival.method == "HEAD" else data
        await self.send(head(status, f"Content-Length: {len(data)}", *headers) + shown)

    def close(self) -> None:
        """End the connection in the orderly way."""
        self._writer.close()

    def reset(self) -> None:
        """End the connection with a RST."""
        linger = struct.pack("ii", 1, 0)
        raw = self._writer.get_extra_info("socket")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self._writer.transport.abort()

    async def _count(self, size: int) -> None:
        while size:
            data = await self.reader.read(min(size, 65536))
            if not data:
                raise EOFError("the request was cut off")
            self.arrival.body_length += len(data)
            size -= len(data)

    async def _read_chunks(self) -> None:
        while size := int((await self.reader.readline()).split(b";")[0], 16):
            await self._count(size)
            await self.reader.readline()
        while await self.reader.readline() not in (b"\r\n", b""):
            pass
