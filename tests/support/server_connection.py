"""An upstream's side of one HTTP/1 connection: read requests, send raw bytes, close or reset."""

import asyncio
from dataclasses import dataclass, field
from http import HTTPStatus
from urllib.parse import parse_qsl, urlsplit

from .socket_server import reset_on_close

HEAD_LIMIT = 16 * 1024 * 1024
_PATTERN = bytes(range(251)) * 256


def body(size: int, start: int = 0) -> bytes:
    """Return `size` bytes of the repeating pattern that all bodies consist of, from `start` on."""
    offset = start % len(_PATTERN)
    copies = (offset + size) // len(_PATTERN) + 1
    return (_PATTERN * copies)[offset : offset + size]


def head(status: int, *headers: str) -> bytes:
    """Return a response head, with the standard reason phrase if the status has one."""
    phrase = HTTPStatus(status).phrase if status in HTTPStatus else "Unknown"
    lines = [f"HTTP/1.1 {status} {phrase}", *headers, "", ""]
    return "\r\n".join(lines).encode("latin-1")


@dataclass
class ReceivedRequest:
    """A request that reached the upstream; `body_length` grows as the body arrives."""

    method: str
    target: str
    version: str
    headers: list[tuple[str, str]]
    raw_head: bytes = field(repr=False)
    body_length: int = 0
    complete: bool = False

    @classmethod
    def parse(cls, raw_head: bytes) -> "ReceivedRequest":
        """Parse a request head. Lower-case the header names; keep the rest as received."""
        first, *lines = raw_head.decode("latin-1").removesuffix("\r\n\r\n").split("\r\n")
        method, target, version = first.split(" ", 2)
        pairs = [line.partition(":") for line in lines]
        headers = [(name.lower(), value.strip()) for name, _, value in pairs]
        return cls(method, target, version, headers, raw_head)

    @property
    def path(self) -> str:
        """The path of the target, in any of the forms of a target."""
        return urlsplit(self.target).path

    @property
    def query(self) -> dict[str, str]:
        """The query parameters; the last value of a repeated name."""
        return dict(parse_qsl(urlsplit(self.target).query, keep_blank_values=True))

    def header(self, name: str, default: str = "") -> str:
        """Return the first header with this lower-case name."""
        return next((value for key, value in self.headers if key == name), default)


class ServerConnection:
    """A connection and the request that it is answering.

    Attributes:
        request: The request being answered.
        released: Set when the test lets waiting responses continue.
    """

    request: ReceivedRequest

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, released: asyncio.Event
    ) -> None:
        self.reader = reader
        self.released = released
        self._writer = writer

    @property
    def size(self) -> int:
        """The body size that the request asks for, in bytes."""
        return int(self.request.query.get("size", "1000"))

    @property
    def open(self) -> bool:
        """Whether another request may follow."""
        keep_alive = self.request.header("connection").lower() != "close"
        return keep_alive and self.request.version != "HTTP/1.0" and not self._writer.is_closing()

    async def read_head(self) -> ReceivedRequest:
        """Wait for the next request."""
        self.request = ReceivedRequest.parse(await self.reader.readuntil(b"\r\n\r\n"))
        return self.request

    async def read_body(self) -> None:
        """Read and count the body of the request."""
        if self.request.header("expect").lower() == "100-continue":
            await self.send(head(100))
        if self.request.header("transfer-encoding").lower() == "chunked":
            await self._read_chunks()
        else:
            await self._read_and_count(int(self.request.header("content-length", "0")))
        self.request.complete = True

    async def send(self, data: bytes) -> None:
        """Send raw bytes."""
        self._writer.write(data)
        await self._writer.drain()

    async def send_body(self, size: int, start: int = 0) -> None:
        """Send a part of the body pattern, unless the request was a HEAD."""
        if self.request.method == "HEAD":
            return
        step = len(_PATTERN)
        for offset in range(start, start + size, step):
            await self.send(body(min(step, start + size - offset), offset))

    async def respond(self, status: int, data: bytes = b"", *headers: str) -> None:
        """Send a complete response with Content-Length; only its head for a HEAD request."""
        sent_body = b"" if self.request.method == "HEAD" else data
        await self.send(head(status, f"Content-Length: {len(data)}", *headers) + sent_body)

    def close(self) -> None:
        """Close the connection cleanly."""
        self._writer.close()

    def reset(self) -> None:
        """Close the connection with a RST."""
        reset_on_close(self._writer.get_extra_info("socket"))
        self._writer.transport.abort()

    async def _read_and_count(self, size: int) -> None:
        while size:
            data = await self.reader.read(min(size, 65536))
            if not data:
                raise EOFError("the request is incomplete")
            self.request.body_length += len(data)
            size -= len(data)

    async def _read_chunks(self) -> None:
        while size := int((await self.reader.readline()).split(b";")[0], 16):
            await self._read_and_count(size)
            await self.reader.readline()
        while await self.reader.readline() not in (b"\r\n", b""):
            pass
