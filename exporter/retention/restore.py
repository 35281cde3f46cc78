"""Load a day back from its Parquet files into access_log."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, NamedTuple

from psycopg import sql

from ..archive.columns import table_columns
from ..archive.files import files_of_day
from ..archive.parquet import (
    ArchiveError,
    check_file,
    common_columns,
    copy_lines,
    engine,
    files_relation,
)
from ..day import day_span
from ..postgres.citus import in_sequence
from ..postgres.locks import HOUSEKEEPING, only_transaction
from .days import left_partitions
from .repeats import pruned_rollups, remove_repeats

if TYPE_CHECKING:
    from datetime import date
    from pathlib import Path

    from psycopg import Connection

    from .repeats import PrunedRollup

_MAX_COMPARED = 12  # rollups of pruned rows of one day; usually one
# Rollups of rows that are in the table notice new rows by their logged_at, which restored ones keep.
_DELETE_STALE = """
    DELETE FROM access_log_rollup WHERE pruned_at IS NULL AND from_at < %s AND until_at > %s
"""
_DELETE_ROLLUPS = "DELETE FROM access_log_rollup WHERE rollup_id = ANY(%s)"
# Columns that somebody added and that PostgreSQL computes.
_GENERATED = """
    SELECT attname FROM pg_attribute
    WHERE attrelid = 'access_log'::regclass AND attgenerated <> '' AND NOT attisdropped
"""
_PIECES_AT_ONCE = 100  # of copy_lines: bounds what the server holds twice
_ENSURE_PARTITION = "SELECT access_log_ensure_partition(%s)"
_RESTORED = "CREATE TEMP TABLE restored ON COMMIT DROP AS SELECT * FROM access_log WITH NO DATA"
_COPY = sql.SQL("COPY pg_temp.restored ({columns}) FROM STDIN")
# RETURNING, because Citus otherwise counts the rows that were there already.
_INSERT = sql.SQL("""
    INSERT INTO access_log ({columns}) SELECT {columns} FROM pg_temp.restored ON CONFLICT DO NOTHING RETURNING 1
""")


class DayBusyError(Exception):
    """The day cannot be restored now. The message is one sentence."""


class RestoredDay(NamedTuple):
    """What a restore did."""

    rows: int  # in the files of the day
    inserted: int  # the others were in the table already
    counted_twice: (
        bool  # the totals in the rollups include the rows of the files and others, and stay
    )


def restore_day(connection: Connection[Any], folder: Path, day: date) -> RestoredDay:
    """Insert the archived rows of a day that are not in the table, in one transaction. Idempotent.

    The rows keep their `logged_at`, and `artifact_by_node` does not count them again. The totals that were made of
    them when they left the table are removed: it has the rows again. The files stay. Columns that the table no longer
    has are left out; columns that the files do not have yet are NULL.

    Args:
        connection: In autocommit mode, outside a transaction, as the owner of the tables.
        folder: The archive.
        day: The day (UTC).

    Raises:
        DayBusyError: rows are rolled up or pruned just now, or a prune of this day was interrupted.
        ArchiveError: DuckDB is not installed, the archive does not have the day, or a file is damaged.
        psycopg.Error, DeadlineExceededError: writing the rows failed; none was inserted.
    """
    if not files_of_day(folder, day):
        raise ArchiveError(f"The archive {folder} has no rows of {day}.")
    connection.execute(_ENSURE_PARTITION, (day,))
    with connection.transaction():
        in_sequence(connection)
        _check_free(connection, day)
        paths = files_of_day(folder, day)  # from here on, no prune adds one
        records = [check_file(path) for path in paths]
        remove_repeats(connection, sql.Identifier("access_log"), day, folder)
        generated = {name for (name,) in connection.execute(_GENERATED)}
        columns = [
            column
            for column in common_columns(
                records, table_columns(connection, sql.Identifier("access_log"))
            )
            if column.name not in generated
        ]
        names = sql.SQL(", ").join(sql.Identifier(column.name) for column in columns)
        connection.execute(_RESTORED)
        inserted = 0
        with engine() as reader:
            lines = copy_lines(reader, columns, files_relation(paths), {})
            for pieces in itertools.batched(lines, _PIECES_AT_ONCE):
                with (
                    connection.cursor() as cursor,
                    cursor.copy(_COPY.format(columns=names)) as copy,
                ):
                    for piece in pieces:
                        copy.write(piece)
                inserted += connection.execute(_INSERT.format(columns=names)).rowcount
                connection.execute("TRUNCATE pg_temp.restored")
        rows = sum(record.digest.rows for record in records)
        if inserted:
            start, end = day_span(day)
            connection.execute(_DELETE_STALE, (end, start))
        sizes = {path.name: record.digest.rows for path, record in zip(paths, records, strict=True)}
        counted_twice = not _remove_rollups(connection, day, sizes)
    return RestoredDay(rows, inserted, counted_twice)


def _check_free(connection: Connection[Any], day: date) -> None:
    """No rollup may begin before the rows are there, and no table may have them that is about to be dropped."""
    if not only_transaction(connection, HOUSEKEEPING):
        raise DayBusyError(
            "A proxy or `artifactapi prune` is rolling up or pruning the log; try again later."
        )
    for partition in left_partitions(connection):
        if day in partition.days:
            raise DayBusyError(
                f"A prune was interrupted and has left rows of {day} in the table {partition.name}; run"
                " `artifactapi prune` first."
            )


def _remove_rollups(connection: Connection[Any], day: date, sizes: dict[str, int]) -> bool:
    """Remove the totals of rows that are in the table again. Return whether none of those rows is left in them.

    Each time that rows of the day left the table made one rollup. Those that are in no file left it without an
    archive; their rollups have to stay.

    Args:
        connection: In the transaction that inserted the rows.
        day: The day (UTC).
        sizes: The number of rows of each file, by its name.
    """
    rollups = pruned_rollups(connection, day)
    recorded = {it.id: set(it.files) for it in rollups if it.files is not None}
    restored = [number for number, files in recorded.items() if files and files <= sizes.keys()]
    connection.execute(_DELETE_ROLLUPS, (restored,))
    if any(files & sizes.keys() for number, files in recorded.items() if number not in restored):
        return False  # others of its files are missing
    known = set().union(*recorded.values())
    rest = sum(rows for name, rows in sizes.items() if name not in known)
    unrecorded = [it for it in rollups if it.files is None]
    return not rest or not unrecorded or _remove_unrecorded(connection, unrecorded, rest)


def _remove_unrecorded(connection: Connection[Any], rollups: list[PrunedRollup], rows: int) -> bool:
    """The same for totals of earlier versions, which did not record the files: those that are together so many rows."""
    sizes = range(len(rollups), 0, -1) if len(rollups) <= _MAX_COMPARED else (len(rollups),)
    for size in sizes:
        for chosen in itertools.combinations(rollups, size):
            if sum(it.requests for it in chosen) == rows:
                connection.execute(_DELETE_ROLLUPS, ([it.id for it in chosen],))
                return True
    return False
