"""Create a schema for one test or module, and read the access_log table in it."""

from __future__ import annotations

import contextlib
import itertools
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg.rows import dict_row

from exporter import Settings
from exporter.write.database import Database

from .citus import Cluster, distributed, one_at_a_time
from .wait import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

    from exporter import AccessLogEntry

    from .postgres import Postgres

SCRIPT = Path(__file__).resolve().parents[2] / "addon" / "artifactapi.py"

type Row = dict[str, Any]

_numbers = itertools.count()


def write_entries(dsn: str, *entries: AccessLogEntry) -> None:
    """Write rows as a proxy does, and create the schema if needed."""
    database = Database(Settings().with_dsn(dsn).database)
    try:
        assert database.write(entries) == []
    finally:
        database.close()


class AccessLog:
    """Reads the access_log table of one database."""

    def __init__(self, dsn: str) -> None:
        self.dsn = dsn

    def rows(self, where: str = "true", *values: object) -> list[Row]:
        """Return the matching rows, oldest first; none if the table or the server is missing."""
        sql = f"SELECT * FROM access_log WHERE {where} ORDER BY started_at, path"
        try:
            with psycopg.connect(self.dsn, row_factory=dict_row) as connection:
                return connection.execute(sql.encode(), values).fetchall()
        except (psycopg.errors.UndefinedTable, psycopg.OperationalError):
            return []

    def wait_rows(
        self, count: int, where: str = "true", *values: object, timeout: float = 15
    ) -> list[Row]:
        """Wait until at least `count` rows match, and return them."""
        return eventually(
            lambda: found if len(found := self.rows(where, *values)) >= count else [], timeout
        )

    def wait_row(self, where: str, *values: object) -> Row:
        """Wait for the only matching row, and return it."""
        (row,) = self.wait_rows(1, where, *values)
        return row

    def row_for_agent(self, agent: str) -> Row:
        """Wait for the only row with this User-Agent, and return it."""
        return self.wait_row("user_agent = %s", agent)


@contextlib.contextmanager
def temporary_schema(server: Postgres | Cluster) -> Iterator[str]:
    """Create an empty schema, yield its connection string, and drop the schema afterwards.

    On a cluster, the schema has a distributed log, because only an owner of the cluster can do that.
    """
    name = f"test_{next(_numbers)}"
    if isinstance(server, Cluster):
        name += f"{os.getpid():08d}"  # other processes use the same cluster
    with psycopg.connect(server.dsn(), autocommit=True) as connection:
        connection.execute(f"CREATE SCHEMA {name}".encode())
    dsn = f"{server.dsn()} options=-csearch_path={name}"
    yield distributed(dsn) if isinstance(server, Cluster) else dsn
    alone = one_at_a_time(server.dsn()) if isinstance(server, Cluster) else contextlib.nullcontext()
    with alone, psycopg.connect(server.dsn(), autocommit=True) as connection:
        connection.execute(f"DROP SCHEMA {name} CASCADE".encode())
