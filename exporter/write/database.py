"""The one connection: open it, COPY batches into access_log, and say what an error means.

Knows nothing of threads, retries or the buffer. Whose fault an error is, is decided here by
SQLSTATE, never by exception class: psycopg files a poison row under OperationalError and a
failover under InternalError.
"""

from __future__ import annotations

import contextlib
import re
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import psycopg
from psycopg import generators, sql
from psycopg.errors import error_from_result
from psycopg.pq import ExecStatus

from ..postgres.connection import (
    Deadline,
    DeadlineConnection,
    DeadlineExceededError,
    connect,
    describe,
)
from ..postgres.embedded import EmbeddedServer
from ..postgres.faults import MENDABLE, Fault, classify
from ..postgres.schema import SchemaError, ensure_schema
from ..rows.entry import AccessLogEntry
from .artifacts import fetches, record
from .copy_batch import CopyBatch, days_of
from .gaps import Gap

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from psycopg.abc import PQGen
    from psycopg.pq.abc import PGconn

    from ..settings import DatabaseSettings

COLUMNS = AccessLogEntry._fields
_COLUMN_LIST = sql.SQL(", ").join(map(sql.Identifier, COLUMNS))
_COPY = sql.SQL("COPY access_log ({}) FROM STDIN (NULL '')").format(_COLUMN_LIST).as_bytes()
_INSERT = sql.SQL("INSERT INTO access_log ({}) VALUES ({}) ON CONFLICT DO NOTHING").format(
    _COLUMN_LIST, sql.SQL(", ").join(sql.Placeholder() for _ in COLUMNS)
)
_INSERT_GAP = sql.SQL("INSERT INTO access_log_gap ({}) VALUES ({}) ON CONFLICT DO NOTHING").format(
    sql.SQL(", ").join(map(sql.Identifier, Gap._fields)),
    sql.SQL(", ").join(sql.Placeholder() for _ in Gap._fields),
)
_ASYNCHRONOUS = b"SET LOCAL synchronous_commit = off"
_ENSURE_PARTITION = "SELECT access_log_ensure_partition(%s)"

_COPY_LINE = re.compile(r"\bCOPY \S+, line (\d+)")

_KNOWN_DAYS = 1024  # partitions remembered as made
_SENT_AT_ONCE = 128 * 1024  # bytes, as psycopg does it: more may never fit (psycopg #255)


class DatabaseUnavailable(Exception):  # noqa: N818 - not an error: a state to wait through
    """The batch was not written, or it is not known whether it was; send it again later.

    `configuration` says that nobody but the user can mend it.
    """

    def __init__(self, reason: str, *, configuration: bool = False) -> None:
        super().__init__(reason)
        self.configuration = configuration


class Rejection(NamedTuple):
    """One entry that Postgres will not take, and why."""

    entry: AccessLogEntry
    sqlstate: str
    reason: str


def insert_access_log_batch(
    connection: psycopg.Connection[Any],
    entries: Sequence[AccessLogEntry],
    *,
    synchronous_commit: bool = True,
) -> None:
    """COPY the entries into access_log and count their artifacts, all of it or nothing.

    Text format, since psycopg's binary one stores 40000 in a smallint as -25536 without a word.
    All of it goes in one query, which is one transaction (PostgreSQL docs, "Multiple Statements in a
    Simple Query"): two round trips where BEGIN and COMMIT would make it five.

    Args:
        connection: Where it is not in autocommit, to commit is the caller's part. After anything but
            what is named below it must be closed.
        entries: The rows; a CopyBatch has them ready.
        synchronous_commit: Whether to wait for the disk, where the server does.

    Raises:
        psycopg.Error, UnicodeError: see `classify`.
    """
    batch = entries if isinstance(entries, CopyBatch) else CopyBatch.of(entries)
    statements = (b"" if synchronous_commit else _ASYNCHRONOUS, batch.statement, _COPY)
    if not connection.autocommit:
        # Before it psycopg begins a transaction, which is the caller's to end.
        connection.execute("SELECT")
    query = b"; ".join(filter(None, statements))
    copied = connection.wait(_copy(connection.pgconn, query, batch.text))
    if copied != len(batch):
        raise psycopg.DatabaseError(f"COPY took {copied} of {len(batch)} rows.")


def _copy(pgconn: PGconn, query: bytes, text: bytes) -> PQGen[int | None]:
    """Run a query that ends in COPY. psycopg's own Copy takes no other statement with it.

    The text is ready before: a client that dies in mid-COPY holds its locks.
    """
    pgconn.send_query(query)
    *_, result = yield from generators.execute(pgconn)
    if result.status != ExecStatus.COPY_IN:
        raise error_from_result(result)
    for start in range(0, len(text), _SENT_AT_ONCE):
        yield from generators.copy_to(pgconn, text[start : start + _SENT_AT_ONCE])
    result = yield from generators.copy_end(pgconn, None)
    return result.command_tuples


class Database:
    """Owns at most one connection, opened when first needed. One thread uses it.

    Only `deadline.give_up_at` may be set from another thread.
    """

    def __init__(self, settings: DatabaseSettings, deadline: Deadline | None = None) -> None:
        self._settings = settings
        self.deadline = deadline or Deadline()
        self._connection: DeadlineConnection | None = None
        self._embedded: EmbeddedServer | None = None
        self._days: set[str] = set()

    def reconfigure(self, settings: DatabaseSettings) -> None:
        """Go on with other settings; a connection to another place is closed."""
        if settings != self._settings:
            self.close()
            self._settings = settings

    def open(self) -> None:
        """Connect and make the schema now rather than with the first entry.

        Raises:
            DatabaseUnavailable: not now; `write` will try again.
        """
        try:
            self._ready()
        except (psycopg.Error, DeadlineExceededError) as e:
            raise self._away(e, classify(e)) from None

    def write(self, entries: Sequence[AccessLogEntry]) -> list[Rejection]:
        """Write the entries; returns those that Postgres will not take, all others are in the table.

        Idempotent: an entry that is in the table already stays there once.

        Raises:
            DatabaseUnavailable: nothing, all, or an unknown part was written; write the same again.
        """
        rejected: list[Rejection] = []
        remaining = entries
        tried: set[Fault] = set()
        while remaining:
            try:
                connection = self._ready(
                    remaining.days if isinstance(remaining, CopyBatch) else days_of(remaining)
                )
                if Fault.ROW in tried:
                    rejected += _insert_singly(connection, remaining)
                elif Fault.DUPLICATE in tried:
                    _insert_missing(connection, remaining)
                else:
                    insert_access_log_batch(
                        connection,
                        remaining,
                        synchronous_commit=self._settings.synchronous_commit,
                    )
            except (psycopg.Error, UnicodeError, DeadlineExceededError) as e:
                fault = classify(e)
                line = _line_at_fault(e, len(remaining)) if fault is Fault.ROW else None
                if line is not None:
                    rejected.append(_rejection(remaining[line], e))
                    remaining = [*remaining[:line], *remaining[line + 1 :]]
                elif fault in MENDABLE and fault not in tried:
                    tried.add(fault)
                    self._mend(fault)
                else:
                    raise self._away(e, fault) from None
            else:
                break
        return rejected

    def write_gaps(self, gaps: Sequence[Gap]) -> None:
        """Write the gaps; those that are there already stay there once.

        Raises:
            DatabaseUnavailable: write the same again.
        """
        try:
            connection = self._ready()
            with connection.transaction(), connection.cursor() as cursor:
                cursor.executemany(_INSERT_GAP, gaps)
        except (psycopg.Error, DeadlineExceededError) as e:
            raise self._away(e, classify(e)) from None

    def close(self) -> None:
        """Close the connection and let go of the embedded server. Idempotent."""
        self.disconnect()
        if self._embedded is not None:
            self._embedded.release()
            self._embedded = None

    def _ready(self, days: Collection[str] = ()) -> DeadlineConnection:
        """A connection with the schema and these days' partitions in place and its deadline set."""
        connection = self._connect()
        self._set_deadline(connection)
        self._ensure_partitions(connection, days)
        return connection

    def _set_deadline(self, connection: DeadlineConnection) -> None:
        connection.call_deadline = time.monotonic() + self._settings.call_seconds

    def _connect(self) -> DeadlineConnection:
        if self._connection is not None and not self._connection.closed:
            return self._connection
        dsn = self._settings.dsn
        try:
            if not dsn:
                self._embedded = self._embedded or EmbeddedServer()
                dsn = self._embedded.start(self.deadline.give_up_at)
            self._connection = connect(dsn, self._settings, self.deadline)
            ensure_schema(self._connection)
        except SchemaError as e:
            self.disconnect()
            raise DatabaseUnavailable(str(e), configuration=True) from None
        except OSError as e:
            raise DatabaseUnavailable(f"The embedded server did not start: {e}") from None
        return self._connection

    def disconnect(self) -> None:
        """Close the connection; the next call opens another. Idempotent."""
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(psycopg.Error):  # closing what is broken may say so once more
                connection.close()
        self._days.clear()

    def _ensure_partitions(self, connection: DeadlineConnection, days: Collection[str]) -> None:
        for day in sorted(day for day in days if day not in self._days):
            connection.execute(_ENSURE_PARTITION, (day,))
            if len(self._days) >= _KNOWN_DAYS:
                self._days.clear()
            self._days.add(day)

    def _mend(self, fault: Fault) -> None:
        """What the server says is missing is no longer believed to be there."""
        if fault is Fault.SCHEMA:
            self.disconnect()
        self._days.clear()

    def _away(self, error: Exception, fault: Fault) -> DatabaseUnavailable:
        if fault is not Fault.BUSY:
            self.disconnect()
        return DatabaseUnavailable(describe(error), configuration=fault is Fault.CONFIGURATION)


def _insert_missing(connection: DeadlineConnection, entries: Sequence[AccessLogEntry]) -> None:
    """Insert those that are not there yet. INSERT: it needs no right to read or to make tables."""
    with connection.transaction():
        with connection.pipeline():
            inserts = [connection.execute(_INSERT, entry) for entry in entries]
        inserted = [e for e, insert in zip(entries, inserts, strict=True) if insert.rowcount]
        if fetched := fetches(inserted):
            connection.execute(record(fetched))


def _insert_singly(
    connection: DeadlineConnection, entries: Sequence[AccessLogEntry]
) -> list[Rejection]:
    """Insert each on its own, for errors that don't say which row is to classify."""
    rejected = []
    for entry in entries:
        try:
            _insert_missing(connection, [entry])
        except (psycopg.Error, UnicodeError) as e:
            if classify(e) is not Fault.ROW:
                raise
            rejected.append(_rejection(entry, e))
    return rejected


def _rejection(entry: AccessLogEntry, error: Exception) -> Rejection:
    return Rejection(entry, getattr(error, "sqlstate", None) or "", describe(error))


def _line_at_fault(error: Exception, rows: int) -> int | None:
    """Index of the row that Postgres blames, from "COPY access_log, line 3" in the error's context."""
    context = getattr(getattr(error, "diag", None), "context", None) or ""
    match = _COPY_LINE.search(context)
    index = int(match[1]) - 1 if match else -1
    return index if 0 <= index < rows else None
