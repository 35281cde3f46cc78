"""Sum up a span of the log from one state of the database; how it looks is not decided here."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec import Struct, structs
from psycopg import sql

from ..rows.cache_status import FROM_CACHE
from .selection import SelectionError
from .session import read_only

if TYPE_CHECKING:
    from ..postgres.connection import DeadlineConnection
    from .selection import Selection

DEFAULT_SPAN = timedelta(hours=24)
TOP = 10  # how many of each kind are named
_STATEMENT_SECONDS = 120.0
_MAX_BARS = 60
_CLASSES = 50  # of durations, to a factor of e: each some two per cent wide
_LEAST_REFUSAL = 400
_LEAST_FAILURE = 500
_WIDTHS = tuple(
    timedelta(minutes=it)
    for it in (1, 2, 5, 10, 15, 30, 60, 120, 180, 360, 720, 1440, 2880, 10_080)
)
_EPOCH = datetime(1970, 1, 5, tzinfo=UTC)  # a Monday, for bars of a week
# Bars begin before the span and end after it.
_EARLIEST, _LATEST = datetime(1900, 1, 1, tzinfo=UTC), datetime(9000, 1, 1, tzinfo=UTC)

# Some hundred thousand rows become a few groups: in memory, by two processes, since little is handed
# from one to the other and more than two wait for the one that groups. Rows of a span lie together:
# of a day half asked for, half is read.
_PLANNER_SETTINGS = """
    SELECT set_config('work_mem', '64MB', true), set_config('random_page_cost', '1.1', true),
           set_config('max_parallel_workers_per_gather', '1', true),
           set_config('parallel_tuple_cost', '0.001', true), set_config('parallel_setup_cost', '100', true)
"""

_TRAFFIC = sql.SQL("""
    SELECT date_bin(%(width)s, started_at, %(origin)s) AS at, cache_source, cache_status, error_type,
           status_code, count(*) AS requests, coalesce(sum(response_bytes), 0)::bigint AS bytes
    FROM access_log WHERE {where} GROUP BY 1, 2, 3, 4, 5
""")
# Sorting all durations takes longer than all the rest: they are counted in classes of two per cent.
# Names are compared byte by byte, COLLATE "C", for the same reason.
_REMOTES = sql.SQL("""
    WITH classes AS MATERIALIZED (
      SELECT coalesce(remote, host) COLLATE "C" AS name,
             CASE WHEN duration_ms IS NOT NULL  -- greatest() would leave a NULL out
                  THEN round(ln(greatest(duration_ms, 0.001)) * %(classes)s) END AS class,
             count(*) AS requests,
             coalesce(sum(response_bytes), 0)::bigint AS bytes,
             count(*) FILTER (WHERE status_code IS NULL OR status_code >= 500) AS failures
      FROM access_log WHERE {where} GROUP BY 1, 2
    ), busiest AS (
      SELECT name FROM classes GROUP BY 1 ORDER BY sum(requests) DESC, 1 LIMIT %(top)s
    )
    SELECT classes.*
    FROM classes JOIN busiest ON classes.name IS NOT DISTINCT FROM busiest.name
    ORDER BY class
""")
_CALLERS = sql.SQL("""
    WITH callers AS MATERIALIZED (
      SELECT CASE WHEN remote IS NULL THEN host END COLLATE "C" AS unknown, client_ip,
             proxy_user COLLATE "C" AS proxy_user, count(*) AS requests,
             sum(request_bytes)::bigint AS sent_bytes, min(started_at) AS first_at
      FROM access_log WHERE {where} GROUP BY 1, 2, 3
    ), hosts AS MATERIALIZED (
      SELECT unknown AS name, sum(requests)::bigint AS requests,
             count(DISTINCT coalesce(proxy_user, host(client_ip))) AS callers,
             coalesce(sum(sent_bytes), 0)::bigint AS sent_bytes, min(first_at) AS first_at
      FROM callers WHERE unknown IS NOT NULL GROUP BY 1
    )
    SELECT json_build_object(
      'clients', (SELECT count(DISTINCT client_ip) FROM callers),
      'users', (SELECT count(DISTINCT proxy_user) FROM callers),
      'unknown_hosts', (SELECT count(*) FROM hosts),
      'busiest_unknown_hosts', (SELECT coalesce(json_agg(it), '[]') FROM
        (SELECT * FROM hosts ORDER BY requests DESC, name LIMIT %(top)s) AS it))::text
""")
# What was fetched whole a second time within the span a cache would have had, but for the largest
# transfer, which filled it. (The view access_log_redundant leaves out the first fetch ever instead.)
_ARTIFACTS = sql.SQL("""
    WITH fetched AS MATERIALIZED (
      SELECT purl COLLATE "C" AS purl, min(remote COLLATE "C") AS remote, count(*) AS fetches,
             coalesce(sum(response_bytes), 0)::bigint AS bytes,
             coalesce(sum(response_bytes) FILTER (WHERE status_code = 200)
                      - max(response_bytes) FILTER (WHERE status_code = 200), 0)::bigint AS avoidable_bytes
      FROM access_log
      WHERE artifact_kind = 'artifact' AND purl IS NOT NULL AND method = 'GET' AND error_type IS NULL
        AND status_code IN (200, 206, 304) AND {where}
      GROUP BY 1
    ), news AS MATERIALIZED (
      SELECT purl, artifact.remote, first_user, first_seen
      FROM fetched JOIN artifact USING (purl)
      WHERE first_seen >= %(since)s AND first_seen < %(until)s
    )
    SELECT json_build_object(
      'artifacts', (SELECT count(*) FROM fetched),
      'avoidable_bytes', (SELECT coalesce(sum(avoidable_bytes), 0) FROM fetched),
      'new_artifacts', (SELECT count(*) FROM news),
      'biggest', (SELECT coalesce(json_agg(it), '[]') FROM
        (SELECT * FROM fetched ORDER BY bytes DESC, purl LIMIT %(top)s) AS it),
      'avoidable', (SELECT coalesce(json_agg(it), '[]') FROM
        (SELECT * FROM fetched WHERE avoidable_bytes > 0
         ORDER BY avoidable_bytes DESC, purl LIMIT %(top)s) AS it),
      'first_seen', (SELECT coalesce(json_agg(it), '[]') FROM
        (SELECT * FROM news ORDER BY first_seen DESC, purl LIMIT %(top)s) AS it))::text
""")
_GAPS = """
    SELECT node, reason, sum(entries)::bigint AS entries, min(from_at) AS from_at, max(to_at) AS to_at
    FROM access_log_gap WHERE to_at >= %(since)s AND from_at < %(until)s
    GROUP BY 1, 2 ORDER BY 3 DESC, 1, 2
"""


class TrafficBar(Struct, frozen=True):
    """One stretch of time, from `at` to the next."""

    at: datetime
    requests: int = 0
    failures: int = 0
    bytes: int = 0


class RemoteSummary(Struct, frozen=True):
    """A remote, or a host that is none. Percentiles are of duration_ms, to one per cent; None: not known."""

    name: str | None
    requests: int
    bytes: int
    failures: int
    p50_ms: float | None
    p95_ms: float | None


class CacheSummary(Struct, frozen=True):
    """Answers of which one kind of evidence says whether they came from a cache."""

    source: str
    requests: int = 0
    hits: int = 0
    bytes: int = 0
    hit_bytes: int = 0


class ArtifactSummary(Struct, frozen=True):
    """What was fetched of one artifact; bytes of all fetches, and of those a cache would have saved."""

    purl: str
    remote: str | None
    fetches: int
    bytes: int
    avoidable_bytes: int


class FirstSeen(Struct, frozen=True):
    """An artifact that was never fetched before this span."""

    purl: str
    remote: str | None
    first_user: str | None
    first_seen: datetime


class FailureCount(Struct, frozen=True):
    """An error_type, "no response", or a status such as "status 404"."""

    kind: str
    requests: int


class UnknownHost(Struct, frozen=True):
    """A host that is no known remote."""

    name: str
    requests: int
    callers: int
    sent_bytes: int
    first_at: datetime


class Callers(Struct, frozen=True):
    """Who asked, and where no remote is known."""

    clients: int
    users: int
    unknown_hosts: int
    busiest_unknown_hosts: list[UnknownHost]


class Loss(Struct, frozen=True):
    """What the log lost, by node and reason, whatever the filters: no more is known of what was lost."""

    node: str
    reason: str
    entries: int
    from_at: datetime
    to_at: datetime


class Artifacts(Struct, frozen=True):
    """What the selected requests fetched: how many, how much a cache would have saved, and the first of each."""

    artifacts: int
    avoidable_bytes: int
    new_artifacts: int
    biggest: list[ArtifactSummary]
    avoidable: list[ArtifactSummary]
    first_seen: list[FirstSeen]


class Report(Struct, frozen=True):
    """A span of the log. Lists have at most TOP elements, the most of their kind first.

    Failures are requests without a response or with a status of 500 and more.
    """

    since: datetime
    until: datetime
    filters: dict[str, str]
    requests: int
    failures: int
    bytes: int
    bar_seconds: int
    traffic: list[TrafficBar]
    remotes: list[RemoteSummary]
    cache: list[CacheSummary]
    fetched: Artifacts
    failures_by_kind: list[FailureCount]
    callers: Callers
    gaps: list[Loss]

    @property
    def note_on_gaps(self) -> str:
        """What has to be said of the gaps beside the rest; empty where nothing has."""
        return "The gaps are those of all requests, whatever the filters." if self.filters else ""


def make_report(
    connection: DeadlineConnection, selection: Selection, now: datetime | None = None
) -> Report:
    """Sum up the selected rows of the selection's span, by default of the last 24 hours.

    Raises:
        SelectionError: the span ends before it begins, or reaches beyond what there is a calendar for.
        psycopg.Error, DeadlineExceededError: the server refused, took too long or went away.
    """
    until = selection.until or now or datetime.now(UTC)
    if selection.since is not None and selection.since >= until:
        raise SelectionError("since must be earlier than until.")
    if (selection.since or until) < _EARLIEST or until > _LATEST:
        raise SelectionError("since and until must lie between the years 1900 and 9000.")
    since = selection.since or until - DEFAULT_SPAN
    where, values = dataclasses.replace(selection, since=since, until=until).where()
    width = bar_width(until - since)
    values |= {"since": since, "until": until, "width": width, "origin": _EPOCH}
    values |= {"top": TOP, "classes": _CLASSES}

    def ask(query: sql.SQL) -> list[tuple[Any, ...]]:
        return connection.execute(query.format(where=where), values).fetchall()

    with read_only(connection, _STATEMENT_SECONDS):
        connection.execute(_PLANNER_SETTINGS)
        traffic = ask(_TRAFFIC)
        remotes = ask(_REMOTES)
        callers = msgspec.json.decode(ask(_CALLERS)[0][0], type=Callers)
        fetched = msgspec.json.decode(ask(_ARTIFACTS)[0][0], type=Artifacts)
        gaps = [Loss(*row) for row in connection.execute(_GAPS, values)]
    bars = _bars(traffic, since, until, width)
    return Report(
        since=since,
        until=until,
        filters=selection.filters(),
        requests=sum(bar.requests for bar in bars),
        failures=sum(bar.failures for bar in bars),
        bytes=sum(bar.bytes for bar in bars),
        bar_seconds=round(width.total_seconds()),
        traffic=bars,
        remotes=_remotes(remotes),
        cache=_cache(traffic),
        fetched=fetched,
        failures_by_kind=_kinds(traffic),
        callers=callers,
        gaps=gaps,
    )


def bar_width(span: timedelta) -> timedelta:
    """The shortest of the round widths that makes at most 60 bars of a span; else a sixtieth of it, in days."""
    for width in _WIDTHS:
        if span <= (_MAX_BARS - 1) * width:  # one more begins before the span
            return width
    return timedelta(days=-(-span.days // (_MAX_BARS - 2)))


def _bars(
    rows: list[tuple[Any, ...]], since: datetime, until: datetime, width: timedelta
) -> list[TrafficBar]:
    """All of the span in order, also those in which nothing happened."""
    at = _EPOCH + (since - _EPOCH) // width * width
    bars = {}
    while at < until:
        bars[at] = TrafficBar(at)
        at += width
    for bar_at, _, _, _, status, requests, size in rows:
        bar = bars[bar_at]
        bars[bar_at] = structs.replace(
            bar,
            requests=bar.requests + requests,
            failures=bar.failures + requests * _failed(status),
            bytes=bar.bytes + size,
        )
    return list(bars.values())


def _remotes(rows: list[tuple[Any, ...]]) -> list[RemoteSummary]:
    """By their durations' classes, which come in order."""
    by_name: dict[str | None, list[tuple[Any, ...]]] = {}
    for name, *class_ in rows:
        by_name.setdefault(name, []).append(tuple(class_))
    found = [
        RemoteSummary(
            name,
            requests=sum(n for _, n, _, _ in classes),
            bytes=sum(size for _, _, size, _ in classes),
            failures=sum(failures for _, _, _, failures in classes),
            p50_ms=_percentile(classes, 0.5),
            p95_ms=_percentile(classes, 0.95),
        )
        for name, classes in by_name.items()
    ]
    return sorted(found, key=lambda it: (-it.requests, it.name or ""))


def _percentile(classes: list[tuple[Any, ...]], share: float) -> float | None:
    """The middle of the class that holds it, by nearest rank."""
    known = [(it[0], it[1]) for it in classes if it[0] is not None]
    rank = math.ceil(share * sum(n for _, n in known))
    for class_, requests in known:
        rank -= requests
        if rank <= 0:
            return round(math.exp(class_ / _CLASSES), 3)
    return None


def _failed(status: int | None) -> bool:
    return status is None or status >= _LEAST_FAILURE


def _cache(rows: list[tuple[Any, ...]]) -> list[CacheSummary]:
    """By evidence: a CDN's hit is not one's own."""
    found: dict[str, CacheSummary] = {}
    for _, source, status, _, _, requests, size in rows:
        if status is None:
            continue
        hit = status in FROM_CACHE
        it = found.get(source or "-", CacheSummary(source or "-"))
        found[it.source] = CacheSummary(
            it.source,
            it.requests + requests,
            it.hits + requests * hit,
            it.bytes + size,
            it.hit_bytes + size * hit,
        )
    return sorted(found.values(), key=lambda it: (-it.requests, it.source))


def _kinds(rows: list[tuple[Any, ...]]) -> list[FailureCount]:
    counts: Counter[str] = Counter()
    for _, _, _, error_type, status, requests, _ in rows:
        if error_type is not None or status is None or status >= _LEAST_REFUSAL:
            no_error = "no response" if status is None else f"status {status}"
            counts[error_type or no_error] += requests
    found = [FailureCount(kind, requests) for kind, requests in counts.items()]
    return sorted(found, key=lambda it: (-it.requests, it.kind))[:TOP]
