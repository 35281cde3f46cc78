"""Open the database for commands that look, in transactions that change nothing and end in time; no query here."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg import sql

from ..postgres.connection import DeadlineExceededError, connect, reachable
from ..postgres.faults import Fault, classify
from ..postgres.schema import SchemaError, ensure_schema
from ..rows.entry import AccessLogEntry

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ..postgres.connection import DeadlineConnection
    from ..settings import Settings

# What may be raised wherever a database is used.
DATABASE_ERRORS = (psycopg.Error, DeadlineExceededError, SchemaError, OSError)

_MIGRATION_SECONDS = 3600.0  # rewriting a large table takes its time
_GRACE_SECONDS = 2.0  # the server ends a statement first, and says so
# Compiling a query to the parts of a partitioned table takes longer than it saves.
_BOUNDS = """
    SELECT set_config('statement_timeout', %s, true), set_config('timezone', 'UTC', true),
           set_config('jit', 'off', true)
"""
_LIMIT = "SELECT set_config('statement_timeout', %s, true)"

# All columns as they are told to others, in the table's order.
_FIELDS = AccessLogEntry._fields
COLUMN_NAMES = (*_FIELDS[:2], "logged_at", *_FIELDS[2:])
ALL_COLUMNS = sql.SQL(", ").join(
    sql.SQL("encode(sha256, 'hex') AS sha256") if name == "sha256" else sql.Identifier(name)
    for name in COLUMN_NAMES
)

# A row of access_log with all its columns as one line of JSON, bytes in hexadecimal.
JSON_ROW = sql.SQL("(SELECT row_to_json(told)::text FROM (SELECT {}) AS told)").format(ALL_COLUMNS)


@contextlib.contextmanager
def open_database(
    settings: Settings, schema_seconds: float = _MIGRATION_SECONDS
) -> Iterator[DeadlineConnection]:
    """A connection to a database that has the schema; the embedded server runs as long as the block.

    Args:
        settings: Say which database, and how long connecting and a statement may take.
        schema_seconds: Longest that making or migrating the schema may take.

    Raises:
        psycopg.Error, DeadlineExceededError, SchemaError, OSError: there is none, or it is not ours.
    """
    with reachable(settings.database) as target, connect(target, settings.database) as connection:
        connection.call_seconds = schema_seconds
        ensure_schema(connection)
        connection.call_seconds = settings.database.call_seconds
        yield connection


@contextlib.contextmanager
def read_only(connection: DeadlineConnection, statement_seconds: float) -> Iterator[None]:
    """A transaction that sees one state of the database, in UTC, and whose statements end in time.

    Raises:
        psycopg.errors.QueryCanceled: a statement took longer than `statement_seconds`.
        psycopg.Error, DeadlineExceededError: the server refused or went away.
    """
    connection.read_only = True
    connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
    connection.call_seconds = statement_seconds + _GRACE_SECONDS
    with connection.transaction():
        connection.execute(_BOUNDS, (f"{statement_seconds * 1000:.0f}",))
        yield


@contextlib.contextmanager
def time_limited(connection: psycopg.Connection[Any], seconds: float | None) -> Iterator[None]:
    """Within `read_only`: statements end sooner, and one that does leaves the transaction as it was.

    Raises:
        psycopg.errors.QueryCanceled: a statement took longer than so many seconds.
        psycopg.Error, DeadlineExceededError: the server refused or went away.
    """
    with connection.transaction(force_rollback=True):
        if seconds is not None:
            connection.execute(_LIMIT, (f"{max(1.0, seconds * 1000):.0f}",))
        yield


def is_temporary(error: Exception) -> bool:
    """Whether waiting may help: the server is away or busy, and nothing is wrong with what was asked."""
    if isinstance(error, SchemaError):
        return False
    return isinstance(error, OSError) or classify(error) in {Fault.UNAVAILABLE, Fault.BUSY}
