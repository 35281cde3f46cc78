"""A TCP server with one asyncio task per connection, in a thread."""

import asyncio
import contextlib
import socket
import struct

from .loop_thread import LoopThread


class SocketServer(LoopThread):
    """Listens on loopback inside its `with` block; subclasses implement `_serve`.

    Unlike asyncio's servers, it does not leak a connection that arrives while it closes.

    Attributes:
        accepted: The number of connections accepted so far.
        address: The listening address and port.
    """

    def __init__(self, host: str = "127.0.0.1") -> None:
        super().__init__()
        self.accepted = 0
        self.address = (host, 0)
        self._tasks: dict[asyncio.Task[None], socket.socket] = {}
        self._listener: socket.socket | None = None

    @property
    def connections(self) -> int:
        """The number of open connections."""
        return len(self._tasks)

    async def _serve(self, client: socket.socket) -> None:
        """Serve one connection and close it."""
        raise NotImplementedError

    async def _open(self) -> None:
        self._reserved = _bind(self.address)  # reserves the port while nothing listens on it
        self.address = self._reserved.getsockname()[:2]
        self._listen()

    async def _close(self) -> None:
        await self._refuse()
        self._reserved.close()

    def _listen(self) -> None:
        if self._listener is None:
            self._listener = _bind(self.address)
            self._listener.listen(128)
            self._loop.add_reader(self._listener, self._accept, self._listener)

    async def _refuse(self) -> None:
        """Stop listening and reset every connection."""
        if self._listener:
            self._loop.remove_reader(self._listener)
            self._listener.close()
            self._listener = None
        dropped = dict(self._tasks)
        for task in dropped:
            task.cancel()
        await asyncio.gather(*dropped, return_exceptions=True)
        await self._run_pending_callbacks()
        for client in dropped.values():  # a task that never started did not close its socket
            reset(client)

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):  # the client may have left already
            client, _ = listener.accept()
            client.setblocking(False)
            notice_dead_peer(client)
            self.accepted += 1
            task = self._loop.create_task(self._serve(client))
            self._tasks[task] = client
            task.add_done_callback(self._forget)

    def _forget(self, task: asyncio.Task[None]) -> None:
        del self._tasks[task]
        error = None if task.cancelled() else task.exception()
        if error:
            self.errors.append(error)


def notice_dead_peer(sock: socket.socket) -> None:
    """Detect within two seconds that the peer is gone, even if its RST was not accepted.

    Linux answers a RST with an unexpected sequence number by a challenge ACK (RFC 5961 3.2), whose rate is
    limited. Without keepalive such a connection would stay open forever.
    """
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)


def reset(sock: socket.socket) -> None:
    """Close a socket with a RST, unless it is closed already."""
    with contextlib.suppress(OSError):
        reset_on_close(sock)
    sock.close()


def reset_on_close(sock: socket.socket) -> None:
    """Make the close of a socket send a RST instead of a FIN (socket(7), SO_LINGER)."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def _bind(address: tuple[str, int]) -> socket.socket:
    bound = socket.socket(socket.AF_INET6 if ":" in address[0] else socket.AF_INET)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.setblocking(False)
    bound.bind(address)
    return bound
