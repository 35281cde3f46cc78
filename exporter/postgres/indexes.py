"""Build indexes that a migration has only declared, without blocking the writers of the log."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, cast

from psycopg import sql

from .locks import short_lock_waits

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
# What migration 006 creates if the table is empty.
_ARTIFACT_INDEX = """
    SELECT nspname FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace
    WHERE pg_class.oid = to_regclass('artifact') AND relkind = 'r'
    AND EXISTS (SELECT FROM pg_proc WHERE proname = 'access_log_package_key' AND pronamespace = relnamespace)
    AND NOT EXISTS (SELECT FROM pg_index WHERE indrelid = pg_class.oid AND indisvalid
                    AND indexrelid = to_regclass('artifact_package_idx'))
"""
_BUILD_ARTIFACT_INDEX = """
    CREATE INDEX CONCURRENTLY artifact_package_idx ON {} (access_log_package_key(purl))
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

    The table `artifact` gets its index as well. Yields the name of each table before its index is built, the
    newest day first. Other sessions can read and write meanwhile. If interrupted at any point, the next
    call continues. The connection must be in autocommit mode and its role must own the tables.

    Raises:
        psycopg.Error: A lock was not available within a second, or the server reported another error.
    """
    with short_lock_waits(connection):
        found = connection.execute(_MISSING, (list(_REPLACED.values()),)).fetchall()
        for missing in [_Missing(*row) for row in found]:
            yield missing.partition
            _build(connection, missing)
        for (schema,) in connection.execute(_ARTIFACT_INDEX).fetchall():
            yield "artifact"
            _build_artifact_index(connection, schema)
        for old, new in _REPLACED.items():
            row = connection.execute(_IS_VALID, (new,)).fetchone()
            if row is not None and row[0]:
                connection.execute(sql.SQL("DROP INDEX IF EXISTS {}").format(sql.Identifier(old)))


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
    connection.execute(
        sql.SQL("ALTER INDEX {} ATTACH PARTITION {}").format(
            sql.Identifier(missing.index_name), name
        )
    )


def _build_artifact_index(connection: Connection[Any], schema: str) -> None:
    # What is left of a build that was interrupted is invalid.
    connection.execute(
        sql.SQL("DROP INDEX CONCURRENTLY IF EXISTS {}").format(
            sql.Identifier(schema, "artifact_package_idx")
        )
    )
    connection.execute(sql.SQL(_BUILD_ARTIFACT_INDEX).format(sql.Identifier(schema, "artifact")))
