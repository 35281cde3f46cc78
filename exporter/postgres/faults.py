"""Classify an error from PostgreSQL by SQLSTATE, so that the writer knows how to react.

The exception class is not enough: psycopg reports some bad rows as OperationalError and some
failovers as InternalError. docs/operations.md explains the table to operators.
"""

from __future__ import annotations

import enum
import re
from typing import TYPE_CHECKING

import psycopg

from .connection import DeadlineExceededError

if TYPE_CHECKING:
    from collections.abc import Collection


class Fault(enum.Enum):
    """The cause of an error. The value says how to react."""

    ROW = "find the row; skip it if the server accepts others"
    DUPLICATE = "insert the rows that are not in the table yet"
    PARTITION = "create the partition"
    SCHEMA = "create the schema"
    UNAVAILABLE = "reconnect and retry"
    BUSY = "retry"
    CONFIGURATION = "wait for the user to fix it"


# The writer can repair these and retry the batch at once.
REPAIRABLE = frozenset({Fault.PARTITION, Fault.SCHEMA})

# PostgreSQL docs, appendix A. A state goes before its class. Everything else is Fault.ROW: it comes from
# the row's values, a constraint or a trigger, and a trigger can raise any state.
_FAULTS_BY_STATE = {
    "23505": Fault.DUPLICATE,  # unique_violation; not of other keys than ours
    "23514": Fault.PARTITION,  # check_violation; not if a constraint is named
    "42883": Fault.SCHEMA,  # undefined_function
    "42P01": Fault.SCHEMA,  # undefined_table
    "55006": Fault.BUSY,  # object_in_use
    "55P03": Fault.BUSY,  # lock_not_available
    "57014": Fault.BUSY,  # query_canceled: statement_timeout
    "XX001": Fault.UNAVAILABLE,  # data_corrupted
    "XX002": Fault.UNAVAILABLE,  # index_corrupted
}
_FAULTS_BY_CLASS = {
    "08": Fault.UNAVAILABLE,  # connection exception
    "0A": Fault.CONFIGURATION,  # feature not supported: row-level security, a foreign partition
    "0L": Fault.CONFIGURATION,  # invalid grantor
    "0P": Fault.CONFIGURATION,  # invalid role specification
    "24": Fault.UNAVAILABLE,  # invalid cursor state
    "25": Fault.UNAVAILABLE,  # invalid transaction state; 25006: read-only after a failover
    "26": Fault.UNAVAILABLE,  # invalid SQL statement name: a pooler changed the session
    "28": Fault.CONFIGURATION,  # invalid authorization
    "2B": Fault.CONFIGURATION,  # dependent privilege descriptors still exist
    "34": Fault.UNAVAILABLE,  # invalid cursor name
    "3B": Fault.UNAVAILABLE,  # savepoint exception
    "3D": Fault.CONFIGURATION,  # invalid catalog name
    "3F": Fault.CONFIGURATION,  # invalid schema name
    "40": Fault.BUSY,  # transaction rollback: deadlock, serialization failure
    "42": Fault.CONFIGURATION,  # syntax error or access rule violation: privilege, changed column
    "53": Fault.BUSY,  # insufficient resources: full disk, no memory, too many connections
    "57": Fault.UNAVAILABLE,  # operator intervention: shutdown, idle session timeout
    "58": Fault.UNAVAILABLE,  # system error: input or output
    "72": Fault.BUSY,  # snapshot too old
    "F0": Fault.CONFIGURATION,  # configuration file error
    "HV": Fault.BUSY,  # foreign data wrapper error: the other server
}
_FATAL = {"FATAL", "PANIC"}  # the server ended the session
_OUR_KEY = re.compile(r"_pkey\d*(_\d+)?$")  # a shard of Citus has a number
# A trigger that refuses a row with a state of its choice. RAISE is a keyword, in any language of lc_messages.
_RAISED = re.compile(r"\APL/pgSQL .* RAISE$", re.MULTILINE)
_COPY_LINE = re.compile(r"\bCOPY \S+, \D*?(\d+)")  # in any language of lc_messages
_FUNCTION = re.compile(r"^PL/", re.MULTILINE)
_INVALID_TEXT = "22021"  # character_not_in_repertoire: a NUL
_INTERNAL = "XX000"  # internal_error


def classify(error: Exception, repaired: Collection[Fault] = ()) -> Fault:
    """Return the cause of an error raised by a write.

    Args:
        error: From psycopg, or DeadlineExceededError or UnicodeError.
        repaired: Causes that have been repaired already, so that it must be another one.
    """
    if isinstance(error, DeadlineExceededError):
        return Fault.UNAVAILABLE
    state = getattr(error, "sqlstate", None)
    if state is None:
        is_row = isinstance(error, (UnicodeError, psycopg.DataError))
        return Fault.ROW if is_row else Fault.UNAVAILABLE
    diagnosis = getattr(error, "diag", None)
    constraint = getattr(diagnosis, "constraint_name", None)
    if getattr(diagnosis, "severity_nonlocalized", None) in _FATAL:
        return Fault.UNAVAILABLE
    if _RAISED.search(_context(error)):
        return Fault.ROW
    fault = _FAULTS_BY_STATE.get(state) or _FAULTS_BY_CLASS.get(state[:2], Fault.ROW)
    # A trigger may write to other tables, with keys like ours.
    is_other_key = _is_in_function(error) or (
        constraint is not None and not _OUR_KEY.search(constraint)
    )
    is_other_check = constraint is not None or fault in repaired
    if is_other_key if fault is Fault.DUPLICATE else fault is Fault.PARTITION and is_other_check:
        fault = Fault.ROW
    elif fault is Fault.SCHEMA and fault in repaired:
        fault = Fault.CONFIGURATION
    is_from_row = fault is Fault.CONFIGURATION and _is_raised_by_row(error)
    return Fault.ROW if is_from_row else fault


def hides_cause(error: Exception) -> bool:
    """Whether the state of an error of COPY says nothing about its cause.

    Citus reports every error that a worker raises during COPY as XX000 (internal_error), without the
    context. Errors of INSERT keep their states.
    """
    return getattr(error, "sqlstate", None) == _INTERNAL


def is_certainly_bad(error: Exception) -> bool:
    """Whether no server would ever accept the row, however its tables and triggers are defined."""
    is_invalid_text = getattr(error, "sqlstate", None) == _INVALID_TEXT
    return isinstance(error, UnicodeError) or (is_invalid_text and not _is_in_function(error))


def rejected_line(error: Exception, rows: int) -> int | None:
    """Index of the bad row, from "COPY access_log, line 3" in the error's context."""
    match = _COPY_LINE.search(_context(error))
    index = int(match[1]) - 1 if match else -1
    return index if 0 <= index < rows else None


def _is_raised_by_row(error: Exception) -> bool:
    """Whether the server was at a row or in a trigger, and not only looking at the statement."""
    return _COPY_LINE.search(_context(error)) is not None or _is_in_function(error)


def _is_in_function(error: Exception) -> bool:
    return _FUNCTION.search(_context(error)) is not None


def _context(error: Exception) -> str:
    return getattr(getattr(error, "diag", None), "context", None) or ""
