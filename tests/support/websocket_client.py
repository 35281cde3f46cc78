"""A websocket's client, which can also leave without a word."""

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
    """Opens a websocket over a connection that is ready for it.

    Args:
        raw: To a server, to a proxy (then `target` is a whole URL), or inside a tunnel.
        host: The Host header.
        target: What to ask for.

    Attributes:
        rejected: The status, where there came another than 101.
        close_code: What the other side closed with; 1006 if it left without saying.
    """

    def __init__(self, raw: RawClient, host: str, target: str) -> None:
        self.raw = raw
        self.rejected: int | None = None
        self.close_code: int | None = None
        self._state = WSConnection(ConnectionType.CLIENT)
        self._opened = False
        self._messages: list[str | bytes] = []
        self._parts = bytearray()
        self._say(Request(host=host, target=target))
        while not self._opened and self.rejected is None and self.close_code is None:
            self._pump()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.raw.close()

    def send(self, message: str | bytes) -> None:
        """Send one message."""
        if isinstance(message, str):
            self._say(TextMessage(message))
        else:
            self._say(BytesMessage(message))

    def receive(self) -> str | bytes | None:
        """Return the next message; None once the websocket is closed."""
        while not self._messages and self.close_code is None:
            self._pump()
        return self._messages.pop(0) if self._messages else None

    def close(self, code: int = 1000, reason: str = "") -> None:
        """Close in the orderly way and wait for the answer."""
        self._say(CloseConnection(code=code, reason=reason))
        while self.close_code is None:
            self._pump()

    def abort(self) -> None:
        """Leave with a RST."""
        self.raw.reset()

    def _say(self, event: Event) -> None:
        self.raw.send(self._state.send(event))

    def _pump(self) -> None:
        data = self.raw.receive()
        self._state.receive_data(data or None)
        for event in self._state.events():
            self._note(event)
        if not data and self.close_code is None:
            self.close_code = 1006

    def _note(self, event: Event) -> None:
        match event:
            case AcceptConnection():
                self._opened = True
            case RejectConnection():
                self.rejected = event.status_code
            case Ping():
                self._say(event.response())
            case TextMessage() | BytesMessage():
                self._collect(event.data, event.message_finished)
            case CloseConnection():
                self._closed(event)

    def _collect(self, data: str | bytes | bytearray, finished: bool) -> None:
        self._parts += data.encode() if isinstance(data, str) else data
        if finished:
            whole, self._parts = bytes(self._parts), bytearray()
            self._messages.append(whole.decode() if isinstance(data, str) else whole)

    def _closed(self, event: CloseConnection) -> None:
        self.close_code = int(event.code)
        if self._state.state.name == "REMOTE_CLOSING":
            self._say(event.response())
