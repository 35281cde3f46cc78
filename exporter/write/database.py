"""The writer's connection: COPY batches into access_log and react to errors.

Knows nothing about threads, retries or the buffer. postgres/faults.py decides what an error means.
"""

from __future__ import annotations

import contextlib
import re
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import psycopg
from psycopg import sql

from ..postgres.connection import (
    Deadline,
    DeadlineConnection,
    DeadlineExceededError,
    connect,
    describe,
)
from ..postgres.copy import copy_from_stdin
from ..postgres.embedded import EmbeddedServer
from ..postgres.faults import REPAIRABLE, Fault, classify
from ..postgres.schema import SchemaError, ensure_schema
from ..rows.entry import AccessLogEntry
from .artifacts import fetches, record
from .copy_batch import CopyBatch, days_of
from .gaps import Gap

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

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

_KNOWN_DAYS = 1024  # partitions known to exist
_MAX_REJECTED_LINES = 8  # COPY is repeated without each; with more, rows are inserted one by one


class DatabaseUnavailable(Exception):  # noqa: N818 - a state, not an error
    """The batch was not written, or that is unknown; send it again later.

    `configuration`: only the user can fix the cause. `refused`: the server answers, but it accepts no
    row of this batch. It may accept others.
    """

    def __init__(self, reason: str, *, configuration: bool = False, refused: bool = False) -> None:
        super().__init__(reason)
        self.configuration = configuration
        self.refused = refused


class Rejection(NamedTuple):
    """An entry that PostgreSQL will never accept, and why."""

    entry: AccessLogEntry
    sqlstate: str
    reason: str


def insert_access_log_batch(
    connection: psycopg.Connection[Any],
    entries: Sequence[AccessLogEntry],
    *,
    synchronous_commit: bool = True,
) -> None:
    """COPY the entries into access_log and count their artifacts, in one transaction.

    Text format, because psycopg's binary format silently stores 40000 in a smallint as -25536.
    Everything is one simple query and therefore one transaction (PostgreSQL docs, "Multiple Statements
    in a Simple Query"): two round trips instead of five with BEGIN and COMMIT.

    Args:
        connection: If it is not in autocommit mode, the caller commits. After an exception other
            than those below it must be closed.
        entries: The rows; a CopyBatch is ready to send.
        synchronous_commit: Whether to wait until the server has the rows on disk.

    Raises:
        psycopg.Error, UnicodeError: see `classify`.
    """
    batch = entries if isinstance(entries, CopyBatch) else CopyBatch.of(entries)
    statements = (b"" if synchronous_commit else _ASYNCHRONOUS, batch.statement, _COPY)
    if not connection.autocommit:
        # Makes psycopg begin the transaction, which the caller ends.
        connection.execute("SELECT")
    query = b"; ".join(filter(None, statements))
    copied = copy_from_stdin(connection, query, batch.text)
    if copied != len(batch):
        raise psycopg.DatabaseError(f"COPY took {copied} of {len(batch)} rows.")


class Database:
    """Owns at most one connection, opened on first use. One thread uses it.

    Only `deadline.give_up_at` may be set by another thread.
    """

    def __init__(self, settings: DatabaseSettings, deadline: Deadline | None = None) -> None:
        self._settings = settings
        self.deadline = deadline or Deadline()
        self._connection: DeadlineConnection | None = None
        self._embedded: EmbeddedServer | None = None
        self._days: set[str] = set()
        self.reconnects = 0  # calls that found the connection closed while it was idle

    def reconfigure(self, settings: DatabaseSettings) -> None:
        """Use other settings; closes the connection if they differ."""
        if settings != self._settings:
            self.close()
            self._settings = settings

    def open(self) -> None:
        """Connect and create the schema now instead of on the first write.

        Raises:
            DatabaseUnavailable: it failed; `write` tries again.
        """
        try:
            self._ready()
        except (psycopg.Error, DeadlineExceededError) as e:
            raise self._unavailable(e, classify(e)) from None

    def write(self, entries: Sequence[AccessLogEntry]) -> list[Rejection]:
        """Write the entries. Returns the rejected ones; all others are in the table.

        Idempotent: an entry that is already in the table is not inserted again. An entry is only
        rejected if the server accepts another one of them. If it accepts none, the cause may be a
        constraint, trigger or column type that a DBA has changed, and no entry may be lost for it.

        Raises:
            DatabaseUnavailable: none, all or some of them were written; write the same entries again.
        """
        rejected: list[Rejection] = []
        remaining = entries
        tried: set[Fault] = set()
        was_idle = self._connection is not None
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
                line = _rejected_line(e, len(remaining)) if fault is Fault.ROW else None
                if line is not None and len(rejected) < _MAX_REJECTED_LINES:
                    rejected.append(_rejection(remaining[line], e))
                    remaining = [*remaining[:line], *remaining[line + 1 :]]
                elif fault in REPAIRABLE and fault not in tried:
                    tried.add(fault)
                    self._forget(fault)
                elif was_idle and self._is_disconnected(e):
                    was_idle = False
                    self._reconnect()
                else:
                    raise self._unavailable(e, fault) from None
            else:
                break
        if len(rejected) == len(entries) and any(it.sqlstate for it in rejected):
            raise DatabaseUnavailable(f"it accepts no row: {rejected[0].reason}", refused=True)
        return rejected

    def write_gaps(self, gaps: Sequence[Gap]) -> None:
        """Write the gaps. Idempotent.

        Raises:
            DatabaseUnavailable: write the same gaps again.
        """
        try:
            connection = self._ready()
            with connection.transaction(), connection.cursor() as cursor:
                cursor.executemany(_INSERT_GAP, gaps)
        except (psycopg.Error, DeadlineExceededError) as e:
            raise self._unavailable(e, classify(e)) from None

    def close(self) -> None:
        """Close the connection and release the embedded server. Idempotent."""
        self.disconnect()
        if self._embedded is not None:
            self._embedded.release()
            self._embedded = None

    def _ready(self, days: Collection[str] = ()) -> DeadlineConnection:
        """A connection with its deadline set, the schema and the partitions of these days in place."""
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
            raise DatabaseUnavailable(f"the embedded server did not start: {e}") from None
        return self._connection

    def disconnect(self) -> None:
        """Close the connection; the next call opens another. Idempotent."""
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(psycopg.Error):  # closing a broken connection may fail again
                connection.close()
        self._days.clear()

    def _ensure_partitions(self, connection: DeadlineConnection, days: Collection[str]) -> None:
        for day in sorted(day for day in days if day not in self._days):
            connection.execute(_ENSURE_PARTITION, (day,))
            if len(self._days) >= _KNOWN_DAYS:
                self._days.clear()
            self._days.add(day)

    def _is_disconnected(self, error: Exception) -> bool:
        """Whether the server or a pooler closed the connection, and did not just fail to answer."""
        connection = self._connection
        return isinstance(error, psycopg.OperationalError) and (
            connection is None or connection.closed
        )

    def _reconnect(self) -> None:
        """Poolers and idle_session_timeout close idle connections. That is not an outage."""
        self.disconnect()
        self.reconnects += 1

    def _forget(self, fault: Fault) -> None:
        """Forget that the missing schema or partition exists, so that it is created again."""
        if fault is Fault.SCHEMA:
            self.disconnect()
        self._days.clear()

    def _unavailable(self, error: Exception, fault: Fault) -> DatabaseUnavailable:
        if fault is not Fault.BUSY:
            self.disconnect()
        return DatabaseUnavailable(describe(error), configuration=fault is Fault.CONFIGURATION)


def _insert_missing(connection: DeadlineConnection, entries: Sequence[AccessLogEntry]) -> None:
    """Insert the entries that are not in the table yet. Needs only the INSERT privilege."""
    with connection.transaction():
        with connection.pipeline():
            inserts = [connection.execute(_INSERT, entry) for entry in entries]
        inserted = [e for e, insert in zip(entries, inserts, strict=True) if insert.rowcount]
        if fetched := fetches(inserted):
            connection.execute(record(fetched))


def _insert_singly(
    connection: DeadlineConnection, entries: Sequence[AccessLogEntry]
) -> list[Rejection]:
    """Insert each entry separately, for errors that do not name the row."""
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


def _rejected_line(error: Exception, rows: int) -> int | None:
    """Index of the bad row, from "COPY access_log, line 3" in the error's context."""
    context = getattr(getattr(error, "diag", None), "context", None) or ""
    match = _COPY_LINE.search(context)
    index = int(match[1]) - 1 if match else -1
    return index if 0 <= index < rows else None
