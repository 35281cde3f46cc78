"""A table access_log of a test module's own, and what the tests ask of it."""

from __future__ import annotations

import contextlib
import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg.rows import dict_row

from .wait import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .postgres import Postgres

SCRIPT = Path(__file__).resolve().parents[2] / "addon" / "artifactapi.py"

type Row = dict[str, Any]

_numbers = itertools.count()


class AccessLog:
    """Reads the table behind a connection string; nothing there yet counts as no rows."""

    def __init__(self, dsn: str) -> None:
        self.dsn = dsn

    def rows(self, where: str = "true", *values: object) -> list[Row]:
        """Return the rows that match, in the order in which the requests came."""
        sql = f"SELECT * FROM access_log WHERE {where} ORDER BY started_at"
        try:
            with psycopg.connect(self.dsn, row_factory=dict_row) as connection:
                return connection.execute(sql.encode(), values).fetchall()
        except (psycopg.errors.UndefinedTable, psycopg.OperationalError):
            return []

    def wait(
        self, count: int, where: str = "true", *values: object, timeout: float = 15
    ) -> list[Row]:
        """Wait for at least so many rows that match, and return them."""
        return eventually(
            lambda: found if len(found := self.rows(where, *values)) >= count else [], timeout
        )

    def of(self, agent: str) -> Row:
        """Wait for the one row of the request with this User-Agent."""
        (row,) = self.wait(1, "user_agent = %s", agent)
        return row


@contextlib.contextmanager
def own_schema(server: Postgres) -> Iterator[str]:
    """Make an empty schema for as long as the block runs; its connection string."""
    name = f"module_{next(_numbers)}"
    with psycopg.connect(server.dsn(), autocommit=True) as connection:
        connection.execute(f"CREATE SCHEMA {name}".encode())
    yield f"{server.dsn()} options=-csearch_path={name}"
    with psycopg.connect(server.dsn(), autocommit=True) as connection:
        connection.execute(f"DROP SCHEMA {name} CASCADE".encode())
