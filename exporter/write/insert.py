"""The statements that write rows of the log, each in one transaction. Decides nothing about errors."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg import sql

from ..postgres.copy import copy_from_stdin
from ..rows.entry import AccessLogEntry
from .artifacts import fetches, record
from .copy_batch import CopyBatch

if TYPE_CHECKING:
    from collections.abc import Sequence

COLUMNS = AccessLogEntry._fields
_COLUMN_LIST = sql.SQL(", ").join(map(sql.Identifier, COLUMNS))
_COPY = sql.SQL("COPY access_log ({}) FROM STDIN (NULL '')").format(_COLUMN_LIST).as_bytes()
_INSERT = sql.SQL("INSERT INTO access_log ({}) VALUES ({}) ON CONFLICT DO NOTHING").format(
    _COLUMN_LIST, sql.SQL(", ").join(sql.Placeholder() for _ in COLUMNS)
)
_ASYNCHRONOUS = b"SET LOCAL synchronous_commit = off"


class RowsDiscardedError(psycopg.DataError):
    """The server reported success but did not store all rows, as a trigger can make it do."""


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
        RowsDiscardedError: The server stored only some of the rows.
        psycopg.Error, UnicodeError: It stored none; see `classify`.
    """
    batch = entries if isinstance(entries, CopyBatch) else CopyBatch.of(entries)
    statements = (b"" if synchronous_commit else _ASYNCHRONOUS, batch.statement, _COPY)
    if not connection.autocommit:
        # Makes psycopg begin the transaction, which the caller ends.
        connection.execute("SELECT")
    query = b"; ".join(filter(None, statements))
    copied = copy_from_stdin(connection, query, batch.text)
    if copied != len(batch):
        raise RowsDiscardedError(
            f"COPY stored {copied} of {len(batch)} rows; a trigger on access_log discards rows."
        )


def insert_missing(
    connection: psycopg.Connection[Any], entries: Sequence[AccessLogEntry]
) -> list[bool]:
    """Insert the entries that are not in the table yet. Needs only the INSERT privilege.

    Returns whether each one was inserted. The others are in the table, or a trigger discarded them.
    """
    with connection.transaction():
        with connection.pipeline():
            inserts = [connection.execute(_INSERT, entry) for entry in entries]
        flags = [insert.rowcount > 0 for insert in inserts]
        inserted = [entry for entry, flag in zip(entries, flags, strict=True) if flag]
        if fetched := fetches(inserted):
            connection.execute(record(fetched))
    return flags


def would_insert(
    connection: psycopg.Connection[Any],
    entries: Sequence[AccessLogEntry],
    *,
    count_artifacts: bool = True,
) -> list[bool]:
    """Whether the server would store rows with these values and other keys. Stores nothing.

    False means that a trigger would discard the row.

    Raises:
        psycopg.Error, UnicodeError: It would reject one of them.
    """
    copies = [entry._replace(flow_id=str(uuid.uuid4())) for entry in entries]
    with connection.transaction(force_rollback=True):
        with connection.pipeline():
            inserts = [connection.execute(_INSERT, copy) for copy in copies]
        if count_artifacts and (fetched := fetches(copies)):
            connection.execute(record(fetched))
        connection.execute("SET CONSTRAINTS ALL IMMEDIATE")  # not only at the commit
    return [insert.rowcount > 0 for insert in inserts]
