"""The writer's connection: write batches into access_log and react to errors.

Knows nothing about threads, retries or the buffer. postgres/faults.py decides what an error means.
"""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

import psycopg
from psycopg import sql

from ..postgres.connection import (
    Deadline,
    DeadlineConnection,
    DeadlineExceededError,
    connect,
    describe,
)
from ..postgres.embedded import EmbeddedServer
from ..postgres.faults import REPAIRABLE, Fault, classify
from ..postgres.schema import SchemaError, ensure_schema
from .copy_batch import CopyBatch, days_of
from .gaps import Gap
from .insert import (
    COLUMNS,
    RowsDiscardedError,
    forbidden_columns,
    insert_access_log_batch,
)
from .rejections import AcceptedRows, NoRowAcceptedError, Rejection, RejectionFinder

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from ..rows.entry import AccessLogEntry
    from ..settings import DatabaseSettings

__all__ = ["COLUMNS", "Database", "DatabaseUnavailable", "Rejection", "insert_access_log_batch"]

_INSERT_GAP = sql.SQL("INSERT INTO access_log_gap ({}) VALUES ({}) ON CONFLICT DO NOTHING").format(
    sql.SQL(", ").join(map(sql.Identifier, Gap._fields)),
    sql.SQL(", ").join(sql.Placeholder() for _ in Gap._fields),
)
_ENSURE_PARTITION = "SELECT access_log_ensure_partition(%s)"
_KNOWN_DAYS = 1024  # partitions known to exist


class DatabaseUnavailable(Exception):  # noqa: N818 - a state, not an error
    """The batch was not written, or that is unknown; send it again later.

    `configuration`: only the user can fix the cause. `refused`: the server answers, but it accepts no
    row of this batch, nor any other that we know. It may accept others.
    """

    def __init__(self, reason: str, *, configuration: bool = False, refused: bool = False) -> None:
        super().__init__(reason)
        self.configuration = configuration
        self.refused = refused


class Database:
    """Owns at most one connection, opened on first use. One thread uses it.

    Only `deadline.give_up_at` may be set by another thread.
    """

    def __init__(
        self,
        settings: DatabaseSettings,
        deadline: Deadline | None = None,
        waiting: Callable[[], Sequence[AccessLogEntry]] = tuple,
    ) -> None:
        """`waiting` returns some of the entries that wait to be written, at random."""
        self._settings = settings
        self._waiting = waiting
        self._accepted = AcceptedRows()
        self.deadline = deadline or Deadline()
        self._connection: DeadlineConnection | None = None
        self._embedded: EmbeddedServer | None = None
        self._days: set[str] = set()
        # A trigger discards rows without an error. Then nothing is committed before we have counted,
        # so that no artifact is counted twice.
        self._discards_rows = False
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
        rejected if the server accepts a similar one. If it accepts none, the cause may be a
        constraint, trigger or column type that a DBA has changed, and no entry may be lost for it.

        Raises:
            DatabaseUnavailable: none, all or some of them were written; write the same entries again.
        """
        repaired: set[Fault] = set()
        was_idle = self._connection is not None
        while entries:
            try:
                return self._write(entries, repaired)
            except NoRowAcceptedError as e:
                raise DatabaseUnavailable(f"it accepts no row: {e}", refused=True) from None
            except (psycopg.Error, DeadlineExceededError) as e:
                fault = classify(e, repaired)
                if fault in REPAIRABLE:
                    repaired.add(fault)
                    self._forget(fault)
                elif was_idle and self._is_disconnected(e):
                    was_idle = False
                    self._reconnect()
                else:
                    raise self._unavailable(e, fault) from None
        return []

    def _write(
        self, entries: Sequence[AccessLogEntry], repaired: Collection[Fault]
    ) -> list[Rejection]:
        connection = self._ready(
            entries.days if isinstance(entries, CopyBatch) else days_of(entries), repaired
        )
        try:
            with connection.transaction() if self._discards_rows else contextlib.nullcontext():
                insert_access_log_batch(
                    connection, entries, synchronous_commit=self._settings.synchronous_commit
                )
        except (psycopg.Error, UnicodeError) as e:
            if classify(e, repaired) not in {Fault.ROW, Fault.DUPLICATE}:
                raise
            self._discards_rows |= isinstance(e, RowsDiscardedError)
            connection.call_deadline = None  # each of the following calls has a deadline
            finder = RejectionFinder(connection, self._accepted, self._waiting, repaired)
            return finder.write(entries)
        self._accepted.add(entries)
        return []

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

    def _ready(
        self, days: Collection[str] = (), repaired: Collection[Fault] = ()
    ) -> DeadlineConnection:
        """A connection with its deadline set, the schema and the partitions of these days in place."""
        try:
            connection = self._connect()
            self._set_deadline(connection)
            self._ensure_partitions(connection, days)
        except psycopg.Error as e:
            if classify(e, repaired) in {Fault.ROW, Fault.DUPLICATE, Fault.PARTITION}:
                raise self._unavailable(e, Fault.CONFIGURATION) from None  # no row is involved yet
            raise
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
        self._discards_rows = False

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
        reason = describe(error)
        if isinstance(error, psycopg.errors.InsufficientPrivilege):
            reason += self._missing_privileges()
        if fault is not Fault.BUSY:
            self.disconnect()
        is_configuration = fault in {Fault.CONFIGURATION, Fault.ROW}
        return DatabaseUnavailable(reason, configuration=is_configuration)

    def _missing_privileges(self) -> str:
        """PostgreSQL does not say which columns it is about."""
        columns = ""
        if self._connection is not None:
            with contextlib.suppress(psycopg.Error, DeadlineExceededError):
                columns = forbidden_columns(self._connection)
        return f"; it lacks INSERT on {columns}" if columns else ""
