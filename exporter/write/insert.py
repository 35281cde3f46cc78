"""The statements that write rows of the log, each in one transaction. Decides nothing about errors."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg import sql

from ..postgres.copy import copy_from_stdin
from ..postgres.faults import hides_cause
from ..rows.entry import AccessLogEntry
from .artifacts import fetches, record
from .copy_batch import CopyBatch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

COLUMNS = AccessLogEntry._fields
_COLUMN_LIST = sql.SQL(", ").join(map(sql.Identifier, COLUMNS))
_COPY = sql.SQL("COPY access_log ({}) FROM STDIN (NULL '')").format(_COLUMN_LIST).as_bytes()
_INSERT = sql.SQL("INSERT INTO access_log ({}) VALUES ({})").format(
    _COLUMN_LIST, sql.SQL(", ").join(sql.Placeholder() for _ in COLUMNS)
)
_INSERT_IF_MISSING = _INSERT + sql.SQL(" ON CONFLICT DO NOTHING")
_ASYNCHRONOUS = b"SET LOCAL synchronous_commit = off"
_CHECK_NOW = "SET CONSTRAINTS ALL IMMEDIATE"  # not only at the commit
_DISCARDED = "PostgreSQL stored {} of {} rows; a trigger on access_log discards rows."

_FORBIDDEN_COLUMNS = """
    SELECT string_agg(attname, ', ' ORDER BY attnum) FROM pg_attribute
    WHERE attrelid = 'access_log'::regclass AND attname = ANY (%s)
    AND NOT has_column_privilege(attrelid, attnum, 'INSERT')
"""


class RowsDiscardedError(psycopg.DataError):
    """The server reported success but did not store all rows, as a trigger can make it do."""


def insert_access_log_batch(
    connection: psycopg.Connection[Any],
    entries: Sequence[AccessLogEntry],
    *,
    synchronous_commit: bool = True,
    ledger_statement: bytes = b"",
) -> None:
    """COPY the entries into access_log and count them and their artifacts, in one transaction.

    Text format, because psycopg's binary format silently stores 40000 in a smallint as -25536.
    Everything is one simple query and therefore one transaction (PostgreSQL docs, "Multiple Statements
    in a Simple Query"): two round trips instead of five with BEGIN and COMMIT.

    Args:
        connection: If it is not in autocommit mode, the caller commits. After an exception other
            than those below it must be closed.
        entries: The rows; a CopyBatch is ready to send.
        synchronous_commit: Whether to wait until the server has the rows on disk.
        ledger_statement: From `RunLedger.record_rows`; empty if no ledger counts the rows.

    Raises:
        RowsDiscardedError: The server stored only some of the rows.
        psycopg.Error, UnicodeError: It stored none; see `classify`.
    """
    batch = entries if isinstance(entries, CopyBatch) else CopyBatch.of(entries)
    commit = b"" if synchronous_commit else _ASYNCHRONOUS
    statements = (commit, batch.statement, ledger_statement, _COPY)
    if not connection.autocommit:
        # Makes psycopg begin the transaction, which the caller ends.
        connection.execute("SELECT")
    query = b"; ".join(filter(None, statements))
    copied = copy_from_stdin(connection, query, batch.text)
    if copied != len(batch):
        raise RowsDiscardedError(_DISCARDED.format(copied, len(batch)))


def insert_or_explain(
    connection: psycopg.Connection[Any],
    entries: Sequence[AccessLogEntry],
    *,
    ledger_statement: bytes = b"",
    force_rollback: bool = False,
) -> None:
    """Like `insert_access_log_batch` in a transaction of its own, but the error tells the cause.

    If the error of COPY does not, the rows are inserted one by one instead, and that may succeed. The
    transaction checks deferred constraints, also with `force_rollback`, which stores nothing.
    """
    try:
        with connection.transaction(force_rollback=force_rollback):
            insert_access_log_batch(connection, entries, ledger_statement=ledger_statement)
            if force_rollback:
                connection.execute(_CHECK_NOW)
    except psycopg.Error as e:
        if not hides_cause(e):
            raise
        with connection.transaction(force_rollback=force_rollback):
            _insert_singly(connection, entries, ledger_statement)
            if force_rollback:
                connection.execute(_CHECK_NOW)


def _insert_singly(
    connection: psycopg.Connection[Any], entries: Sequence[AccessLogEntry], ledger_statement: bytes
) -> None:
    batch = entries if isinstance(entries, CopyBatch) else CopyBatch.of(entries)
    for statement in filter(None, (batch.statement, ledger_statement)):
        connection.execute(statement)
    with connection.pipeline():
        inserts = [connection.execute(_INSERT, entry) for entry in batch]
    stored = sum(insert.rowcount for insert in inserts)
    if stored != len(batch):
        raise RowsDiscardedError(_DISCARDED.format(stored, len(batch)))


def insert_missing(
    connection: psycopg.Connection[Any],
    entries: Sequence[AccessLogEntry],
    ledger_statement: Callable[[Sequence[AccessLogEntry]], bytes],
    *,
    count_artifacts: bool = True,
) -> list[bool]:
    """Insert the entries that are not in the table yet. Needs only the INSERT privilege.

    Returns whether each one was inserted. The others are in the table, or a trigger discarded them.
    `ledger_statement` returns the statement that counts the inserted ones; empty: it does not.
    """
    with connection.transaction():
        with connection.pipeline():
            inserts = [connection.execute(_INSERT_IF_MISSING, entry) for entry in entries]
        flags = [insert.rowcount > 0 for insert in inserts]
        inserted = [entry for entry, flag in zip(entries, flags, strict=True) if flag]
        if count_artifacts and (fetched := fetches(inserted)):
            connection.execute(record(fetched))
        if inserted and (statement := ledger_statement(inserted)):
            connection.execute(statement)
    return flags


def take_back(
    connection: psycopg.Connection[Any], entries: Sequence[AccessLogEntry], statement: bytes
) -> None:
    """Count these entries no longer, because they were not stored.

    `statement` takes them back from the ledger; it may be empty.
    """
    with connection.transaction():
        if fetched := fetches(entries):
            connection.execute(record(fetched, sign=-1))
        if entries and statement:
            connection.execute(statement)


def would_accept(
    connection: psycopg.Connection[Any],
    entries: Sequence[AccessLogEntry],
    *,
    count_artifacts: bool = True,
    ledger_statement: bytes = b"",
) -> bool:
    """Whether the server would store all of these rows under other keys. Stores nothing.

    False means that a trigger would discard some of them. `ledger_statement`: see
    `insert_access_log_batch`.

    Raises:
        psycopg.Error, UnicodeError: It would reject one of them, or cannot count them.
    """
    batch = CopyBatch.of([entry._replace(flow_id=str(uuid.uuid4())) for entry in entries])
    if not count_artifacts:
        batch = batch.without_artifacts()
    try:
        insert_or_explain(connection, batch, ledger_statement=ledger_statement, force_rollback=True)
    except RowsDiscardedError:
        return False
    return True


def forbidden_columns(connection: psycopg.Connection[Any]) -> str:
    """The columns of access_log that this role may not write, for messages; empty: none.

    Raises:
        psycopg.Error: Not even this may be asked.
    """
    row = connection.execute(_FORBIDDEN_COLUMNS, (list(COLUMNS),)).fetchone()
    return (row[0] or "") if row else ""
