"""An HTTP/2 client that runs concurrent streams and can reset them."""

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
    """The response on one stream.

    Attributes:
        status: None until the head arrives.
        ended: Whether the response is complete.
        reset: The error code, if either side reset the stream.
    """

    status: int | None = None
    headers: list[tuple[str, str]] = field(default_factory=list)
    body: bytes = b""
    ended: bool = False
    reset: int | None = None


class Http2Client:
    """Speaks HTTP/2 over an open connection.

    Args:
        raw: A TLS connection that selected h2, or a plain one (which mitmproxy closes).
        authority: The :authority of all requests.
        scheme: The :scheme of all requests.
        lax: Whether to allow request headers that HTTP/2 forbids.

    Attributes:
        streams: The responses by stream id.
        goaway_code: The error code of the peer's GOAWAY.
        closed: Whether the peer closed the connection.
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
        """Open a tunnel through a proxy and start HTTP/2 in it."""
        raw = RawClient(proxy)
        try:
            tunnel = raw.connect(host, port)
            assert tunnel, "the proxy closed the connection"
            assert tunnel.status == 200, tunnel
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
        """Open a stream and return its id; with `end=False` more of the body can follow."""
        number = self._state.get_next_available_stream_id()
        self.streams[number] = Stream()
        fields = [(":method", method), (":path", path), *self._base, *headers]
        if body and end:  # mitmproxy needs it to delimit the body for an HTTP/1 upstream
            fields.append(("content-length", str(len(body))))
        self._state.send_headers(number, fields, end_stream=end and not body)
        self._flush()
        if body:
            self.send_body(number, body, end=end)
        return number

    def send_body(self, number: int, data: bytes, *, end: bool = True) -> None:
        """Send a part of a request body, within the peer's flow control window."""
        while data:
            size = min(self._window(number), len(data))
            last = end and size == len(data)
            self._state.send_data(number, data[:size], end_stream=last)
            self._flush()
            data = data[size:]

    def reset(self, number: int, code: int = ErrorCodes.CANCEL) -> None:
        """Reset one stream."""
        self._state.reset_stream(number, code)
        self.streams[number].reset = code
        self._flush()

    def goaway(self, code: int = ErrorCodes.NO_ERROR) -> None:
        """Send a GOAWAY; the connection stays open."""
        self._state.close_connection(code)
        self._flush()

    def wait(self, *numbers: int) -> Sequence[Stream]:
        """Wait until each of these streams has ended or was reset, and return them."""
        streams = [self.streams[number] for number in numbers]
        while not self.closed and not all(
            stream.ended or stream.reset is not None for stream in streams
        ):
            self.pump()
        return streams

    def pump(self) -> None:
        """Receive once and process the events."""
        data = self.raw.receive()
        self.closed = not data
        for event in self._state.receive_data(data) if data else ():
            self._handle(event)
        if not self.closed:
            self._flush()

    def _window(self, number: int) -> int:
        while not (size := self._state.local_flow_control_window(number)):
            self.pump()
            if self.closed:
                raise ConnectionError("the connection ended during the upload")
        return min(size, self._state.max_outbound_frame_size)

    def _flush(self) -> None:
        self.raw.send(self._state.data_to_send())

    def _handle(self, event: Event) -> None:
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
