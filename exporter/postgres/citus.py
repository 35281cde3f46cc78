"""Distribute the log over a Citus cluster. Without the extension citus, nothing here does anything."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from psycopg import sql

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import LiteralString

    from psycopg import Connection

_DISTRIBUTION = Path(__file__).parent / "citus.sql"

_HAS_EXTENSION = "SELECT to_regclass('pg_catalog.pg_dist_partition') IS NOT NULL"
_IS_DISTRIBUTED = """
    SELECT EXISTS (SELECT 1 FROM pg_catalog.pg_dist_partition WHERE logicalrelid = to_regclass('access_log'))
"""
_IS_WORKER = "SELECT groupid > 0 FROM pg_catalog.pg_dist_local_group"
_KNOWS_COORDINATOR = "SELECT EXISTS (SELECT 1 FROM pg_catalog.pg_dist_node WHERE groupid = 0)"
# Tables that no batch writes to are on every node.
_REPLICATE = """
    SELECT create_reference_table(quote_ident(relname)) FROM pg_class
    WHERE relnamespace = current_schema()::regnamespace AND relname = ANY (%s) AND relkind = 'r'
    AND NOT EXISTS (SELECT 1 FROM pg_catalog.pg_dist_partition WHERE logicalrelid = pg_class.oid
                    AND (partmethod <> 'n' OR repmodel = 't'))
    ORDER BY relname
"""
# While tables are tied by foreign keys, Citus creates them again one after the other, with their views, which then lack
# their comments and grants.
_FOREIGN_KEYS = """
    SELECT relname, conname, pg_get_constraintdef(pg_constraint.oid)
    FROM pg_constraint JOIN pg_class ON pg_class.oid = conrelid
    WHERE contype = 'f' AND conparentid = 0 AND relnamespace = current_schema()::regnamespace AND relname = ANY (%s)
    AND NOT EXISTS (SELECT 1 FROM pg_catalog.pg_dist_partition WHERE logicalrelid = conrelid)
"""
_IN_SEQUENCE = "SET LOCAL citus.multi_shard_modify_mode TO 'sequential'"
_NO_NOTICES = "SET LOCAL client_min_messages = 'warning'"  # about each table
# Distributing a table copies its rows to its shards.
_TRUNCATE_LOCAL = """
    SELECT truncate_local_data_after_distributing_table(logicalrelid)
    FROM pg_catalog.pg_dist_partition JOIN pg_class ON pg_class.oid = logicalrelid
    WHERE relnamespace = current_schema()::regnamespace AND partmethod = 'h' AND NOT relispartition
"""


class DistributionError(Exception):
    """The log cannot be distributed, or this is the wrong server for it. The message says what to do."""


def is_distributed(connection: Connection[Any]) -> bool:
    """Whether access_log in the current schema is a distributed table of Citus."""
    return _has_extension(connection) and _value(connection, _IS_DISTRIBUTED)


def is_worker(connection: Connection[Any]) -> bool:
    """Whether the server is a worker of a Citus cluster, where no table can be created or changed."""
    return _has_extension(connection) and _value(connection, _IS_WORKER)


def check_coordinator(connection: Connection[Any]) -> None:
    """Check that tables can be changed here.

    Raises:
        DistributionError: the server is a worker.
    """
    if is_worker(connection):
        raise DistributionError(
            "This server is a worker of a Citus cluster, where no table can be changed; connect to its"
            " coordinator."
        )


def check_can_distribute(connection: Connection[Any]) -> None:
    """Check what `distribute` needs.

    Raises:
        DistributionError: it is missing.
    """
    if not _has_extension(connection):
        raise DistributionError(
            f"The database {connection.info.dbname} has no extension citus; run CREATE EXTENSION citus in it on"
            " every node of the cluster, or leave out --distribute."
        )
    check_coordinator(connection)
    if not _value(connection, _KNOWS_COORDINATOR):
        raise DistributionError(
            "The Citus cluster does not know the address of its coordinator, which creates the partitions of"
            " new days; run SELECT citus_set_coordinator_host('HOST') on it."
        )


def in_sequence(connection: Connection[Any]) -> None:
    """Let this transaction use one connection to each node, as reference tables with foreign keys need it."""
    if is_distributed(connection):
        connection.execute(_IN_SEQUENCE)


def distribute(connection: Connection[Any], tables: Sequence[str]) -> None:
    """Distribute the log over the workers. In one transaction, which the caller has begun.

    Writers and readers wait meanwhile: it copies all rows.

    Args:
        connection: To the coordinator, as the owner of the tables; see `check_can_distribute`.
        tables: Names of all our tables; other names are ignored.

    Raises:
        psycopg.Error: the server reported an error or the connection was lost; nothing was done.
    """
    connection.execute(_NO_NOTICES)
    connection.execute(_DISTRIBUTION.read_text(encoding="utf-8").encode())
    replicate(connection, tables)
    connection.execute(_TRUNCATE_LOCAL)


def replicate(connection: Connection[Any], tables: Sequence[str]) -> None:
    """Copy those of these tables to every node that are not distributed, such as new ones of a migration."""
    keys = connection.execute(_FOREIGN_KEYS, (list(tables),)).fetchall()
    for table, name, _ in keys:
        connection.execute(
            sql.SQL("ALTER TABLE {} DROP CONSTRAINT {}").format(*map(sql.Identifier, (table, name)))
        )
    connection.execute(_REPLICATE, (list(tables),))
    for table, name, definition in keys:
        connection.execute(
            sql.SQL("ALTER TABLE {} ADD CONSTRAINT {} ").format(*map(sql.Identifier, (table, name)))
            + sql.SQL(definition)
        )


def _has_extension(connection: Connection[Any]) -> bool:
    return _value(connection, _HAS_EXTENSION)


def _value(connection: Connection[Any], query: LiteralString) -> bool:
    (row,) = connection.execute(query).fetchall()
    return bool(row[0])
