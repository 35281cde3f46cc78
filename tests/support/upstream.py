"""An HTTP/1 server whose responses end in whatever way the path asks for."""

import asyncio
import ssl
import weakref
from pathlib import Path

from .endings import BEFORE_BODY, find
from .loopthread import LoopThread
from .wire import HEAD_LIMIT, Arrival, Wire


class RawUpstream(LoopThread):
    """Listens on this machine while its `with` lasts; see `endings` for the paths.

    Args:
        certificate: PEM file with certificate and key; with it the server speaks TLS.
        host: The address to listen on.

    Attributes:
        arrivals: The requests that reached it, in order of their heads.
        accepted: How many connections it took.
        connections: How many of them are open now.
    """

    def __init__(self, certificate: Path | None = None, host: str = "127.0.0.1") -> None:
        super().__init__()
        self.arrivals: list[Arrival] = []
        self.accepted = self.connections = 0
        self.host = host
        self.port = 0
        self._certificate = certificate
        self._transports: weakref.WeakSet[asyncio.WriteTransport] = weakref.WeakSet()

    @property
    def url(self) -> str:
        """Where it listens, without a slash at the end."""
        name = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self._certificate else 'http'}://{name}:{self.port}"

    def release(self) -> None:
        """Let every response that waits go on."""
        self._loop.call_soon_threadsafe(self._gate.set)

    def hold(self) -> None:
        """Make the responses wait again."""
        self._loop.call_soon_threadsafe(self._gate.clear)

    async def _open(self) -> None:
        self._gate = asyncio.Event()
        secured = self._tls()
        self._server = await asyncio.start_server(
            self._serve,
            self.host,
            0,
            limit=HEAD_LIMIT,
            ssl=secured,
            ssl_handshake_timeout=5 if secured else None,
        )
        self.port = self._server.sockets[0].getsockname()[1]

    async def _close(self) -> None:
        self._server.close()
        for transport in self._transports:  # also those that still flush to someone deaf
            transport.abort()

    def _tls(self) -> ssl.SSLContext | None:
        if self._certificate is None:
            return None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self._certificate)
        return context

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        self._transports.add(writer.transport)
        self.connections += 1
        try:
            await self._converse(Wire(reader, writer, self._gate))
        except (OSError, EOFError):
            pass  # the other side went away, as it may
        finally:
            self.connections -= 1
            writer.close()

    async def _converse(self, wire: Wire) -> None:
        while True:
            self.arrivals.append(await wire.read_head())
            if wire.arrival.path not in BEFORE_BODY:
                await wire.read_body()
            await find(wire.arrival.path)(wire)
            if not wire.open:
                return
