"""Run many proxies under load on a server that runs already, or on all nodes of a Citus cluster.

The log is in a schema of its own, which is dropped at the end. Nothing else on the server is touched.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import psycopg
from psycopg.conninfo import make_conninfo

from exporter.postgres.citus import is_worker
from exporter.postgres.connection import describe
from exporter.postgres.schema import ensure_schema

from .chaos_fleet import FleetEnvironment
from .citus import distributed, worker_dsns
from .relay import Relay, Relays

if TYPE_CHECKING:
    from typing import LiteralString

    from psycopg import Connection

    from .chaos_environment import ChaosEnvironment
    from .relay import Target

_SHARDS = 8
_IS_CLUSTER = "SELECT to_regclass('pg_catalog.pg_dist_node') IS NOT NULL"
_HAS_WORKERS = "SELECT EXISTS (SELECT FROM pg_catalog.pg_dist_node WHERE groupid > 0 AND isactive)"
_COMMAND_SECONDS = 120.0
# The relays read PostgreSQL's protocol, so it must not be encrypted.
_PLAIN = {"sslmode": "disable", "gssencmode": "disable"}


class Outage(NamedTuple):
    """Shell commands that stop a server of the log and start it again."""

    stop: str
    start: str


class ServerFleet(FleetEnvironment):
    """Like its base, on a server that somebody else runs. It is the coordinator, if it belongs to a cluster.

    Args:
        folder: For the files of the proxies.
        proxies: How many; on a cluster, they are connected to its nodes in turn.
        dsn: One server and a database, with a role that may create a schema in it.
    """

    def __init__(self, folder: Path, proxies: int, dsn: str) -> None:
        super().__init__(folder, proxies)
        self._dsn = dsn
        self._relays: list[Relay] = []

    @property
    def owner_dsn(self) -> str:
        """Leads to the schema of this run."""
        return make_conninfo(self._dsn, options=f"-csearch_path={self._schema}")

    @property
    def _schema(self) -> str:
        return f"artifactapi_chaos_{os.getpid()}"

    def _start_server(self) -> None:
        """Create the schema, and a relay to each node that proxies connect to."""
        self.disk = None
        try:
            is_cluster = self._create_schema()
        except psycopg.Error as e:
            raise SystemExit(f"--dsn: {describe(e)}.") from None
        if is_cluster:
            distributed(self.owner_dsn, _SHARDS)
        else:
            with self.admin() as connection:
                ensure_schema(connection)
        nodes = [self._dsn, *(worker_dsns(self._dsn) if is_cluster else ())]
        self._relays = [
            self._stack.enter_context(Relay(_address(node), postgres=True)) for node in nodes
        ]
        self.relay = Relays(self._relays)

    def _create_schema(self) -> bool:
        """Create the schema; return whether the server is the coordinator of a cluster with workers."""
        with psycopg.connect(self._dsn, autocommit=True) as connection:
            if is_worker(connection):
                raise SystemExit("--dsn leads to a worker; name the coordinator of the cluster.")
            connection.execute(f"CREATE SCHEMA {self._schema}".encode())
            self._stack.callback(self._drop_schema)
            return _value(connection, _IS_CLUSTER) and _value(connection, _HAS_WORKERS)

    def _login(self, number: int) -> dict[str, str]:
        host, port = self._relays[number % len(self._relays)].address
        dsn = make_conninfo(self.owner_dsn, host=host, hostaddr=host, port=port, **_PLAIN)
        return {"ARTIFACTAPI_DSN": dsn}

    def _drop_schema(self) -> None:
        with psycopg.connect(self._dsn, autocommit=True) as connection:
            connection.execute(f"DROP SCHEMA {self._schema} CASCADE".encode())


def interrupt(environment: ChaosEnvironment, seconds: float, outage: Outage) -> None:
    """Stop a server with the user's command, and start it again. Raises SystemExit if one fails."""
    try:
        _run(outage.stop)
        environment.wait(seconds)
    finally:
        _run(outage.start)


def _run(command: str) -> None:
    """Run a shell command of the user. Raises SystemExit if it fails."""
    done = subprocess.run(
        ["sh", "-c", command],
        check=False,
        stdin=subprocess.DEVNULL,
        timeout=_COMMAND_SECONDS,
    )
    if done.returncode:
        raise SystemExit(f"{command!r} failed with exit status {done.returncode}.")


def _address(dsn: str) -> Target:
    """The address or the socket that a connection string leads to."""
    with psycopg.connect(dsn) as connection:
        host, port = connection.info.host, connection.info.port
    return Path(host, f".s.PGSQL.{port}") if host.startswith("/") else (host, port)


def _value(connection: Connection[Any], query: LiteralString) -> bool:
    (row,) = connection.execute(query).fetchall()
    return bool(row[0])
