"""Locks of a session: wait briefly for those of tables, and do some work in only one session at a time."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

    from psycopg import Connection

HOUSEKEEPING = "artifactapi housekeeping"  # the name of this work for `only_session`
_TRY_LOCK = "SELECT pg_try_advisory_lock(hashtext(%s), hashtext(current_schema()))"
_TRY_TRANSACTION_LOCK = "SELECT pg_try_advisory_xact_lock(hashtext(%s), hashtext(current_schema()))"
_UNLOCK = "SELECT pg_advisory_unlock(hashtext(%s), hashtext(current_schema()))"
_SESSION = "SELECT pg_backend_pid()"


class SharedSessionError(Exception):
    """A connection pooler may run our statements in different sessions. The message is one sentence."""


def _check_own_session(connection: Connection[Any]) -> None:
    """Check that this connection leads to PostgreSQL itself, so that what is set for the session lasts.

    In PgBouncer's transaction mode, each transaction may run in another session: a lock or a setting of the
    session would stay behind for other clients, and would not hold for us. A pooler gives its clients keys of
    its own (PostgreSQL docs, "Canceling Requests in Progress"), whatever its mode.

    Raises:
        SharedSessionError: There is a pooler in between.
    """
    row = connection.execute(_SESSION).fetchone()
    if row != (connection.info.backend_pid,):
        raise SharedSessionError(
            "The connection leads to a connection pooler, but this work needs a session of its own; use a "
            "connection string that leads to PostgreSQL itself."
        )


@contextlib.contextmanager
def short_lock_waits(connection: Connection[Any]) -> Iterator[None]:
    """Let statements of the block fail if a lock is not available within a second.

    A session that waits for a lock of the log makes the writers wait behind it. The connection must be
    in autocommit mode.

    Raises:
        SharedSessionError: There is a pooler in between.
    """
    _check_own_session(connection)
    connection.execute("SET lock_timeout = '1s'")
    try:
        yield
    finally:
        if not connection.closed:
            connection.execute("RESET lock_timeout")


@contextlib.contextmanager
def locking_out_writers(connection: Connection[Any]) -> Iterator[None]:
    """A transaction for a short statement that needs a lock which keeps writers out.

    While it waits for the lock, for half a second at most, they wait behind it: behind an autovacuum too, which
    PostgreSQL would only interrupt after a second. With what the statement does then, that is less than a second.
    """
    with connection.transaction():
        connection.execute("SET LOCAL lock_timeout = '500ms'")
        yield


@contextlib.contextmanager
def only_session(connection: Connection[Any], work: str) -> Iterator[bool]:
    """Yield whether no other session does this work, by name, in the current schema.

    If so, other sessions get False until the block ends. The connection must be in autocommit mode.

    Raises:
        SharedSessionError: There is a pooler in between.
    """
    _check_own_session(connection)
    row = connection.execute(_TRY_LOCK, (work,)).fetchone()
    is_free = row == (True,)
    try:
        yield is_free
    finally:
        if is_free and not connection.closed:
            connection.execute(_UNLOCK, (work,))


def only_transaction(connection: Connection[Any], work: str) -> bool:
    """Return whether no other session does this work; until the end of the transaction, none begins.

    Works behind a pooler too. Call it within a transaction.
    """
    return connection.execute(_TRY_TRANSACTION_LOCK, (work,)).fetchone() == (True,)
