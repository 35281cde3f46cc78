"""One row of the table access_log. exporter/rows/entry_builder.py makes it."""

from __future__ import annotations

from typing import NamedTuple


class AccessLogEntry(NamedTuple):
    """One row of access_log in column order, without `logged_at`, which PostgreSQL fills in.

    The meaning of each column is its comment in exporter/postgres/schema.sql. Every text is valid
    UTF-8 without NUL, and not empty. Unknown is None: never -1, 0, "-" or a guess.
    """

    started_at: str  # ISO 8601 with offset, microseconds
    flow_id: str
    node: str
    client_ip: str | None
    client_port: int | None
    proxy_user: str | None
    user_agent: str | None
    method: str | None
    scheme: str | None
    host: str | None
    port: int | None
    path: str | None
    query: str | None
    http_version: str | None
    status_code: int | None
    error_type: str | None
    error: str | None
    content_type: str | None
    request_bytes: int | None
    response_bytes: int | None
    duration_ms: float | None
    ttfb_ms: float | None
    connect_ms: float | None
    server_ip: str | None
    tls_version: str | None
    response_source: str | None
    cache_status: str | None = None
    cache_source: str | None = None
    cache_age_s: int | None = None
    remote: str | None = None
    artifact_kind: str | None = None
    ecosystem: str | None = None
    package: str | None = None
    version: str | None = None
    filename: str | None = None
    purl: str | None = None
    artifact_complete: bool | None = None
    sha256: str | None = None  # in bytea's hex format: \\x and 64 digits
    requested_url: str | None = None
