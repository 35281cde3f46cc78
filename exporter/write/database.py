"""The writer's connection: write batches into access_log and react to errors.

Knows nothing about threads, retries or the buffer. postgres/faults.py decides what an error means.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

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
    take_back,
)
from .ledger import end_statement, row_counts
from .rejections import AcceptedRows, NoRowAcceptedError, Rejection, RejectionFinder
from .slow_rows import SlowRows

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence
    from typing import LiteralString

    from ..rows.entry import AccessLogEntry
    from ..settings import DatabaseSettings
    from .ledger import EndReason, RunEnd, RunLedger

__all__ = ["COLUMNS", "Database", "DatabaseUnavailable", "Rejection", "insert_access_log_batch"]

_INSERT_GAP = sql.SQL("INSERT INTO access_log_gap ({}) VALUES ({}) ON CONFLICT DO NOTHING").format(
    sql.SQL(", ").join(map(sql.Identifier, Gap._fields)),
    sql.SQL(", ").join(sql.Placeholder() for _ in Gap._fields),
)
_ENSURE_PARTITION = "SELECT access_log_ensure_partition(%s)"
_CAN_READ = "SELECT has_table_privilege('access_log', 'SELECT')"
_KNOWN_DAYS = 1024  # partitions known to exist
# Whether a trigger may discard rows: pg_trigger.tgtype is 1 for FOR EACH ROW, 2 for BEFORE, 4 for INSERT.
_HAS_TRIGGER = """
    SELECT EXISTS (SELECT 1 FROM pg_trigger WHERE NOT tgisinternal AND tgtype & 7 = 7 AND (
      tgrelid = 'access_log'::regclass
      OR tgrelid IN (SELECT inhrelid FROM pg_inherits WHERE inhparent = 'access_log'::regclass)))
"""
# A report need not survive a crash of the server: the next one says more.
_ASYNCHRONOUS = b"SET LOCAL synchronous_commit = off; "

logger = logging.getLogger(__name__)


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
        ledger: RunLedger | None = None,
    ) -> None:
        """`waiting` returns some of the entries that wait to be written, at random.

        `ledger` counts what this run writes; None: nobody counts it.
        """
        self._settings = settings
        self._waiting = waiting
        self._accepted = AcceptedRows()
        self._slow_rows = SlowRows()
        self._sent: Sequence[AccessLogEntry] = ()  # what the server was last asked to write
        self.deadline = deadline or Deadline()
        self._connection: DeadlineConnection | None = None
        self._embedded: EmbeddedServer | None = None
        self._days: set[str] = set()
        # A trigger discards rows without an error. Then nothing is committed before we have counted,
        # so that no artifact is counted twice.
        self._discards_rows = False
        self._ledger = ledger
        self._keeps_ledger = False  # on this connection
        self._has_warned = False
        self._vanished = 0  # rows that the server has lost, as far as the log says
        self.reconnects = 0  # calls that found the connection closed while it was idle

    def reconfigure(self, settings: DatabaseSettings) -> None:
        """Use other settings; closes the connection if they differ."""
        if settings != self._settings:
            self.close()
            if settings.dsn != self._settings.dsn:
                self._has_warned = False
                self._vanished = 0
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

    def write(
        self, entries: Sequence[AccessLogEntry], origin: str | None = None, *, spooled: int = 0
    ) -> list[Rejection]:
        """Write the entries. Returns the rejected ones; all others are in the table.

        `origin` is the id of the run that saw the requests, if it is not this one. `spooled` is how
        many of the entries this run still counts as spooled.

        Idempotent: an entry that is already in the table is not inserted again. An entry is only
        rejected if the server accepts a similar one. If it accepts none, the cause may be a
        constraint, trigger or column type that a DBA has changed, and no entry may be lost for it.
        If the server is too slow for these entries, the next call sends fewer at a time.

        Raises:
            DatabaseUnavailable: none, all or some of them were written; write the same entries again.
        """
        repaired: set[Fault] = set()
        was_idle = self._connection is not None
        while entries:
            self._sent = ()
            try:
                if self._slow_rows.is_in_one_part(entries):
                    rejections = self._write(entries, repaired, origin, spooled)
                else:
                    rejections = self._write_in_parts(entries, repaired, origin)
                self._slow_rows.succeeded(entries)
                return rejections  # noqa: TRY300 - the loop goes on after some errors
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
                    if self._is_too_slow(e):
                        self._slow_rows.failed(self._sent)
                    raise self._unavailable(e, fault) from None
        return []

    def _write_in_parts(
        self, entries: Sequence[AccessLogEntry], repaired: Collection[Fault], origin: str | None
    ) -> list[Rejection]:
        """Write a few rows at a time. One row that fails alone does not keep the others waiting."""
        rejections: list[Rejection] = []
        failure: Exception | None = None
        for part in self._slow_rows.parts(entries):
            try:
                rejections += self._write(part, repaired, origin)
            except (psycopg.Error, DeadlineExceededError) as e:
                if failure is not None or len(part) > 1 or not self._is_too_slow(e):
                    raise
                self._unavailable(e, classify(e, repaired))
                self._slow_rows.failed(part)
                if self._slow_rows.is_given_up(part[0]):
                    rejections += self._give_up(part[0], e, entries, repaired)
                else:
                    failure = e
        if failure is not None:
            self._sent = ()  # this failure is counted
            raise failure
        return rejections

    def _give_up(
        self,
        row: AccessLogEntry,
        error: Exception,
        batch: Sequence[AccessLogEntry],
        repaired: Collection[Fault],
    ) -> list[Rejection]:
        connection = self._ready(days_of([row]), repaired)
        connection.call_deadline = None
        finder = RejectionFinder(connection, self._accepted, self._waiting, repaired, lambda _: b"")
        return finder.give_up(row, error, batch)

    def _is_too_slow(self, error: Exception) -> bool:
        """Whether the server did not write `_sent` in time, or gave up the connection over it."""
        if not self._sent or time.monotonic() >= self.deadline.give_up_at:
            return False
        return isinstance(
            error, (DeadlineExceededError, psycopg.errors.QueryCanceled)
        ) or self._is_disconnected(error)

    def _write(
        self,
        entries: Sequence[AccessLogEntry],
        repaired: Collection[Fault],
        origin: str | None,
        spooled: int | None = None,
    ) -> list[Rejection]:
        """Write the entries at once. `spooled` is None for a part of a batch."""
        connection = self._ready(
            entries.days if isinstance(entries, CopyBatch) else days_of(entries), repaired
        )
        self._sent = entries
        try:
            with connection.transaction() if self._discards_rows else contextlib.nullcontext():
                insert_access_log_batch(
                    connection,
                    entries,
                    synchronous_commit=self._settings.synchronous_commit,
                    ledger_statement=self._count_rows(
                        entries, origin, settled=spooled is not None, spooled=spooled or 0
                    ),
                )
        except (psycopg.Error, UnicodeError) as e:
            if classify(e, repaired) not in {Fault.ROW, Fault.DUPLICATE}:
                raise
            # Without a transaction of ours, what was stored and all counts are committed.
            is_counted = isinstance(e, RowsDiscardedError) and not self._discards_rows
            self._discards_rows |= is_counted
            connection.call_deadline = None  # each of the following calls has a deadline
            finder = RejectionFinder(
                connection,
                self._accepted,
                self._waiting,
                repaired,
                lambda rows: self._count_rows(rows, origin),
                is_counted=is_counted,
            )
            try:
                return finder.write(entries)
            finally:
                self._add_confirmed(finder.inserted)
                if is_counted:
                    others = [entry for entry in entries if entry.flow_id not in finder.stored]
                    statement = self._count_rows(others, origin, sign=-1)
                    with contextlib.suppress(psycopg.Error, DeadlineExceededError):
                        take_back(connection, others, statement)
        self._accepted.add(entries)
        self._add_confirmed(len(entries))
        if self._ledger is not None and spooled is not None:
            self._ledger.reported()
        return []

    def _add_confirmed(self, rows: int) -> None:
        if self._ledger is not None and self._keeps_ledger:
            self._ledger.add_confirmed(rows)

    def _count_rows(
        self,
        rows: Sequence[AccessLogEntry],
        origin: str | None,
        *,
        settled: bool = False,
        spooled: int = 0,
        sign: int = 1,
    ) -> bytes:
        if self._ledger is None or not self._keeps_ledger:
            return b""
        counts = rows.row_counts if isinstance(rows, CopyBatch) else row_counts(rows)
        if sign < 0:
            counts = Counter({key: -count for key, count in counts.items()})
        return self._ledger.record_rows(counts, origin, settled=settled, spooled=spooled)

    def write_gaps(self, gaps: Sequence[Gap]) -> None:
        """Write the gaps. Idempotent.

        Raises:
            DatabaseUnavailable: write the same gaps again.
        """
        try:
            connection = self._ready()
            with connection.transaction():
                with connection.pipeline():
                    inserts = [connection.execute(_INSERT_GAP, gap) for gap in gaps]
                pairs = zip(gaps, inserts, strict=True)
                inserted = [gap for gap, insert in pairs if insert.rowcount > 0]
                if inserted and self._ledger is not None and self._keeps_ledger:
                    connection.execute(self._ledger.record_gaps(inserted))
        except (psycopg.Error, DeadlineExceededError) as e:
            raise self._unavailable(e, classify(e)) from None

    def report_run(self, reason: EndReason | None = None) -> None:
        """Report that this run is alive, if it has not reported for some time, or that it ends now.

        Raises:
            DatabaseUnavailable: it may not have been reported.
        """
        if self._ledger is not None and (reason is not None or self._ledger.is_due):
            self._report(lambda ledger: ledger.report(reason))
            self._ledger.reported()

    def report_end(self, end: RunEnd) -> None:
        """Report the end of an earlier run. Idempotent.

        Raises:
            DatabaseUnavailable: report the same end again.
        """
        self._report(lambda _: end_statement(end))

    def _report(self, statement: Callable[[RunLedger], bytes]) -> None:
        was_idle = self._connection is not None
        while True:
            try:
                connection = self._ready()
                if self._ledger is not None and self._keeps_ledger:
                    connection.execute(_ASYNCHRONOUS + statement(self._ledger))
            except (psycopg.Error, DeadlineExceededError) as e:
                if was_idle and self._is_disconnected(e):
                    was_idle = False
                    self._reconnect()
                    continue
                raise self._unavailable(e, classify(e)) from None
            return

    def can_read(self) -> bool:
        """Whether our role may read the log.

        Raises:
            DatabaseUnavailable: that is unknown.
        """
        try:
            return bool(_value(self._ready(), _CAN_READ))
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
            if self._ledger is not None:
                self._begin_ledger(self._connection, self._ledger)
        except SchemaError as e:
            self.disconnect()
            raise DatabaseUnavailable(str(e), configuration=True) from None
        except OSError as e:
            raise DatabaseUnavailable(f"the embedded server did not start: {e}") from None
        return self._connection

    def _begin_ledger(self, connection: DeadlineConnection, ledger: RunLedger) -> None:
        """Report this run. Without a ledger, the log goes on, but nobody can prove that it is complete."""
        try:
            if not _value(connection, ledger.report()):
                ledger.renew()  # the role is another one
                _value(connection, ledger.report())
            self._find_vanished(connection, ledger)
            self._keeps_ledger = True
            ledger.reported()
        except (
            psycopg.errors.InsufficientPrivilege,
            psycopg.errors.UndefinedFunction,
            psycopg.errors.UndefinedTable,
        ) as e:
            self._keeps_ledger = False
            if not self._has_warned:
                self._has_warned = True
                logger.warning(
                    "artifactapi: this run is not recorded in access_log_run, so artifactapi audit cannot "
                    "prove that its rows are complete: %s; artifactapi init prints the grants",
                    describe(e),
                )
        self._discards_rows = bool(_value(connection, _HAS_TRIGGER))

    def _find_vanished(self, connection: DeadlineConnection, ledger: RunLedger) -> None:
        """Notice that the server has lost rows that it had confirmed, so that an audit finds them."""
        if not (statement := ledger.compare_confirmed()):
            return
        vanished = _value(connection, statement) or 0
        if vanished > self._vanished:
            logger.warning(
                "artifactapi: PostgreSQL has lost %d %s that it had confirmed, as a failover to a standby that "
                "lags behind can do; artifactapi audit counts them",
                lost := vanished - self._vanished,
                "row" if lost == 1 else "rows",
            )
            self._vanished = vanished

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


def _value(connection: DeadlineConnection, statement: bytes | LiteralString) -> Any:
    row = connection.execute(statement).fetchone()
    return row[0] if row else None
