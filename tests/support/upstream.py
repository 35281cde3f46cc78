"""An HTTP/1 server whose responses end in whatever way the path asks for."""

import asyncio
import socket
import ssl
from pathlib import Path

from .endings import BEFORE_BODY, find
from .server_connection import HEAD_LIMIT, ReceivedRequest, ServerConnection
from .socket_server import SocketServer

_PATIENCE = 5.0  # seconds for the beginning and the end of TLS


class RawUpstream(SocketServer):
    """Listens on this machine while its `with` lasts; see `endings` for the paths.

    Args:
        certificate: PEM file with certificate and key; with it the server speaks TLS.
        host: The address to listen on.

    Attributes:
        requests: The requests that reached it, in order of their heads.
    """

    def __init__(self, certificate: Path | None = None, host: str = "127.0.0.1") -> None:
        super().__init__(host)
        self.requests: list[ReceivedRequest] = []
        self._tls: ssl.SSLContext | None = None
        if certificate:
            self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._tls.load_cert_chain(certificate)

    @property
    def host(self) -> str:
        """The address it listens on."""
        return self.address[0]

    @property
    def port(self) -> int:
        """The port it listens on."""
        return self.address[1]

    @property
    def url(self) -> str:
        """Where it listens, without a slash at the end."""
        name = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self._tls else 'http'}://{name}:{self.port}"

    def release(self) -> None:
        """Let every response that waits go on."""
        self._loop.call_soon_threadsafe(self._gate.set)

    def hold(self) -> None:
        """Make the responses wait again."""
        self._loop.call_soon_threadsafe(self._gate.clear)

    async def _open(self) -> None:
        self._gate = asyncio.Event()
        await super()._open()

    async def _serve(self, client: socket.socket) -> None:
        reader = asyncio.StreamReader(HEAD_LIMIT)
        protocol = asyncio.StreamReaderProtocol(reader)
        deadline = _PATIENCE if self._tls else None
        transport: asyncio.Transport | None = None
        try:
            transport, _ = await self._loop.connect_accepted_socket(
                lambda: protocol,
                client,
                ssl=self._tls,
                ssl_handshake_timeout=deadline,
                ssl_shutdown_timeout=deadline,
            )
            writer = asyncio.StreamWriter(transport, protocol, reader, self._loop)
            await self._converse(ServerConnection(reader, writer, self._gate))
            writer.close()
            await writer.wait_closed()
        except (OSError, EOFError):
            pass  # the other side went away, as it may
        finally:
            if transport:
                transport.abort()

    async def _converse(self, wire: ServerConnection) -> None:
        while True:
            self.requests.append(await wire.read_head())
            if wire.arrival.path not in BEFORE_BODY:
                await wire.read_body()
            await find(wire.arrival.path)(wire)
            if not wire.open:
                return
