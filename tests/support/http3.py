"""HTTP/3 on this machine: an upstream that ends responses in several ways, and a client."""

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

__all__ = ["ErrorCode", "Http3Upstream", "ask"]


class _Upstream(QuicConnectionProtocol):
    """Answers /size/N with N bytes, resets /reset after 100, never answers /wait."""

    def __init__(self, owner: Http3Upstream, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._owner = owner

    def quic_event_received(self, event: QuicEvent) -> None:
        if not hasattr(self, "_http"):
            self._http = H3Connection(self._quic)
        for one in self._http.handle_event(event):
            if isinstance(one, HeadersReceived):
                self._answer(one.stream_id, dict(one.headers)[b":path"].decode())

    def _answer(self, stream: int, path: str) -> None:
        self._owner.arrived += 1
        if path == "/wait":
            return
        size = int(path.rpartition("/")[2]) if path.startswith("/size/") else 100
        self._http.send_headers(stream, [(b":status", b"200")])
        self._http.send_data(stream, body(size), end_stream=path != "/reset")
        self.transmit()
        if path == "/reset":
            self._loop.call_later(0.2, self._reset, stream)  # what was sent goes first

    def _reset(self, stream: int) -> None:
        self._quic.reset_stream(stream, ErrorCode.H3_INTERNAL_ERROR)
        self.transmit()


class Http3Upstream(LoopThread):
    """Listens while its `with` lasts.

    Attributes:
        arrived: How many requests reached it.
    """

    def __init__(self, certificate: Path) -> None:
        super().__init__()
        self._settings = QuicConfiguration(is_client=False, alpn_protocols=H3_ALPN)
        text = certificate.read_bytes()
        self._settings.certificate = load_pem_x509_certificate(text)
        self._settings.private_key = load_pem_private_key(text, None)
        self.port = 0
        self.arrived = 0

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
    """Notes what comes back, and wakes whoever waits."""

    def begin(self) -> None:
        """Speak HTTP/3 from now on."""
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
            for one in self.http.handle_event(event):
                self._note(one)
        if hasattr(self, "changed"):
            self.changed.set()

    def _note(self, event: H3Event) -> None:
        if isinstance(event, HeadersReceived):
            self.streams[event.stream_id].status = int(dict(event.headers)[b":status"])
            self.streams[event.stream_id].ended |= event.stream_ended
        elif isinstance(event, DataReceived):
            self.streams[event.stream_id].body += event.data
            self.streams[event.stream_id].ended |= event.stream_ended

    def request(self, path: str, agent: str) -> int:
        """Begin a stream."""
        number = self._quic.get_next_available_stream_id()
        self.streams[number] = Stream()
        headers = {":method": "GET", ":scheme": "https", ":authority": "localhost", ":path": path}
        pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
        self.http.send_headers(number, [*pairs, (b"user-agent", agent.encode())], end_stream=True)
        self.transmit()
        return number

    async def wait(self, numbers: Sequence[int]) -> None:
        """Wait until these streams have ended in some way."""
        while not all(self.streams[one].ended or self.streams[one].reset for one in numbers):
            self.changed.clear()
            await asyncio.wait_for(self.changed.wait(), 10)


def ask(
    port: int,
    agent: str,
    *paths: str,
    reset: int | None = None,
    when: Callable[[], bool] | None = None,
) -> list[Stream]:
    """Ask for these side by side on one connection, and wait for the answers.

    With `when`, leave them as soon as it holds; with `reset`, first end each by this code.
    """
    return asyncio.run(_ask(port, agent, paths, reset, when))


async def _ask(
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
        client.begin()
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
