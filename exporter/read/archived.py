"""Let queries on access_log cover archived days too: load the rows they need into a temporary table.

A temporary view `access_log` is the table and the loaded rows together, and temporary relations come first in the
search path. So every query works as it is. No row counts twice: loaded rows that are in the table are removed.
"""

from __future__ import annotations

import contextlib
import dataclasses
from datetime import date, datetime, timedelta
from typing import TYPE_CHECKING, Any, LiteralString, NamedTuple

import psycopg
from psycopg import sql

from ..archive.columns import ArchiveColumn, table_columns
from ..archive.files import archived_days, files_of_day
from ..archive.parquet import (
    ArchiveError,
    FileRecord,
    check_file,
    common_columns,
    copy_lines,
    count_by,
    engine,
    files_relation,
    read_records,
)
from ..day import midnight
from ..postgres.connection import describe
from ..postgres.schema import schema_name
from .selection import Selection

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from ..postgres.connection import DeadlineConnection

# Bounds the disk space that a query takes on the server: about 4 GB.
MAX_LOADED_ROWS = 10_000_000
LOADED_ROWS: LiteralString = "access_log_loaded"

_LOAD_SECONDS = 600.0  # limit for one statement
_DAY = timedelta(days=1)
# The lock first, and then the snapshot: a day that leaves the table later is still in the snapshot, and
# one that left it before has its files. So no row is in neither.
_LOCK = "LOCK TABLE ONLY access_log IN ACCESS SHARE MODE"
_CREATE = sql.SQL("""
    CREATE TEMP TABLE {loaded} ON COMMIT DROP AS SELECT * FROM {log} WITH NO DATA
""")
_CREATE_VIEWS = sql.SQL("""
    CREATE TEMP VIEW access_log AS SELECT * FROM {log} UNION ALL SELECT * FROM pg_temp.{loaded};
    CREATE TEMP VIEW access_log_fetches AS SELECT * FROM pg_temp.access_log WHERE artifact_complete;
""")
# pg_temp comes first by itself, unless search_path names it.
_SETTINGS = """
    SET TRANSACTION READ ONLY;
    SELECT set_config('search_path', 'pg_temp, ' || current_setting('search_path'), true),
           set_config('timezone', 'UTC', true), set_config('jit', 'off', true)
"""
_COPY = sql.SQL("COPY pg_temp.{loaded} ({columns}) FROM STDIN")
_ANALYZE = sql.SQL("ANALYZE pg_temp.{loaded}")
_FORGET = sql.SQL("DELETE FROM pg_temp.{loaded}")
_COUNT_BY_NODE = sql.SQL("SELECT coalesce(node, ''), count(*) FROM pg_temp.{loaded} GROUP BY 1")
_REMOVE_KNOWN = sql.SQL("""
    DELETE FROM pg_temp.{loaded} AS loaded USING {log} AS known
    WHERE known.started_at = loaded.started_at AND known.flow_id = loaded.flow_id
    AND known.started_at >= %s AND known.started_at < %s
""")
_REMOVE_DUPLICATES = sql.SQL("""
    DELETE FROM pg_temp.{loaded} AS loaded USING pg_temp.{loaded} AS other
    WHERE other.started_at = loaded.started_at AND other.flow_id = loaded.flow_id AND other.ctid < loaded.ctid
""")
_FETCHES = "artifact_complete"
# The functions that conditions call, for DuckDB. In the files, addresses are texts.
_FUNCTIONS = """
    CREATE TEMP MACRO access_log_caller(proxy_user, client_ip) AS coalesce(proxy_user, client_ip);
    CREATE TEMP MACRO access_log_search_text(host, path, package, purl, proxy_user) AS
      coalesce(host, '') || chr(10) || coalesce(path, '') || chr(10) || coalesce(package, '') || chr(10)
      || coalesce(purl, '') || chr(10) || coalesce(proxy_user, '');
    CREATE TEMP MACRO access_log_failed(status_code) AS status_code IS NULL OR status_code >= 500;
"""


class ArchivedSpan(NamedTuple):
    """A day of the archive."""

    day: date
    paths: list[Path]
    records: list[FileRecord]

    @property
    def start(self) -> datetime:
        """Midnight in UTC."""
        return midnight(self.day)

    @property
    def end(self) -> datetime:
        """The next midnight."""
        return self.start + _DAY

    @property
    def last_arrival(self) -> datetime:
        """The latest `logged_at` of its rows."""
        return max(record.last_arrival for record in self.records)

    @property
    def rows(self) -> int:
        """The number of rows in its files."""
        return sum(record.digest.rows for record in self.records)


def archived_spans(folder: Path, selection: Selection) -> list[ArchivedSpan]:
    """Return the archived days that the selection's time span overlaps, oldest first.

    Raises:
        ArchiveError: the folder cannot be read, or a file is damaged.
    """
    wanted = [
        day
        for day in archived_days(folder)
        if (selection.since is None or midnight(day) + _DAY > selection.since)
        and (selection.until is None or midnight(day) < selection.until)
    ]
    paths = {day: files_of_day(folder, day) for day in wanted}
    records = iter(read_records([path for day in wanted for path in paths[day]]))
    return [ArchivedSpan(day, paths[day], [next(records) for _ in paths[day]]) for day in wanted]


class ArchiveLoader:
    """Loads archived rows into the temporary table of one transaction. `with_archive` makes it."""

    def __init__(self, connection: DeadlineConnection, folder: Path, log: sql.Identifier) -> None:
        self._connection = connection
        self._folder = folder
        self._names = {"loaded": sql.Identifier(LOADED_ROWS), "log": log}
        self._log_columns = table_columns(connection, sql.Identifier("access_log"))
        self._rows = 0

    @property
    def columns(self) -> list[ArchiveColumn]:
        """The columns of the table access_log, with their comments."""
        return self._log_columns

    def days(self, selection: Selection) -> list[ArchivedSpan]:
        """Return the archived days that the selection's time span overlaps, oldest first.

        Raises:
            ArchiveError: the folder cannot be read, or a file is damaged.
        """
        return archived_spans(self._folder, selection)

    def load(
        self,
        selection: Selection,
        spans: list[ArchivedSpan],
        *,
        newest: int | None = None,
        only_fetches: bool = False,
    ) -> None:
        """Load the selected rows of these days, without those that are in the table.

        Loads other rows as well if DuckDB does not understand a filter.

        Args:
            selection: Which rows.
            spans: The days.
            newest: Load only so many of them, those with the latest `logged_at`, if DuckDB can tell which.
            only_fetches: Leave out what `access_log_fetches` leaves out.

        Raises:
            ArchiveError: there are more than MAX_LOADED_ROWS, or a file is damaged.
            psycopg.Error, DeadlineExceededError: loading failed.
        """
        paths = [path for span in spans for path in span.paths]
        if not paths:
            return
        records = [record for span in spans for record in span.records]
        columns = common_columns(records, self._log_columns)
        condition = selection.portable_where()
        limit = MAX_LOADED_ROWS - self._rows + 1
        order = ""
        if newest is not None and condition.is_complete:
            # A row that is in the table or in another file as well must not take the place of others.
            order = "ORDER BY logged_at DESC, started_at DESC"
            limit = min(limit, newest * len(paths) + self._rows_in_table(spans))
        fetches = f" AND {_FETCHES}" if only_fetches else ""
        rows = f"{files_relation(paths)} WHERE {condition.text}{fetches} {order} LIMIT {limit}"
        self._rows += self._copy(columns, rows, condition.values)
        if self._rows > MAX_LOADED_ROWS:
            raise ArchiveError(
                f"More than {MAX_LOADED_ROWS:,} archived rows match; select fewer with --since, --until"
                " or other filters."
            )
        self._execute(_ANALYZE)
        if any(len(span.paths) > 1 for span in spans):
            self._execute(_REMOVE_DUPLICATES)
        self._execute(_REMOVE_KNOWN, spans[0].start, spans[-1].end)

    def count_missing(self, span: ArchivedSpan, *, in_table: bool) -> dict[str, int]:
        """Check every value of the day's files, and count the rows by node that are not in the table.

        Args:
            span: The day.
            in_table: Whether the table has any rows of the day.

        Raises:
            ArchiveError: a file is damaged, or the day has more than MAX_LOADED_ROWS.
            psycopg.Error, DeadlineExceededError: loading failed.
        """
        for path in span.paths:
            check_file(path)
        if not in_table and len(span.paths) == 1:
            return {node or "": rows for node, rows in count_by(span.paths, "node").items()}
        self.load(Selection(since=span.start, until=span.end), [span])
        found = self._connection.execute(_COUNT_BY_NODE.format(**self._names)).fetchall()
        self.forget()
        return dict(found)

    def forget(self) -> None:
        """Remove all loaded rows."""
        self._execute(_FORGET)
        self._rows = 0

    def _copy(self, columns: list[ArchiveColumn], rows: str, values: dict[str, Any]) -> int:
        names = sql.SQL(", ").join(sql.Identifier(column.name) for column in columns)
        statement = _COPY.format(columns=names, **self._names)
        with engine() as reader, self._connection.cursor() as cursor:
            reader.execute(_FUNCTIONS)
            with cursor.copy(statement) as copy:
                for lines in copy_lines(reader, columns, rows, values):
                    copy.write(lines)
            return cursor.rowcount

    def _rows_in_table(self, spans: list[ArchivedSpan]) -> int:
        count = sql.SQL(
            "SELECT count(*) FROM {log} WHERE started_at >= %s AND started_at < %s"
        ).format(**self._names)
        values = min(span.start for span in spans), max(span.end for span in spans)
        row = self._connection.execute(count, values).fetchone()
        return int(row[0]) if row else 0

    def _execute(self, statement: sql.SQL, *values: object) -> None:
        self._connection.execute(statement.format(**self._names), values or None)


@contextlib.contextmanager
def with_archive(
    connection: DeadlineConnection, folder: Path, *, with_views: bool = True
) -> Iterator[ArchiveLoader]:
    """Run the block in a read-only transaction in which `access_log` and `access_log_fetches` include loaded rows.

    Nothing of it is left afterwards.

    Args:
        connection: In autocommit mode, outside a transaction.
        folder: The archive.
        with_views: False: only the table LOADED_ROWS has the loaded rows.

    Raises:
        ArchiveError: the role may not create temporary tables, or DuckDB is not installed.
        psycopg.Error, DeadlineExceededError: the transaction could not begin.
    """
    archived_days(folder)  # if the folder cannot be read, say so before anything else
    schema = schema_name(connection)
    connection.call_seconds = _LOAD_SECONDS
    connection.read_only = False  # until the temporary table exists
    connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
    with contextlib.ExitStack() as transaction:
        try:
            transaction.enter_context(connection.transaction(force_rollback=True))
        except psycopg.errors.FeatureNotSupported:
            raise ArchiveError(
                "This server is a standby, which has no temporary tables; --archive needs the primary server."
            ) from None
        connection.execute(_LOCK)
        try:
            log = sql.Identifier(schema, "access_log")
            loader = ArchiveLoader(connection, folder, log)
            names = {"loaded": sql.Identifier(LOADED_ROWS), "log": log}
            connection.execute(_CREATE.format(**names))
            if with_views:
                connection.execute(_CREATE_VIEWS.format(**names))
        except psycopg.errors.InsufficientPrivilege as e:
            raise ArchiveError(
                f"This database role cannot create the temporary table that --archive needs ({describe(e)});"
                f" run GRANT TEMPORARY ON DATABASE {connection.info.dbname} for it."
            ) from None
        connection.execute(_SETTINGS)
        yield loader


@contextlib.contextmanager
def rows_loaded(
    connection: DeadlineConnection,
    folder: Path | None,
    selection: Selection,
    *,
    only_fetches: bool = False,
) -> Iterator[None]:
    """Run the block with all selected rows of the archive loaded; without a folder, just run it.

    Raises:
        ArchiveError: see `with_archive` and `ArchiveLoader.load`.
        psycopg.Error, DeadlineExceededError: loading failed.
    """
    if folder is None:
        yield
        return
    with with_archive(connection, folder) as loader:
        loader.load(selection, loader.days(selection), only_fetches=only_fetches)
        yield


def parts_by_day(loader: ArchiveLoader, selection: Selection) -> Iterator[Selection]:
    """Split a selection at the archived days, oldest first, and load each of them while its part is used.

    So a query over years takes no more space than one over a day.

    Raises:
        ArchiveError, psycopg.Error, DeadlineExceededError: see `ArchiveLoader.load`.
    """
    since = selection.since
    for span in loader.days(selection):
        if since is None or since < span.start:
            yield dataclasses.replace(selection, since=since, until=span.start)
        start = span.start if since is None else max(since, span.start)
        end = span.end if selection.until is None else min(selection.until, span.end)
        part = dataclasses.replace(selection, since=start, until=end)
        loader.load(part, [span])
        yield part
        loader.forget()
        since = end
    if selection.until is None or since is None or since < selection.until:
        yield dataclasses.replace(selection, since=since)
