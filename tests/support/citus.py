"""A running Citus cluster, for the same tests that otherwise run on a server of their own."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING, NoReturn, Self

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from exporter.postgres.schema import distribute_schema, ensure_schema

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

VARIABLE = "ARTIFACTAPI_TEST_CITUS"
# A fixture removes the variables of the person who runs the tests.
CLUSTER_DSN = os.environ.get(VARIABLE, "")
NEEDS_TRIGGERS = pytest.mark.not_on_citus("Citus refuses triggers on distributed tables")
_SHARDS = 2  # few, because each test creates its own


class Cluster:
    """Stands in for `Postgres`. A test that stops or configures its server is skipped."""

    def __init__(self, dsn: str) -> None:
        """`dsn` is the coordinator's, as a superuser named postgres."""
        self._parameters = conninfo_to_dict(dsn)
        self.port = int(str(self._parameters.get("port", 5432)))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the cluster running."""

    def dsn(
        self, dbname: str | None = None, host: str = "127.0.0.1", port: int | None = None
    ) -> str:
        """Return a connection string, in the order that `Postgres.dsn` has."""
        name = dbname or self._parameters["dbname"]
        return f"host={host} port={port or self.port} user=postgres dbname={name}"

    @contextlib.contextmanager
    def database(self, name: str) -> Iterator[None]:
        """Create a database on all nodes, with a distributed log, and drop it afterwards."""
        dsns = [self.dsn(), *worker_dsns(self.dsn())]
        for dsn in dsns:
            _run(dsn, f"CREATE DATABASE {name}")
            _run(make_conninfo(dsn, dbname=name), "CREATE EXTENSION citus")
        coordinator, *workers = [conninfo_to_dict(dsn) for dsn in dsns]
        here = self.dsn(name)
        _run(here, f"SELECT citus_set_coordinator_host('{coordinator['host']}', {self.port})")
        for worker in workers:
            _run(here, f"SELECT citus_add_node('{worker['host']}', {worker['port']})")
        distributed(here)
        try:
            yield
        finally:
            for dsn in dsns:
                _run(dsn, f"DROP DATABASE {name} WITH (FORCE)")

    def stop(self, *_: object) -> NoReturn:
        """Not on a server that others use."""
        pytest.skip("needs a server of its own")

    start = kill = configure = run = stop

    @property
    def data(self) -> Path:
        """Its files are not ours."""
        pytest.skip("needs a server of its own")

    folder = pid = data


def distributed(dsn: str, shards: int = _SHARDS) -> str:
    """Create the schema in the search path of `dsn` and distribute it. Returns a connection string for it."""
    parameters = conninfo_to_dict(dsn)
    options = f"{parameters.get('options', '')} -ccitus.shard_count={shards}"
    small = make_conninfo(dsn, options=options)
    with psycopg.connect(small, autocommit=True) as connection, one_at_a_time(dsn):
        ensure_schema(connection)
        distribute_schema(connection)
    return dsn


def _run(dsn: str, statement: str) -> None:
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(statement.encode())


@contextlib.contextmanager
def one_at_a_time(dsn: str) -> Iterator[None]:
    """Other test processes create and drop their schemas before or after this: they could deadlock."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute("SELECT pg_advisory_lock(hashtext('artifactapi tests'))")
        yield


def worker_dsns(dsn: str) -> Iterator[str]:
    """Connection strings to the workers of the cluster."""
    with psycopg.connect(dsn) as connection:
        for host, port in connection.execute(
            "SELECT nodename, nodeport FROM pg_catalog.pg_dist_node WHERE groupid > 0 AND isactive ORDER BY 2"
        ).fetchall():
            yield make_conninfo(dsn, host=host, port=port)
