"""A client of HTTP/1 that sends what it is told, byte for byte, and says exactly what it got."""

import contextlib
import socket
import ssl
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit

_READ = 65536


@dataclass
class Response:
    """What came back for one request.

    Attributes:
        complete: Whether it ended as its head had promised.
        interim: The statuses of the 1xx responses before it.
    """

    status: int
    headers: list[tuple[str, str]]
    body: bytes = b""
    complete: bool = True
    interim: list[int] = field(default_factory=list)

    @classmethod
    def parse(cls, head: bytes) -> Self:
        """Read a response head; header names are lower-cased."""
        first, *lines = head.decode("latin-1").removesuffix("\r\n\r\n").split("\r\n")
        pairs = [line.partition(":") for line in lines]
        return cls(
            int(first.split(" ")[1]), [(name.lower(), value.strip()) for name, _, value in pairs]
        )

    def header(self, name: str, default: str = "") -> str:
        """Return the first header of this lower-case name."""
        return next((value for key, value in self.headers if key == name), default)


class RawClient:
    """One connection to a proxy or a server.

    Attributes:
        was_reset: Whether the other side ended it with a RST.
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
        """Ask a proxy for a tunnel."""
        self.request("CONNECT", f"{host}:{port}", *headers)
        return self.read_response("CONNECT")

    def start_tls(
        self, server_name: str, ca: Path | None = None, protocols: Sequence[str] = ()
    ) -> str | None:
        """Speak TLS from now on; return the protocol agreed upon.

        Args:
            server_name: For SNI and the check of the certificate.
            ca: Whom to trust; without it nobody, so that the handshake fails.
            protocols: What to offer by ALPN.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        if ca:
            context.load_verify_locations(ca)
        if protocols:
            context.set_alpn_protocols(list(protocols))
        # a failed handshake closes the socket it was given, but not before the alert is sent
        self._sock = secured = context.wrap_socket(self._sock, server_hostname=server_name)
        return secured.selected_alpn_protocol()

    def send(self, data: bytes) -> None:
        """Send bytes as they are."""
        self._sock.sendall(data)

    def request(
        self, method: str, target: str, *headers: str, body: bytes = b"", length: int | None = None
    ) -> None:
        """Send a request, with a Host header unless there is one.

        Args:
            method: As it is.
            target: As it is, in whichever form.
            headers: Whole lines.
            body: What is sent of the body.
            length: What Content-Length says, if not the truth.
        """
        lines = [f"{method} {target} HTTP/1.1", *headers]
        if not any(line.lower().startswith("host:") for line in headers):
            authority = target if method == "CONNECT" else urlsplit(target).netloc
            lines.append(f"Host: {authority or 'localhost'}")
        if body or length is not None:
            lines.append(f"Content-Length: {len(body) if length is None else length}")
        self.send("\r\n".join([*lines, "", ""]).encode() + body)

    def receive(self) -> bytes:
        """Return some bytes, none at the end of the connection."""
        if self._buffer:
            data, self._buffer = self._buffer, b""
            return data
        try:
            return self._sock.recv(_READ)
        except ConnectionError:
            self.was_reset = True
            return b""

    def read_all(self) -> bytes:
        """Return everything until the end of the connection."""
        return b"".join(iter(self.receive, b""))

    def read_response(self, method: str = "GET") -> Response | None:
        """Return the response to a request of this method; None if not even a head came."""
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
        """Say that nothing more will be sent, and stay to listen."""
        self._sock.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        """End the connection with a RST."""
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._sock.close()

    def close(self) -> None:
        """End the connection in the orderly way."""
        self._sock.close()

    def _read_until(self, mark: bytes) -> bytes:
        """Return what ends with `mark`, or nothing if the connection ends before."""
        data = bytearray()
        while (end := data.find(mark)) < 0:
            more = self.receive()
            if not more:
                return b""
            data += more
        end += len(mark)
        self._buffer = bytes(data[end:])
        return bytes(data[:end])

    def _read_exactly(self, size: int) -> bytes:
        """Return so many bytes, fewer if the connection ends before."""
        data = bytearray()
        while len(data) < size and (more := self.receive()):
            data += more
        self._buffer = bytes(data[size:])
        return bytes(data[:size])

    def _read_body(self, response: Response, method: str) -> None:
        bodyless = method == "HEAD" or response.status in (101, 204, 304)
        if bodyless or (method == "CONNECT" and response.status < 300):
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
    """Send one request through a proxy; what refused the tunnel is returned as well."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    with contextlib.closing(RawClient(proxy)) as client:
        if parts.scheme == "http":
            client.request(method, url, *headers, body=body)
            return client.read_response(method)
        opened = client.connect(host, parts.port or 443)
        if opened is None or opened.status != 200:
            return opened
        client.start_tls(host, ca)
        target = parts._replace(scheme="", netloc="").geturl() or "/"
        client.request(method, target, f"Host: {parts.netloc}", *headers, body=body)
        return client.read_response(method)
