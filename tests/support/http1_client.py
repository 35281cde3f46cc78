"""An HTTP/1 client that sends exactly the given bytes and reports exactly what it received."""

import contextlib
import socket
import ssl
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit

from .socket_server import reset

_READ = 65536


@dataclass
class Response:
    """The response to one request.

    Attributes:
        complete: Whether the body is complete according to the head.
        interim: The status codes of the 1xx responses before it.
    """

    status: int
    headers: list[tuple[str, str]]
    body: bytes = b""
    complete: bool = True
    interim: list[int] = field(default_factory=list)

    @classmethod
    def parse(cls, head: bytes) -> Self:
        """Parse a response head; lower-case the header names."""
        first, *lines = head.decode("latin-1").removesuffix("\r\n\r\n").split("\r\n")
        pairs = [line.partition(":") for line in lines]
        return cls(
            int(first.split(" ")[1]), [(name.lower(), value.strip()) for name, _, value in pairs]
        )

    def header(self, name: str, default: str = "") -> str:
        """Return the first header with this lower-case name."""
        return next((value for key, value in self.headers if key == name), default)


class RawClient:
    """One connection to a proxy or a server.

    Attributes:
        was_reset: Whether the peer closed it with a RST.
    """

    def __init__(self, address: tuple[str, int], timeout: float = 10.0) -> None:
        self.was_reset = False
        self._sock = socket.create_connection(address, timeout)
        self._buffer = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def connect(self, host: str, port: int, *headers: str) -> Response | None:
        """Ask a proxy for a tunnel with CONNECT."""
        self.request("CONNECT", f"{host}:{port}", *headers)
        return self.read_response("CONNECT")

    def start_tls(
        self, server_name: str, ca: Path | None = None, protocols: Sequence[str] = ()
    ) -> str | None:
        """Start TLS; return the protocol that ALPN selected.

        Args:
            server_name: For SNI and for the certificate check.
            ca: The authority to trust. Without it the handshake fails.
            protocols: The protocols to offer with ALPN.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        if ca:
            context.load_verify_locations(ca)
        if protocols:
            context.set_alpn_protocols(list(protocols))
        # a failed handshake closes this socket, after the TLS alert was sent
        self._sock = secured = context.wrap_socket(self._sock, server_hostname=server_name)
        return secured.selected_alpn_protocol()

    def send(self, data: bytes) -> None:
        """Send raw bytes."""
        self._sock.sendall(data)

    def request(
        self, method: str, target: str, *headers: str, body: bytes = b"", length: int | None = None
    ) -> None:
        """Send a request; add a Host header if there is none.

        Args:
            method: Sent unchanged.
            target: Sent unchanged, in any form.
            headers: Complete header lines.
            body: The part of the body to send.
            length: The Content-Length, if it differs from the length of `body`.
        """
        lines = [f"{method} {target} HTTP/1.1", *headers]
        if not any(line.lower().startswith("host:") for line in headers):
            authority = target if method == "CONNECT" else urlsplit(target).netloc
            lines.append(f"Host: {authority or 'localhost'}")
        if body or length is not None:
            lines.append(f"Content-Length: {len(body) if length is None else length}")
        self.send("\r\n".join([*lines, "", ""]).encode() + body)

    def receive(self) -> bytes:
        """Return the next bytes; none at the end of the connection."""
        if self._buffer:
            data, self._buffer = self._buffer, b""
            return data
        try:
            return self._sock.recv(_READ)
        except ConnectionError:
            self.was_reset = True
            return b""

    def read_all(self) -> bytes:
        """Return all bytes up to the end of the connection."""
        return b"".join(iter(self.receive, b""))

    def read_response(self, method: str = "GET") -> Response | None:
        """Return the response to a request with this method; None if the connection ends before a head."""
        interim: list[int] = []
        while head := self._read_until(b"\r\n\r\n"):
            response = Response.parse(head)
            if response.status >= 200 or response.status == 101:
                response.interim = interim
                self._read_body(response, method)
                return response
            interim.append(response.status)
        return None

    def half_close(self) -> None:
        """Send a FIN, and keep reading."""
        self._sock.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        """Close the connection with a RST."""
        reset(self._sock)

    def close(self) -> None:
        """Close the connection cleanly."""
        self._sock.close()

    def _read_until(self, delimiter: bytes) -> bytes:
        """Return the bytes up to and including `delimiter`; none if the connection ends first."""
        data = bytearray()
        while (end := data.find(delimiter)) < 0:
            more = self.receive()
            if not more:
                return b""
            data += more
        end += len(delimiter)
        self._buffer = bytes(data[end:])
        return bytes(data[:end])

    def _read_exactly(self, size: int) -> bytes:
        """Return `size` bytes, or fewer if the connection ends first."""
        data = bytearray()
        while len(data) < size and (more := self.receive()):
            data += more
        self._buffer = bytes(data[size:])
        return bytes(data[:size])

    def _read_body(self, response: Response, method: str) -> None:
        has_no_body = method == "HEAD" or response.status in (101, 204, 304)
        if has_no_body or (method == "CONNECT" and response.status < 300):
            return
        length = response.header("content-length")
        if response.header("transfer-encoding").lower() == "chunked":
            self._read_chunks(response)
        elif length:
            response.body = self._read_exactly(int(length))
            response.complete = len(response.body) == int(length)
        else:
            response.body = self.read_all()
            response.complete = not self.was_reset

    def _read_chunks(self, response: Response) -> None:
        response.complete = False
        while line := self._read_until(b"\r\n"):
            size = int(line.split(b";")[0], 16)
            if size == 0:
                while trailer := self._read_until(b"\r\n"):
                    response.complete = trailer == b"\r\n"
                    if response.complete:
                        return
                return
            data = self._read_exactly(size)
            response.body += data
            if len(data) < size or not self._read_exactly(2):
                return


def fetch(
    proxy: tuple[str, int],
    url: str,
    *headers: str,
    method: str = "GET",
    body: bytes = b"",
    ca: Path | None = None,
) -> Response | None:
    """Send one request through a proxy. If the proxy refuses the tunnel, return that response."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    with contextlib.closing(RawClient(proxy)) as client:
        if parts.scheme == "http":
            client.request(method, url, *headers, body=body)
            return client.read_response(method)
        tunnel = client.connect(host, parts.port or 443)
        if tunnel is None or tunnel.status != 200:
            return tunnel
        client.start_tls(host, ca)
        target = parts._replace(scheme="", netloc="").geturl() or "/"
        client.request(method, target, f"Host: {parts.netloc}", *headers, body=body)
        return client.read_response(method)
