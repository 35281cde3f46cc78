"""Count the artifacts that a batch fetched, for the table `artifact`; within the caller's transaction."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

    from psycopg import Connection

    from .entry import AccessLogEntry

_RECORD = """
    SELECT artifact_record(%s::text[], %s::text[], %s::text[], %s::timestamptz[], %s::timestamptz[],
                           %s::bigint[], %s::bigint[])
"""
# The client has it now, or has it still: RFC 9110 15.3.1, 15.3.7, 15.4.5.
_FETCHED = frozenset({200, 206, 304})


def record_artifacts(connection: Connection[Any], entries: Iterable[AccessLogEntry]) -> None:
    """Add what these entries fetched. Not idempotent: call it for entries that were inserted, once.

    Raises:
        psycopg.Error: the transaction has failed.
    """
    fetches = [entry for entry in entries if is_fetch(entry)]
    if fetches:
        connection.execute(_RECORD, _columns(fetches))


def is_fetch(entry: AccessLogEntry) -> bool:
    """Whether this was an artifact that reached its client, not an index, a checksum or a redirect."""
    return (
        entry.artifact_kind == "artifact"
        and entry.purl is not None
        and entry.status_code in _FETCHED
    )


def _columns(fetches: Iterable[AccessLogEntry]) -> list[list[Any]]:
    """One row a purl, sorted: its first fetch names remote and user."""
    rows: dict[str, list[Any]] = {}
    for entry in sorted(fetches, key=lambda e: (e.purl or "", e.started_at)):
        row = rows.setdefault(
            entry.purl or "",
            [entry.purl, entry.remote, entry.proxy_user, entry.started_at, entry.started_at, 0, 0],
        )
        row[4] = entry.started_at
        row[5] += 1
        row[6] += entry.response_bytes or 0
    return [list(column) for column in zip(*rows.values(), strict=True)]
