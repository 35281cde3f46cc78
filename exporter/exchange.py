"""The raw facts of one HTTP exchange, as they cross from the proxy to the writer; no decoding here."""

from __future__ import annotations

import msgspec

# Response header fields that some column is read from. Lower case, as RFC 9110 5.1 lets us.
RESPONSE_FIELDS = frozenset(
    {
        b"age",
        b"akamai-cache-status",
        b"cache-status",
        b"cf-cache-status",
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
    }
)


# None of its values can refer back to it: the garbage collector need not walk through a full buffer.
class Exchange(msgspec.Struct, frozen=True, gc=False):
    """One exchange, in the types the proxy has them: immutable, bounded in size.

    Times are seconds since the epoch. None means unknown, never zero. Text is bytes as received,
    or str that may hold lone surrogates.
    """

    flow_id: str
    started_at: float
    ended_at: float | None
    head_at: float | None  # when the response head came
    connect_seconds: float | None  # TCP and TLS to upstream; None on a connection used before
    client: tuple[str, ...] | tuple[str, int] | None  # address as the socket gave it
    server: tuple[str, ...] | tuple[str, int] | None
    proxy_user: str | None
    method: bytes
    scheme: bytes
    host: str
    port: int
    target: bytes  # path and query
    http_version: bytes
    user_agent: bytes | None
    request_bytes: int | None
    status_code: int | None  # what the client got
    error_type: str | None
    error: str | None
    response_fields: tuple[tuple[bytes, bytes], ...]  # names of RESPONSE_FIELDS, lower case
    response_bytes: int | None
    tls_version: str | None
    response_source: str | None
    body: (
        bytes | None
    )  # only where its digest is wanted: a whole response body, hashed by the writer
    sha256: bytes | None  # of a body that was streamed, where wanted
    size: int  # upper bound of the memory this holds, bytes

    @property
    def bare_size(self) -> int:
        """The same without the body."""
        return self.size - len(self.body or b"")
