"""Build indexes that a migration has only declared, without blocking the writers of the log."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, cast

from psycopg import sql

from .locks import locking_out_writers, short_lock_waits

if TYPE_CHECKING:
    from collections.abc import Iterator

    from psycopg import Connection

# Indexes of access_log that others replace, from migrations. They go when the new ones are complete.
_REPLACED = {
    "access_log_package_idx": "access_log_package_version_idx",
    "access_log_proxy_user_idx": "access_log_user_idx",
}
# An index of the partitioned table is valid once each partition has an index attached to it.
_MISSING = """
    SELECT parent.relname, partition.relnamespace::regnamespace::text, partition.relname, pg_get_indexdef(parent.oid)
    FROM pg_index AS declared
    JOIN pg_class AS parent ON parent.oid = declared.indexrelid
    JOIN pg_inherits AS day ON day.inhparent = declared.indrelid AND NOT day.inhdetachpending
    JOIN pg_class AS partition ON partition.oid = day.inhrelid
    WHERE declared.indrelid = 'access_log'::regclass AND NOT declared.indisvalid
    AND parent.relname = ANY (%s)
    AND NOT EXISTS (SELECT FROM pg_inherits AS attached JOIN pg_index AS built ON built.indexrelid = attached.inhrelid
                    WHERE attached.inhparent = declared.indexrelid AND built.indrelid = day.inhrelid)
    ORDER BY partition.relname DESC, parent.relname
"""
_IS_VALID = """
    SELECT indisvalid FROM pg_index
    WHERE indexrelid = to_regclass(%s) AND indrelid = 'access_log'::regclass
"""
# What migrations 006 and 011 create if the table is empty: an index, and a key with the node.
_ARTIFACT_KEY = """
    SELECT nspname, indnkeyatts = 1
    FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace
    JOIN pg_index ON indrelid = pg_class.oid AND indisprimary
    WHERE pg_class.oid = to_regclass('artifact_by_node')
"""
_ARTIFACT_TABLE = "artifact_by_node"
_ARTIFACT_INDEX = "artifact_package_idx"
_NEW_KEY = "artifact_by_node_key"
_DEFINITIONS = {
    _ARTIFACT_INDEX: "CREATE INDEX CONCURRENTLY {} ON {} (access_log_package_key(purl))",
    _NEW_KEY: "CREATE UNIQUE INDEX CONCURRENTLY {} ON {} (purl, node)",
}
_INDEX_STATE = "SELECT indisvalid FROM pg_index WHERE indexrelid = to_regclass(%s)"
_REPLACE_KEY = """
    ALTER TABLE {} DROP CONSTRAINT artifact_by_node_pkey,
      ADD CONSTRAINT artifact_by_node_pkey PRIMARY KEY USING INDEX artifact_by_node_key
"""
_MAX_NAME_BYTES = 63  # PostgreSQL docs, 4.1.1


class _Missing(NamedTuple):
    """An index of the partitioned table that a partition does not have yet."""

    index_name: str
    schema: str
    partition: str
    definition: str  # CREATE INDEX ... ON ONLY schema.access_log USING ...


def build_missing_indexes(connection: Connection[Any]) -> Iterator[str]:
    """Give each day the indexes that migrations declared, then drop the ones they replace.

    The table `artifact_by_node` gets its index and its key as well. Yields the name of each table before its
    index is built, the newest day first. Other sessions can read and write meanwhile. If interrupted at any
    point, the next call continues. The connection must be in autocommit mode and its role must own the tables.

    Raises:
        psycopg.Error: A lock was not available in time, or the server reported another error.
    """
    with short_lock_waits(connection):
        found = connection.execute(_MISSING, (list(_REPLACED.values()),)).fetchall()
        for missing in [_Missing(*row) for row in found]:
            yield missing.partition
            _build(connection, missing)
        yield from _build_of_artifacts(connection)
        for old, new in _REPLACED.items():
            row = connection.execute(_IS_VALID, (new,)).fetchone()
            if row is not None and row[0]:
                with locking_out_writers(connection):
                    connection.execute(
                        sql.SQL("DROP INDEX IF EXISTS {}").format(sql.Identifier(old))
                    )


def _build(connection: Connection[Any], missing: _Missing) -> None:
    short = f"{missing.partition}_{missing.index_name.removeprefix('access_log_')}"[
        :_MAX_NAME_BYTES
    ]
    name = sql.Identifier(missing.schema, short)
    partition = sql.Identifier(missing.schema, missing.partition)
    _, _, definition = missing.definition.partition(" USING ")
    # What is left of a build that was interrupted is invalid, and is not attached.
    connection.execute(sql.SQL("DROP INDEX CONCURRENTLY IF EXISTS {}").format(name))
    connection.execute(
        sql.SQL("CREATE INDEX CONCURRENTLY {} ON {} USING ").format(
            sql.Identifier(short), partition
        )
        + sql.SQL(cast("Any", definition))  # as PostgreSQL wrote it
    )
    with locking_out_writers(connection):
        connection.execute(
            sql.SQL("ALTER INDEX {} ATTACH PARTITION {}").format(
                sql.Identifier(missing.index_name), name
            )
        )


def _build_of_artifacts(connection: Connection[Any]) -> Iterator[str]:
    for schema, is_without_node in connection.execute(_ARTIFACT_KEY).fetchall():
        table = sql.Identifier(schema, _ARTIFACT_TABLE)
        wanted = (_ARTIFACT_INDEX, _NEW_KEY) if is_without_node else (_ARTIFACT_INDEX,)
        for name in wanted:
            qualified = sql.Identifier(schema, name)
            state = connection.execute(_INDEX_STATE, (qualified.as_string(),)).fetchone()
            if state == (True,):
                continue
            yield _ARTIFACT_TABLE
            # What is left of a build that was interrupted is invalid.
            connection.execute(sql.SQL("DROP INDEX CONCURRENTLY IF EXISTS {}").format(qualified))
            definition = sql.SQL(_DEFINITIONS[name])
            connection.execute(definition.format(sql.Identifier(name), table))
        if is_without_node:
            with locking_out_writers(connection):
                connection.execute(sql.SQL(_REPLACE_KEY).format(table))
