"""An HTTP/1 server whose responses end as the request path asks."""

import asyncio
import socket
import ssl
from pathlib import Path

from .endings import RESPOND_BEFORE_BODY, find_responder
from .server_connection import HEAD_LIMIT, ReceivedRequest, ServerConnection
from .socket_server import SocketServer

_TLS_SECONDS = 5.0  # limit for a handshake and for a TLS shutdown


class RawUpstream(SocketServer):
    """Listens on loopback inside its `with` block; see `endings` for the paths.

    Args:
        certificate: A PEM file with a certificate and its key; turns on TLS.
        host: The address to listen on.

    Attributes:
        requests: The requests received, in the order of their heads.
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
        """The listening address."""
        return self.address[0]

    @property
    def port(self) -> int:
        """The listening port."""
        return self.address[1]

    @property
    def url(self) -> str:
        """The base URL, without a trailing slash."""
        name = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self._tls else 'http'}://{name}:{self.port}"

    def release(self) -> None:
        """Let every waiting response continue."""
        self._loop.call_soon_threadsafe(self._released.set)

    def hold(self) -> None:
        """Make responses wait again."""
        self._loop.call_soon_threadsafe(self._released.clear)

    async def _open(self) -> None:
        self._released = asyncio.Event()
        await super()._open()

    async def _serve(self, client: socket.socket) -> None:
        reader = asyncio.StreamReader(HEAD_LIMIT)
        protocol = asyncio.StreamReaderProtocol(reader)
        deadline = _TLS_SECONDS if self._tls else None
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
            await self._answer_requests(ServerConnection(reader, writer, self._released))
            writer.close()
            await writer.wait_closed()
            transport = None  # asyncio cannot abort a transport that sent its buffer and closed
        except (OSError, EOFError):
            pass  # the client may leave at any time
        finally:
            if transport:
                transport.abort()

    async def _answer_requests(self, connection: ServerConnection) -> None:
        while True:
            self.requests.append(await connection.read_head())
            if connection.request.path not in RESPOND_BEFORE_BODY:
                await connection.read_body()
            await find_responder(connection.request.path)(connection)
            if "close" in connection.request.query:  # any path: the response is the last one
                connection.close()
            if not connection.open:
                return
