"""Answer scrapes of one address, in one thread, within limits that no client can exceed.

All work is in an event loop of its own. A client has a few seconds for its request and our answer, and
may send one short request. Few clients are answered at a time; one more ends the oldest. And few are
accepted per second, because what this thread computes is taken from the proxy's thread.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
import threading
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Never

from ..settings import listen_address

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    type _Respond = Callable[[socket.socket], Awaitable[None]]

logger = logging.getLogger(__name__)

THREAD_NAME = "artifactapi-metrics"
_MAX_CLIENTS = 4  # answered at the same time
_BACKLOG = 8  # not yet accepted; the operating system holds them
_ACCEPT_PAUSE_SECONDS = 0.1  # after each client
_CLIENT_SECONDS = 5.0  # for one request and its answer
_BIND_RETRY_SECONDS = 10.0
_JOIN_SECONDS = 1.0
_NO_IPV6 = {errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT}


class Endpoint:
    """Serves from its construction until `request_stop`."""

    def __init__(
        self,
        listen: str,
        status: Callable[[], Mapping[str, Any]],
        predecessor: Endpoint | None = None,
    ) -> None:
        """Start. Nothing is waited for.

        Args:
            listen: See `listen_address`; a valid one.
            status: See `Exporter.status`.
            predecessor: Is stopping, and may still have the address.
        """
        self._listen = listen
        self._status = status
        self._predecessor = predecessor
        self._is_stopping = False
        self._serving: asyncio.Task[None] | None = None  # in the thread's event loop
        self._reported = ""
        self._thread = threading.Thread(target=self._run, name=THREAD_NAME, daemon=True)
        self._thread.start()

    def request_stop(self) -> None:
        """Close everything soon. Any thread may call it, and does not wait."""
        self._is_stopping = True
        serving = self._serving
        if serving is not None:
            with suppress(RuntimeError):  # its event loop has ended
                serving.get_loop().call_soon_threadsafe(serving.cancel)

    def join(self) -> None:
        """Wait up to a second until everything is closed, after `request_stop`."""
        self._thread.join(_JOIN_SECONDS)

    def _run(self) -> None:
        if self._predecessor is not None:
            self._predecessor.join()
            self._predecessor = None
        try:
            # Only now: without metrics, a proxy does not load them. They take 2 MiB.
            from .answer import Responder  # noqa: PLC0415

            respond = Responder(self._status).respond
        except ImportError as e:
            logger.warning(
                "artifactapi: no metrics: metrics.listen is set, but the package %s is not installed; run: "
                "pip install prometheus-client h11",
                (e.name or "prometheus_client").partition(".")[0].replace("_", "-"),
            )
            return
        try:
            with suppress(asyncio.CancelledError):
                asyncio.run(self._serve(respond))
        except Exception as e:  # noqa: BLE001 - the proxy and the log go on
            logger.warning("artifactapi: the metrics ended: %s (%s)", e, type(e).__name__)

    async def _serve(self, respond: _Respond) -> None:
        self._serving = asyncio.current_task()
        while not self._is_stopping:
            try:
                listener = _bind(self._listen)
            except OSError as e:
                self._report_unusable(e)
                await asyncio.sleep(_BIND_RETRY_SECONDS)
                continue
            with listener:
                host, port = listener.getsockname()[:2]
                shown = f"[{host}]" if ":" in host else host
                logger.info("artifactapi: metrics at http://%s:%d/metrics", shown, port)
                await _accept(listener, respond)

    def _report_unusable(self, error: OSError) -> None:
        # asyncio and create_server add the address to the text of errno.
        reason = os.strerror(error.errno) if error.errno else str(error)
        if reason != self._reported:
            self._reported = reason
            logger.warning(
                "artifactapi: no metrics: metrics.listen is %s: %s; trying again every %g s",
                self._listen,
                reason,
                _BIND_RETRY_SECONDS,
            )


def _bind(listen: str) -> socket.socket:
    """Listen on this address. Raises OSError."""
    address = listen_address(listen)
    if address is None:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    host, port = address
    listener = _bind_all(port) if not host else _create(host, port)
    listener.setblocking(False)
    return listener


def _bind_all(port: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        try:
            return _create("::", port, dualstack_ipv6=True)
        except OSError as e:  # the machine or the container has IPv6 switched off
            if e.errno not in _NO_IPV6:
                raise
    return _create("0.0.0.0", port)  # noqa: S104 - the user wants all addresses


def _create(host: str, port: int, *, dualstack_ipv6: bool = False) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server(
        (host, port), family=family, backlog=_BACKLOG, dualstack_ipv6=dualstack_ipv6
    )


async def _accept(listener: socket.socket, respond: _Respond) -> Never:
    """Answer clients until canceled. `asyncio.run` then cancels their tasks, which closes their sockets."""
    # Not loop.sock_accept: canceled at the wrong moment, it forgets a socket that it has accepted.
    loop = asyncio.get_running_loop()
    clients: list[asyncio.Task[None]] = []  # oldest first
    is_ready = asyncio.Event()
    try:
        while True:
            is_ready.clear()
            loop.add_reader(listener, is_ready.set)
            await is_ready.wait()
            loop.remove_reader(listener)
            with suppress(OSError):  # the client is gone, or this process has too many files open
                client, _ = listener.accept()
                client.setblocking(False)
                clients = [task for task in clients if not task.done()]
                if len(clients) >= _MAX_CLIENTS:
                    clients[0].cancel()
                task = loop.create_task(_answer(client, respond))
                task.add_done_callback(partial(_close, client))
                clients.append(task)
            await asyncio.sleep(_ACCEPT_PAUSE_SECONDS)
    finally:
        loop.remove_reader(listener)


async def _answer(client: socket.socket, respond: _Respond) -> None:
    # A client that is gone or too slow gets no answer; Prometheus then sets its metric up to 0.
    with suppress(OSError, TimeoutError):
        async with asyncio.timeout(_CLIENT_SECONDS):
            await respond(client)


def _close(client: socket.socket, _: asyncio.Task[None]) -> None:
    """Close the socket also if the task was canceled before it began."""
    client.close()
