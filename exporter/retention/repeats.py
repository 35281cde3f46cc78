"""Remove rows that were written again after their day had left the table.

A proxy sends a batch again if it did not get the answer. While the rows are in the table, their key refuses it. Once
their day has left, only the files of the archive know the key.
"""

from __future__ import annotations

import itertools
from datetime import UTC, date
from typing import TYPE_CHECKING, Any, NamedTuple

from psycopg import sql

from ..archive.files import files_of_day, load_keys
from ..archive.parquet import check_file
from ..day import day_span

if TYPE_CHECKING:
    from pathlib import Path

    from psycopg import Connection

_MAX_COMPARED = 12  # files of one day; usually one
_ROWS_AT_ONCE = 10_000  # bounds the memory of both sides
# Few pruned days have a partition. MATERIALIZED, so that the function is called for no others.
_LATE_DAYS = """
    WITH late AS MATERIALIZED (
      SELECT DISTINCT pruned.from_at, pruned.until_at
      FROM access_log_rollup AS pruned JOIN access_log_partitions AS partition
        ON partition.from_at < pruned.until_at AND partition.until_at > pruned.from_at
      WHERE pruned_at IS NOT NULL
    )
    SELECT from_at FROM late
    WHERE access_log_has_grown(from_at, until_at, '-infinity')
    AND NOT EXISTS (SELECT FROM access_log_rollup_state AS present
                    WHERE present.from_at = late.from_at AND present.until_at = late.until_at
                    AND pruned_at IS NULL AND is_complete)
    ORDER BY 1
"""
_PRUNED = """
    SELECT rollup_id, requests, archive_files FROM access_log_rollup
    WHERE pruned_at IS NOT NULL AND from_at = %s AND until_at = %s
"""
# Citus joins a local table only in a subquery of its own.
_REPEATED_KEYS = sql.SQL("""
    SELECT started_at, flow_id FROM {table} AS entry
    WHERE started_at >= {start} AND started_at < {end} AND EXISTS (
      SELECT 1 FROM (SELECT started_at, flow_id FROM pg_temp.archived_key) AS known
      WHERE known.started_at = entry.started_at AND known.flow_id = entry.flow_id)
    LIMIT {limit}
""")
_DELETE = sql.SQL("""
    DELETE FROM {table} WHERE started_at >= {start} AND started_at < {end}
    AND (started_at, flow_id) IN (SELECT * FROM unnest(%s::timestamptz[], %s::uuid[]))
    RETURNING coalesce(node, ''), CASE WHEN artifact_complete THEN purl END, started_at, coalesce(response_bytes, 0)
""")
_RECORD = "INSERT INTO access_log_repeated (day, node, requests) VALUES (%s, %s, %s)"
_TAKE_BACK = """
    SELECT artifact_add(%s, %s::text[], %s::text[], %s::text[], %s::timestamptz[], %s::timestamptz[], %s::bigint[],
                        %s::bigint[])
"""
# They counted the rows.
_DELETE_STALE = """
    DELETE FROM access_log_rollup WHERE pruned_at IS NULL AND from_at < %s AND until_at > %s
"""


class PrunedRollup(NamedTuple):
    """The totals of rows of a day that left the table together."""

    id: int
    requests: int
    files: list[str] | None  # names of the files that have these rows; None: not recorded


def pruned_rollups(connection: Connection[Any], day: date) -> list[PrunedRollup]:
    """Return the totals of a day's pruned rows. Raises psycopg.Error."""
    return [PrunedRollup(*row) for row in connection.execute(_PRUNED, day_span(day))]


def late_days(connection: Connection[Any]) -> list[date]:
    """Return the days that have left the table and got rows since that were not looked at. Raises psycopg.Error."""
    return [at.astimezone(UTC).date() for (at,) in connection.execute(_LATE_DAYS).fetchall()]


def remove_repeats(
    connection: Connection[Any], table: sql.Identifier, day: date, archive: Path
) -> int:
    """Delete the rows of a day that had left the table before and are in the archive; return their number.

    `artifact_by_node` does not count them twice any longer, and `access_log_repeated` says how many the ledger does.
    Rows that were restored, or that a prune has archived but not removed, stay. Call it in a transaction.

    Args:
        connection: As the owner of the tables.
        table: access_log, or one of its partitions, attached or not.
        day: The day (UTC).
        archive: The folder of the archive.

    Raises:
        ArchiveError: a file is damaged or not ours, or the folder cannot be read.
        psycopg.Error: The server reported an error.
    """
    paths = counted_files(connection, day, archive)
    if not paths:
        return 0
    start, end = day_span(day)
    load_keys(connection, paths)
    names = {
        "table": table,
        "start": sql.Literal(start),
        "end": sql.Literal(end),
        "limit": sql.Literal(_ROWS_AT_ONCE),
    }
    removed = 0
    while keys := connection.execute(_REPEATED_KEYS.format(**names)).fetchall():
        times, flows = zip(*keys, strict=True)
        rows = connection.execute(_DELETE.format(**names), (list(times), list(flows))).fetchall()
        _record(connection, day, rows)
        removed += len(rows)
    if removed:
        connection.execute(_DELETE_STALE, (end, start))
    return removed


def counted_files(connection: Connection[Any], day: date, archive: Path) -> list[Path]:
    """Check the files of a day if rows of it were pruned, and return those whose rows the totals of pruned rows count.

    A prune that was interrupted may have written others, whose rows are still in the table.

    Raises:
        ArchiveError: a file is damaged or not ours, or the folder cannot be read.
        psycopg.Error: The server reported an error.
    """
    rollups = pruned_rollups(connection, day)
    if not rollups:
        return []
    sizes = {path: check_file(path).digest.rows for path in files_of_day(archive, day)}
    named = {name for rollup in rollups for name in rollup.files or ()}
    counted = [path for path in sizes if path.name in named]
    others = [path for path in sizes if path.name not in named]
    unrecorded = sum(rollup.requests for rollup in rollups if rollup.files is None)
    return [*counted, *_first_files(others, sizes, unrecorded)]


def _first_files(paths: list[Path], sizes: dict[Path, int], rows: int) -> list[Path]:
    """Return the oldest files that have so many rows together: earlier versions did not record which they pruned."""
    oldest = sorted(paths, key=lambda path: path.stat().st_mtime_ns)
    for count in range(1, len(oldest) + 1 if rows and len(oldest) <= _MAX_COMPARED else 1):
        for chosen in itertools.combinations(oldest, count):
            if sum(sizes[path] for path in chosen) == rows:
                return list(chosen)
    return []


def _record(connection: Connection[Any], day: date, rows: list[tuple[Any, ...]]) -> None:
    """Remember how many rows of each node were removed, and take back their fetches in the order of a writer."""
    for node in sorted({row[0] for row in rows}):
        of_node = [row for row in rows if row[0] == node]
        connection.execute(_RECORD, (day, node, len(of_node)))
        fetches: dict[str, list[Any]] = {}
        for _, purl, at, size in of_node:
            if purl is not None:
                counted = fetches.setdefault(purl, [at, at, 0, 0])
                counted[:2] = min(counted[0], at), max(counted[1], at)
                counted[2:] = counted[2] - 1, counted[3] - size
        if fetches:
            columns = map(list, zip(*fetches.values(), strict=True))
            unknown = [None] * len(fetches)  # remote and user of the first fetch, which stays
            connection.execute(_TAKE_BACK, (node, list(fetches), unknown, unknown, *columns))
