"""Compute in Python the rows of the views by hour and day, which PostgreSQL and DuckDB must return."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .expected_results import (
    HITS,
    as_float4,
    callers,
    columns_key,
    day_of,
    failed,
    group_by,
    hour_of,
    is_fetch,
    not_null,
    percentile,
    remote_or_host,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from .access_log import Row


def total(rows: list[Row], column: str) -> int | None:
    values = not_null(rows, column)
    return sum(values) if values else None


def remotes(rows: list[Row]) -> Iterator[tuple[Any, ...]]:
    for (hour, remote), group in group_by(
        rows, lambda row: (hour_of(row["started_at"]), remote_or_host(row))
    ):
        durations = as_float4(not_null(group, "duration_ms"))
        yield (
            hour,
            remote,
            len(group),
            total(group, "response_bytes"),
            sum(map(failed, group)),
            *(percentile(durations, share) for share in (0.5, 0.95, 0.99)),
        )


def cache(rows: list[Row]) -> Iterator[tuple[Any, ...]]:
    with_evidence = (row for row in rows if row["cache_status"] is not None)
    for (day, *key), group in group_by(with_evidence, by_day("remote", "cache_source")):
        hits = [row for row in group if row["cache_status"] in HITS]
        sizes = total(group, "response_bytes"), total(hits, "response_bytes") or 0
        yield (day, *key, len(group), len(hits), *sizes)


def unknown_hosts(rows: list[Row]) -> Iterator[tuple[Any, ...]]:
    requests = (row for row in rows if row["remote"] is None)
    for (day, *key), group in group_by(requests, by_day("host", "port", "scheme")):
        moments = not_null(group, "started_at")
        sent = total(group, "request_bytes")
        yield (*key, len(group), callers(group), sent, min(moments), max(moments), day)


def not_found(rows: list[Row]) -> Iterator[tuple[Any, ...]]:
    requests = (
        row for row in rows if row["status_code"] in {404, 410} and row["package"] is not None
    )
    for (day, *key), group in group_by(requests, by_day("remote", "package")):
        moments = not_null(group, "started_at")
        yield (*key, len(group), callers(group), min(moments), max(moments), day)


def redundant(rows: list[Row]) -> Iterator[tuple[Any, ...]]:
    firsts = {
        purl: min(not_null(group, "started_at"))
        for purl, group in group_by(filter(is_fetch, rows), columns_key("purl"))
    }
    complete = (row for row in rows if is_fetch(row) and row["status_code"] == 200)
    for (day, purl), group in group_by(complete, by_day("purl")):
        later = [row for row in group if row["started_at"] > firsts[purl]]
        if later:
            clients = len(set(not_null(group, "client_ip")))
            avoidable = total(later, "response_bytes")
            yield (purl, min(not_null(group, "remote")), len(group), clients, avoidable, day)


def by_day(*columns: str) -> Callable[[Row], Any]:
    key = columns_key("started_at", *columns)

    def dated(row: Row) -> tuple[Any, ...]:
        started_at, *rest = key(row)
        return day_of(started_at), *rest

    return dated
