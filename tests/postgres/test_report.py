"""`artifactapi report`: correct numbers in every format, and no text from clients that a terminal or browser runs."""

from __future__ import annotations

import math
import random
import re
from collections import Counter
from datetime import UTC, datetime, timedelta
from html.parser import HTMLParser
from typing import TYPE_CHECKING, Any
from zoneinfo import ZoneInfo

import msgspec
import psycopg
import pytest
from click.testing import CliRunner
from rich.cells import cell_len
from rich.console import Console

from addon.cli.main import main
from exporter import Settings
from exporter.read.chart import bar_edges
from exporter.read.report import Report, make_report
from exporter.read.report_html import report_html
from exporter.read.report_text import report_text
from exporter.read.selection import Selection
from exporter.read.session import open_database
from exporter.write.database import Database
from exporter.write.gaps import Gap
from tests.support.access_log import temporary_schema
from tests.support.command import call, write
from tests.support.expected_results import HITS, is_fetch
from tests.support.samples import make_entry
from tests.support.terminal import on_terminal

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from exporter import AccessLogEntry
    from tests.support.postgres import Postgres

pytestmark = pytest.mark.slow

NOW = datetime(2026, 3, 5, 12, 10, tzinfo=UTC)
SPAN = timedelta(hours=24)
HOSTILE_TEXT = "<script>alert(1)</script>\x1b]0;x\x07\u202e'\"&"


def random_rows() -> list[AccessLogEntry]:
    """Return two days of rows of every kind, the same each time."""
    chance = random.Random(7)
    found = []
    for number in range(900):
        at = NOW - timedelta(seconds=chance.uniform(1, 2 * 86_400))
        known = chance.random() < 0.8
        artifact = known and chance.random() < 0.7
        status = chance.choice([200] * 8 + [206, 304, 404, 500, 503, None])
        purl = f"pkg:pypi/p{int(chance.paretovariate(1)) % 40}@1"
        found.append(
            make_entry(
                number,
                started_at=at.isoformat(),
                client_ip=f"192.0.2.{chance.randrange(9)}",
                proxy_user=chance.choice([None, "build-1", "build-2", HOSTILE_TEXT]),
                host=f"h{chance.randrange(14)}.example" if not known else "files.example",
                remote=chance.choice(["pypi", "npm", HOSTILE_TEXT]) if known else None,
                artifact_kind="artifact" if artifact else "index",
                purl=purl if artifact else None,
                status_code=status,
                error_type=chance.choice(["dns", HOSTILE_TEXT]) if status is None else None,
                request_bytes=chance.choice([None, 10, 2000]),
                response_bytes=chance.choice([None, 0, chance.randrange(10**9)]),
                duration_ms=chance.choice([None, 0.0, round(chance.lognormvariate(4, 2), 3)]),
                cache_status=chance.choice([None, *sorted(HITS), "MISS"]),
                cache_source=chance.choice(["x-cache", "age"]),
            )
        )
        if artifact and status == 206 and number % 2:
            found[-1] = found[-1]._replace(artifact_complete=False)
    return found


ROWS = random_rows()


def _small_gap(number: int, at: datetime) -> Gap:
    gap_id = f"00000000-0000-4000-8000-{number + 100:012}"
    return Gap(gap_id, "b", at.isoformat(), at.isoformat(), "buffer_full", 1 + number // 6)


@pytest.fixture(scope="module")
def table(postgres: Postgres) -> Iterator[str]:
    with temporary_schema(postgres) as dsn:
        database = Database(Settings().with_dsn(dsn).database)
        for start in range(0, len(ROWS), 128):
            assert database.write(ROWS[start : start + 128]) == []
        times = [(NOW - timedelta(hours=h)).isoformat() for h in (30, 25, 23, 1)]
        database.write_gaps(
            [
                Gap("00000000-0000-4000-8000-000000000001", "a", times[0], times[1], "rejected", 5),
                Gap(
                    "00000000-0000-4000-8000-000000000002",
                    HOSTILE_TEXT,
                    times[1],
                    times[2],
                    "shutdown",
                    7,
                ),
                *(_small_gap(number, NOW - timedelta(minutes=5 * number)) for number in range(12)),
            ]
        )
        database.close()
        yield dsn


@pytest.fixture(scope="module")
def report(table: str) -> Report:
    with open_database(Settings().with_dsn(table)) as connection:
        return make_report(connection, Selection(), NOW)


def started(row: AccessLogEntry) -> datetime:
    return datetime.fromisoformat(row.started_at)


ROWS_IN_SPAN = [row for row in ROWS if NOW - SPAN <= started(row) < NOW]
FETCHED = [row for row in ROWS_IN_SPAN if is_fetch(row._asdict())]


def failed(row: AccessLogEntry) -> bool:
    return row.status_code is None or row.status_code >= 500


def refused(row: AccessLogEntry) -> bool:
    return row.status_code is not None and 400 <= row.status_code < 500


def size(rows: list[AccessLogEntry]) -> int:
    return sum(row.response_bytes or 0 for row in rows)


def test_totals_and_bars(report: Report) -> None:
    assert (report.since, report.until) == (NOW - SPAN, NOW)
    assert report.requests == len(ROWS_IN_SPAN) > 300
    assert report.failures == sum(map(failed, ROWS_IN_SPAN))
    assert report.refusals == sum(map(refused, ROWS_IN_SPAN)) > 0
    partial = [row for row in ROWS_IN_SPAN if row.artifact_complete is False]
    assert report.partial_reads == len(partial) > 0
    assert report.bytes == size(ROWS_IN_SPAN)
    assert report.bar_seconds == 3600
    assert len(report.traffic) == 25
    assert report.edges == bar_edges(NOW - SPAN, NOW)
    for bar in report.traffic:
        rows = [row for row in ROWS_IN_SPAN if bar.at <= started(row) < bar.until]
        assert bar.requests == len(rows)
        assert bar.failures == sum(map(failed, rows))
        assert bar.refusals == sum(map(refused, rows))
        assert bar.bytes == size(rows)


@pytest.mark.parametrize("zone", ["Europe/Berlin", "Asia/Kolkata"])
def test_days_start_at_local_midnight(table: str, zone: str) -> None:
    span = ("--since", "2026-02-15", "--until", "2026-04-05")
    done = call("--dsn", table, "report", "--json", *span, TZ=zone)
    found = msgspec.json.decode(done.stdout, type=Report)
    assert len(found.traffic) == 49
    for bar in found.traffic:
        midnight = bar.at.astimezone(ZoneInfo(zone))
        assert (midnight.hour, midnight.minute) == (0, 0)
        day = [r for r in ROWS if started(r).astimezone(ZoneInfo(zone)).date() == midnight.date()]
        assert bar.requests == len(day)
    assert found.requests == len(ROWS)
    text = call("--dsn", table, "report", *span, TZ=zone).stdout
    assert f"Requests per day, at most {max(bar.requests for bar in found.traffic)}\n" in text
    assert re.search(r"└.*┬.*\n +02-16 +03-02 +03-16 +03-30\n", text)


def test_remotes(report: Report) -> None:
    names = Counter(row.remote or row.host for row in ROWS_IN_SPAN)
    expected = sorted(names, key=lambda name: (-names[name], name or ""))[:10]
    assert [remote.name for remote in report.remotes] == expected
    for remote in report.remotes:
        rows = [row for row in ROWS_IN_SPAN if (row.remote or row.host) == remote.name]
        assert (remote.requests, remote.bytes) == (len(rows), size(rows))
        assert remote.failures == sum(map(failed, rows))
        durations = sorted(
            max(row.duration_ms, 0.001) for row in rows if row.duration_ms is not None
        )
        for share, percentile_ms in ((0.5, remote.p50_ms), (0.95, remote.p95_ms)):
            assert percentile_ms == pytest.approx(
                durations[math.ceil(share * len(durations)) - 1], rel=0.0102, abs=0.0006
            )


def test_caches(report: Report) -> None:
    known = [row for row in ROWS_IN_SPAN if row.cache_status is not None]
    assert sum(cache.requests for cache in report.cache) == len(known)
    for cache in report.cache:
        rows = [row for row in known if row.cache_source == cache.source]
        hits = [row for row in rows if row.cache_status in HITS]
        assert (cache.requests, cache.bytes) == (len(rows), size(rows))
        assert (cache.hits, cache.hit_bytes) == (len(hits), size(hits))


def test_artifacts(report: Report) -> None:
    by_purl: dict[str, list[AccessLogEntry]] = {}
    for row in FETCHED:
        by_purl.setdefault(row.purl or "", []).append(row)

    def avoidable(rows: list[AccessLogEntry]) -> int:
        whole = [row.response_bytes or 0 for row in rows if row.status_code == 200]
        return sum(whole) - max(whole, default=0)

    fetched = report.fetched
    assert fetched.artifacts == len(by_purl)
    assert fetched.avoidable_bytes == sum(map(avoidable, by_purl.values()))
    expected = sorted(by_purl, key=lambda purl: (-size(by_purl[purl]), purl))[:10]
    assert [artifact.purl for artifact in fetched.biggest] == expected
    for artifact in [*fetched.biggest, *fetched.avoidable]:
        rows = by_purl[artifact.purl]
        assert (artifact.fetches, artifact.bytes) == (len(rows), size(rows))
        assert artifact.avoidable_bytes == avoidable(rows)
    saved = [artifact.avoidable_bytes for artifact in fetched.avoidable]
    assert saved == sorted(map(avoidable, by_purl.values()), reverse=True)[: len(saved)]


def test_never_seen_before_covers_the_whole_log(report: Report) -> None:
    ever = [r for r in ROWS if is_fetch(r._asdict())]
    first = {row.purl: row for row in sorted(ever, key=started, reverse=True)}
    new = [row for row in first.values() if NOW - SPAN <= started(row) < NOW]
    assert report.fetched.new_artifacts == len(new) > 0
    new.sort(key=started, reverse=True)
    found = [(new.purl, new.first_user, new.first_seen) for new in report.fetched.first_seen]
    assert found == [(row.purl, row.proxy_user, started(row)) for row in new[:10]]


def test_failures_unknown_hosts_and_callers(report: Report) -> None:
    kinds = Counter(
        row.error_type or f"status {row.status_code}"
        for row in ROWS_IN_SPAN
        if row.error_type or (row.status_code or 999) >= 400
    )
    assert {failure.kind: failure.requests for failure in report.failures_by_kind} == kinds
    unknown = [row for row in ROWS_IN_SPAN if row.remote is None]
    hosts = Counter(row.host for row in unknown)
    callers = report.callers
    assert callers.unknown_hosts == len(hosts) > 10
    assert [host.requests for host in callers.busiest_unknown_hosts] == sorted(
        hosts.values(), reverse=True
    )[:10]
    for host in callers.busiest_unknown_hosts:
        rows = [row for row in unknown if row.host == host.name]
        assert host.callers == len({row.proxy_user or row.client_ip for row in rows})
        assert host.sent_bytes == sum(row.request_bytes or 0 for row in rows)
        assert host.first_at == min(map(started, rows))
    assert callers.clients == len({row.client_ip for row in ROWS_IN_SPAN})
    assert callers.users == len({row.proxy_user for row in ROWS_IN_SPAN} - {None})


def test_gaps_that_overlap_the_span_are_listed_one_by_one(report: Report) -> None:
    found = [(gap.node, gap.reason, gap.entries) for gap in report.gaps.biggest]
    small = [("b", "buffer_full", 2)] * 6 + [("b", "buffer_full", 1)] * 3
    assert found == [(HOSTILE_TEXT, "shutdown", 7), *small]
    times = [gap.to_at for gap in report.gaps.biggest[1:7]]
    assert times == sorted(times, reverse=True)
    assert (report.gaps.gaps, report.gaps.entries) == (12, 7 + 5 + 6 * 2)  # one is not before NOW
    console = Console(width=80)
    with console.capture() as shown:
        console.print(report_text(report, 80))
    assert "Gaps in the log: 12 with 24 requests" in shown.get()
    assert "Gaps in the log: 12 gaps, 24 requests lost; the 10 biggest" in report_html(report)


def test_gaps_of_a_report_for_one_node(table: str) -> None:
    with open_database(Settings().with_dsn(table)) as connection:
        node_report = make_report(connection, Selection(node="b"), NOW)
        build_report = make_report(connection, Selection(node="b", user="build-1"), NOW)
    assert {gap.node for gap in node_report.gaps.biggest} == {"b"}
    assert (node_report.gaps.gaps, node_report.note_on_gaps) == (11, "")
    assert build_report.gaps == node_report.gaps
    note = "The gaps are those of this node, regardless of the other filters."
    assert build_report.note_on_gaps == note


def test_report_for_one_build(table: str) -> None:
    with open_database(Settings().with_dsn(table)) as connection:
        build_report = make_report(connection, Selection(user="build-1"), NOW)
    rows = [row for row in ROWS_IN_SPAN if row.proxy_user == "build-1"]
    assert (build_report.requests, build_report.bytes) == (len(rows), size(rows))
    assert build_report.filters == {"user": "build-1"}
    assert build_report.callers.users == 1
    fetched = {row.purl for row in rows if row in FETCHED}
    assert build_report.fetched.artifacts == len(fetched)


def test_note_that_gaps_ignore_the_filters(table: str, report: Report) -> None:
    with open_database(Settings().with_dsn(table)) as connection:
        build_report = make_report(connection, Selection(user="build-1"), NOW)
    assert build_report.gaps == report.gaps
    assert report.gaps.gaps > 0
    note = "The gaps are those of all requests, regardless of the filters."
    for width in (80, 150):
        console = Console(width=width)
        with console.capture() as shown:
            console.print(report_text(build_report, width))
        assert note in shown.get()
    assert note in report_html(build_report)
    assert note not in report_html(report)


def test_report_on_an_empty_log(dsn: str, tmp_path: Path) -> None:
    write(dsn)
    page = tmp_path / "report.html"
    done = CliRunner().invoke(main, ["--dsn", dsn, "report", "--html", str(page)])
    assert (done.exit_code, done.stdout) == (0, "")
    assert "none" in page.read_text()
    done = CliRunner().invoke(main, ["--dsn", dsn, "report"])
    assert done.exit_code == 0
    assert "0 requests" in done.stdout


@pytest.mark.parametrize("width", [80, 150])
def test_text_fits_the_terminal_and_is_printable(table: str, report: Report, width: int) -> None:
    text = on_terminal(width, "--dsn", table, "report", "--until", NOW.isoformat())
    plain = re.sub(r"\x1b\[[0-9;]*m", "", text).split("\r\n")
    assert all(line.isprintable() and cell_len(line) <= width for line in plain)
    assert len(plain) <= (50 if width == 150 else 90)
    assert f"{len(ROWS_IN_SPAN):,} requests" in plain[1]
    highest = max(bar.requests for bar in report.traffic)
    (caption,) = (number for number, line in enumerate(plain) if line.startswith("Requests per "))
    assert plain[caption] == f"Requests per hour, at most {highest}"
    top, *rest = (int(line.split(" ┤")[0]) for line in plain if " ┤" in line)
    assert sum(rest[-1:]) < highest <= top, "the scale reaches the maximum"
    axis = next(number for number, line in enumerate(plain) if "└" in line)
    labels = plain[axis + 1].split()
    assert len(labels) >= 3
    assert plain[axis].count("┬") == len(labels)
    ok = report.requests - report.failures - report.refusals
    legend = f"█ ok {ok}   █ refused {report.refusals}   █ failed {report.failures}"
    assert plain[axis + 2].strip() == legend


def test_chart_is_left_out_where_it_does_not_fit(table: str) -> None:
    text = on_terminal(25, "--dsn", table, "report", "--until", NOW.isoformat())
    assert "requests" in text
    assert "█" not in text


def test_one_of_each_is_singular(dsn: str, tmp_path: Path) -> None:
    write(dsn, 1, purl="pkg:npm/demo@1", remote="npm", artifact_kind="artifact", response_bytes=1)
    arguments = ("--dsn", dsn, "report", "--since", "2023-11-14")
    text = " ".join(call(*arguments).stdout.split())
    assert "1 request; 1 B; 0.0 % failed; " in text
    assert "1 artifact, " in text
    assert "1 client, 1 user" in text
    page = tmp_path / "report.html"
    assert call(*arguments, "--html", str(page)).returncode == 0
    html = page.read_text()
    for noun in ("request", "artifact", "client", "user"):
        assert f"<dt>{noun}</dt><dd>1</dd>" in html
    assert ": 1 request, 0 refused (4xx), 0 failed, 1 B</title>" in html


def test_artifacts_are_decoded(dsn: str, tmp_path: Path) -> None:
    write(
        dsn,
        1,
        purl="pkg:deb/debian/g%2B%2B-12@12.2.0-14%2Bdeb12u1?arch=amd64",
        remote="debian",
        artifact_kind="artifact",
        artifact_complete=True,
    )
    arguments = ("--dsn", dsn, "report", "--since", "2023-11-14")
    assert "deb g++-12 12.2.0-14+deb12u1 " in call(*arguments).stdout
    page = tmp_path / "report.html"
    assert call(*arguments, "--html", str(page)).returncode == 0
    assert ">deb g++-12 12.2.0-14+deb12u1</td>" in page.read_text()


def test_proxies_are_summed_up(dsn: str, tmp_path: Path) -> None:
    write(dsn, 1)
    with psycopg.connect(dsn) as connection:
        connection.execute(
            "INSERT INTO access_log_run (run_id, node, started_at, last_seen_at, seen, written, dropped, rejected,"
            " spooled, owner) SELECT gen_random_uuid(), 'gone', now() - interval '2 hours',"
            " now() - interval '1 hour', 0, 0, 0, 0, 0, session_user"
        )
    page = tmp_path / "report.html"
    runner = CliRunner()
    text = runner.invoke(main, ["--dsn", dsn, "report"]).stdout
    assert "\n0 proxies running, 1 silent since 20" in text
    assert runner.invoke(main, ["--dsn", dsn, "report", "--html", str(page)]).exit_code == 0
    assert re.search(r'<p class="amber">\S+ 0 proxies running, 1 silent since 20', page.read_text())


def test_json_equals_the_report(table: str, report: Report) -> None:
    done = CliRunner().invoke(
        main, ["--dsn", table, "report", "--json", "--until", NOW.isoformat()]
    )
    assert done.exit_code == 0
    assert done.stdout.rstrip("\n").isprintable()
    assert msgspec.json.decode(done.stdout, type=Report) == report


class _Page(HTMLParser):
    """Collects the tags, attributes and visible text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: Counter[str] = Counter()
        self.text: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, Any]]) -> None:
        self.tags[tag] += 1
        self.attributes.update(name for name, _ in attrs)

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_page_is_self_contained_and_escapes_text_from_clients(report: Report) -> None:
    html = report_html(report)
    page = _Page(html)
    assert page.tags["script"] == page.tags["img"] == page.tags["link"] == 0
    assert not {
        name for name in page.attributes if name.startswith("on") or name in {"src", "href"}
    }
    assert "url(" not in html
    assert "@import" not in html
    assert "prefers-color-scheme: dark" in html
    assert "@media print" in html
    assert all(c.isprintable() or c == "\n" for c in html)
    assert page.text.count(r"<script>alert(1)</script>\x1b]0;x\x07\u202e'" + '"&') >= 3
    assert page.tags["svg"] > 2
    assert html.count('<rect class="failed" x=') == sum(bar.failures > 0 for bar in report.traffic)
    assert html.count('<rect class="refused" x=') == sum(bar.refusals > 0 for bar in report.traffic)
    text = " ".join("".join(page.text).split())
    assert f"Requests per hour, at most {max(bar.requests for bar in report.traffic)} " in text
    ok = report.requests - report.failures - report.refusals
    assert f"ok {ok} refused (4xx) {report.refusals} failed {report.failures} " in text


def test_unwritable_file_gives_one_sentence(table: str) -> None:
    done = CliRunner().invoke(main, ["--dsn", table, "report", "--html", "/nowhere/report.html"])
    assert done.exit_code == 1
    assert done.stderr.startswith("Error: ")
    assert "/nowhere/report.html" in done.stderr


@pytest.mark.parametrize(
    "span",
    [
        ("--since", "9999-12-01T00:00Z", "--until", "9999-12-31T23:59:59Z"),
        ("--until", "0001-01-01T10:00Z"),
        ("--since", "0001-01-01T00:00Z"),
    ],
)
def test_span_at_the_end_of_the_calendar_gives_one_sentence(
    table: str, span: tuple[str, ...]
) -> None:
    done = CliRunner().invoke(main, ["--dsn", table, "report", *span])
    assert done.exit_code == 2
    assert "between the years 1900 and 9000." in done.stderr


def test_span_that_ends_before_it_starts_gives_one_sentence(table: str) -> None:
    done = CliRunner().invoke(main, ["--dsn", table, "report", "--since", "1h", "--until", "2h"])
    assert done.exit_code == 2
    assert "since must be earlier than until." in done.stderr


@pytest.mark.not_on_citus(
    "on Citus, a SELECT locks all partitions, also those that it does not read"
)
def test_only_partitions_in_the_span_are_read(table: str) -> None:
    with psycopg.connect(table) as connection:
        (days,) = connection.execute(
            "SELECT count(*) FROM pg_inherits WHERE inhparent = 'access_log'::regclass"
        ).fetchone() or (0,)
        assert days >= 3
        connection.execute("LOCK TABLE access_log_20260303 IN ACCESS EXCLUSIVE MODE")
        with open_database(Settings().with_dsn(table)) as reader:
            assert make_report(reader, Selection(), NOW).requests == len(ROWS_IN_SPAN)
