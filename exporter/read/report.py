"""Summarize a time span of the log, from one snapshot of the database. Formats nothing."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import msgspec
from msgspec import Struct, structs
from psycopg import sql

from . import report_queries as queries
from .archived import rows_loaded
from .chart import bar_edges, bar_width, width_name
from .gaps import GapSummary, gap_summary
from .kept_advisories import KeptSummary, Mark, kept_summary, marks
from .log_size import LogSize, log_size
from .nodes import NodesSummary, nodes_summary
from .rolled_up import RolledUp, fits_bars, rolled_up
from .selection import SelectionError
from .session import read_only
from .status import is_failure, is_refusal

if TYPE_CHECKING:
    from pathlib import Path

    from ..postgres.connection import DeadlineConnection
    from .selection import Selection

DEFAULT_SPAN = timedelta(hours=24)
TOP = 10  # length of each list
_STATEMENT_SECONDS = 120.0
_BUCKETS_PER_E = 50  # as in access_log_duration_bucket
# Bars start before the span and end after it, so the span must not touch the ends of the calendar.
_EARLIEST, _LATEST = datetime(1900, 1, 1, tzinfo=UTC), datetime(9000, 1, 1, tzinfo=UTC)


class TrafficBar(Struct, frozen=True):
    """The traffic from `at` to `until`. Other requests than failures and refusals are ok."""

    at: datetime
    until: datetime
    requests: int = 0
    failures: int = 0
    refusals: int = 0
    bytes: int = 0


class RemoteSummary(Struct, frozen=True):
    """A remote, or a host that is not a known remote. Percentiles of duration_ms are exact to 1 %; None: unknown."""

    name: str | None
    requests: int
    bytes: int
    failures: int
    p50_ms: float | None
    p95_ms: float | None


class CacheSummary(Struct, frozen=True):
    """Responses with the same evidence for or against a cache."""

    source: str
    requests: int = 0
    hits: int = 0
    bytes: int = 0
    hit_bytes: int = 0


class ArtifactSummary(Struct, frozen=True):
    """The fetches of one artifact: their bytes, and the bytes that a cache would have saved."""

    purl: str
    remote: str | None
    fetches: int
    bytes: int
    avoidable_bytes: int


class FirstSeen(Struct, frozen=True):
    """An artifact that was fetched for the first time ever."""

    purl: str
    remote: str | None
    first_user: str | None
    first_seen: datetime


class FailureCount(Struct, frozen=True):
    """Number of requests with one error_type, with "no response", or with a status such as "status 404"."""

    kind: str
    requests: int


class UnknownHost(Struct, frozen=True):
    """A host that is not a known remote."""

    name: str
    requests: int
    callers: int
    sent_bytes: int
    first_at: datetime


class Callers(Struct, frozen=True):
    """Number of clients and users, and the hosts they connected to that are not known remotes."""

    clients: int
    users: int
    unknown_hosts: int
    busiest_unknown_hosts: list[UnknownHost]


class Artifacts(Struct, frozen=True):
    """What the selected requests fetched: number of artifacts, bytes that a cache would have saved, top lists."""

    artifacts: int
    avoidable_bytes: int
    new_artifacts: int
    biggest: list[ArtifactSummary]
    avoidable: list[ArtifactSummary]
    first_seen: list[FirstSeen]

    @property
    def purls(self) -> set[str]:
        """The artifacts in the lists."""
        fetched = {each.purl for each in (*self.biggest, *self.avoidable)}
        return fetched | {each.purl for each in self.first_seen}


class Report(Struct, frozen=True):
    """A summary of a time span. Each list except `traffic` has at most TOP items, largest first.

    Failures and refusals are defined in status.py, the bars of `traffic` in chart.py.
    """

    since: datetime
    until: datetime
    filters: dict[str, str]
    requests: int
    failures: int
    refusals: int
    partial_reads: int  # requests that delivered only part of an artifact
    bytes: int
    bar_seconds: int  # of most bars; a bar can be shorter or longer if the clock changed
    traffic: list[TrafficBar]
    remotes: list[RemoteSummary]
    cache: list[CacheSummary]
    fetched: Artifacts
    failures_by_kind: list[FailureCount]
    callers: Callers
    gaps: GapSummary
    proxies: NodesSummary | None  # now, whatever the span is; None: the database knows none
    log: LogSize | None  # None: it could not be measured now
    kept: KeptSummary | None  # None: no advisories are kept
    marks: dict[str, Mark]  # by Package URL: of the listed artifacts that kept advisories are about

    @property
    def edges(self) -> list[datetime]:
        """Where each bar of `traffic` starts, and where the last one ends."""
        return [*(bar.at for bar in self.traffic), self.traffic[-1].until]

    @property
    def per_bar(self) -> str:
        """The width of a bar, such as "hour"."""
        return width_name(timedelta(seconds=self.bar_seconds))

    @property
    def note_on_gaps(self) -> str:
        """A sentence to show next to the gaps; empty if all filters apply to them."""
        if not self.filters.keys() - {"node"}:
            return ""
        whose = "this node" if "node" in self.filters else "all requests"
        other = "other " if "node" in self.filters else ""
        return f"The gaps are those of {whose}, regardless of the {other}filters."


def make_report(
    connection: DeadlineConnection,
    selection: Selection,
    now: datetime | None = None,
    archive: Path | None = None,
    *,
    kept_days: int = 0,
) -> Report:
    """Summarize the selected rows. The time span defaults to the last 24 hours.

    Without filters and archive, rollups replace the rows of whole days (UTC). A span that begins within
    such a day then begins with it if it is longer than a week, or if the rows of the day were pruned.

    The bars follow the hours and days of the local time zone.

    Args:
        connection: In autocommit mode.
        selection: Which rows.
        now: The end of the span, if `selection` has none. Default: the current time.
        archive: The folder of archived days to sum up as well.
        kept_days: The setting retention.days.

    Raises:
        ArchiveError: the archive cannot be read.
        SelectionError: the span ends before it starts, or is not between the years 1900 and 9000.
        psycopg.Error, DeadlineExceededError: the query failed, took too long, or lost its connection.
    """
    until = selection.until or now or datetime.now(UTC)
    if selection.since is not None and selection.since >= until:
        raise SelectionError("since must be earlier than until.")
    if (selection.since or until) < _EARLIEST or until > _LATEST:
        raise SelectionError("since and until must lie between the years 1900 and 9000.")
    since = selection.since or until - DEFAULT_SPAN
    loaded = dataclasses.replace(selection, since=since, until=until)
    with (
        rows_loaded(connection, archive, loaded),
        read_only(connection, _STATEMENT_SECONDS),
    ):
        connection.execute(queries.PLANNER_SETTINGS)
        use_rollups = archive is None and not selection.filters()  # they have only totals
        span = _span(connection, since, until, use_rollups=use_rollups)
        since, until = span.since, span.until
        selected = dataclasses.replace(selection, since=since, until=until)
        where, values = selected.where()
        if span.rollups:
            where = where + sql.SQL(" AND ") + span.condition
        edges = bar_edges(since, until)
        values |= {"since": since, "until": until, "edges": edges}
        values |= {"top": TOP, "rollups": span.rollups}
        values |= {"months": span.months, "single_rollups": span.single_rollups}

        def query(statement: sql.SQL) -> list[tuple[Any, ...]]:
            return connection.execute(statement.format(where=where), values).fetchall()

        traffic = query(queries.TRAFFIC)
        rolled_up_bars = query(queries.ROLLED_UP_BARS) if span.rollups else []
        remotes = query(queries.REMOTES)
        callers = msgspec.json.decode(query(queries.CALLERS)[0][0], type=Callers)
        fetched = msgspec.json.decode(query(queries.ARTIFACTS)[0][0], type=Artifacts)
        gaps = gap_summary(connection, selected, TOP)
        proxies = nodes_summary(connection)
        log = log_size(connection, kept_days) if archive is None else None
        kept = kept_summary(connection, where, values, TOP)
        marked = marks(connection, fetched.purls)
    bars = _traffic_bars(traffic, rolled_up_bars, edges)
    return Report(
        since=since,
        until=until,
        filters=selection.filters(),
        requests=sum(bar.requests for bar in bars),
        failures=sum(bar.failures for bar in bars),
        refusals=sum(bar.refusals for bar in bars),
        partial_reads=sum(row[-1] for row in traffic),
        bytes=sum(bar.bytes for bar in bars),
        bar_seconds=round(bar_width(until - since).total_seconds()),
        traffic=bars,
        remotes=_remote_summaries(remotes),
        cache=_cache_summaries(traffic),
        fetched=fetched,
        failures_by_kind=_failure_counts(traffic),
        callers=callers,
        gaps=gaps,
        proxies=proxies,
        log=log,
        kept=kept,
        marks=marked,
    )


def _span(
    connection: DeadlineConnection, since: datetime, until: datetime, *, use_rollups: bool
) -> RolledUp:
    if use_rollups:
        span = rolled_up(connection, since, until)
        if fits_bars(span, bar_edges(span.since, span.until)):
            return span
    return RolledUp.rows_only(since, until)


def _traffic_bars(
    rows: list[tuple[Any, ...]], rolled_up_bars: list[tuple[Any, ...]], edges: list[datetime]
) -> list[TrafficBar]:
    """Return all bars of the span in order, including those without requests."""
    bars = [TrafficBar(at, until) for at, until in pairwise(edges)]
    for number, requests, failures, refusals, size in rolled_up_bars:
        bar = bars[number - 1]
        bars[number - 1] = TrafficBar(bar.at, bar.until, requests, failures, refusals, size)
    for number, _, _, _, status_code, requests, size, _ in rows:
        if number is None:
            continue
        bar = bars[number - 1]
        bars[number - 1] = structs.replace(
            bar,
            requests=bar.requests + requests,
            failures=bar.failures + requests * is_failure(status_code),
            refusals=bar.refusals + requests * is_refusal(status_code),
            bytes=bar.bytes + size,
        )
    return bars


def _remote_summaries(rows: list[tuple[Any, ...]]) -> list[RemoteSummary]:
    """Sum up each remote's duration buckets, which come in ascending order."""
    buckets_by_name: dict[str | None, list[tuple[Any, ...]]] = {}
    for name, *bucket in rows:
        buckets_by_name.setdefault(name, []).append(tuple(bucket))
    summaries = [
        RemoteSummary(
            name,
            requests=sum(requests for _, requests, _, _ in buckets),
            bytes=sum(size for _, _, size, _ in buckets),
            failures=sum(failures for _, _, _, failures in buckets),
            p50_ms=_percentile(buckets, 0.5),
            p95_ms=_percentile(buckets, 0.95),
        )
        for name, buckets in buckets_by_name.items()
    ]
    return sorted(summaries, key=lambda remote: (-remote.requests, remote.name or ""))


def _percentile(buckets: list[tuple[Any, ...]], fraction: float) -> float | None:
    """Return the middle of the bucket with the nearest-rank percentile."""
    known = [(bucket, requests) for bucket, requests, *_ in buckets if bucket is not None]
    rank = math.ceil(fraction * sum(requests for _, requests in known))
    for bucket, requests in known:
        rank -= requests
        if rank <= 0:
            return round(math.exp(bucket / _BUCKETS_PER_E), 3)
    return None


def _cache_summaries(rows: list[tuple[Any, ...]]) -> list[CacheSummary]:
    """Sum up by evidence, because a hit in a CDN is not a hit in your own cache."""
    summaries: dict[str, CacheSummary] = {}
    for _, source, from_cache, _, _, requests, size, _ in rows:
        if from_cache is None:  # no evidence
            continue
        old = summaries.get(source or "-", CacheSummary(source or "-"))
        summaries[old.source] = CacheSummary(
            old.source,
            old.requests + requests,
            old.hits + requests * from_cache,
            old.bytes + size,
            old.hit_bytes + size * from_cache,
        )
    return sorted(summaries.values(), key=lambda cache: (-cache.requests, cache.source))


def _failure_counts(rows: list[tuple[Any, ...]]) -> list[FailureCount]:
    counts: Counter[str] = Counter()
    for _, _, _, error_type, status_code, requests, _, _ in rows:
        if error_type is not None or is_failure(status_code) or is_refusal(status_code):
            no_error = "no response" if status_code is None else f"status {status_code}"
            counts[error_type or no_error] += requests
    kinds = [FailureCount(kind, requests) for kind, requests in counts.items()]
    return sorted(kinds, key=lambda failure: (-failure.requests, failure.kind))[:TOP]
