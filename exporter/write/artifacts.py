"""Count the artifacts that a batch fetched, for the table `artifact_by_node`. Runs nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from psycopg import sql

if TYPE_CHECKING:
    from collections.abc import Iterable

    from ..rows.entry import AccessLogEntry

_RECORD = sql.SQL("""
    SELECT artifact_add({}, {}::text[], {}::text[], {}::text[], {}::timestamptz[], {}::timestamptz[],
                        {}::bigint[], {}::bigint[])
""")


def fetches(entries: Iterable[AccessLogEntry]) -> list[AccessLogEntry]:
    """The entries that completed an artifact, as in the view access_log_fetches."""
    return [entry for entry in entries if entry.artifact_complete]


def record(fetched: Iterable[AccessLogEntry], *, sign: int = 1) -> bytes:
    """The statements that add these fetches (at least one). Not idempotent: run them once per inserted row.

    With `sign` -1 they take them back. One statement for each node, which is nearly always the same; in
    order, so that two proxies cannot deadlock.
    """
    by_node: dict[str, list[AccessLogEntry]] = {}
    for entry in fetched:
        by_node.setdefault(entry.node or "", []).append(entry)
    return b"; ".join([_record_node(node, by_node[node], sign) for node in sorted(by_node)])


def _record_node(node: str, fetched: Iterable[AccessLogEntry], sign: int) -> bytes:
    # One row per purl, with remote and user of its first fetch.
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
        row[5] += sign
        row[6] += sign * (entry.response_bytes or 0)
    *texts, fetch_counts, sizes = zip(*rows.values(), strict=True)
    arrays = [map(_quoted, column) for column in texts]
    columns = map(_array, (*arrays, map(str, fetch_counts), map(str, sizes)))
    return _RECORD.format(sql.Literal(node), *columns).as_bytes()


def _array(elements: Iterable[str]) -> sql.Literal:
    """An array literal (PostgreSQL docs, 8.15.6). psycopg's list adaptation is five times slower."""
    return sql.Literal(f"{{{','.join(elements)}}}")


def _quoted(value: str | None) -> str:
    if value is None:
        return "NULL"
    if "\\" in value or '"' in value:
        value = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{value}"'
