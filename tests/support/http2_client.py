"""A client of HTTP/2 that runs streams side by side and ends them however the test wants."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import (
    ConnectionTerminated,
    DataReceived,
    Event,
    ResponseReceived,
    StreamEnded,
    StreamReset,
)

from .http1_client import RawClient


@dataclass
class Stream:
    """What has come back on one stream.

    Attributes:
        status: None as long as there is no head.
        ended: Whether the response is whole.
        reset: The code with which either side ended the stream before its time.
    """

    status: int | None = None
    headers: list[tuple[str, str]] = field(default_factory=list)
    body: bytes = b""
    ended: bool = False
    reset: int | None = None


class Http2Client:
    """Speaks HTTP/2 over a connection that is ready for it.

    Args:
        raw: A plain connection (mitmproxy hangs up on that), or one on which TLS agreed on h2.
        authority: What the requests are for.
        scheme: Likewise.
        lax: Whether headers may be sent that HTTP/2 forbids.

    Attributes:
        streams: Everything received, by the number of the stream.
        goaway_code: The code of the GOAWAY the other side sent.
        closed: Whether the other side has ended the connection.
    """

    def __init__(
        self, raw: RawClient, authority: str, scheme: str = "https", *, lax: bool = False
    ) -> None:
        self.raw = raw
        self.streams: dict[int, Stream] = {}
        self.goaway_code: int | None = None
        self.closed = False
        self._base = [(":authority", authority), (":scheme", scheme)]
        config = H2Configuration(
            header_encoding="latin-1",
            validate_outbound_headers=not lax,
            normalize_outbound_headers=not lax,
        )
        self._state = H2Connection(config)
        self._state.initiate_connection()
        self._flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.raw.close()

    @classmethod
    def through(cls, proxy: tuple[str, int], host: str, port: int, ca: Path) -> Self:
        """Open a tunnel through a proxy and agree on HTTP/2 in it."""
        raw = RawClient(proxy)
        try:
            answer = raw.connect(host, port)
            assert answer, "the proxy hung up"
            assert answer.status == 200, answer
            assert raw.start_tls(host, ca, ["h2"]) == "h2"
        except BaseException:
            raw.close()
            raise
        return cls(raw, f"{host}:{port}")

    def request(
        self,
        path: str,
        *headers: tuple[str, str],
        method: str = "GET",
        body: bytes = b"",
        end: bool = True,
    ) -> int:
        """Begin a stream and return its number; without `end`, more of the body may follow."""
        number = self._state.get_next_available_stream_id()
        self.streams[number] = Stream()
        whole = [(":method", method), (":path", path), *self._base, *headers]
        if body and end:  # mitmproxy can't tell an HTTP/1 upstream the end without it
            whole.append(("content-length", str(len(body))))
        self._state.send_headers(number, whole, end_stream=end and not body)
        self._flush()
        if body:
            self.send_body(number, body, end=end)
        return number

    def send_body(self, number: int, data: bytes, *, end: bool = True) -> None:
        """Send a part of a request's body, as fast as the other side allows."""
        while data:
            size = min(self._window(number), len(data))
            last = end and size == len(data)
            self._state.send_data(number, data[:size], end_stream=last)
            self._flush()
            data = data[size:]

    def reset(self, number: int, code: int = ErrorCodes.CANCEL) -> None:
        """End one stream at once."""
        self._state.reset_stream(number, code)
        self.streams[number].reset = code
        self._flush()

    def goaway(self, code: int = ErrorCodes.NO_ERROR) -> None:
        """Say that this is the end; the connection stays open until it is closed."""
        self._state.close_connection(code)
        self._flush()

    def wait(self, *numbers: int) -> Sequence[Stream]:
        """Wait until these streams have ended in some way, and return them."""
        wanted = [self.streams[number] for number in numbers]
        while not self.closed and not all(one.ended or one.reset is not None for one in wanted):
            self.pump()
        return wanted

    def pump(self) -> None:
        """Receive once and take note of it."""
        data = self.raw.receive()
        self.closed = not data
        for event in self._state.receive_data(data) if data else ():
            self._note(event)
        if not self.closed:
            self._flush()

    def _window(self, number: int) -> int:
        while not (open_now := self._state.local_flow_control_window(number)):
            self.pump()
            if self.closed:
                raise ConnectionError("the connection ended in mid-upload")
        return min(open_now, self._state.max_outbound_frame_size)

    def _flush(self) -> None:
        self.raw.send(self._state.data_to_send())

    def _note(self, event: Event) -> None:
        match event:
            case ResponseReceived():
                stream = self.streams[event.stream_id]
                stream.headers = [(_text(name), _text(value)) for name, value in event.headers]
                stream.status = int(dict(stream.headers)[":status"])
            case DataReceived():
                self.streams[event.stream_id].body += event.data
                size = event.flow_controlled_length
                self._state.acknowledge_received_data(size, event.stream_id)
            case StreamEnded():
                self.streams[event.stream_id].ended = True
            case StreamReset():
                self.streams[event.stream_id].reset = event.error_code
            case ConnectionTerminated():
                self.goaway_code = event.error_code


def _text(value: str | bytes) -> str:
    return value if isinstance(value, str) else value.decode("latin-1")
