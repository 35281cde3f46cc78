"""Count the artifacts that a batch fetched, for the table `artifact`; within the caller's transaction."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from psycopg import Connection

    from .entry import AccessLogEntry

_RECORD = """
    SELECT artifact_record(%s::text[], %s::text[], %s::text[], %s::timestamptz[], %s::timestamptz[],
                           %s::bigint[], %s::bigint[])
"""
# The client has it now, or has it still: RFC 9110 15.3.1, 15.3.7, 15.4.5.
_FETCHED = frozenset({200, 206, 304})


def fetches(entries: Iterable[AccessLogEntry]) -> list[AccessLogEntry]:
    """Those that brought an artifact to its client, and not an index, a checksum or a redirect."""
    return [
        entry
        for entry in entries
        if entry.artifact_kind == "artifact"
        and entry.purl is not None
        and entry.status_code in _FETCHED
    ]


def record_artifacts(connection: Connection[Any], fetched: Iterable[AccessLogEntry]) -> None:
    """Add these fetches. Not idempotent: call it for entries that were inserted, once.

    Raises:
        psycopg.Error: the transaction has failed.
    """
    # One row a purl; its first fetch names remote and user.
    rows: dict[str | None, list[Any]] = {}
    for entry in fetched:
        purl, at = entry.purl, entry.started_at
        row = rows.get(purl)
        if row is None:
            row = rows[purl] = [purl, entry.remote, entry.proxy_user, at, at, 0, 0]
        elif at < row[3]:
            row[1:4] = entry.remote, entry.proxy_user, at
        elif at > row[4]:
            row[4] = at
        row[5] += 1
        row[6] += entry.response_bytes or 0
    if rows:
        connection.execute(_RECORD, [_array(column) for column in zip(*rows.values(), strict=True)])


def _array(values: Sequence[str | int | None]) -> str:
    """As PostgreSQL writes an array (docs, 8.15.6). psycopg's own lists take five times as long."""
    return f"{{{','.join(map(_element, values))}}}"


def _element(value: str | int | None) -> str:
    if value is None:
        return "NULL"
    if isinstance(value, int):
        return str(value)
    if "\\" in value or '"' in value:
        value = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{value}"'
