"""Make ordinary exchanges and rows. Tests change the fields that they are about."""

from __future__ import annotations

from typing import Any

from msgspec.structs import replace

from exporter import AccessLogEntry, Exchange, Settings
from exporter.rows.entry_builder import EntryBuilder


def make_exchange(number: int = 0, **changes: Any) -> Exchange:
    """Make an ordinary exchange; `number` determines its id and its start time."""
    start = 1_700_000_000.0 + number / 1000
    exchange = Exchange(
        flow_id=f"{number:08x}-0000-4000-8000-000000000000",
        started_at=start,
        ended_at=start + 0.25,
        head_at=start + 0.125,
        connect_seconds=0.01,
        client=("192.0.2.7", 50_000),
        server=("198.51.100.9", 443),
        proxy_user="build-42",
        method=b"GET",
        scheme=b"https",
        host="registry.example",
        port=443,
        target=b"/simple/demo/?token=s3cret",
        http_version=b"HTTP/1.1",
        user_agent=b"pip/25.0",
        request_bytes=0,
        status_code=200,
        error_type=None,
        error=None,
        response_fields=((b"content-type", b"text/html"),),
        response_bytes=1234,
        tls_version="TLSv1.3",
        response_source="upstream",
        body=None,
        sha256=None,
    )
    return replace(exchange, **changes)


def make_entry(number: int = 0, **changes: Any) -> AccessLogEntry:
    """Make an ordinary row; `number` determines its id and its start time.

    A GET for an artifact completes it, unless the changes say something else.
    """
    entry = EntryBuilder(Settings(node="test")).build(make_exchange(number))._replace(**changes)
    if "artifact_complete" in changes:
        return entry
    is_download = (
        entry.artifact_kind == "artifact"
        and entry.purl is not None
        and entry.method == "GET"
        and entry.error_type is None
        and entry.status_code in {200, 206, 304}
    )
    return entry._replace(artifact_complete=True if is_download else None)
