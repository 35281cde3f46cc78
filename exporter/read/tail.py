"""Print the newest rows and follow new ones: find each row once. lines.py formats them."""

from __future__ import annotations

import itertools
import threading
import time
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID

from psycopg import sql

from ..postgres.connection import describe
from . import time_search
from .archived import LOADED_ROWS, with_archive
from .left_days import left_days_notice
from .newest import BY_ARRIVAL, NewestRows, Row, columns, newest, single_time
from .session import DATABASE_ERRORS, is_temporary, open_database, read_only

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator
    from pathlib import Path

    from ..postgres.connection import DeadlineConnection
    from ..settings import Settings
    from .selection import Selection

POLL_SECONDS = 0.5
# logged_at is the start of the transaction, so rows of one writer can become visible after later
# rows of another.
_OVERLAP = timedelta(seconds=60)
_STATEMENT_SECONDS = 60.0  # with --since, a filter that matches few rows scans the whole span
_RECONNECT_SECONDS = 1.0
_ARCHIVE_SECONDS = 10.0  # without --since, how long to search archived days
_FETCH_ROWS = 1000
_CURSOR_NAME = "artifactapi_tail"

_NOW = sql.SQL("SELECT now()")
# All rows of a transaction have the same logged_at and become visible together. So if the count of a
# logged_at is unchanged, it has no new rows.
_COUNTS = sql.SQL("""
    SELECT logged_at, count(*) FROM access_log WHERE logged_at >= %(since)s AND {where}
    GROUP BY logged_at ORDER BY logged_at
""")
_KEYS = sql.SQL("""
    SELECT logged_at, started_at, flow_id FROM access_log WHERE logged_at >= %(since)s AND {where}
""")
_ROWS_LOGGED_AT = sql.SQL("""
    SELECT {columns} FROM access_log WHERE logged_at = ANY(%(times)s) AND {where}
    ORDER BY logged_at, started_at
""")

type Key = tuple[datetime, UUID]


class Follower:
    """Finds new rows and remembers which rows it has seen. Survives reconnects."""

    def __init__(
        self, connection: DeadlineConnection, selection: Selection, *, as_json: bool = False
    ) -> None:
        """Start at the current end of the log.

        Raises:
            psycopg.Error, DeadlineExceededError: as all methods that take a connection.
        """
        self._columns = columns(as_json=as_json)
        self._where, self._values = selection.where()
        self._seen: dict[datetime, set[Key]] = {}  # by logged_at; only times that can get new rows
        with read_only(connection, _STATEMENT_SECONDS):
            self._polled_at = _server_time(connection)
            for logged_at, *key in self._query(connection, _KEYS, since=self._polled_at - _OVERLAP):
                self._seen.setdefault(logged_at, set()).add((key[0], key[1]))

    def mark_seen(self, row: Row) -> bool:
        """Remember the row. Return whether it is new."""
        keys = self._seen.setdefault(row.logged_at, set())
        is_new = row.key not in keys
        keys.add(row.key)
        return is_new

    def poll(self, connection: DeadlineConnection) -> Generator[Row]:
        """Yield the rows that arrived since the last poll, each once, whichever proxy wrote them.

        If a poll fails halfway, the next one yields the rest.
        """
        with read_only(connection, _STATEMENT_SECONDS):
            now = _server_time(connection)
            counts = self._query(connection, _COUNTS, since=self._polled_at - _OVERLAP)
            grown = [at for at, count in counts if count != len(self._seen.get(at, ()))]
            if grown:
                yield from filter(self.mark_seen, self._rows_logged_at(connection, grown))
        self._polled_at = now
        self._seen = {at: keys for at, keys in self._seen.items() if at > now - 2 * _OVERLAP}

    def _query(
        self, connection: DeadlineConnection, query: sql.SQL, **values: Any
    ) -> list[tuple[Any, ...]]:
        statement = query.format(where=self._where)
        return connection.execute(statement, {**self._values, **values}).fetchall()

    def _rows_logged_at(
        self, connection: DeadlineConnection, times: list[datetime]
    ) -> Iterator[Row]:
        """Yield all rows with these logged_at, in batches: after an outage there can be many."""
        query = _ROWS_LOGGED_AT.format(columns=self._columns, where=self._where)
        with connection.cursor(_CURSOR_NAME) as cursor:
            cursor.itersize = _FETCH_ROWS
            for row in cursor.execute(query, {**self._values, "times": times}):
                yield Row(*row)


def tail(
    settings: Settings,
    selection: Selection,
    count: int,
    *,
    following: bool,
    as_json: bool,
    notify: Callable[[str], None],
    archive: Path | None = None,
) -> Iterator[tuple[Row, ...]]:
    """Yield the newest rows as one batch, which may be empty; then, if `following`, new rows forever.

    While following, it waits for an unavailable database. It skips and repeats no row.

    Args:
        settings: Which database.
        selection: Which rows.
        count: Maximum number of newest rows.
        following: Whether to continue with new rows.
        as_json: Whether to fill in `Row.json`.
        notify: Called with one sentence if the search was incomplete or days are only in files, when the
            database becomes unavailable, and when it is available again.
        archive: The folder of archived days to search as well. New rows come from the table.

    Raises:
        ArchiveError: the archive cannot be read.
        psycopg.Error, DeadlineExceededError, SchemaError, OSError: the first query failed, or a
            later one with an error that waiting does not fix.
    """
    follower: Follower | None = None
    is_unavailable = False
    pause = threading.Event()
    while True:
        try:
            with open_database(settings) as connection:
                if follower is None:
                    follower, found = _start(
                        connection, selection, count, as_json=as_json, archive=archive
                    )
                    yield tuple(reversed(found.rows))
                    has_all = archive is not None or len(found.rows) == count
                    for notice in _notices(connection, settings, selection, found, has_all=has_all):
                        notify(notice)
                if not following:
                    return
                if is_unavailable:
                    notify("The database is available again.")
                    is_unavailable = False
                while True:
                    yield from itertools.batched(follower.poll(connection), _FETCH_ROWS)
                    pause.wait(POLL_SECONDS)
        except DATABASE_ERRORS as e:
            if follower is None or not is_temporary(e):
                raise
            if not is_unavailable:
                notify(f"The database is unavailable: {describe(e).rstrip('.')}. Waiting for it.")
            is_unavailable = True
        pause.wait(_RECONNECT_SECONDS)


def _start(
    connection: DeadlineConnection,
    selection: Selection,
    count: int,
    *,
    as_json: bool,
    archive: Path | None,
) -> tuple[Follower, NewestRows]:
    """Find the newest rows, and make a follower that continues after them."""
    follower = Follower(connection, selection, as_json=as_json)
    # Only a search that names no start time gets a time limit.
    seconds = None if selection.since or not count else time_search.SEARCH_SECONDS
    if archive is None:
        with read_only(connection, _STATEMENT_SECONDS):
            found = newest(
                connection, selection, count, BY_ARRIVAL, search_seconds=seconds, as_json=as_json
            )
    else:
        found = _newest_with_archive(
            connection, archive, selection, count, search_seconds=seconds, as_json=as_json
        )
    for row in found.rows:
        follower.mark_seen(row)
    return follower, found


def _newest_with_archive(
    connection: DeadlineConnection,
    archive: Path,
    selection: Selection,
    count: int,
    *,
    search_seconds: float | None,
    as_json: bool,
) -> NewestRows:
    """Find the newest rows of the table, and then load archived days until none can have a newer one."""
    with with_archive(connection, archive) as loader, read_only(connection, _STATEMENT_SECONDS):
        found = newest(
            connection, selection, count, BY_ARRIVAL, search_seconds=search_seconds, as_json=as_json
        )
        if found.searched_back_to is not None:
            return found
        give_up_at = time.monotonic() + (_ARCHIVE_SECONDS if search_seconds else float("inf"))
        rows = found.rows
        for span in sorted(
            loader.days(selection), key=lambda span: span.last_arrival, reverse=True
        ):
            if len(rows) == count and (not count or rows[-1].logged_at > span.last_arrival):
                break
            if time.monotonic() > give_up_at:
                return NewestRows(rows, span.last_arrival)
            loader.load(selection, [span], newest=count)
            more = newest(
                connection, selection, count, BY_ARRIVAL, as_json=as_json, relation=LOADED_ROWS
            )
            loader.forget()
            rows = sorted([*rows, *more.rows], key=_arrival, reverse=True)[:count]
        return NewestRows(rows, None)


def _arrival(row: Row) -> tuple[datetime, datetime]:
    return row.logged_at, row.started_at


def _notices(
    connection: DeadlineConnection,
    settings: Settings,
    selection: Selection,
    found: NewestRows,
    *,
    has_all: bool,
) -> Iterator[str]:
    """Say what the first rows leave out. `has_all`: none of it can be rows that are only in files."""
    if found.searched_back_to is not None:
        yield _search_limit(found.searched_back_to)
    elif not has_all:
        notice = left_days_notice(connection, selection, settings.retention.archive)
        if notice:
            yield notice


def _search_limit(searched_back_to: datetime) -> str:
    """Say how far the search got.

    This is a logged_at, so it does not suggest --until, which compares started_at and could skip rows.
    """
    return (
        f"Searched back to rows logged at {searched_back_to.astimezone().isoformat(timespec='seconds')};"
        " set a start time with --since, such as --since 7d, to search all rows after it."
    )


def _server_time(connection: DeadlineConnection) -> datetime:
    now = single_time(connection, _NOW, {})
    if now is None:
        raise AssertionError
    return now
