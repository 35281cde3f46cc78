"""Classify an error from PostgreSQL by SQLSTATE, so that the writer knows how to react.

The exception class is not enough: psycopg reports some bad rows as OperationalError and some
failovers as InternalError.
"""

from __future__ import annotations

import enum

import psycopg

from .connection import DeadlineExceededError


class Fault(enum.Enum):
    """The cause of an error. The value says how to react."""

    ROW = "skip the row"
    DUPLICATE = "insert the rows that are not in the table yet"
    PARTITION = "create the partition"
    SCHEMA = "create the schema"
    UNAVAILABLE = "reconnect and retry"
    BUSY = "retry"
    CONFIGURATION = "wait for the user to fix it"


# The writer can repair these and retry the batch at once.
REPAIRABLE = frozenset({Fault.ROW, Fault.DUPLICATE, Fault.PARTITION, Fault.SCHEMA})


def classify(error: Exception) -> Fault:  # noqa: PLR0911 - a table
    """Return the cause of an error raised by COPY (SQLSTATEs: PostgreSQL docs, appendix A)."""
    if isinstance(error, DeadlineExceededError):
        return Fault.UNAVAILABLE
    if isinstance(error, UnicodeError):
        return Fault.ROW
    state = getattr(error, "sqlstate", None)
    if state is None:
        return Fault.ROW if isinstance(error, psycopg.DataError) else Fault.UNAVAILABLE
    if state == "23505":  # unique_violation
        return Fault.DUPLICATE
    if state == "23514" and "no partition" in str(error):  # check_violation
        return Fault.PARTITION
    if state[:2] in {"21", "22", "23", "44", "P0"} or state == "54000":  # program_limit_exceeded
        return Fault.ROW
    if state in {"42P01", "42883"}:  # undefined_table, undefined_function
        return Fault.SCHEMA
    if state[:2] in {"28", "3D", "3F", "42", "0A"}:
        return Fault.CONFIGURATION
    if state[:2] in {"40", "53", "55"} or state == "57014":  # query_canceled
        return Fault.BUSY
    return Fault.UNAVAILABLE
