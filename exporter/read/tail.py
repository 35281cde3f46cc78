"""Find the newest rows of access_log, and those that arrive, each once; how they look is lines.py's job."""

from __future__ import annotations

import itertools
import threading
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import UUID

from psycopg import sql

from ..postgres.connection import describe
from . import time_search
from .session import DATABASE_ERRORS, JSON_ROW, is_temporary, open_database, read_only, time_limited

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator

    from psycopg import Connection

    from ..postgres.connection import DeadlineConnection
    from ..settings import Settings
    from .selection import Selection

POLL_SECONDS = 0.5
# A row bears the time its transaction began; another writer's may become visible later than ours.
_OVERLAP = timedelta(seconds=60)
_STATEMENT_SECONDS = 60.0  # a filter that almost nothing matches reads all since --since
_AWAY_SECONDS = 1.0
_FETCH_ROWS = 1000
_CURSOR = "artifactapi_tail"

_NEWEST = sql.SQL("""
    SELECT * FROM (
      SELECT {columns} FROM access_log WHERE {where} AND {stretch}
    ) AS newest ORDER BY logged_at DESC, started_at DESC LIMIT %(limit)s
""")
# OFFSET 0 has it planned as if all rows of the stretch were wanted: few match, if any.
_STRETCH = sql.SQL("logged_at >= %(from)s AND logged_at < %(to)s OFFSET 0")
_BEFORE = sql.SQL("SELECT max(logged_at) FROM access_log WHERE {span} AND logged_at < %(to)s")
# All rows of one transaction bear the same time and become visible at once: where there are as many
# as were seen there is nothing new, and nothing has to be fetched again.
_COUNTS = sql.SQL("""
    SELECT logged_at, count(*) FROM access_log WHERE logged_at >= %(since)s AND {where}
    GROUP BY logged_at ORDER BY logged_at
""")
_KEYS = sql.SQL("""
    SELECT logged_at, started_at, flow_id FROM access_log WHERE logged_at >= %(since)s AND {where}
""")
_ARRIVED = sql.SQL("""
    SELECT {columns} FROM access_log WHERE logged_at = ANY(%(stamps)s) AND {where}
    ORDER BY logged_at, started_at
""")

type Key = tuple[datetime, UUID]


class Row(NamedTuple):
    """What a line of the terminal or of the page is made of; names and meaning as in access_log."""

    started_at: datetime
    flow_id: UUID
    logged_at: datetime
    client_ip: Any
    proxy_user: str | None
    method: str | None
    scheme: str | None
    host: str | None
    port: int | None
    path: str | None
    status_code: int | None
    error_type: str | None
    response_bytes: int | None
    duration_ms: float | None
    cache_status: str | None
    purl: str | None
    json: str | None  # all columns, one line, where asked for

    @property
    def key(self) -> Key:
        """What tells rows apart."""
        return self.started_at, self.flow_id


class Newest(NamedTuple):
    """The rows that reached Postgres last, oldest of them first."""

    rows: list[Row]
    searched_back_to: datetime | None  # what is older was not looked at; None: all was


def newest(
    connection: DeadlineConnection, selection: Selection, count: int, *, as_json: bool = False
) -> Newest:
    """At most `count` rows; with filters and without `since`, of those that a short search finds.

    Raises:
        psycopg.Error, DeadlineExceededError: the server refused, took too long or went away.
    """
    where, values = selection.where()

    def ask(stretch: sql.SQL, limit: int, **bounds: datetime) -> list[Row]:
        query = _NEWEST.format(columns=columns(as_json=as_json), where=where, stretch=stretch)
        found = connection.execute(query, {**values, **bounds, "limit": limit})
        return [Row(*row) for row in found]

    def search(since: datetime, until: datetime, limit: int, seconds: float | None) -> list[Row]:
        with time_limited(connection, seconds):
            return ask(_STRETCH, limit, **{"from": since, "to": until})

    with read_only(connection, _STATEMENT_SECONDS):
        if selection.since or not selection.filters() or not count:
            return Newest(ask(sql.SQL("true"), count)[::-1], None)
        span, bound = selection.time_alone().where()
        before = _BEFORE.format(span=span)
        rows, searched_back_to = time_search.search_back(
            lambda until: moment(connection, before, {**bound, "to": until}),
            search,
            count,
            time_search.SEARCH_SECONDS,
        )
    return Newest(rows[::-1], searched_back_to)


class Follower:
    """Knows which rows are there, and finds those that come after; outlives any connection."""

    def __init__(
        self, connection: DeadlineConnection, selection: Selection, *, as_json: bool = False
    ) -> None:
        """From now on. Raises psycopg.Error or DeadlineExceededError, as its methods do."""
        self._columns = columns(as_json=as_json)
        self._where, self._values = selection.where()
        self._seen: dict[datetime, set[Key]] = {}  # by logged_at, as far back as it may still grow
        with read_only(connection, _STATEMENT_SECONDS):
            self._looked_at = _now(connection)
            for at, *key in self._ask(connection, _KEYS, since=self._looked_at - _OVERLAP):
                self._seen.setdefault(at, set()).add((key[0], key[1]))

    def remember(self, row: Row) -> bool:
        """Take the row for told; whether it was not before."""
        keys = self._seen.setdefault(row.logged_at, set())
        new = row.key not in keys
        keys.add(row.key)
        return new

    def look(self, connection: DeadlineConnection) -> Generator[Row]:
        """Rows that came since the last look, each once, also of several writers.

        What a look that failed did not tell the next one does.
        """
        with read_only(connection, _STATEMENT_SECONDS):
            now = _now(connection)
            counts = self._ask(connection, _COUNTS, since=self._looked_at - _OVERLAP)
            grown = [at for at, n in counts if n != len(self._seen.get(at, ()))]
            if grown:
                yield from filter(self.remember, self._arrived(connection, grown))
        self._looked_at = now
        self._seen = {at: keys for at, keys in self._seen.items() if at > now - 2 * _OVERLAP}

    def _ask(
        self, connection: DeadlineConnection, query: sql.SQL, **values: Any
    ) -> list[tuple[Any, ...]]:
        statement = query.format(where=self._where)
        return connection.execute(statement, {**self._values, **values}).fetchall()

    def _arrived(self, connection: DeadlineConnection, stamps: list[datetime]) -> Iterator[Row]:
        """All rows that bear one of these times; some at a time: after an outage they may be many."""
        query = _ARRIVED.format(columns=self._columns, where=self._where)
        with connection.cursor(_CURSOR) as cursor:
            cursor.itersize = _FETCH_ROWS
            for row in cursor.execute(query, {**self._values, "stamps": stamps}):
                yield Row(*row)


def tail(
    settings: Settings,
    selection: Selection,
    count: int,
    *,
    following: bool,
    as_json: bool,
    say: Callable[[str], None],
) -> Iterator[tuple[Row, ...]]:
    """The newest rows in one batch, which may be empty; then, `following`, those that arrive, for ever.

    A database that goes away while it is followed is waited for; no row is left out or told twice.

    Args:
        settings: Which database.
        selection: Which rows.
        count: How many of the newest.
        following: Whether to go on.
        as_json: Whether the rows have their `json`.
        say: Takes a sentence where not all of the log was searched; when the database is away, once,
            and one when it is back.

    Raises:
        psycopg.Error, DeadlineExceededError, SchemaError, OSError: at the start; later, what waiting
            does not mend.
    """
    follower: Follower | None = None
    is_unavailable = False
    pause = threading.Event()
    while True:
        try:
            with open_database(settings) as connection:
                if follower is None:
                    follower, found = _begin(connection, selection, count, as_json=as_json)
                    yield tuple(found.rows)
                    if found.searched_back_to is not None:
                        say(_how_far(found.searched_back_to))
                if not following:
                    return
                if is_unavailable:
                    say("The database is back.")
                    is_unavailable = False
                while True:
                    yield from itertools.batched(follower.look(connection), _FETCH_ROWS)
                    pause.wait(POLL_SECONDS)
        except DATABASE_ERRORS as e:
            if follower is None or not is_temporary(e):
                raise
            if not is_unavailable:
                say(f"The database is away: {describe(e).rstrip('.')}. Waiting for it.")
            is_unavailable = True
        pause.wait(_AWAY_SECONDS)


def _begin(
    connection: DeadlineConnection, selection: Selection, count: int, *, as_json: bool
) -> tuple[Follower, Newest]:
    """The newest rows, and a follower that goes on after them."""
    follower = Follower(connection, selection, as_json=as_json)
    found = newest(connection, selection, count, as_json=as_json)
    for row in found.rows:
        follower.remember(row)
    return follower, found


def columns(*, as_json: bool = False) -> sql.Composed:
    """What to SELECT for a Row."""
    json = JSON_ROW if as_json else sql.SQL("NULL")
    return sql.SQL(", ").join(
        [*map(sql.Identifier, Row._fields[:-1]), sql.SQL("{} AS json").format(json)]
    )


def _how_far(searched_back_to: datetime) -> str:
    """By when rows were logged, and not, as --until goes by, began: it could leave some out."""
    return (
        f"Searched back to what was logged at {searched_back_to.astimezone().isoformat(timespec='seconds')};"
        " name a time with --since, such as 7d, to search all of it."
    )


def _now(connection: DeadlineConnection) -> datetime:
    now = moment(connection, sql.SQL("SELECT now()"), {})
    if now is None:
        raise AssertionError
    return now


def moment(
    connection: Connection[Any], query: sql.SQL | sql.Composed, values: dict[str, Any]
) -> datetime | None:
    """The one moment that is the answer."""
    row = connection.execute(query, values).fetchone()
    found: datetime | None = row[0] if row else None
    return found
