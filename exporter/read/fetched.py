"""Read which packages were ever fetched, and who fetched given ones. Knows no advisories.

Fetches are remembered by three tables: access_log has every row, the rollups have who fetched what on a
day whose rows were pruned, and artifact_by_node has every package ever fetched.
"""

from __future__ import annotations

from datetime import datetime  # noqa: TC003 - msgspec reads the annotations
from itertools import batched
from typing import TYPE_CHECKING, Any

from msgspec import Struct
from psycopg import sql

from ..advisories.names import package_column
from .selection import Selection, glob_condition

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from ..postgres.connection import DeadlineConnection

MAX_LISTED = 1000  # users and clients of one package that are listed; more are only counted
_PURLS_AT_ONCE = 20_000
# Millions of purls are made distinct in memory.
_PLANNER_SETTINGS = """
    SELECT set_config('work_mem', '128MB', true), set_config('hash_mem_multiplier', '2', true)
"""

# For all of them, the view artifact would take longer: it finds the first fetch of each.
_ALL_FETCHED = sql.SQL("SELECT DISTINCT purl FROM artifact_by_node")
_FETCHED = sql.SQL("SELECT purl FROM artifact WHERE access_log_package_key(purl) = ANY(%(keys)s)")
_COUNT = sql.SQL("SELECT count(DISTINCT purl) FROM artifact_by_node")
_EVER = sql.SQL("""
    SELECT purl, fetches, bytes, first_seen, last_seen, first_user, remote FROM artifact
    WHERE purl = ANY(%(purls)s)
""")
_LOG_START = sql.SQL("SELECT min(started_at) FROM access_log")
_WHO = sql.SQL("""
    count(*), sum(response_bytes)::bigint, min(started_at), max(started_at),
    coalesce((array_agg(DISTINCT proxy_user) FILTER (WHERE proxy_user IS NOT NULL))[1:{listed}], '{{}}'),
    count(DISTINCT proxy_user),
    coalesce((array_agg(DISTINCT host(client_ip)) FILTER (WHERE client_ip IS NOT NULL))[1:{listed}], '{{}}'),
    count(DISTINCT client_ip),
    coalesce((array_agg(DISTINCT host(client_ip))
              FILTER (WHERE proxy_user IS NULL AND client_ip IS NOT NULL))[1:{listed}], '{{}}'),
    count(DISTINCT client_ip) FILTER (WHERE proxy_user IS NULL),
    (array_agg(DISTINCT coalesce(remote, host)))[1:{listed}]
""").format(listed=sql.Literal(MAX_LISTED))
_FETCHES = sql.SQL("""
    SELECT purl, {who}, bool_or(access_log_from_cache(cache_status)),
           coalesce((array_agg(DISTINCT encode(sha256, 'hex')) FILTER (WHERE sha256 IS NOT NULL))[1:{listed}], '{{}}')
    FROM access_log_fetches
    WHERE {where} AND package = ANY(%(packages)s) AND purl = ANY(%(purls)s) GROUP BY purl
""")
# Whom the rollups remember, of days whose rows were pruned. Position 0 of users is NULL: no login.
_PRUNED = sql.SQL("""
    SELECT purl, min(from_at), max(until_at),
           coalesce((array_agg(DISTINCT proxy_user) FILTER (WHERE proxy_user IS NOT NULL))[1:{listed}], '{{}}'),
           count(DISTINCT proxy_user), bool_or(proxy_user IS NULL)
    FROM (
      SELECT purl, from_at, until_at, users[number] AS proxy_user
      FROM access_log_rollup JOIN access_log_rollup_artifact USING (rollup_id)
      CROSS JOIN unnest(user_numbers) AS number
      WHERE pruned_at IS NOT NULL AND purl = ANY(%(purls)s)
        AND (%(since)s::timestamptz IS NULL OR until_at > %(since)s)
        AND (%(until)s::timestamptz IS NULL OR from_at < %(until)s)
    ) AS fetched
    WHERE {user} GROUP BY purl
""")
_REMEMBERED = sql.SQL("""
    SELECT purl, sum(fetches)::bigint FROM (
      SELECT purl, count(*) AS fetches FROM access_log_fetches
      WHERE package = ANY(%(packages)s) AND purl = ANY(%(purls)s) GROUP BY purl
      UNION ALL
      SELECT purl, fetches FROM access_log_rollup JOIN access_log_rollup_artifact USING (rollup_id)
      WHERE pruned_at IS NOT NULL AND purl = ANY(%(purls)s)
    ) AS remembered GROUP BY purl
""")
# What a request did that did not fetch the artifact. The first that applies.
_HOW = sql.SQL("""
    CASE WHEN method = 'HEAD' THEN 'HEAD'
         WHEN NOT artifact_complete THEN 'partial download'
         WHEN access_log_failed(status_code) OR error_type IS NOT NULL THEN 'failed'
         WHEN status_code IN (404, 410) THEN 'not found'
         WHEN access_log_refused(status_code) THEN 'refused'
         WHEN artifact_kind = 'index' THEN 'index'
         WHEN artifact_kind = 'sidecar' THEN 'metadata'
         WHEN artifact_kind = 'blob' THEN 'image layer'
         ELSE 'other' END
""")
_LOOKS = sql.SQL("""
    SELECT purl, {how} AS how, {who}
    FROM access_log
    WHERE {where} AND artifact_complete IS NOT TRUE
      AND package = ANY(%(packages)s) AND purl = ANY(%(purls)s)
    GROUP BY purl, how
""")
_ALL_SEEN = sql.SQL("""
    SELECT DISTINCT purl FROM access_log
    WHERE {where} AND artifact_complete IS NOT TRUE AND purl IS NOT NULL
""")
_SEEN = sql.SQL("""
    SELECT DISTINCT purl FROM access_log
    WHERE {where} AND artifact_complete IS NOT TRUE AND purl IS NOT NULL AND package = ANY(%(packages)s)
""")


class Callers(Struct, frozen=True, kw_only=True):
    """Requests for one package, and who made them. Lists have at most MAX_LISTED items."""

    requests: int
    bytes: int | None  # of response bodies; None: none of them known
    first_at: datetime
    last_at: datetime
    users: list[str]  # proxy logins, such as builds
    user_count: int
    clients: list[str]  # addresses
    client_count: int
    anonymous_clients: list[str]  # those of requests without a login
    anonymous_client_count: int
    remotes: list[str]  # or hosts that are not a known remote


class Fetches(Callers, frozen=True, kw_only=True):
    """The fetches of one package."""

    from_cache: bool | None  # whether a cache answered any of them; None: no evidence
    sha256: list[str]


class Looks(Callers, frozen=True, kw_only=True):
    """Requests for one package that did not fetch it."""

    purl: str
    how: str  # HEAD, partial download, failed, not found, refused, index, metadata, other


class PrunedFetches(Struct, frozen=True):
    """Who fetched a package on days whose rows were pruned: what the rollups remember."""

    purl: str
    from_at: datetime  # start of the first day, in UTC
    until_at: datetime  # end of the last one
    users: list[str]  # at most MAX_LISTED
    user_count: int
    is_anonymous: bool  # whether some had no login


class EverFetched(Struct, frozen=True):
    """What the view artifact remembers, also after the rows were removed."""

    purl: str
    fetches: int
    bytes: int
    first_at: datetime
    last_at: datetime
    first_user: str | None
    remote: str | None


def fetched_purls(
    connection: DeadlineConnection, search_keys: Iterable[str] | None = None
) -> Iterator[str]:
    """Yield each Package URL that was ever fetched, in no order, in constant memory.

    Call it within `session.read_only`.

    Args:
        connection: To the database.
        search_keys: Only packages with these `names.search_key`; None: all.

    Raises:
        psycopg.Error, DeadlineExceededError: the query failed, took too long, or lost its connection.
    """
    statement = _ALL_FETCHED if search_keys is None else _FETCHED
    values = {} if search_keys is None else {"keys": list(search_keys)}
    yield from _purls(connection, statement, values)


def count_fetched(connection: DeadlineConnection) -> int:
    """Return how many Package URLs were ever fetched. Raises as `fetched_purls`."""
    row = connection.execute(_COUNT).fetchone()
    return int(row[0]) if row else 0


def seen_purls(
    connection: DeadlineConnection, selection: Selection, packages: Iterable[str] | None = None
) -> Iterator[str]:
    """Yield each Package URL of a selected request that fetched nothing.

    Call it within `session.read_only`. Raises as `fetched_purls`.

    Args:
        connection: To the database.
        selection: Which requests.
        packages: Only these values of the column package; None: all.
    """
    where, values = selection.where()
    if packages is not None:
        values["packages"] = list(packages)
    statement = (_ALL_SEEN if packages is None else _SEEN).format(where=where)
    yield from _purls(connection, statement, values)


def fetches_of(
    connection: DeadlineConnection, selection: Selection, purls: Iterable[str]
) -> dict[str, Fetches]:
    """Return who fetched given Package URLs with the selected requests. Others are left out.

    Call it within `session.read_only`. Raises as `fetched_purls`.
    """
    statement = _FETCHES.format(
        who=_WHO, where=selection.where()[0], listed=sql.Literal(MAX_LISTED)
    )
    return {
        purl: Fetches(**_callers(row), from_cache=row[11], sha256=row[12])
        for purl, *row in _rows_of(connection, statement, selection, purls)
    }


def looks_at(
    connection: DeadlineConnection, selection: Selection, purls: Iterable[str]
) -> list[Looks]:
    """Return the selected requests for given Package URLs that did not fetch them, by what they did.

    Call it within `session.read_only`. Raises as `fetched_purls`.
    """
    statement = _LOOKS.format(how=_HOW, who=_WHO, where=selection.where()[0])
    return [
        Looks(purl=purl, how=how, **_callers(row))
        for purl, how, *row in _rows_of(connection, statement, selection, purls)
    ]


def ever_fetched(connection: DeadlineConnection, purls: Iterable[str]) -> dict[str, EverFetched]:
    """Return what is known of the fetches of given Package URLs, also of rows that were removed.

    Call it within `session.read_only`. Raises as `fetched_purls`.
    """
    found = {}
    for batch in batched(purls, _PURLS_AT_ONCE, strict=False):
        for row in connection.execute(_EVER, {"purls": list(batch)}):
            found[row[0]] = EverFetched(*row)
    return found


def pruned_fetches(
    connection: DeadlineConnection, selection: Selection, purls: Iterable[str]
) -> dict[str, PrunedFetches]:
    """Return who fetched given Package URLs on days whose rows were pruned. Others are left out.

    Of the filters only `user` and the time apply; a day counts if the time includes a part of it.
    Call it within `session.read_only`. Raises as `fetched_purls`.
    """
    user: sql.SQL | sql.Composed = sql.SQL("true")
    values: dict[str, Any] = {"since": selection.since, "until": selection.until}
    if selection.user is not None:
        condition, values["where_user"] = glob_condition("user", "proxy_user", selection.user)
        user = sql.SQL(condition)
    statement = _PRUNED.format(listed=sql.Literal(MAX_LISTED), user=user)
    found = {}
    for batch in batched(purls, _PURLS_AT_ONCE, strict=False):
        for row in connection.execute(statement, {**values, "purls": list(batch)}):
            found[row[0]] = PrunedFetches(*row)
    return found


def remembered_fetches(connection: DeadlineConnection, purls: Iterable[str]) -> dict[str, int]:
    """Return how many fetches of given Package URLs rows or rollups still tell who made them.

    Call it within `session.read_only`. Raises as `fetched_purls`.
    """
    return dict(_rows_of(connection, sql.Composed([_REMEMBERED]), Selection(), purls))


def log_start(connection: DeadlineConnection) -> datetime | None:
    """Return the time of the oldest row; None: there is none. Raises as `fetched_purls`."""
    row = connection.execute(_LOG_START).fetchone()
    return row[0] if row else None


def _purls(
    connection: DeadlineConnection, query: sql.SQL | sql.Composed, values: dict[str, Any]
) -> Iterator[str]:
    """Stream a column of texts with COPY, which PostgreSQL can do in parallel, unlike a cursor."""
    connection.execute(_PLANNER_SETTINGS)
    with (
        connection.cursor() as cursor,
        cursor.copy(sql.SQL("COPY ({}) TO STDOUT").format(query), values) as copy,
    ):
        for (purl,) in copy.rows():
            if purl is not None:
                yield purl


def _rows_of(
    connection: DeadlineConnection,
    statement: sql.Composed,
    selection: Selection,
    purls: Iterable[str],
) -> Iterator[tuple[Any, ...]]:
    """Run a statement for some purls at a time. The column package has an index, purl has none."""
    _, values = selection.where()
    for batch in batched(purls, _PURLS_AT_ONCE, strict=False):
        packages = {package_column(purl) for purl in batch} - {None}
        values |= {"purls": list(batch), "packages": list(packages)}
        yield from connection.execute(statement, values)


def _callers(row: list[Any]) -> dict[str, Any]:
    return dict(zip(Callers.__struct_fields__, row, strict=False))
