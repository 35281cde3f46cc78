"""Write a day of access_log to a verified Parquet file, and find the files of days.

The layout is that of Hive, which every tool for Parquet reads: `day=2026-11-27/access_log-NAME.parquet`. A day has
several files if rows arrived after it was archived. A file is complete and verified from the moment it has its name,
and is never changed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
from datetime import date, datetime
from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import UUID  # noqa: TC003 - msgspec reads the annotations

from msgspec import DecodeError, Struct, ValidationError, json
from psycopg import sql

from ..day import day_span
from ..gil import yielding_gil
from .columns import (
    KEY,
    NO_ROWS,
    ArchiveColumn,
    Digest,
    csv_columns,
    postgres_digest,
    table_columns,
)
from .parquet import (
    PARTIAL,
    ArchiveError,
    FileRecord,
    ParquetWriter,
    check_file,
    copy_lines,
    engine,
    files_relation,
    load_duckdb,
    read_records,
    sync_file,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from psycopg import Connection

_DAY_FOLDER = re.compile(r"day=(\d{4}-\d\d-\d\d)", re.ASCII)
_LOCK_NAME = ".lock"
_OWNER_NAME = "artifactapi.json"  # says which log the archive belongs to
_NAME_DIGITS = 16
_NAME = "access_log-{}"

# What COPY prints must not depend on the settings of the role or the database.
_TRANSACTION_SETTINGS = """
    SELECT set_config('timezone', 'UTC', true), set_config('datestyle', 'ISO', true),
           set_config('extra_float_digits', '1', true), set_config('jit', 'off', true)
"""
_SNAPSHOT = "SET TRANSACTION ISOLATION LEVEL REPEATABLE READ"
_LAST_ARRIVAL = sql.SQL("SELECT max(logged_at) FROM {rows} AS entry")
_KEY_TABLE = """
    CREATE TEMP TABLE IF NOT EXISTS archived_key (started_at timestamptz, flow_id uuid) ON COMMIT DROP
"""
_FORGET_KEYS = "TRUNCATE pg_temp.archived_key"
_COPY_KEYS = "COPY pg_temp.archived_key FROM STDIN"
_ROWS = sql.SQL(
    "(SELECT * FROM {relation} AS entry WHERE started_at >= {start} AND started_at < {end})"
)
# Citus joins a local table only in a subquery of its own.
_NEW_ROWS = sql.SQL("""(
    SELECT * FROM {relation} AS entry WHERE started_at >= {start} AND started_at < {end} AND NOT EXISTS (
      SELECT 1 FROM (SELECT started_at, flow_id FROM pg_temp.archived_key) AS known
      WHERE known.started_at = entry.started_at AND known.flow_id = entry.flow_id)
)""")
_COPY_ROWS = sql.SQL(
    "COPY (SELECT {columns} FROM {rows} AS entry ORDER BY started_at, flow_id) TO STDOUT (FORMAT csv)"
)


class ArchiveBusyError(ArchiveError):
    """Another process is writing to the archive. Try again later."""


class _Owner(Struct, frozen=True):
    """The log whose rows an archive has."""

    log_id: UUID


class ArchivedDay(NamedTuple):
    """The rows of one table in the archive. All of them are in verified files."""

    day: date
    rows: int  # of the day, in the table
    written: int  # of these, written by this call; the others were in files of the day already
    file: Path | None  # the new file; None: there was nothing to write
    bytes: int  # size of the new file


class ArchivedFile(NamedTuple):
    """A verified file of the archive."""

    path: Path
    rows: int
    bytes: int


def archive_day(
    connection: Connection[Any], relation: str | sql.Identifier, day: date, folder: Path
) -> ArchivedDay:
    """Write a table's rows of a day to a verified file of the archive, unless its files have them already.

    After a crash at any point, call it again: a file without its final name is removed. A row is known by its key,
    as in the table: a row whose key is in a file of the day is not written again.

    The table may be attached or detached. To remove a day without a moment in which a reader finds it nowhere,
    archive it, detach it, archive it again for the rows that arrived meanwhile, and drop it if `rows` is the number
    of its rows then.

    Args:
        connection: In autocommit mode, outside a transaction. Its role needs SELECT on the table, and TEMP on
            the database if the day has files already. Its calls must be allowed to take as long as it takes to
            sort the table.
        relation: The table or partition; a name without a schema is one in the search path.
        day: The day (UTC). The table may have rows of other days, too.
        folder: The archive. It is created if its parent exists.

    Raises:
        ArchiveBusyError: another process is writing to the archive.
        ArchiveError: DuckDB is not installed, the file cannot be written or read back, its values are not those
            of the table, or a file of the day is damaged.
        psycopg.Error, DeadlineExceededError: reading the table failed.
    """
    load_duckdb()
    day_folder = folder / f"day={day}"
    with _locked(folder), connection.transaction():
        connection.execute(_SNAPSHOT)
        connection.execute(_TRANSACTION_SETTINGS)
        table = relation if isinstance(relation, sql.Identifier) else sql.Identifier(relation)
        columns = table_columns(connection, table)
        start, end = map(sql.Literal, day_span(day))
        names: dict[str, sql.Composable] = {"relation": table, "start": start, "end": end}
        rows = _ROWS.format(**names)
        digest = total = postgres_digest(connection, columns, rows)
        paths = _files(day_folder)
        records = [check_file(path) for path in paths]
        if _hold_exactly(records, columns, total):
            return ArchivedDay(day, total.rows, 0, None, 0)
        if paths:
            load_keys(connection, paths)
            rows = _NEW_ROWS.format(**names)
            digest = postgres_digest(connection, columns, rows)
        if not digest.rows:
            return ArchivedDay(day, total.rows, 0, None, 0)
        query = _COPY_ROWS.format(columns=csv_columns(columns), rows=rows)
        with _disk_errors(folder):
            record = FileRecord(columns, digest, _last_arrival(connection, rows))
            file = _write(connection, query, record, day_folder)
            return ArchivedDay(day, total.rows, digest.rows, file, file.stat().st_size)


def claim_archive(folder: Path, log_id: UUID) -> None:
    """Remember in the archive that it belongs to this log, or check that it does. Call it before `archive_day`.

    Two logs in one folder could not be told apart again.

    Raises:
        ArchiveBusyError: another process is writing to the archive.
        ArchiveError: it belongs to another log, or the folder cannot be used.
    """
    path = folder / _OWNER_NAME
    with _locked(folder), _disk_errors(folder):
        if path.exists():
            if _owner(path) != log_id:
                raise ArchiveError(
                    f"The archive {folder} has the days of another log; name another folder, or remove {path} if that"
                    " log no longer exists."
                )
            return
        partial = path.with_suffix(PARTIAL)
        try:
            partial.write_bytes(json.encode(_Owner(log_id)) + b"\n")
            sync_file(partial)
            partial.rename(path)
        finally:
            partial.unlink(missing_ok=True)
        _sync_folder(folder)


def _owner(path: Path) -> UUID:
    try:
        return json.decode(path.read_bytes(), type=_Owner).log_id
    except (DecodeError, ValidationError):
        raise ArchiveError(
            f"{path} does not say which log the archive belongs to; remove it if the archive is of this log."
        ) from None


def archived_days(folder: Path) -> list[date]:
    """Return the days that have files, oldest first.

    Raises:
        ArchiveError: the folder cannot be read.
    """
    with _disk_errors(folder):
        names = [entry.name for entry in folder.iterdir()]
    return sorted(day for day in map(_day, names) if day and _files(folder / f"day={day}"))


def files_of_day(folder: Path, day: date) -> list[Path]:
    """Return the files of a day. Raises ArchiveError if the folder cannot be read."""
    return _files(folder / f"day={day}")


def rows_in_archive(folder: Path, day: date) -> int:
    """Return the number of rows of a day, from the metadata of its files.

    Raises:
        ArchiveError: DuckDB is not installed, or a file is damaged or not ours.
    """
    return sum(record.digest.rows for record in read_records(files_of_day(folder, day)))


def verify_day(folder: Path, day: date) -> list[ArchivedFile]:
    """Read every value of the day's files and compare them with what was written.

    Raises:
        ArchiveError: DuckDB is not installed, or a file is damaged or not ours.
    """
    paths = files_of_day(folder, day)
    return [ArchivedFile(path, check_file(path).digest.rows, path.stat().st_size) for path in paths]


def load_keys(connection: Connection[Any], paths: list[Path]) -> None:
    """Send the keys of archived rows to the server, which can compare any number of them.

    They are in the table pg_temp.archived_key until the transaction ends, in which it must be called.

    Raises:
        ArchiveError: DuckDB is not installed, or a file is damaged.
        psycopg.Error: The server reported an error, such as that the role may not create temporary tables.
    """
    key = [ArchiveColumn(KEY[0], "timestamp with time zone"), ArchiveColumn(KEY[1], "uuid")]
    connection.execute(_KEY_TABLE)
    connection.execute(_FORGET_KEYS)
    with (
        engine() as reader,
        connection.cursor() as cursor,
        cursor.copy(_COPY_KEYS) as copy,
    ):
        for lines in yielding_gil(copy_lines(reader, key, files_relation(paths), {})):
            copy.write(lines)
    connection.execute("ANALYZE pg_temp.archived_key")


def _day(name: str) -> date | None:
    """Return the day that a folder is for; None: it is for something else."""
    found = _DAY_FOLDER.fullmatch(name)
    with contextlib.suppress(ValueError):  # such as February 31
        return date.fromisoformat(found[1]) if found else None
    return None


def _files(day_folder: Path) -> list[Path]:
    with _disk_errors(day_folder):
        if not day_folder.is_dir():
            return []
        # Tools that copy files write hidden ones next to them.
        return sorted(p for p in day_folder.glob("*.parquet") if not p.name.startswith("."))


def _last_arrival(connection: Connection[Any], rows: sql.Composed) -> datetime:
    row = connection.execute(_LAST_ARRIVAL.format(rows=rows)).fetchone()
    if row is None:
        raise AssertionError
    at: datetime = row[0]
    return at


def _hold_exactly(
    records: list[FileRecord], columns: Sequence[ArchiveColumn], digest: Digest
) -> bool:
    """Whether the files have the rows of the table, no others, and with the same values."""
    names = [(column.name, column.type) for column in columns]
    if any([(c.name, c.type) for c in record.columns] != names for record in records):
        return False
    return sum((record.digest for record in records), NO_ROWS) == digest


def _write(
    connection: Connection[Any], query: sql.Composed, record: FileRecord, day_folder: Path
) -> Path:
    """Write a new file, compare it with the table's digest, and only then give it its name."""
    day_folder.mkdir(exist_ok=True)
    digest = record.digest
    name = f"{int(digest.sums[0]) ^ int(digest.sums[1]):x}"[-_NAME_DIGITS:].zfill(_NAME_DIGITS)
    path = day_folder / f"{_NAME.format(name)}.parquet"
    partial = path.with_suffix(PARTIAL)
    try:
        with (
            ParquetWriter(partial, record.columns, json.encode(record), digest.rows) as writer,
            connection.cursor() as cursor,
            cursor.copy(query) as copy,
        ):
            for text in yielding_gil(copy):
                writer.write(text)
        sync_file(partial)
        if check_file(partial).digest != digest:
            raise ArchiveError(f"{partial} has other rows than the table.")
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)
    _sync_folder(day_folder)
    _sync_folder(day_folder.parent)
    return path


def _sync_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Let one process at a time write to the archive, and remove what one that was killed left behind."""
    with _disk_errors(folder):
        folder.mkdir(exist_ok=True)
        lock = os.open(folder / _LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        with _disk_errors(folder):
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ArchiveBusyError(
                    f"Another process is writing to the archive {folder}; try again later."
                ) from None
            for partial in folder.glob(f"day=*/{_NAME.format(_NAME_DIGITS * '?')}{PARTIAL}"):
                partial.unlink()
        yield
    finally:
        os.close(lock)  # releases the lock


@contextlib.contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as e:
        raise ArchiveError(f"Cannot use the archive {folder}: {e.strerror or e}.") from None
