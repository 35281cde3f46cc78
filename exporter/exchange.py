"""The raw facts of one HTTP exchange, on their way from the proxy to the writer. Nothing is decoded here."""

from __future__ import annotations

import msgspec

# Response header fields that a column is read from, in lower case (RFC 9110 5.1: case-insensitive).
RESPONSE_FIELDS = frozenset(
    {
        b"age",
        b"akamai-cache-status",
        b"cache-status",
        b"cf-cache-status",
        b"content-range",
        b"content-type",
        b"docker-content-digest",
        b"location",
        b"x-77-cache",
        b"x-cache",
        b"x-cache-hits",
        b"x-cache-status",
        b"x-nginx-cache",
        b"x-proxy-cache",
        b"x-pulp-cache",
        b"x-varnish",
        b"x-vercel-cache",
        b"x-xet-hash",
    }
)


# Scheme, host, port, path and query of a URL.
type RequestedUrl = tuple[bytes, str, int, bytes]
# IP address and port, and two more numbers for IPv6; or the path of a Unix socket.
type SocketAddress = tuple[str | int, ...] | None


# gc=False: an exchange cannot be part of a reference cycle.
# array_like=True: encoded, it holds no names of fields.
class Exchange(msgspec.Struct, frozen=True, gc=False, array_like=True):
    """One exchange in mitmproxy's types: immutable and bounded in size.

    Times are seconds since the epoch. None means unknown. Text is bytes as received, or str that may
    hold lone surrogates.
    """

    flow_id: str
    started_at: float
    ended_at: float | None
    head_at: float | None  # response head
    connect_seconds: float | None  # TCP and TLS setup to upstream; None on a reused connection
    client: SocketAddress  # that the client connected from
    server: SocketAddress
    proxy_user: str | None
    method: bytes
    scheme: bytes
    host: str
    port: int
    target: bytes  # path and query
    http_version: bytes
    user_agent: bytes | None
    request_bytes: int | None
    status_code: int | None  # what the client received
    error_type: str | None
    error: str | None
    response_fields: tuple[tuple[bytes, bytes], ...]  # names of RESPONSE_FIELDS, lower case
    response_bytes: int | None
    tls_version: str | None
    response_source: str | None
    body: bytes | None  # complete response body, only if it is hashed, or has epochs
    sha256: bytes | None  # of a streamed response body, only if enabled
    requested_url: RequestedUrl | None = (
        None  # only if it differs from what was fetched, and is known
    )
