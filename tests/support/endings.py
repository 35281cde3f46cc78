"""The responses of `RawUpstream`: one path for each way in which a response can end.

The query parameter `size` sets the length of the body, 1000 by default. A response that waits
continues when the test calls `RawUpstream.release`.
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

type Responder = Callable[[ServerConnection], Awaitable[None]]

RESPONDERS: dict[str, Responder] = {}
RESPOND_BEFORE_BODY = ("/early-413", "/reset-in-upload")
UPGRADE = "rot0"  # the protocol that /upgrade switches to; it echoes


def find_responder(path: str) -> Responder:
    """Return the responder for `path`; an unknown path gets a 404."""
    known = RESPONDERS.get(path)
    if known:
        return known
    return any_status if path.startswith("/status/") else not_found


def gzipped(size: int) -> bytes:
    """Return the body that /gzip sends."""
    return gzip.compress(body(size), mtime=0)


def _path(path: str) -> Callable[[Responder], Responder]:
    def register(responder: Responder) -> Responder:
        RESPONDERS[path] = responder
        return responder

    return register


async def not_found(connection: ServerConnection) -> None:
    """Respond with 404."""
    await connection.respond(404, b"page not found\n")


async def any_status(connection: ServerConnection) -> None:
    """Respond to /status/NNN with that status, without a body for 204 and 304."""
    status = int(connection.request.path.removeprefix("/status/"))
    if status in (204, 304):
        await connection.send(head(status))
    else:
        await connection.respond(status, f"{status}\n".encode())


# -- complete responses ------------------------------------------------------------------------


@_path("/ok")
async def _ok(connection: ServerConnection) -> None:
    await connection.respond(200, b"ok\n", "Content-Type: text/plain")


@_path("/echo")
async def _echo(connection: ServerConnection) -> None:
    await connection.respond(200, str(connection.request.body_length).encode())


@_path("/head")
async def _head(connection: ServerConnection) -> None:
    await connection.respond(200, body(5000))


@_path("/sized")
async def _sized(connection: ServerConnection) -> None:
    await connection.send(head(200, f"Content-Length: {connection.size}"))
    await connection.send_body(connection.size)


@_path("/204")
async def _no_content(connection: ServerConnection) -> None:
    await connection.send(head(204))


@_path("/304")
async def _not_modified(connection: ServerConnection) -> None:
    await connection.send(head(304, 'ETag: "same"', "Content-Length: 5000"))


@_path("/redirect")
async def _redirect(connection: ServerConnection) -> None:
    await connection.respond(302, b"over there\n", "Location: /ok?from=redirect")


@_path("/gzip")
async def _gzip(connection: ServerConnection) -> None:
    await connection.respond(200, gzipped(connection.size), "Content-Encoding: gzip")


async def _send_chunks(connection: ServerConnection, size: int, step: int = 16384) -> None:
    for start in range(0, size, step):
        data = body(min(step, size - start), start)
        await connection.send(f"{len(data):x}\r\n".encode() + data + b"\r\n")


@_path("/chunked")
async def _chunked(connection: ServerConnection) -> None:
    await connection.send(head(200, "Transfer-Encoding: chunked"))
    if connection.request.method != "HEAD":
        await _send_chunks(connection, connection.size)
        await connection.send(b"0\r\n\r\n")


@_path("/trailers")
async def _trailers(connection: ServerConnection) -> None:
    await connection.send(head(200, "Transfer-Encoding: chunked", "Trailer: X-Last"))
    if connection.request.method != "HEAD":
        await _send_chunks(connection, connection.size)
        await connection.send(b"0\r\nX-Last: yes\r\n\r\n")


@_path("/until-eof")
async def _until_eof(connection: ServerConnection) -> None:
    await connection.send(head(200, "Connection: close"))
    await connection.send_body(connection.size)
    connection.close()


@_path("/many-headers")
async def _many_headers(connection: ServerConnection) -> None:
    await connection.respond(
        200, b"ok\n", *(f"X-{number}: {number}" for number in range(connection.size))
    )


@_path("/1xx-then-200")
async def _interim(connection: ServerConnection) -> None:
    await connection.send(head(103, "Link: </style.css>; rel=preload"))
    await _ok(connection)


# -- responses that wait -----------------------------------------------------------------------


@_path("/slow-head")
async def _slow_head(connection: ServerConnection) -> None:
    await connection.released.wait()
    await _ok(connection)


@_path("/slow-body")
async def _slow_body(connection: ServerConnection) -> None:
    half = connection.size // 2
    await connection.send(head(200, f"Content-Length: {connection.size}"))
    await connection.send_body(half)
    await connection.released.wait()
    await connection.send_body(connection.size - half, half)


@_path("/slow-chunked")
async def _slow_chunked(connection: ServerConnection) -> None:
    await connection.send(head(200, "Transfer-Encoding: chunked"))
    await _send_chunks(connection, connection.size)
    await connection.released.wait()
    await connection.send(b"0\r\n\r\n")


# -- incomplete responses ----------------------------------------------------------------------


@_path("/close-before-head")
async def _close_before_head(connection: ServerConnection) -> None:
    connection.close()


@_path("/reset-before-head")
async def _reset_before_head(connection: ServerConnection) -> None:
    connection.reset()


@_path("/close-in-head")
async def _close_in_head(connection: ServerConnection) -> None:
    await connection.send(head(200, "Content-Length: 1000")[:-10])
    connection.close()


@_path("/close-after-head")
async def _close_after_head(connection: ServerConnection) -> None:
    await connection.send(head(200, f"Content-Length: {connection.size}"))
    connection.close()


@_path("/cut-sized")
async def _cut_sized(connection: ServerConnection) -> None:
    """Promise `size` bytes and send only `sent` of them, 100 by default."""
    await connection.send(head(200, f"Content-Length: {connection.size}"))
    await connection.send_body(int(connection.request.query.get("sent", "100")))
    connection.close()


@_path("/cut-chunked")
async def _cut_chunked(connection: ServerConnection) -> None:
    """Send one complete chunk of `size` bytes and half of another."""
    await connection.send(head(200, "Transfer-Encoding: chunked"))
    await _send_chunks(connection, connection.size)
    await connection.send(b"3e8\r\n" + body(500))
    connection.close()


@_path("/reset-in-body")
async def _reset_in_body(connection: ServerConnection) -> None:
    """Send half of the body, wait, and close with a RST."""
    await connection.send(head(200, f"Content-Length: {connection.size}"))
    await connection.send_body(connection.size // 2)
    await connection.released.wait()
    connection.reset()


# -- invalid responses -------------------------------------------------------------------------


@_path("/garbage")
async def _garbage(connection: ServerConnection) -> None:
    await connection.send(b"\x16\x03\x00 this is not HTTP at all\r\n\r\n")
    connection.close()


@_path("/bad-chunk")
async def _bad_chunk(connection: ServerConnection) -> None:
    await connection.send(
        head(200, "Transfer-Encoding: chunked") + b"zz\r\nnot a length\r\n0\r\n\r\n"
    )
    connection.close()


@_path("/cl-and-te")
async def _length_and_chunks(connection: ServerConnection) -> None:
    await connection.send(head(200, "Content-Length: 5", "Transfer-Encoding: chunked"))
    await connection.send(b"5\r\nhello\r\n0\r\n\r\n")


@_path("/two-lengths")
async def _two_lengths(connection: ServerConnection) -> None:
    await connection.send(head(200, "Content-Length: 5", "Content-Length: 7") + b"hello!!")


# -- responses before the end of the upload ----------------------------------------------------


@_path("/early-413")
async def _too_large(connection: ServerConnection) -> None:
    await connection.respond(413, b"too large\n", "Connection: close")
    await connection.read_body()  # closing now sends a RST, which can overtake the response
    connection.close()


@_path("/reset-in-upload")
async def _reset_in_upload(connection: ServerConnection) -> None:
    await connection.released.wait()
    connection.reset()


# -- other protocols ---------------------------------------------------------------------------


@_path("/upgrade")
async def _upgrade(connection: ServerConnection) -> None:
    await connection.send(head(101, "Connection: Upgrade", f"Upgrade: {UPGRADE}"))
    while data := await connection.reader.read(65536):
        await connection.send(data)
    connection.close()


@_path("/websocket")
async def _websocket(connection: ServerConnection) -> None:
    """Echo every message until the client closes."""
    await _WebSocketEcho(connection).run()


@_path("/websocket-abrupt")
async def _websocket_abrupt(connection: ServerConnection) -> None:
    """Echo one message, then reset the connection without a close frame."""
    if await _WebSocketEcho(connection).run(messages=1):
        connection.reset()


@_path("/websocket-bye")
async def _websocket_bye(connection: ServerConnection) -> None:
    """Echo one message, then close with the `code` in the query, 1000 by default."""
    echo = _WebSocketEcho(connection)
    if await echo.run(messages=1):
        code = int(connection.request.query.get("code", "1000"))
        await echo.send(CloseConnection(code=code, reason="bye"))
        await echo.run()


class _WebSocketEcho:
    """The server's end of a WebSocket. It echoes messages."""

    def __init__(self, connection: ServerConnection) -> None:
        self._connection = connection
        self._state = WSConnection(ConnectionType.SERVER)
        self._state.receive_data(connection.request.raw_head)

    async def send(self, event: Event) -> None:
        """Send one event."""
        await self._connection.send(self._state.send(event))

    async def run(self, messages: int = -1) -> bool:
        """Echo `messages` messages and return True; return False if the WebSocket closes first."""
        while True:
            for event in self._state.events():
                messages -= await self._answer(event)
                if messages == 0:
                    return True
            data = await self._connection.reader.read(65536)
            if not data or self._state.state is ConnectionState.CLOSED:
                self._connection.close()
                return False
            self._state.receive_data(data)

    async def _answer(self, event: Event) -> bool:
        """Answer one event; return whether that completed an echoed message."""
        match event:
            case Request():
                await self.send(AcceptConnection())
            case Ping():
                await self.send(event.response())
            case TextMessage() | BytesMessage():
                await self.send(event)
                return event.message_finished
            case CloseConnection() if self._state.state is ConnectionState.REMOTE_CLOSING:
                await self.send(event.response())
        return False
