"""Give each day that is over an index for the filter `text`, so that such a search reads few rows.

The index is built once, when the day gets no more rows: it would double the work that PostgreSQL has
with each row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from psycopg import sql

from ..postgres.locks import only_session
from .days import owns_log

if TYPE_CHECKING:
    from collections.abc import Iterator

    from psycopg import Connection

    from ..settings import DatabaseSettings

# Where the operators are; a DBA may have installed the extension in any schema.
_OPERATORS = """
    SELECT nspname FROM pg_extension JOIN pg_namespace ON pg_namespace.oid = extnamespace
    WHERE extname = 'pg_trgm'
"""
_CREATE_EXTENSION = "CREATE EXTENSION IF NOT EXISTS pg_trgm"
# The newest first, because these days are searched most. Others may be archived, or not plain tables.
_DUE = """
    SELECT nspname, relname
    FROM access_log_partitions
    JOIN pg_class ON pg_class.oid = partition_oid JOIN pg_namespace ON pg_namespace.oid = relnamespace
    WHERE until_at < now() - interval '2 hours' AND relkind = 'r'
    AND NOT EXISTS (SELECT FROM pg_index WHERE indrelid = partition_oid AND indisvalid
                    AND pg_get_expr(indexprs, indrelid) LIKE '%access_log_search_text(%')
    ORDER BY until_at DESC
"""
# What is left of builds that were interrupted.
_INVALID = """
    SELECT nspname, relname
    FROM pg_index JOIN pg_class ON pg_class.oid = indexrelid JOIN pg_namespace ON pg_namespace.oid = relnamespace
    WHERE indrelid = to_regclass(%s) AND NOT indisvalid
    AND pg_get_expr(indexprs, indrelid) LIKE '%%access_log_search_text(%%'
"""
_BUILD = """
    CREATE INDEX CONCURRENTLY ON {partition}
    USING gin (access_log_search_text(host, path, package, purl, proxy_user) {operators})
"""
# Another session's unfinished index looks like what is left of an interrupted build.
_WORK = "artifactapi text indexes"


def build_text_indexes(connection: Connection[Any], settings: DatabaseSettings) -> Iterator[str]:
    """Build the index of each day that is over and has none; yield the day's table before.

    Other sessions can read and write meanwhile. If interrupted at any point, the next call continues.
    Without the extension pg_trgm this does nothing; in the embedded server, it creates the extension.
    It does nothing either if the role does not own the tables.

    Args:
        connection: In autocommit mode.
        settings: Whether to build indexes, and whether the server is the embedded one.

    Raises:
        psycopg.Error: The server reported an error.
    """
    if not settings.index_text or not owns_log(connection):
        return
    with only_session(connection, _WORK) as is_free:
        if not is_free:
            return
        if not settings.dsn:
            connection.execute(_CREATE_EXTENSION)
        operators = _operators(connection)
        if operators is None:
            return
        for schema, name in connection.execute(_DUE).fetchall():
            yield name
            _build(connection, sql.Identifier(schema, name), operators)


def lacks_extension(connection: Connection[Any], settings: DatabaseSettings) -> bool:
    """Whether only the extension is missing to build indexes. Raises psycopg.Error."""
    return settings.index_text and _operators(connection) is None


def _operators(connection: Connection[Any]) -> sql.Identifier | None:
    found = connection.execute(_OPERATORS).fetchone()
    return sql.Identifier(found[0], "gin_trgm_ops") if found else None


def _build(
    connection: Connection[Any], partition: sql.Identifier, operators: sql.Identifier
) -> None:
    for index in connection.execute(_INVALID, (partition.as_string(connection),)).fetchall():
        connection.execute(
            sql.SQL("DROP INDEX CONCURRENTLY IF EXISTS {}").format(sql.Identifier(*index))
        )
    connection.execute(sql.SQL(_BUILD).format(partition=partition, operators=operators))
    # How common a text is decides whether its search uses the index.
    connection.execute(sql.SQL("ANALYZE {}").format(partition))
