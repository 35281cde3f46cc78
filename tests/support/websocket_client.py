"""A WebSocket client that can close cleanly or reset the connection."""

from typing import Self

from wsproto import ConnectionType, WSConnection
from wsproto.events import (
    AcceptConnection,
    BytesMessage,
    CloseConnection,
    Event,
    Ping,
    RejectConnection,
    Request,
    TextMessage,
)

from .http1_client import RawClient


class WebSocketClient:
    """Opens a WebSocket over an open connection.

    Args:
        raw: A connection to a server, to a proxy (then `target` is a full URL), or in a tunnel.
        host: The Host header.
        target: The request target.

    Attributes:
        rejected: The status code, if the server answered with another one than 101.
        close_code: The peer's close code; 1006 if it left without a close frame.
    """

    def __init__(self, raw: RawClient, host: str, target: str) -> None:
        self.raw = raw
        self.rejected: int | None = None
        self.close_code: int | None = None
        self._state = WSConnection(ConnectionType.CLIENT)
        self._opened = False
        self._messages: list[str | bytes] = []
        self._parts = bytearray()
        self._send_event(Request(host=host, target=target))
        while not self._opened and self.rejected is None and self.close_code is None:
            self._receive_events()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.raw.close()

    def send(self, message: str | bytes) -> None:
        """Send one message."""
        if isinstance(message, str):
            self._send_event(TextMessage(message))
        else:
            self._send_event(BytesMessage(message))

    def receive(self) -> str | bytes | None:
        """Return the next message; None when the WebSocket is closed."""
        while not self._messages and self.close_code is None:
            self._receive_events()
        return self._messages.pop(0) if self._messages else None

    def close(self, code: int = 1000, reason: str = "") -> None:
        """Send a close frame and wait for the peer's."""
        self._send_event(CloseConnection(code=code, reason=reason))
        while self.close_code is None:
            self._receive_events()

    def abort(self) -> None:
        """Close the connection with a RST."""
        self.raw.reset()

    def _send_event(self, event: Event) -> None:
        self.raw.send(self._state.send(event))

    def _receive_events(self) -> None:
        data = self.raw.receive()
        self._state.receive_data(data or None)
        for event in self._state.events():
            self._handle(event)
        if not data and self.close_code is None:
            self.close_code = 1006

    def _handle(self, event: Event) -> None:
        match event:
            case AcceptConnection():
                self._opened = True
            case RejectConnection():
                self.rejected = event.status_code
            case Ping():
                self._send_event(event.response())
            case TextMessage() | BytesMessage():
                self._collect(event.data, event.message_finished)
            case CloseConnection():
                self._handle_close(event)

    def _collect(self, data: str | bytes | bytearray, finished: bool) -> None:
        self._parts += data.encode() if isinstance(data, str) else data
        if finished:
            message, self._parts = bytes(self._parts), bytearray()
            self._messages.append(message.decode() if isinstance(data, str) else message)

    def _handle_close(self, event: CloseConnection) -> None:
        self.close_code = int(event.code)
        if self._state.state.name == "REMOTE_CLOSING":
            self._send_event(event.response())
