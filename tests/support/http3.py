"""An HTTP/3 upstream that ends responses in several ways, and an HTTP/3 client."""

from __future__ import annotations

import asyncio
import ssl
from functools import partial
from typing import TYPE_CHECKING, Any

from aioquic.asyncio.client import connect
from aioquic.asyncio.protocol import QuicConnectionProtocol
from aioquic.asyncio.server import serve
from aioquic.h3.connection import H3_ALPN, ErrorCode, H3Connection
from aioquic.h3.events import DataReceived, H3Event, HeadersReceived
from aioquic.quic.configuration import QuicConfiguration
from aioquic.quic.events import ConnectionTerminated, QuicEvent, StreamReset
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509 import load_pem_x509_certificate

from .http2_client import Stream
from .loop_thread import LoopThread
from .server_connection import body
from .wait import eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

__all__ = ["ErrorCode", "Http3Upstream", "send_requests"]


class _Upstream(QuicConnectionProtocol):
    """Answers /size/N with N bytes, resets /reset after 100 bytes, and never answers /wait."""

    def __init__(self, owner: Http3Upstream, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._owner = owner

    def quic_event_received(self, event: QuicEvent) -> None:
        if not hasattr(self, "_http"):
            self._http = H3Connection(self._quic)
        for http_event in self._http.handle_event(event):
            if isinstance(http_event, HeadersReceived):
                self._answer(http_event.stream_id, dict(http_event.headers)[b":path"].decode())

    def _answer(self, stream: int, path: str) -> None:
        self._owner.request_count += 1
        if path == "/wait":
            return
        size = int(path.rpartition("/")[2]) if path.startswith("/size/") else 100
        self._http.send_headers(stream, [(b":status", b"200")])
        self._http.send_data(stream, body(size), end_stream=path != "/reset")
        self.transmit()
        if path == "/reset":
            self._loop.call_later(0.2, self._reset, stream)  # the body must arrive first

    def _reset(self, stream: int) -> None:
        self._quic.reset_stream(stream, ErrorCode.H3_INTERNAL_ERROR)
        self.transmit()


class Http3Upstream(LoopThread):
    """Listens on loopback inside its `with` block.

    Attributes:
        request_count: The number of requests received.
    """

    def __init__(self, certificate: Path) -> None:
        super().__init__()
        self._settings = QuicConfiguration(is_client=False, alpn_protocols=H3_ALPN)
        text = certificate.read_bytes()
        self._settings.certificate = load_pem_x509_certificate(text)
        self._settings.private_key = load_pem_private_key(text, None)
        self.port = 0
        self.request_count = 0

    async def _open(self) -> None:
        self._server = await serve(
            "127.0.0.1", 0, configuration=self._settings, create_protocol=partial(_Upstream, self)
        )
        assert self._server._transport
        self.port = self._server._transport.get_extra_info("sockname")[1]

    async def _close(self) -> None:
        self._server.close()  # type: ignore[no-untyped-call]
        await asyncio.sleep(0)


class _Client(QuicConnectionProtocol):
    """Collects responses and wakes `wait`."""

    def start_http(self) -> None:
        """Start HTTP/3 on the connection."""
        self.http = H3Connection(self._quic)
        self.streams: dict[int, Stream] = {}
        self.changed = asyncio.Event()

    def quic_event_received(self, event: QuicEvent) -> None:
        if isinstance(event, StreamReset):
            self.streams[event.stream_id].reset = event.error_code
        elif isinstance(event, ConnectionTerminated) and hasattr(self, "streams"):
            for stream in self.streams.values():
                stream.ended = True
        elif hasattr(self, "http"):
            for http_event in self.http.handle_event(event):
                self._handle(http_event)
        if hasattr(self, "changed"):
            self.changed.set()

    def _handle(self, event: H3Event) -> None:
        if isinstance(event, HeadersReceived):
            self.streams[event.stream_id].status = int(dict(event.headers)[b":status"])
            self.streams[event.stream_id].ended |= event.stream_ended
        elif isinstance(event, DataReceived):
            self.streams[event.stream_id].body += event.data
            self.streams[event.stream_id].ended |= event.stream_ended

    def request(self, path: str, agent: str) -> int:
        """Send a request on a new stream."""
        number = self._quic.get_next_available_stream_id()
        self.streams[number] = Stream()
        headers = {":method": "GET", ":scheme": "https", ":authority": "localhost", ":path": path}
        pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
        self.http.send_headers(number, [*pairs, (b"user-agent", agent.encode())], end_stream=True)
        self.transmit()
        return number

    async def wait(self, numbers: Sequence[int]) -> None:
        """Wait until each of these streams has ended or was reset."""
        while not all(
            self.streams[number].ended or self.streams[number].reset for number in numbers
        ):
            self.changed.clear()
            await asyncio.wait_for(self.changed.wait(), 10)


def send_requests(
    port: int,
    agent: str,
    *paths: str,
    reset: int | None = None,
    when: Callable[[], bool] | None = None,
) -> list[Stream]:
    """Request all paths concurrently on one connection, and wait for the responses.

    With `when`, close the connection as soon as that is true. With `reset`, first reset each
    stream with this error code.
    """
    return asyncio.run(_send_requests(port, agent, paths, reset, when))


async def _send_requests(
    port: int,
    agent: str,
    paths: Sequence[str],
    reset: int | None,
    when: Callable[[], bool] | None,
) -> list[Stream]:
    settings = QuicConfiguration(
        is_client=True,
        alpn_protocols=H3_ALPN,
        verify_mode=ssl.CERT_NONE,
        server_name="localhost",
        idle_timeout=10.0,
    )
    async with connect(
        "127.0.0.1", port, configuration=settings, create_protocol=_Client
    ) as client:
        assert isinstance(client, _Client)
        client.start_http()
        numbers = [client.request(path, agent) for path in paths]
        if when is None:
            await client.wait(numbers)
        else:
            await asyncio.to_thread(eventually, when)
            if reset is not None:
                for number in numbers:
                    client._quic.reset_stream(number, reset)
                    client._quic.stop_stream(number, reset)
            client.transmit()
        return [client.streams[number] for number in numbers]
