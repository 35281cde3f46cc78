"""Create the database schema, or upgrade it to this version. Writes no rows of the log."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg import sql

if TYPE_CHECKING:
    from psycopg import Connection

_HERE = Path(__file__).parent
SCHEMA = _HERE / "schema.sql"
MIGRATIONS = _HERE / "migrations"
_MIGRATION_NAME = re.compile(r"(\d{3})_[a-z0-9_]+\.sql")

_LOCK = "SELECT pg_advisory_xact_lock(hashtext('artifactapi'), hashtext(current_schema()))"
# We query pg_class because to_regclass uses a cache, which is not refreshed between the wait for the
# lock and the next statement of the same transaction.
_EXISTING_TABLES = """
    SELECT coalesce(bool_or(relname = 'access_log_schema'), false),
           coalesce(bool_or(relname = 'access_log'), false)
    FROM pg_class WHERE relnamespace = current_schema()::regnamespace
    AND relname IN ('access_log_schema', 'access_log')
"""
_VERSION = "SELECT coalesce(max(version), 0) FROM access_log_schema"
_INSERT_VERSION = "INSERT INTO access_log_schema (version) VALUES (%s)"
# What a reader role can use. A test compares this with the schema.
_VIEWS_WITH_FUNCTION = (
    "access_log_remotes",
    "access_log_cache",
    "access_log_unknown_hosts",
    "access_log_not_found",
    "access_log_redundant",
)
_READER_RELATIONS = (
    "access_log",
    "access_log_gap",
    "access_log_schema",
    "artifact",
    "access_log_fetches",
    "access_log_days",
    "access_log_artifacts",
    "access_log_first_seen",
    "access_log_partial_reads",
    *_VIEWS_WITH_FUNCTION,
)
_READER_FUNCTIONS = (
    *_VIEWS_WITH_FUNCTION,
    "access_log_failed",
    "access_log_refused",
    "access_log_from_cache",
    "access_log_caller",
)


class SchemaError(Exception):
    """The database does not have a schema that we can use. The message says why and what to do."""


def ensure_schema(connection: Connection[Any], migrations: Path | None = None) -> None:
    """Create our tables in the current schema, or upgrade them. Idempotent.

    Safe to call from many processes at once: the first one does the work under an advisory lock,
    and the others wait for it. If there is nothing to do, it only needs SELECT on
    `access_log_schema`.

    Raises:
        SchemaError: the schema is newer than this program, or it is older and this role can't
            upgrade it, or a table `access_log` exists that is not ours, or the database is not UTF-8.
        psycopg.Error: the server reported an error or the connection was lost.
    """
    _check_encoding(connection)
    migrations_by_version = _migrations_by_version(migrations or MIGRATIONS)
    newest = max(migrations_by_version, default=1)
    if _installed_version(connection, newest) == newest:
        return
    with connection.transaction():
        connection.execute(_LOCK)
        installed = _installed_version(connection, newest)
        if installed is None:
            _apply(connection, SCHEMA, 1)
            installed = 1
        try:
            for version in range(installed + 1, newest + 1):
                _apply(connection, migrations_by_version[version], version)
        except psycopg.errors.InsufficientPrivilege:
            raise SchemaError(
                f"The schema is at version {installed}, but this artifactapi needs {newest}; "
                "run `artifactapi init` as the owner of its tables."
            ) from None


def _check_encoding(connection: Connection[Any]) -> None:
    """Requests hold any text. Other encodings would reject rows that nobody could store later."""
    encoding = connection.info.parameter_status("server_encoding")
    if encoding is None:  # a pooler does not pass it on
        row = connection.execute("SHOW server_encoding").fetchone()
        encoding = str(row[0]) if row else "UTF8"
    if encoding != "UTF8":
        raise SchemaError(
            f"The database {connection.info.dbname} has the encoding {encoding}, which cannot store "
            "every request; create one with ENCODING 'UTF8' (TEMPLATE template0) and name it in the "
            "connection string."
        )


def schema_name(connection: Connection[Any]) -> str:
    """Return the current schema: the first one in the search path that exists.

    Raises:
        SchemaError: none exists.
    """
    row = connection.execute("SELECT current_schema()::text").fetchone()
    if row is None or row[0] is None:
        raise SchemaError("No schema in the search path exists; create one or change search_path.")
    name: str = row[0]
    return name


def grants(schema: str, proxy_role: str, reader_role: str) -> str:
    """Return SQL that lets the proxy role only write and the reader role only read."""
    text = sql.SQL(
        "GRANT USAGE ON SCHEMA {schema} TO {proxy}, {reader};\n"
        "GRANT SELECT ON {schema}.access_log_schema TO {proxy};\n"
        "GRANT INSERT ON {schema}.access_log, {schema}.access_log_gap TO {proxy};\n"
        "GRANT EXECUTE ON FUNCTION {schema}.access_log_ensure_partition, {schema}.artifact_record TO {proxy};\n"
        "GRANT SELECT ON {relations} TO {reader};\n"
        "GRANT EXECUTE ON FUNCTION {functions} TO {reader};\n"
    )

    def qualified(names: tuple[str, ...]) -> sql.Composed:
        return sql.SQL(", ").join(sql.Identifier(schema, name) for name in names)

    return text.format(
        schema=sql.Identifier(schema),
        proxy=sql.Identifier(proxy_role),
        reader=sql.Identifier(reader_role),
        relations=qualified(_READER_RELATIONS),
        functions=qualified(_READER_FUNCTIONS),
    ).as_string(None)


def _migrations_by_version(migrations: Path) -> dict[int, Path]:
    """Return the migrations by the version that they upgrade to, such as 2 for 002_add_x.sql."""
    found = {}
    for path in sorted(migrations.glob("*.sql")):
        match = _MIGRATION_NAME.fullmatch(path.name)
        if match is None:
            raise SchemaError(
                f"{path.name} is not a valid migration name, expected a name such as 002_add_x.sql."
            )
        found[int(match[1])] = path
    if sorted(found) != list(range(2, len(found) + 2)):
        raise SchemaError(
            f"The migrations in {migrations.name} have a gap, expected consecutive versions from 002."
        )
    return found


def _installed_version(connection: Connection[Any], newest: int) -> int | None:
    """Return the version of the schema, or None if there is none yet.

    Raises:
        SchemaError: it is newer than `newest`, or a table `access_log` exists that is not ours.
    """
    row = connection.execute(_EXISTING_TABLES).fetchone()
    has_version, has_log = row or (False, False)
    if not has_version:
        if has_log:
            raise SchemaError(
                "A table access_log exists that artifactapi did not create; use another database "
                "or schema in the connection string (options=-csearch_path=...)."
            )
        return None
    row = connection.execute(_VERSION).fetchone()
    version = int(row[0]) if row else 0
    if version > newest:
        raise SchemaError(
            f"The schema is at version {version}, but this artifactapi supports up to {newest}; "
            "upgrade artifactapi."
        )
    return version


def _apply(connection: Connection[Any], path: Path, version: int) -> None:
    connection.execute(path.read_text(encoding="utf-8").encode())
    connection.execute(_INSERT_VERSION, (version,))
