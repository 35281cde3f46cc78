"""The days of access_log, as partitions: list the old ones, detach and drop them. Decides nothing."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from psycopg import sql

from ..archive.files import files_of_day
from ..day import day_span
from ..postgres.citus import in_sequence, is_distributed
from .repeats import counted_files, remove_repeats

if TYPE_CHECKING:
    from pathlib import Path

    from psycopg import Connection

DAYS_AHEAD = 3  # partitions that exist before their day begins

# A partition that was detached tells by its comment that it was ours to prune, and its bounds.
_COMMENT = "Pruned from access_log by artifactapi: {} until {}"
_COMMENT_PATTERN = "^Pruned from access_log by artifactapi: (\\S+) until (\\S+)$"
_OLD = """
    SELECT nspname, relname, from_at, until_at, access_log_size(partition_oid), 'attached'
    FROM access_log_partitions
    JOIN pg_class ON pg_class.oid = partition_oid JOIN pg_namespace ON pg_namespace.oid = relnamespace
    WHERE until_at <= %s AND from_at > '-infinity'
    ORDER BY from_at
"""
# Left by a run that was interrupted: detached, or not quite (PostgreSQL docs, ALTER TABLE, "FINALIZE"). Another schema
# may hold another log.
_LEFT = """
    SELECT nspname, relname, bounds[1]::timestamptz, bounds[2]::timestamptz,
           access_log_size(pg_class.oid),
           CASE WHEN inhdetachpending THEN 'detaching' ELSE 'detached' END
    FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace
    CROSS JOIN regexp_match(obj_description(pg_class.oid, 'pg_class'), %s) AS bounds
    LEFT JOIN pg_inherits ON inhrelid = pg_class.oid AND inhparent = 'access_log'::regclass
    WHERE bounds IS NOT NULL AND (inhdetachpending OR NOT relispartition)
    AND relnamespace = (SELECT relnamespace FROM pg_class WHERE oid = 'access_log'::regclass)
    ORDER BY 3
"""
# Marked by a run that could not begin to detach them.
_MARKED = """
    SELECT nspname, relname FROM pg_inherits
    JOIN pg_class ON pg_class.oid = inhrelid JOIN pg_namespace ON pg_namespace.oid = relnamespace
    WHERE inhparent = 'access_log'::regclass AND NOT inhdetachpending
    AND obj_description(inhrelid, 'pg_class') ~ %s
"""
# Transactions that use the log. A process id alone would also find the next transaction of a writer.
_USERS = """
    SELECT DISTINCT pid, virtualtransaction FROM pg_locks
    WHERE locktype = 'relation' AND relation = 'access_log'::regclass AND granted AND pid <> pg_backend_pid()
"""
# What keeps a partition from being dropped. Its own constraints and the like go with it.
_DEPENDENTS = """
    SELECT DISTINCT replace(pg_describe_object(classid, objid, objsubid), 'rule _RETURN on ', '')
    FROM pg_depend AS other
    WHERE refclassid = 'pg_class'::regclass AND refobjid = %s::regclass AND deptype = 'n'
    AND NOT EXISTS (SELECT FROM pg_depend AS own
                    WHERE own.classid = other.classid AND own.objid = other.objid
                    AND own.refclassid = other.refclassid AND own.refobjid = other.refobjid AND own.deptype <> 'n')
    ORDER BY 1
"""
_SHORT_SECONDS = 1.0  # a batch takes less
_CHECKS = 20  # during that time
_OWNS = "SELECT pg_has_role(relowner, 'MEMBER') FROM pg_class WHERE oid = 'access_log'::regclass"
_ROLL_UP = "SELECT access_log_roll_up(%s::regclass, %s, %s)"
_MARK_PRUNED = """
    UPDATE access_log_rollup SET pruned_at = now(), archive_files = %s WHERE rollup_id = %s
"""


class LogInUseError(Exception):
    """A long transaction uses the log, so that no partition can be detached just now."""


class DependentsError(Exception):
    """Something that somebody created needs a partition, so that it cannot be dropped. The message is one sentence."""


class Partition(NamedTuple):
    """A table that holds, or held, the rows of access_log from `from_at` until `until_at` (exclusive), in UTC."""

    schema: str
    name: str
    from_at: datetime
    until_at: datetime
    bytes: int  # with its indexes
    state: Literal["attached", "detaching", "detached"]

    @property
    def table(self) -> sql.Identifier:
        """The qualified name, for SQL."""
        return sql.Identifier(self.schema, self.name)

    @property
    def days(self) -> list[date]:
        """The days (UTC) that it can hold."""
        first = self.from_at.astimezone(UTC).date()
        last = (self.until_at.astimezone(UTC) - timedelta(microseconds=1)).date()
        return [first + timedelta(days=n) for n in range((last - first).days + 1)]

    def count_rows(self, connection: Connection[Any]) -> int:
        """The exact number of its rows."""
        (row,) = connection.execute(
            sql.SQL("SELECT count(*) FROM {}").format(self.table)
        ).fetchall()
        return int(row[0])

    def contents(self, connection: Connection[Any]) -> tuple[int, datetime | None]:
        """The number of its rows and the latest `logged_at`: if both stay, no row has arrived."""
        (row,) = connection.execute(
            sql.SQL("SELECT count(*), max(logged_at) FROM {}").format(self.table)
        ).fetchall()
        return int(row[0]), row[1]


def owns_log(connection: Connection[Any]) -> bool:
    """Whether this role may detach and drop partitions."""
    (row,) = connection.execute(_OWNS).fetchall()
    return bool(row[0])


def create_days_ahead(connection: Connection[Any]) -> None:
    """Create the partitions of the next days, so that no batch at midnight has to. Idempotent."""
    today = datetime.now(UTC).date()
    for n in range(DAYS_AHEAD + 1):
        connection.execute("SELECT access_log_ensure_partition(%s)", (today + timedelta(days=n),))


def old_partitions(connection: Connection[Any], before: datetime) -> list[Partition]:
    """The partitions that hold only rows from before this time, the oldest first."""
    return [_partition(*row) for row in connection.execute(_OLD, (before,))]


def left_partitions(connection: Connection[Any]) -> list[Partition]:
    """The partitions that an interrupted run has detached but not dropped, the oldest first."""
    return [_partition(*row) for row in connection.execute(_LEFT, (_COMMENT_PATTERN,))]


def _partition(
    schema: str, name: str, from_at: datetime, until_at: datetime, *rest: Any
) -> Partition:
    """The times come in the time zone of the session, in which a day can have 23 or 25 hours."""
    return Partition(schema, name, from_at.astimezone(UTC), until_at.astimezone(UTC), *rest)


def unmark(connection: Connection[Any]) -> None:
    """Remove the comment that marks a partition as ours to drop from those that are still attached.

    Otherwise, one that somebody detaches by hand later, to keep it, would be dropped.
    """
    for name in connection.execute(_MARKED, (_COMMENT_PATTERN,)).fetchall():
        connection.execute(sql.SQL("COMMENT ON TABLE {} IS NULL").format(sql.Identifier(*name)))


def check_dependents(connection: Connection[Any], partition: Partition) -> None:
    """Check that the partition can be dropped, before its day leaves the log.

    Raises:
        DependentsError: A view of somebody or the like depends on it.
        psycopg.Error: The query failed.
    """
    name = partition.table.as_string(connection)
    found = [dependent for (dependent,) in connection.execute(_DEPENDENTS, (name,))]
    if found:
        raise DependentsError(
            f"The partition {partition.name} cannot be removed, because {', '.join(found)} depends on it; drop that, or"
            " let it read access_log."
        )


def detach(connection: Connection[Any], partition: Partition) -> None:
    """Detach the partition while others read and write the log. Not in a transaction.

    Between the two steps of DETACH CONCURRENTLY, the day has no partition, so late rows for it wait.
    Therefore this does not begin while there is a transaction that it would have to wait for.

    Raises:
        LogInUseError: There is such a transaction; nothing was done.
        psycopg.Error: A transaction came in between; `left_partitions` has the partition now.
    """
    _check_short_use(connection)
    if partition.state == "attached":
        comment = _COMMENT.format(partition.from_at.isoformat(), partition.until_at.isoformat())
        connection.execute(
            sql.SQL("COMMENT ON TABLE {} IS {}").format(partition.table, sql.Literal(comment))
        )
    statement = sql.SQL("ALTER TABLE access_log DETACH PARTITION {}").format(partition.table)
    if is_distributed(connection):
        _detach_on_all_nodes(connection, statement)
    else:
        how = " CONCURRENTLY" if partition.state == "attached" else " FINALIZE"
        connection.execute(statement + sql.SQL(how))


def _detach_on_all_nodes(connection: Connection[Any], statement: sql.Composed) -> None:
    """Citus cannot detach CONCURRENTLY. So that no writer waits long, each node waits for its locks for a second."""
    with connection.transaction():
        connection.execute("SET LOCAL citus.propagate_set_commands TO 'local'")
        connection.execute("SET LOCAL lock_timeout = '1s'")
        connection.execute(statement)


def _check_short_use(connection: Connection[Any]) -> None:
    users = set(connection.execute(_USERS).fetchall())
    for _ in range(_CHECKS):
        if not users:
            return
        connection.execute("SELECT pg_sleep(%s)", (_SHORT_SECONDS / _CHECKS,))
        users &= set(connection.execute(_USERS).fetchall())
    if users:
        pids = ", ".join(str(pid) for pid, _ in sorted(users))
        raise LogInUseError(
            f"a long transaction uses access_log (process {pids} of PostgreSQL, perhaps a pg_dump)"
        )


def drop(connection: Connection[Any], partition: Partition, archive: Path | None) -> int:
    """Roll up and drop a detached partition in one transaction; return the number of its rows.

    Rows that had left the table before and came again do not count.

    Args:
        connection: As the owner of the tables.
        partition: The partition.
        archive: The folder that has its rows; None: they are in no archive.

    Raises:
        ArchiveError: A file of one of its days is damaged.
        psycopg.Error: The server reported an error.
    """
    with connection.transaction():
        in_sequence(connection)
        connection.execute(sql.SQL("LOCK TABLE {}").format(partition.table))
        if archive is not None:
            for day in partition.days:
                remove_repeats(connection, partition.table, day, archive)
        rows = partition.count_rows(connection)
        if rows:
            name = partition.table.as_string(connection)
            for day in partition.days:
                files = _new_files(connection, day, archive)
                ((rollup,),) = connection.execute(_ROLL_UP, (name, *day_span(day))).fetchall()
                connection.execute(_MARK_PRUNED, (files, rollup))
        connection.execute(sql.SQL("DROP TABLE {}").format(partition.table))
    return rows


def _new_files(connection: Connection[Any], day: date, archive: Path | None) -> list[str]:
    """Return the names of the files of a day whose rows no totals of pruned rows count yet."""
    if archive is None:
        return []
    counted = counted_files(connection, day, archive)
    return [path.name for path in files_of_day(archive, day) if path not in counted]
