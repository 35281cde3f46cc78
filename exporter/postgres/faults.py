"""Whose fault an error from Postgres is, decided by SQLSTATE, so that the writer knows what to do.

Never by exception class: psycopg files a poison row under OperationalError and a failover under
InternalError.
"""

from __future__ import annotations

import enum

import psycopg

from .connection import DeadlineExceededError


class Fault(enum.Enum):
    """Whose fault an error is, hence what to do about it."""

    ROW = "leave the row out"
    DUPLICATE = "insert what is not there yet"
    PARTITION = "make the partition"
    SCHEMA = "make the schema"
    UNAVAILABLE = "connect again and send it again"
    BUSY = "send it again"
    CONFIGURATION = "wait for the user"


MENDABLE = frozenset({Fault.ROW, Fault.DUPLICATE, Fault.PARTITION, Fault.SCHEMA})


def classify(error: Exception) -> Fault:  # noqa: PLR0911 - a table
    """Decide by SQLSTATE (PostgreSQL docs, appendix A) whose fault an error of a COPY is."""
    if isinstance(error, DeadlineExceededError):
        return Fault.UNAVAILABLE
    if isinstance(error, UnicodeError):
        return Fault.ROW
    state = getattr(error, "sqlstate", None)
    if state is None:
        return Fault.ROW if isinstance(error, psycopg.DataError) else Fault.UNAVAILABLE
    if state == "23505":
        return Fault.DUPLICATE
    if state == "23514" and "no partition" in str(error):
        return Fault.PARTITION
    if state[:2] in {"21", "22", "23"} or state == "54000":
        return Fault.ROW
    if state in {"42P01", "42883"}:  # no such table, no such function
        return Fault.SCHEMA
    if state[:2] in {"28", "3D", "3F", "42", "0A"}:
        return Fault.CONFIGURATION
    if state[:2] in {"40", "53", "55"} or state == "57014":
        return Fault.BUSY
    return Fault.UNAVAILABLE
