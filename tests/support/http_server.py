"""An HTTP server with one thread per connection, for handlers of the standard library."""

from __future__ import annotations

import ssl
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Self, override

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


class QuietHandler(BaseHTTPRequestHandler):
    """A request handler that writes no log to stderr."""

    @override
    def log_message(self, *_: object) -> None:
        """Write nothing."""


class HttpServer:
    """Serves on a loopback port inside its `with` block.

    Args:
        handler: Creates the request handler of a connection.
        certificate: A PEM file with a certificate and its key; turns on TLS.
    """

    def __init__(
        self, handler: Callable[..., BaseHTTPRequestHandler], certificate: Path | None = None
    ) -> None:
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._scheme = "http"
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            # The handshake must not block the accepting thread.
            self._server.socket = context.wrap_socket(
                self._server.socket, server_side=True, do_handshake_on_connect=False
            )
            self._scheme = "https"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def port(self) -> int:
        """The listening port."""
        return self._server.server_port

    @property
    def url(self) -> str:
        """The base URL by host name, without a trailing slash."""
        return f"{self._scheme}://localhost:{self.port}"
