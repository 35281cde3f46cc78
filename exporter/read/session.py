"""Open the database for commands that only read, and limit what they can change and how long they run."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg import sql
from psycopg.pq import TransactionStatus

from ..postgres.connection import DeadlineExceededError, connect, reachable
from ..postgres.faults import Fault, classify
from ..postgres.schema import SchemaError, ensure_schema, require_schema
from ..rows.entry import AccessLogEntry

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..postgres.connection import DeadlineConnection
    from ..settings import Settings

# Everything that opening or querying a database can raise.
DATABASE_ERRORS = (psycopg.Error, DeadlineExceededError, SchemaError, OSError)

_MIGRATION_SECONDS = 3600.0  # a migration may rewrite a large table
_GRACE_SECONDS = 2.0  # lets the server end a statement first, because its error gives the reason
# Without JIT: compiling a query on a partitioned table takes longer than it saves.
_TRANSACTION_SETTINGS = """
    SELECT set_config('statement_timeout', %s, true), set_config('timezone', 'UTC', true),
           set_config('jit', 'off', true)
"""
_STATEMENT_TIMEOUT = "SELECT set_config('statement_timeout', %s, true)"

_HAS_LOG = "SELECT to_regclass('access_log') IS NOT NULL"

# All columns in the order of the table, with bytes in hexadecimal.
_FIELDS = AccessLogEntry._fields
COLUMN_NAMES = (*_FIELDS[:2], "logged_at", *_FIELDS[2:])
ALL_COLUMNS = sql.SQL(", ").join(
    sql.SQL("encode(sha256, 'hex') AS sha256") if name == "sha256" else sql.Identifier(name)
    for name in COLUMN_NAMES
)
# The same as one line of JSON.
JSON_ROW = sql.SQL("(SELECT row_to_json(entry)::text FROM (SELECT {}) AS entry)").format(
    ALL_COLUMNS
)


@contextlib.contextmanager
def open_database(
    settings: Settings, schema_seconds: float = _MIGRATION_SECONDS, *, may_create: bool = False
) -> Iterator[DeadlineConnection]:
    """Open a connection to a database with our schema. Keep the embedded server running meanwhile.

    Args:
        settings: Which database, and how long connecting and a statement may take.
        schema_seconds: How long creating or migrating the schema may take.
        may_create: Whether to create or migrate the schema. In the embedded server, which is ours
            alone, it always is; in another database, a wrong name must not leave tables behind.

    Raises:
        psycopg.Error, DeadlineExceededError, SchemaError, OSError: the database is unavailable, or
            its schema is not ours, missing or outdated.
    """
    with reachable(settings.database) as target, connect(target, settings.database) as connection:
        connection.call_seconds = schema_seconds
        if may_create or not settings.database.dsn:
            _create_schema(connection)
        else:
            require_schema(connection)
        connection.call_seconds = settings.database.call_seconds
        yield connection


def _create_schema(connection: DeadlineConnection) -> None:
    try:
        ensure_schema(connection)
    except psycopg.errors.InsufficientPrivilege:
        if connection.execute(_HAS_LOG).fetchone() != (False,):
            raise
        raise SchemaError(
            "There is no table access_log, and this role cannot create it; run `artifactapi init` as a"
            " role that may create tables here, such as the owner of the database."
        ) from None


@contextlib.contextmanager
def read_only(connection: DeadlineConnection, statement_seconds: float) -> Iterator[None]:
    """Run the block in a read-only transaction: one snapshot, in UTC, each statement limited in time.

    Within `archived.with_archive`, the block is part of that transaction, which is read-only as well.

    Raises:
        psycopg.errors.QueryCanceled: a statement took longer than `statement_seconds`.
        psycopg.Error, DeadlineExceededError: a query failed or lost its connection.
    """
    if connection.info.transaction_status == TransactionStatus.IDLE:
        connection.read_only = True
        connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
    connection.call_seconds = statement_seconds + _GRACE_SECONDS
    with connection.transaction():
        connection.execute(_TRANSACTION_SETTINGS, (f"{statement_seconds * 1000:.0f}",))
        yield


@contextlib.contextmanager
def time_limited(connection: psycopg.Connection[Any], seconds: float | None) -> Iterator[None]:
    """Within `read_only`, limit the statements of the block further. None: no further limit.

    The transaction stays usable after a statement was canceled.

    Raises:
        psycopg.errors.QueryCanceled: a statement took longer than `seconds`.
        psycopg.Error, DeadlineExceededError: a query failed or lost its connection.
    """
    with connection.transaction(force_rollback=True):
        if seconds is not None:
            connection.execute(_STATEMENT_TIMEOUT, (f"{max(1.0, seconds * 1000):.0f}",))
        yield


def is_temporary(error: Exception) -> bool:
    """Return whether a retry can help: the server is unavailable or busy, and the query is valid."""
    if isinstance(error, SchemaError):
        return False
    return isinstance(error, OSError) or classify(error) in {Fault.UNAVAILABLE, Fault.BUSY}
