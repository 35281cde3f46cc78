"""A listening socket and one task for each connection it takes."""

import asyncio
import contextlib
import socket
import struct

from .loop_thread import LoopThread


class SocketServer(LoopThread):
    """Listens on this machine while its `with` lasts; what is served comes from `_serve`.

    asyncio's own servers lose a connection that comes in while they close.

    Attributes:
        accepted: How many connections it took.
        address: Where it listens.
    """

    def __init__(self, host: str = "127.0.0.1") -> None:
        super().__init__()
        self.accepted = 0
        self.address = (host, 0)
        self._tasks: dict[asyncio.Task[None], socket.socket] = {}
        self._listener: socket.socket | None = None

    @property
    def connections(self) -> int:
        """How many connections are open now."""
        return len(self._tasks)

    async def _serve(self, client: socket.socket) -> None:
        """Serve one connection and close it."""
        raise NotImplementedError

    async def _open(self) -> None:
        self._claim = _bound(self.address)  # keeps the port ours while nothing listens on it
        self.address = self._claim.getsockname()[:2]
        self._listen()

    async def _close(self) -> None:
        await self._refuse()
        self._claim.close()

    def _listen(self) -> None:
        if self._listener is None:
            self._listener = _bound(self.address)
            self._listener.listen(128)
            self._loop.add_reader(self._listener, self._accept, self._listener)

    async def _refuse(self) -> None:
        """Stop listening and drop every connection."""
        if self._listener:
            self._loop.remove_reader(self._listener)
            self._listener.close()
            self._listener = None
        dropped = dict(self._tasks)
        for task in dropped:
            task.cancel()
        await asyncio.gather(*dropped, return_exceptions=True)
        await self._turns()
        for client in dropped.values():  # a task that had not begun has not closed it
            reset(client)

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):  # it may be gone again
            client, _ = listener.accept()
            client.setblocking(False)
            self.accepted += 1
            task = self._loop.create_task(self._serve(client))
            self._tasks[task] = client
            task.add_done_callback(self._forget)

    def _forget(self, task: asyncio.Task[None]) -> None:
        del self._tasks[task]
        fault = None if task.cancelled() else task.exception()
        if fault:
            self.faults.append(fault)


def reset(sock: socket.socket) -> None:
    """Close a socket with a RST, if it is not closed already."""
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


def _bound(address: tuple[str, int]) -> socket.socket:
    bound = socket.socket(socket.AF_INET6 if ":" in address[0] else socket.AF_INET)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    bound.setblocking(False)
    bound.bind(address)
    return bound
