"""Make the schema or bring it to this version, once, whoever comes first; never touches a row."""

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
# A query on pg_class, not to_regclass: that one looks into a cache which nothing refreshes between
# the wait for the lock and the next statement of the same transaction.
_FOUND = """
    SELECT coalesce(bool_or(relname = 'access_log_schema'), false),
           coalesce(bool_or(relname = 'access_log'), false)
    FROM pg_class WHERE relnamespace = current_schema()::regnamespace
    AND relname IN ('access_log_schema', 'access_log')
"""
_VERSION = "SELECT coalesce(max(version), 0) FROM access_log_schema"
_RECORD = "INSERT INTO access_log_schema (version) VALUES (%s)"
# What a role that reads may use. A test compares both with the schema.
_SPANS = (
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
    *_SPANS,
)
_READER_FUNCTIONS = (
    *_SPANS,
    "access_log_failed",
    "access_log_refused",
    "access_log_from_cache",
    "access_log_caller",
)


class SchemaError(Exception):
    """What is in the database is not ours to write to; says what was found and what to do."""


def ensure_schema(connection: Connection[Any], migrations: Path | None = None) -> None:
    """Create the schema in the current schema of the search path, or migrate it; idempotent.

    Safe when many callers start at once: the first does it under an advisory lock, the others
    wait for it. Needs no rights but SELECT on `access_log_schema` when there is nothing to do.

    Raises:
        SchemaError: the schema is newer than this program, or older and this role may not upgrade
            it, or `access_log` is somebody else's.
        psycopg.Error: the server refused or went away.
    """
    steps = _steps(migrations or MIGRATIONS)
    newest = max(steps, default=1)
    if _installed_version(connection, newest) == newest:
        return
    with connection.transaction():
        connection.execute(_LOCK)
        installed = _installed_version(connection, newest)
        if installed is None:
            _run(connection, SCHEMA, 1)
            installed = 1
        try:
            for version in range(installed + 1, newest + 1):
                _run(connection, steps[version], version)
        except psycopg.errors.InsufficientPrivilege:
            raise SchemaError(
                f"The schema has version {installed}, this artifactapi needs {newest}; "
                "run `artifactapi init` as the owner of its tables."
            ) from None


def schema_name(connection: Connection[Any]) -> str:
    """The schema new tables go to: the first of the search path that exists."""
    row = connection.execute("SELECT current_schema()::text").fetchone()
    if row is None or row[0] is None:
        raise SchemaError("The search path names no schema that exists; create one or correct it.")
    name: str = row[0]
    return name


def grants(schema: str, proxy_role: str, reader_role: str) -> str:
    """SQL that gives a proxy the right to write and nothing else, and a reader to read."""
    text = sql.SQL(
        "GRANT USAGE ON SCHEMA {schema} TO {proxy}, {reader};\n"
        "GRANT SELECT ON {schema}.access_log_schema TO {proxy};\n"
        "GRANT INSERT ON {schema}.access_log, {schema}.access_log_gap TO {proxy};\n"
        "GRANT EXECUTE ON FUNCTION {schema}.access_log_ensure_partition, {schema}.artifact_record TO {proxy};\n"
        "GRANT SELECT ON {relations} TO {reader};\n"
        "GRANT EXECUTE ON FUNCTION {functions} TO {reader};\n"
    )

    def listed(names: tuple[str, ...]) -> sql.Composed:
        return sql.SQL(", ").join(sql.Identifier(schema, name) for name in names)

    return text.format(
        schema=sql.Identifier(schema),
        proxy=sql.Identifier(proxy_role),
        reader=sql.Identifier(reader_role),
        relations=listed(_READER_RELATIONS),
        functions=listed(_READER_FUNCTIONS),
    ).as_string(None)


def _steps(migrations: Path) -> dict[int, Path]:
    """The migrations by the version they lead to: 002_some_words.sql leads to 2."""
    found = {}
    for path in sorted(migrations.glob("*.sql")):
        match = _MIGRATION_NAME.fullmatch(path.name)
        if match is None:
            raise SchemaError(f"{path.name}: expected a name such as 002_what_it_does.sql.")
        found[int(match[1])] = path
    if sorted(found) != list(range(2, len(found) + 2)):
        raise SchemaError(f"{migrations.name}: versions must run from 002 without a hole.")
    return found


def _installed_version(connection: Connection[Any], newest: int) -> int | None:
    row = connection.execute(_FOUND).fetchone()
    ours, table = row or (False, False)
    if not ours:
        if table:
            raise SchemaError(
                "A table access_log that artifactapi did not make is in the way; "
                "point the DSN at another database or schema (options=-csearch_path=...)."
            )
        return None
    row = connection.execute(_VERSION).fetchone()
    version = int(row[0]) if row else 0
    if version > newest:
        raise SchemaError(
            f"The schema has version {version}, this artifactapi knows up to {newest}; "
            "upgrade artifactapi."
        )
    return version


def _run(connection: Connection[Any], path: Path, version: int) -> None:
    connection.execute(path.read_text(encoding="utf-8").encode())
    connection.execute(_RECORD, (version,))
