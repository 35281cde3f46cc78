"""Every way in which an upstream can end a response, each under its own path.

`size` in the query is the length of the body, 1000 if it is not said. Where a response waits, it
waits until the test calls `RawUpstream.release`.
"""

import gzip
from collections.abc import Awaitable, Callable

from wsproto import ConnectionType, WSConnection
from wsproto.connection import ConnectionState
from wsproto.events import (
    AcceptConnection,
    BytesMessage,
    CloseConnection,
    Event,
    Ping,
    Request,
    TextMessage,
)

from .server_connection import ServerConnection, body, head

type Ending = Callable[[ServerConnection], Awaitable[None]]

ENDINGS: dict[str, Ending] = {}
BEFORE_BODY = ("/early-413", "/reset-in-upload")  # these do not wait for the request's body
UPGRADE = "rot0"  # the protocol /upgrade changes to: an echo


def find(path: str) -> Ending:
    """Return what answers `path`; anything unknown is a 404."""
    known = ENDINGS.get(path)
    if known:
        return known
    return any_status if path.startswith("/status/") else not_found


def gzipped(size: int) -> bytes:
    """Return what /gzip sends."""
    return gzip.compress(body(size), mtime=0)


def _on(path: str) -> Callable[[Ending], Ending]:
    def remember(ending: Ending) -> Ending:
        ENDINGS[path] = ending
        return ending

    return remember


async def not_found(wire: ServerConnection) -> None:
    """Answer 404."""
    await wire.respond(404, b"no such ending\n")


async def any_status(wire: ServerConnection) -> None:
    """Answer /status/NNN with that status; bodyless where HTTP says so."""
    status = int(wire.arrival.path.removeprefix("/status/"))
    if status in (204, 304):
        await wire.send(head(status))
    else:
        await wire.respond(status, f"{status}\n".encode())


# -- whole responses ---------------------------------------------------------------------------


@_on("/ok")
async def _ok(wire: ServerConnection) -> None:
    await wire.respond(200, b"ok\n", "Content-Type: text/plain")


@_on("/echo")
async def _echo(wire: ServerConnection) -> None:
    await wire.respond(200, str(wire.arrival.body_length).encode())


@_on("/head")
async def _head(wire: ServerConnection) -> None:
    await wire.respond(200, body(5000))


@_on("/sized")
async def _sized(wire: ServerConnection) -> None:
    await wire.send(head(200, f"Content-Length: {wire.size}"))
    await wire.send_body(wire.size)


@_on("/204")
async def _no_content(wire: ServerConnection) -> None:
    await wire.send(head(204))


@_on("/304")
async def _not_modified(wire: ServerConnection) -> None:
    await wire.send(head(304, 'ETag: "same"', "Content-Length: 5000"))


@_on("/redirect")
async def _redirect(wire: ServerConnection) -> None:
    await wire.respond(302, b"over there\n", "Location: /ok?from=redirect")


@_on("/gzip")
async def _gzip(wire: ServerConnection) -> None:
    await wire.respond(200, gzipped(wire.size), "Content-Encoding: gzip")


async def _send_chunks(wire: ServerConnection, size: int, step: int = 16384) -> None:
    for start in range(0, size, step):
        data = body(min(step, size - start), start)
        await wire.send(f"{len(data):x}\r\n".encode() + data + b"\r\n")


@_on("/chunked")
async def _chunked(wire: ServerConnection) -> None:
    await wire.send(head(200, "Transfer-Encoding: chunked"))
    if wire.arrival.method != "HEAD":
        await _send_chunks(wire, wire.size)
        await wire.send(b"0\r\n\r\n")


@_on("/trailers")
async def _trailers(wire: ServerConnection) -> None:
    await wire.send(head(200, "Transfer-Encoding: chunked", "Trailer: X-Last"))
    if wire.arrival.method != "HEAD":
        await _send_chunks(wire, wire.size)
        await wire.send(b"0\r\nX-Last: yes\r\n\r\n")


@_on("/until-eof")
async def _until_eof(wire: ServerConnection) -> None:
    await wire.send(head(200, "Connection: close"))
    await wire.send_body(wire.size)
    wire.close()


@_on("/many-headers")
async def _many_headers(wire: ServerConnection) -> None:
    await wire.respond(200, b"ok\n", *(f"X-{number}: {number}" for number in range(wire.size)))


@_on("/1xx-then-200")
async def _interim(wire: ServerConnection) -> None:
    await wire.send(head(103, "Link: </style.css>; rel=preload"))
    await _ok(wire)


# -- slow ones ---------------------------------------------------------------------------------


@_on("/slow-head")
async def _slow_head(wire: ServerConnection) -> None:
    await wire.gate.wait()
    await _ok(wire)


@_on("/slow-body")
async def _slow_body(wire: ServerConnection) -> None:
    half = wire.size // 2
    await wire.send(head(200, f"Content-Length: {wire.size}"))
    await wire.send_body(half)
    await wire.gate.wait()
    await wire.send_body(wire.size - half, half)


@_on("/slow-chunked")
async def _slow_chunked(wire: ServerConnection) -> None:
    await wire.send(head(200, "Transfer-Encoding: chunked"))
    await _send_chunks(wire, wire.size)
    await wire.gate.wait()
    await wire.send(b"0\r\n\r\n")


# -- cut off -----------------------------------------------------------------------------------


@_on("/close-before-head")
async def _close_before_head(wire: ServerConnection) -> None:
    wire.close()


@_on("/reset-before-head")
async def _reset_before_head(wire: ServerConnection) -> None:
    wire.reset()


@_on("/close-in-head")
async def _close_in_head(wire: ServerConnection) -> None:
    await wire.send(head(200, "Content-Length: 1000")[:-10])
    wire.close()


@_on("/close-after-head")
async def _close_after_head(wire: ServerConnection) -> None:
    await wire.send(head(200, f"Content-Length: {wire.size}"))
    wire.close()


@_on("/cut-sized")
async def _cut_sized(wire: ServerConnection) -> None:
    """Send `sent` bytes, 100 if it is not said, of the `size` that were promised."""
    await wire.send(head(200, f"Content-Length: {wire.size}"))
    await wire.send_body(int(wire.arrival.query.get("sent", "100")))
    wire.close()


@_on("/cut-chunked")
async def _cut_chunked(wire: ServerConnection) -> None:
    """Send a whole chunk of `size` bytes and half of another."""
    await wire.send(head(200, "Transfer-Encoding: chunked"))
    await _send_chunks(wire, wire.size)
    await wire.send(b"3e8\r\n" + body(500))
    wire.close()


@_on("/reset-in-body")
async def _reset_in_body(wire: ServerConnection) -> None:
    """Send half the body, wait, and drop the connection with a RST."""
    await wire.send(head(200, f"Content-Length: {wire.size}"))
    await wire.send_body(wire.size // 2)
    await wire.gate.wait()
    wire.reset()


# -- wrong -------------------------------------------------------------------------------------


@_on("/garbage")
async def _garbage(wire: ServerConnection) -> None:
    await wire.send(b"\x16\x03\x00 this is not HTTP at all\r\n\r\n")
    wire.close()


@_on("/bad-chunk")
async def _bad_chunk(wire: ServerConnection) -> None:
    await wire.send(head(200, "Transfer-Encoding: chunked") + b"zz\r\nnot a length\r\n0\r\n\r\n")
    wire.close()


@_on("/cl-and-te")
async def _length_and_chunks(wire: ServerConnection) -> None:
    await wire.send(head(200, "Content-Length: 5", "Transfer-Encoding: chunked"))
    await wire.send(b"5\r\nhello\r\n0\r\n\r\n")


@_on("/two-lengths")
async def _two_lengths(wire: ServerConnection) -> None:
    await wire.send(head(200, "Content-Length: 5", "Content-Length: 7") + b"hello!!")


# -- before the upload is over -----------------------------------------------------------------


@_on("/early-413")
async def _too_large(wire: ServerConnection) -> None:
    await wire.respond(413, b"too large\n", "Connection: close")
    await wire.read_body()  # closing now would be a RST, which can overtake the answer
    wire.close()


@_on("/reset-in-upload")
async def _reset_in_upload(wire: ServerConnection) -> None:
    await wire.gate.wait()
    wire.reset()


# -- other protocols ---------------------------------------------------------------------------


@_on("/upgrade")
async def _upgrade(wire: ServerConnection) -> None:
    await wire.send(head(101, "Connection: Upgrade", f"Upgrade: {UPGRADE}"))
    while data := await wire.reader.read(65536):
        await wire.send(data)
    wire.close()


@_on("/websocket")
async def _websocket(wire: ServerConnection) -> None:
    """Echo every message until the client closes."""
    await _Echo(wire).run()


@_on("/websocket-abrupt")
async def _websocket_abrupt(wire: ServerConnection) -> None:
    """Echo one message, then drop the connection without a close frame."""
    if await _Echo(wire).run(messages=1):
        wire.reset()


@_on("/websocket-bye")
async def _websocket_bye(wire: ServerConnection) -> None:
    """Echo one message, then close with the `code` of the query, 1000 if it is not said."""
    echo = _Echo(wire)
    if await echo.run(messages=1):
        code = int(wire.arrival.query.get("code", "1000"))
        await echo.say(CloseConnection(code=code, reason="bye"))
        await echo.run()


class _Echo:
    """The server's end of a websocket."""

    def __init__(self, wire: ServerConnection) -> None:
        self._wire = wire
        self._state = WSConnection(ConnectionType.SERVER)
        self._state.receive_data(wire.arrival.raw_head)

    async def say(self, event: Event) -> None:
        """Send one event."""
        await self._wire.send(self._state.send(event))

    async def run(self, messages: int = -1) -> bool:
        """Echo until so many messages went back (True) or the websocket is closed (False)."""
        while True:
            for event in self._state.events():
                messages -= await self._answer(event)
                if messages == 0:
                    return True
            data = await self._wire.reader.read(65536)
            if not data or self._state.state is ConnectionState.CLOSED:
                self._wire.close()
                return False
            self._state.receive_data(data)

    async def _answer(self, event: Event) -> bool:
        """Answer one event; tell whether that echoed the end of a message."""
        match event:
            case Request():
                await self.say(AcceptConnection())
            case Ping():
                await self.say(event.response())
            case TextMessage() | BytesMessage():
                await self.say(event)
                return event.message_finished
            case CloseConnection() if self._state.state is ConnectionState.REMOTE_CLOSING:
                await self.say(event.response())
        return False
