"""Create the database schema, or upgrade it to this version. Writes no rows of the log."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg import sql

from .citus import check_can_distribute, distribute, is_distributed, is_worker, replicate

if TYPE_CHECKING:
    from typing import LiteralString

    from psycopg import Connection

_HERE = Path(__file__).parent
SCHEMA = _HERE / "schema.sql"
MIGRATIONS = _HERE / "migrations"
_MIGRATION_TABLE = _HERE / "migration_table.sql"
_MIGRATION_NAME = re.compile(r"(\d{3})_[a-z0-9_]+\.sql")

_LOCK = "SELECT pg_advisory_xact_lock(hashtext('artifactapi'), hashtext(current_schema()))"
# We query pg_class because to_regclass uses a cache, which is not refreshed between the wait for the
# lock and the next statement of the same transaction.
_EXISTING_TABLES = """
    SELECT coalesce(array_agg(relname::text), '{}')
    FROM pg_class WHERE relnamespace = current_schema()::regnamespace
    AND relname IN ('access_log_schema', 'access_log_migration', 'access_log')
"""
_VERSION = "SELECT coalesce(max(version), 0) FROM access_log_schema"
_MIGRATION = "SELECT coalesce(max(number), 0) FROM access_log_migration"
_SEARCH_PATH = "SELECT setting, source FROM pg_settings WHERE name = 'search_path'"
_CHOSEN = ("client", "session")  # by the connection string, or a pooler that passes it on
_INSERT_VERSION = "INSERT INTO access_log_schema (version) VALUES (%s)"
_INSERT_MIGRATION = "INSERT INTO access_log_migration (number) VALUES (%s)"
# The first line of a migration after which earlier proxies can still write.
_COMPATIBLE = "-- Proxies of earlier versions can still write."
# A migration that waits for a lock makes the writers wait behind it. With what it does then, they wait for
# less than a second.
_LOCK_TIMEOUT = "SET LOCAL lock_timeout = '500ms'"
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
    "access_log_migration",
    "access_log_partitions",
    "access_log_run",
    "access_log_run_day",
    "access_log_nodes",
    "access_log_rollup",
    "access_log_rollup_state",
    "access_log_rollup_total",
    "access_log_rollup_duration",
    "access_log_rollup_host",
    "access_log_rollup_artifact",
    "access_log_rollup_chunk",
    "access_log_rollup_unpacked",
    "access_log_rollup_month",
    "access_log_rollup_month_artifact",
    "access_log_rollup_month_total",
    "access_log_rollup_month_duration",
    "access_log_rollup_month_host",
    "access_log_daily",
    "access_log_daily_fetches",
    "access_log_pruned",
    "access_log_repeated",
    "artifact",
    "artifact_by_node",
    "access_log_fetches",
    "access_log_days",
    "access_log_artifacts",
    "access_log_first_seen",
    "advisory",
    "advisory_match",
    "advisory_state",
    "access_log_affected",
    "access_log_partial_reads",
    *_VIEWS_WITH_FUNCTION,
)
_READER_FUNCTIONS = (
    *_VIEWS_WITH_FUNCTION,
    "access_log_failed",
    "access_log_refused",
    "access_log_from_cache",
    "access_log_caller",
    "access_log_search_text",
    "access_log_package_key",
    "access_log_run_state",
    "access_log_duration_bucket",
    "access_log_has_grown",
    "access_log_size",
    "access_log_id",
)


class SchemaError(Exception):
    """The database does not have a schema that we can use. The message says why and what to do."""


def ensure_schema(connection: Connection[Any], migrations: Path | None = None) -> None:
    """Create our tables in the current schema, or upgrade them. Idempotent.

    Safe to call from many processes at once: each migration is one transaction under an advisory lock, in
    one of the processes, and the others wait for it. No migration reads or rewrites what is in the tables;
    `build_missing_indexes` does that while others write. If there is nothing to do, it only needs SELECT on
    `access_log_schema` and `access_log_migration`.

    Raises:
        SchemaError: only newer proxies can write to the schema, or it is older and this role can't
            upgrade it, or a table `access_log` exists that is not ours, or the database is not UTF-8, or a
            pooler ignores the search_path of the connection string.
        psycopg.Error: the server reported an error or the connection was lost.
    """
    _check_encoding(connection)
    _check_search_path(connection)
    migrations_by_number = _migrations_by_number(migrations or MIGRATIONS)
    newest = max(migrations_by_number, default=1)
    # A transaction for each: all locks of a transaction last until its end.
    while (last := _last_migration(connection, newest)) < newest:
        _check_coordinator(connection, newest)
        try:
            _apply_next(connection, migrations_by_number)
        except psycopg.errors.InsufficientPrivilege:
            if last == 0:
                raise  # PostgreSQL's message says what is missing
            raise _outdated(last, newest) from None


def require_schema(connection: Connection[Any]) -> None:
    """Check that the current schema has our tables, in a version that can be read. Changes nothing.

    Raises:
        SchemaError: it has none, or they are older than this version, or not ours, or only newer
            versions can use them, or the database is not UTF-8, or a pooler ignores the search_path.
        psycopg.Error: the server reported an error or the connection was lost.
    """
    _check_encoding(connection)
    _check_search_path(connection)
    newest = max(_migrations_by_number(MIGRATIONS))
    last = _last_migration(connection, newest)
    if last == 0:
        raise SchemaError(
            f"The database {connection.info.dbname} has no log (schema {schema_name(connection)}); check the"
            " connection string, or create a log with `artifactapi init`."
        )
    if last < newest:
        raise _outdated(last, newest)


def distribute_schema(connection: Connection[Any]) -> bool:
    """Distribute the log over the workers of a Citus cluster. Return whether that was still to do.

    The schema must exist, with all its indexes. Writers and readers wait meanwhile.

    Raises:
        DistributionError: this is not the coordinator of a cluster.
        psycopg.Error: a lock was not available within a second, or the server reported another error.
    """
    check_can_distribute(connection)
    with connection.transaction():
        connection.execute(_LOCK)
        if is_distributed(connection):
            return False
        connection.execute(_LOCK_TIMEOUT)
        distribute(connection, _READER_RELATIONS)
    return True


def _outdated(last: int, newest: int) -> SchemaError:
    return SchemaError(
        f"The schema is at version {last}, but this artifactapi needs {newest}; "
        "run `artifactapi init` as the owner of its tables."
    )


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


def _check_search_path(connection: Connection[Any]) -> None:
    """A pooler that ignores `options` would make us write to another schema."""
    wanted = re.search(r"search_path=(\S+)", connection.info.options)
    if wanted is None:
        return
    row = connection.execute(_SEARCH_PATH).fetchone()
    if row is not None and row[1] not in _CHOSEN and row[0] != wanted[1]:
        raise SchemaError(
            f"The connection string asks for the schema {wanted[1]}, but a connection pooler ignores that; "
            "set search_path for the role (ALTER ROLE ... SET search_path) and leave out options=."
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


def grants(schema: str, proxy_role: str, reader_role: str, *, is_distributed: bool = False) -> str:
    """Return SQL that lets the proxy role only write and the reader role only read.

    `is_distributed`: on Citus, which grants tables with foreign keys only in a mode of its own.
    """
    text = sql.SQL(
        "{mode}"
        "GRANT USAGE ON SCHEMA {schema} TO {proxy}, {reader};\n"
        "GRANT SELECT ON {schema}.access_log_schema TO {proxy};\n"
        "GRANT INSERT ON {schema}.access_log, {schema}.access_log_gap TO {proxy};\n"
        "GRANT EXECUTE ON FUNCTION {schema}.access_log_ensure_partition, {schema}.artifact_add,"
        " {schema}.artifact_record, {schema}.access_log_run_record, {schema}.access_log_run_confirm TO {proxy};\n"
        "GRANT SELECT ON {relations} TO {reader};\n"
        "GRANT EXECUTE ON FUNCTION {functions} TO {reader};\n"
    )

    def qualified(names: tuple[str, ...]) -> sql.Composed:
        return sql.SQL(", ").join(sql.Identifier(schema, name) for name in names)

    return text.format(
        # Otherwise Citus could not grant tables with foreign keys in the same transaction as others.
        mode=sql.SQL(
            "SET citus.multi_shard_modify_mode TO 'sequential';\n" if is_distributed else ""
        ),
        schema=sql.Identifier(schema),
        proxy=sql.Identifier(proxy_role),
        reader=sql.Identifier(reader_role),
        relations=qualified(_READER_RELATIONS),
        functions=qualified(_READER_FUNCTIONS),
    ).as_string(None)


def _migrations_by_number(migrations: Path) -> dict[int, Path]:
    """Return schema.sql as number 1, and the migrations, such as 2 for 002_add_x.sql."""
    found = {1: SCHEMA}
    for path in sorted(migrations.glob("*.sql")):
        match = _MIGRATION_NAME.fullmatch(path.name)
        if match is None:
            raise SchemaError(
                f"{path.name} is not a valid migration name, expected a name such as 002_add_x.sql."
            )
        found[int(match[1])] = path
    if sorted(found) != list(range(1, len(found) + 1)):
        raise SchemaError(
            f"The migrations in {migrations.name} have a gap, expected consecutive numbers from 002."
        )
    return found


def _last_migration(connection: Connection[Any], newest: int) -> int:
    """Return the number of the last migration that was applied, or 0 if there is no schema yet.

    Raises:
        SchemaError: only newer versions can write, or a table `access_log` exists that is not ours.
    """
    existing: list[str] = _value(connection, _EXISTING_TABLES)
    if "access_log_schema" not in existing:
        if "access_log" in existing:
            raise SchemaError(
                "A table access_log exists that artifactapi did not create; use another database "
                "or schema in the connection string (options=-csearch_path=...)."
            )
        return 0
    version: int = _value(connection, _VERSION)
    if version > newest:
        raise SchemaError(
            f"The schema is at version {version}, but this artifactapi supports up to {newest}; "
            "upgrade artifactapi."
        )
    if "access_log_migration" not in existing:
        return version
    last: int = _value(connection, _MIGRATION)
    return max(version, last)


def _apply_next(connection: Connection[Any], migrations_by_number: dict[int, Path]) -> None:
    """Apply the next migration in a transaction, unless another process has applied the last one."""
    newest = max(migrations_by_number)
    with connection.transaction():
        connection.execute(_LOCK)
        number = _last_migration(connection, newest) + 1
        if number <= newest:
            connection.execute(_LOCK_TIMEOUT)
            _apply(connection, migrations_by_number[number], number)
            if is_distributed(connection):
                replicate(connection, _READER_RELATIONS)


def _check_coordinator(connection: Connection[Any], newest: int) -> None:
    if is_worker(connection):
        raise SchemaError(
            f"The schema has to be at version {newest}, and this server is a worker of a Citus cluster, which"
            " cannot change it; run `artifactapi init` on the coordinator as the owner of its tables."
        )


def _apply(connection: Connection[Any], path: Path, number: int) -> None:
    text = path.read_text(encoding="utf-8")
    connection.execute(text.encode())
    connection.execute(_MIGRATION_TABLE.read_text(encoding="utf-8").encode())
    if number == 1:  # someone has dropped the other tables
        connection.execute("DELETE FROM access_log_migration")
    connection.execute(_INSERT_MIGRATION, (number,))
    if not text.startswith(_COMPATIBLE):
        connection.execute(_INSERT_VERSION, (number,))


def _value(connection: Connection[Any], query: LiteralString) -> Any:
    (row,) = connection.execute(query).fetchall()
    return row[0]
