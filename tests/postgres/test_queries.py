"""configs/queries.sql, run by psql on generated traffic: each result equals one computed in Python."""

from __future__ import annotations

import csv
import io
import math
import re
import subprocess
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from exporter import Settings
from exporter.postgres.connection import connect
from exporter.postgres.embedded import programs
from exporter.postgres.schema import ensure_schema
from tests.support.expected_results import (
    HITS,
    as_float4,
    caller,
    callers,
    columns_key,
    day_of,
    failed,
    group_by,
    hour_of,
    is_fetch,
    nearly_equal,
    not_null,
    percent,
    percentile,
    remote_or_host,
)
from tests.support.seeded_log import Plan, seeded_log

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from tests.support.access_log import AccessLog, Row
    from tests.support.postgres import Postgres

pytestmark = pytest.mark.slow

QUERIES = Path(__file__).resolve().parents[2] / "configs" / "queries.sql"
NOW = datetime.now(UTC).replace(microsecond=0)
SINCE = NOW - timedelta(days=2)
_MIN_REQUESTS = 20


class ExpectedRows(NamedTuple):
    """The rows that a query can return, its sort key (without tiebreakers), and its limit."""

    rows: list[tuple[Any, ...]]
    order: Callable[[tuple[Any, ...]], Any]
    limit: int = 10**6


@pytest.fixture(scope="module")
def seeded(postgres: Postgres) -> Iterator[AccessLog]:
    with seeded_log(postgres, Plan(6000, NOW, days=4, seed=3)) as log:
        yield log


@pytest.fixture(scope="module")
def rows(seeded: AccessLog) -> list[Row]:
    return seeded.rows()


def run_queries(dsn: str, **variables: str) -> dict[str, list[dict[str, str]]]:
    """Run the file with psql. Return the rows that it prints, by number of the query."""
    given = [f"--set={name}={value}" for name, value in variables.items()]
    done = subprocess.run(
        [
            programs() / "psql",
            "-X",
            "-q",
            "--csv",
            "--set=ON_ERROR_STOP=1",
            *given,
            "-f",
            QUERIES,
            dsn,
        ],
        check=True,
        capture_output=True,
        text=True,
        env={"PGTZ": "UTC", "LC_ALL": "C.UTF-8"},
    )
    assert done.stderr == ""
    _, *parts = re.split(r"^# (\d+)\. .+\?$\n", done.stdout, flags=re.MULTILINE)
    return {
        number: list(csv.DictReader(io.StringIO(text)))
        for number, text in zip(parts[::2], parts[1::2], strict=True)
    }


@pytest.fixture(scope="module")
def build(rows: list[Row]) -> str:
    """The build with the most rows."""
    counts: Counter[str] = Counter(row["proxy_user"] for row in rows if row["proxy_user"])
    return counts.most_common(1)[0][0]


@pytest.fixture(scope="module")
def popular_row(rows: list[Row]) -> Row:
    """A row of the most requested artifact."""
    counts = Counter(r["purl"] for r in rows if r["artifact_kind"] == "artifact" and r["purl"])
    purl = counts.most_common(1)[0][0]
    return next(row for row in rows if row["purl"] == purl)


@pytest.fixture(scope="module")
def results(seeded: AccessLog, build: str, popular_row: Row) -> dict[str, list[dict[str, str]]]:
    package, version = popular_row["package"], popular_row["version"]
    return run_queries(seeded.dsn, since=str(SINCE), build=build, package=package, version=version)


def recent(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if row["started_at"] >= SINCE]


def descending(value: float | None) -> float:
    return math.inf if value is None else -value


def of_build(rows: list[Row], build: str) -> ExpectedRows:
    found = []
    for purl, group in group_by(
        (r for r in rows if r["proxy_user"] == build and is_fetch(r)), columns_key("purl")
    ):
        statuses = not_null(group, "cache_status")
        found.append(
            (
                purl,
                min(not_null(group, "filename"), default=None),
                min(not_null(group, "remote")),
                len(group),
                sum(not_null(group, "response_bytes")),
                min(not_null(group, "started_at")),
                any(status in HITS for status in statuses) if statuses else None,
            )
        )
    return ExpectedRows(found, lambda row: descending(row[4]))


def biggest(rows: list[Row]) -> ExpectedRows:
    artifacts = (row for row in recent(rows) if row["artifact_kind"] == "artifact")
    found = []
    for key, group in group_by(artifacts, columns_key("purl", "filename", "remote")):
        sizes = not_null(group, "response_bytes")
        fetches = sum(map(is_fetch, group))
        found.append((*key, fetches, max(sizes, default=None), sum(sizes) if sizes else None))
    return ExpectedRows(found, lambda row: descending(row[5]), 20)


def slow(rows: list[Row]) -> ExpectedRows:
    found = []
    for remote, group in group_by(
        (r for r in recent(rows) if r["method"] == "GET"), remote_or_host
    ):
        if len(group) >= _MIN_REQUESTS:
            heads = as_float4(not_null(group, "ttfb_ms"))
            durations = percentile(as_float4(not_null(group, "duration_ms")), 0.95)
            shares = [percentile(heads, share) for share in (0.5, 0.95, 0.99)]
            found.append((remote, len(group), *shares, durations))
    return ExpectedRows(found, lambda row: descending(row[5]))


def failures(rows: list[Row]) -> ExpectedRows:
    found = []
    for (at, remote), group in group_by(
        recent(rows), lambda row: (hour_of(row["started_at"]), remote_or_host(row))
    ):
        kinds = Counter(not_null(group, "error_type"))
        commonest = min(kinds, key=lambda kind: (-kinds[kind], kind), default=None)
        share = percent(sum(map(failed, group)), len(group), "0.01")
        found.append((at, remote, len(group), share, commonest))
    return ExpectedRows(found, lambda row: descending(row[3]), 50)


def from_cache(rows: list[Row]) -> ExpectedRows:
    found = []
    with_evidence = (row for row in recent(rows) if row["cache_status"] is not None)
    for key, group in group_by(with_evidence, columns_key("remote", "cache_source")):
        hits = [row for row in group if row["cache_status"] in HITS]
        total = sum(not_null(group, "response_bytes"))
        share = percent(sum(not_null(hits, "response_bytes")), total, "0.1") if total else None
        found.append((*key, len(group), percent(len(hits), len(group), "0.1"), share))
    return ExpectedRows(found, lambda row: descending(row[2]))


def first_seen(rows: list[Row]) -> ExpectedRows:
    found = []
    for purl, group in group_by(filter(is_fetch, rows), columns_key("purl")):
        first = min(group, key=columns_key("started_at"))
        if first["started_at"] >= SINCE:
            total = sum(not_null(group, "response_bytes"))
            origin = (purl, first["remote"], first["proxy_user"])
            found.append((first["started_at"], *origin, len(group), total))
    return ExpectedRows(found, lambda row: -row[0].timestamp(), 100)


def who_fetched(rows: list[Row], popular_row: Row) -> ExpectedRows:
    columns = (
        "started_at proxy_user client_ip user_agent remote filename status_code response_bytes"
    )
    found = [
        tuple(row[column] for column in columns.split())
        for row in rows
        if columns_key("package", "version")(row) == columns_key("package", "version")(popular_row)
        and row["artifact_kind"] == "artifact"
    ]
    return ExpectedRows(found, lambda row: -row[0].timestamp(), 100)


def by_day(rows: list[Row]) -> ExpectedRows:
    def key(row: Row) -> tuple[datetime, str]:
        return day_of(row["started_at"]), row["remote"] or f"(other) {row['host']}"

    found = []
    for group_key, group in group_by(recent(rows), key):
        sizes = not_null(group, "response_bytes")
        found.append((*group_key, len(group), sum(sizes) if sizes else None))
    return ExpectedRows(found, lambda row: (row[0], descending(row[3])))


def newest(rows: list[Row]) -> ExpectedRows:
    columns = (
        "logged_at started_at proxy_user client_ip method status_code error_type response_bytes"
        " duration_ms host path purl"
    )
    found = [tuple(row[column] for column in columns.split()) for row in rows]
    return ExpectedRows(found, lambda row: -row[0].timestamp(), 20)


def heaviest(rows: list[Row]) -> ExpectedRows:
    found = []
    for who, group in group_by(recent(rows), caller):
        sizes = not_null(group, "response_bytes")
        artifacts = len({row["purl"] for row in group if is_fetch(row)})
        found.append((who, len(group), sum(sizes) if sizes else None, artifacts))
    return ExpectedRows(found, lambda row: descending(row[2]), 20)


def unknown_hosts(rows: list[Row]) -> ExpectedRows:
    requests = (row for row in recent(rows) if row["remote"] is None)
    found = []
    for key, group in group_by(requests, columns_key("host", "port", "scheme")):
        sent = not_null(group, "request_bytes")
        first = min(not_null(group, "started_at"))
        found.append((*key, len(group), callers(group), sum(sent) if sent else None, first))
    return ExpectedRows(found, lambda row: (row[4], row[3]))


def avoidable(rows: list[Row]) -> ExpectedRows:
    firsts = {
        purl: min(not_null(group, "started_at"))
        for purl, group in group_by(filter(is_fetch, rows), columns_key("purl"))
    }
    complete = (row for row in recent(rows) if is_fetch(row) and row["status_code"] == 200)
    found = []
    for purl, group in group_by(complete, columns_key("purl")):
        later = [row for row in group if row["started_at"] > firsts[purl]]
        if later:
            total = sum(not_null(later, "response_bytes"))
            clients = len(set(not_null(group, "client_ip")))
            found.append((purl, min(not_null(group, "remote")), len(group), clients, total))
    return ExpectedRows(found, lambda row: descending(row[4]), 20)


def not_found(rows: list[Row]) -> ExpectedRows:
    requests = (
        r for r in recent(rows) if r["status_code"] in {404, 410} and r["package"] is not None
    )
    found = []
    for key, group in group_by(requests, columns_key("remote", "package")):
        moments = not_null(group, "started_at")
        found.append((*key, len(group), callers(group), min(moments), max(moments)))
    return ExpectedRows(found, lambda row: descending(row[2]), 50)


@pytest.mark.parametrize(
    ("number", "expected_rows"),
    [
        ("2", biggest),
        ("3", slow),
        ("4", failures),
        ("5", from_cache),
        ("6", first_seen),
        ("8", by_day),
        ("9", newest),
        ("10", heaviest),
        ("11", unknown_hosts),
        ("12", avoidable),
        ("13", not_found),
    ],
)
def test_query_over_a_time_span_matches_the_rows(
    number: str,
    expected_rows: Callable[[list[Row]], ExpectedRows],
    rows: list[Row],
    results: dict[str, list[dict[str, str]]],
) -> None:
    check(results[number], expected_rows(rows))


def test_downloads_of_a_build(
    rows: list[Row], build: str, results: dict[str, list[dict[str, str]]]
) -> None:
    check(results["1"], of_build(rows, build))


def test_fetches_of_a_version(
    rows: list[Row], popular_row: Row, results: dict[str, list[dict[str, str]]]
) -> None:
    check(results["7"], who_fetched(rows, popular_row))


def test_every_query_has_a_result_without_variables(seeded: AccessLog, rows: list[Row]) -> None:
    found = run_queries(seeded.dsn)
    assert list(found) == [str(number) for number in range(1, 14)]
    assert [number for number, lines in found.items() if not lines] == []
    check(found["9"], newest(rows))


def test_package_without_version_means_all_versions(
    seeded: AccessLog, rows: list[Row], popular_row: Row
) -> None:
    package = popular_row["package"]
    expected = [
        r
        for r in rows
        if r["package"] == package and r["artifact_kind"] == "artifact" and r["version"] is not None
    ]
    found = run_queries(seeded.dsn, package=package)["7"]
    assert len(found) == min(100, len(expected))


def test_empty_log_gives_no_rows_and_no_errors(dsn: str) -> None:
    with connect(dsn, Settings().database) as connection:
        ensure_schema(connection)
    assert not any(run_queries(dsn).values())


def check(lines: list[dict[str, str]], expected_rows: ExpectedRows) -> None:
    """The lines are the first of the expected rows in their order, each once."""
    expected = sorted(expected_rows.rows, key=expected_rows.order)[: expected_rows.limit]
    assert expected
    assert len(lines) == len(expected)
    types = [
        next((type(row[place]) for row in expected_rows.rows if row[place] is not None), str)
        for place in range(len(lines[0]))
    ]
    found = [
        tuple(value(text, kind) for text, kind in zip(line.values(), types, strict=True))
        for line in lines
    ]
    for line, best in zip(found, expected, strict=True):
        assert nearly_equal(expected_rows.order(line), expected_rows.order(best))
    rest = list(expected_rows.rows)
    for line in found:
        rest.remove(next(row for row in rest if nearly_equal(row, line)))


def value(text: str, kind: type) -> Any:
    """Parse a value that psql printed; it prints nothing for NULL."""
    if not text:
        return None
    if kind is bool:
        return {"t": True, "f": False}[text]
    if kind is datetime:
        return datetime.fromisoformat(text)
    return kind(text)
