"""configs/grafana-dashboard.json: each panel's query, run on a real log as Grafana would run it.

Macros and variables are expanded like in Grafana's PostgreSQL data source (its macros.go, and the
documentation's "Advanced variable format options" for `sqlstring`).
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import psycopg
import pytest

from tests.support.expected_results import (
    HITS,
    as_float4,
    callers,
    columns_key,
    failed,
    group_by,
    is_fetch,
    nearly_equal,
    not_null,
    percentile,
)
from tests.support.seeded_log import Plan, seeded_log

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from tests.support.access_log import AccessLog, Row
    from tests.support.postgres import Postgres

pytestmark = pytest.mark.slow

DASHBOARD = json.loads(
    (Path(__file__).resolve().parents[2] / "configs" / "grafana-dashboard.json").read_text()
)
PANELS = {panel["title"]: panel for panel in DASHBOARD["panels"] if panel["type"] != "row"}
ROWS = [panel for panel in DASHBOARD["panels"] if panel["type"] == "row"]
VARIABLES = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
_TO = datetime(2026, 5, 31, 12, tzinfo=UTC)
_FROM = _TO - timedelta(days=2)
_STEP_SECONDS = 3600
_GRID_WIDTH = 24


class Variables(NamedTuple):
    """The values selected above the panels. Empty means all."""

    remote: tuple[str, ...] = ()
    node: tuple[str, ...] = ()
    user: str = ""

    def matches(self, row: Mapping[str, Any], *, remote: bool = True) -> bool:
        """Return whether a panel counts this row. `remote`: whether the panel filters by remote."""
        return (
            (not remote or not self.remote or row["remote"] in self.remote)
            and (not self.node or row["node"] in self.node)
            and (not self.user or row["proxy_user"] == self.user)
        )


_ALL = Variables()


def expanded(sql: str, variables: Variables = _ALL) -> str:
    """Expand the variables and macros of a statement."""
    for name in ("remote", "node"):
        chosen = ",".join(map(quoted, getattr(variables, name))) or VARIABLES[name]["allValue"]
        sql = sql.replace(f"${{{name}:sqlstring}}", chosen)
    sql = sql.replace("${user:sqlstring}", quoted(variables.user))
    sql = sql.replace("$__interval_ms", str(_STEP_SECONDS * 1000)).replace("$__interval", "1h")
    return re.sub(r"\$([_a-zA-Z0-9]+)\(([^)]*)\)", macro, sql)


def quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def macro(match: re.Match[str]) -> str:
    start, end = (f"'{moment:%Y-%m-%dT%H:%M:%SZ}'" for moment in (_FROM, _TO))
    column, *rest = (argument.strip() for argument in match[2].split(","))
    if match[1] == "__timeGroupAlias":
        assert rest == ["1h"]
        return f'floor(extract(epoch from {column})/{_STEP_SECONDS})*{_STEP_SECONDS} AS "time"'
    return {
        "__timeFilter": f"{column} BETWEEN {start} AND {end}",
        "__timeFrom": start,
        "__timeTo": end,
    }[match[1]]


@pytest.fixture(scope="module")
def seeded(postgres: Postgres) -> Iterator[AccessLog]:
    with seeded_log(postgres, Plan(6000, _TO + timedelta(hours=6), days=4, seed=5)) as log:
        yield log


@pytest.fixture(scope="module")
def rows(seeded: AccessLog) -> list[Row]:
    return seeded.rows()


@pytest.fixture(scope="module")
def query(seeded: AccessLog) -> Iterator[Callable[[str], list[tuple[Any, ...]]]]:
    with psycopg.connect(seeded.dsn, autocommit=True) as connection:
        yield lambda sql: connection.execute(sql.encode()).fetchall()


Query = Callable[[str], list[tuple[Any, ...]]]
ExpectedRows = Callable[["list[Row]", Variables], "Iterable[tuple[Any, ...]]"]


def selected(rows: list[Row], variables: Variables, *, remote: bool = True) -> list[Row]:
    return [
        r for r in rows if _FROM <= r["started_at"] <= _TO and variables.matches(r, remote=remote)
    ]


def step(row: Row) -> int:
    return int(row["started_at"].timestamp()) // _STEP_SECONDS * _STEP_SECONDS


def requests(rows: list[Row], variables: Variables) -> Iterable[tuple[Any, ...]]:
    def status_class(row: Row) -> tuple[int, str]:
        code = row["status_code"]
        return step(row), "no response" if code is None else f"{code // 100}xx"

    for key, group in group_by(selected(rows, variables), status_class):
        yield *key, len(group) / _STEP_SECONDS


def step_and_remote(row: Row) -> tuple[int, str]:
    return step(row), row["remote"] or "(unknown)"


def bytes_by_remote(rows: list[Row], variables: Variables) -> Iterable[tuple[Any, ...]]:
    for key, group in group_by(selected(rows, variables), step_and_remote):
        sizes = not_null(group, "response_bytes")
        yield *key, sum(sizes) / _STEP_SECONDS if sizes else None


def durations(rows: list[Row], variables: Variables) -> Iterable[tuple[Any, ...]]:
    for at, group in group_by(selected(rows, variables), step):
        values = as_float4(not_null(group, "duration_ms"))
        yield at, *(percentile(values, share) for share in (0.5, 0.95, 0.99))


def failures(rows: list[Row], variables: Variables) -> Iterable[tuple[Any, ...]]:
    for key, group in group_by(selected(rows, variables), step_and_remote):
        yield *key, sum(map(failed, group)) / len(group)


def from_cache(rows: list[Row], variables: Variables) -> Iterable[tuple[Any, ...]]:
    with_evidence = (row for row in selected(rows, variables) if row["cache_status"] is not None)
    for at, group in group_by(with_evidence, step):
        hits = [row for row in group if row["cache_status"] in HITS]
        total = sum(not_null(group, "response_bytes"))
        share = sum(not_null(hits, "response_bytes")) / total if total else None
        yield at, len(hits) / len(group), share


def top_artifacts(rows: list[Row], variables: Variables) -> Iterable[tuple[Any, ...]]:
    found = []
    for purl, group in group_by(filter(is_fetch, selected(rows, variables)), columns_key("purl")):
        found.append((purl, len(group), callers(group), sum(not_null(group, "response_bytes"))))
    return sorted(found, key=lambda row: (-row[3], row[0]))[:20]


def first_seen(rows: list[Row], variables: Variables) -> Iterable[tuple[Any, ...]]:
    found = []
    for _, group in group_by(filter(is_fetch, rows), columns_key("purl")):
        first = min(group, key=columns_key("started_at"))
        if selected([first], variables._replace(node=())):
            total = sum(not_null(group, "response_bytes"))
            found.append(
                (
                    *columns_key("started_at", "purl", "remote", "proxy_user")(first),
                    len(group),
                    total,
                )
            )
    return sorted(found, key=lambda row: row[0], reverse=True)[:100]


def unknown_hosts(rows: list[Row], variables: Variables) -> Iterable[tuple[Any, ...]]:
    requests = (row for row in selected(rows, variables, remote=False) if row["remote"] is None)
    for key, group in group_by(requests, columns_key("host", "port", "scheme")):
        sent = not_null(group, "request_bytes")
        moments = not_null(group, "started_at")
        total = sum(sent) if sent else None
        yield *key, len(group), callers(group), total, min(moments), max(moments)


def requests_by_proxy(rows: list[Row], variables: Variables) -> Iterable[tuple[Any, ...]]:
    for key, group in group_by(selected(rows, variables), step_and_node):
        yield *key, len(group) / _STEP_SECONDS


def delays(rows: list[Row], variables: Variables) -> Iterable[tuple[Any, ...]]:
    for key, group in group_by(selected(rows, variables), step_and_node):
        seconds = [
            (row["logged_at"] - row["started_at"]).total_seconds()
            - (row["duration_ms"] or 0) / 1000
            for row in group
        ]
        yield *key, percentile(seconds, 0.95)


def step_and_node(row: Row) -> tuple[int, str]:
    return step(row), row["node"] or "(unknown)"


EXPECTED_ROWS: dict[str, ExpectedRows] = {
    "Requests by proxy": requests_by_proxy,
    "Delay of rows": delays,
    "Requests by status class": requests,
    "Bytes by remote": bytes_by_remote,
    "Durations": durations,
    "Failures": failures,
    "Responses from a cache": from_cache,
    "Top artifacts": top_artifacts,
    "Never fetched before": first_seen,
    "Unknown hosts": unknown_hosts,
}


@pytest.mark.parametrize(
    "variables",
    [
        Variables(),
        Variables(remote=("pypi", "nexus:npm-proxy")),
        Variables(node=("seed-2",)),
        Variables(remote=("debian",), node=("seed", "seed-3")),
    ],
    ids=["all", "remotes", "node", "both"],
)
@pytest.mark.parametrize("title", EXPECTED_ROWS)
def test_panel_matches_the_rows(
    title: str, variables: Variables, rows: list[Row], query: Query
) -> None:
    found = [tuple(map(number, row)) for row in query(expanded(sql_of(title), variables))]
    compare(found, list(EXPECTED_ROWS[title](rows, variables)))


@pytest.mark.parametrize("title", EXPECTED_ROWS)
def test_panel_can_show_one_build(title: str, rows: list[Row], query: Query) -> None:
    unknown = selected([r for r in rows if r["remote"] is None and r["proxy_user"]], Variables())
    fetches = selected([r for r in rows if is_fetch(r) and r["proxy_user"]], Variables())
    candidates = unknown if title == "Unknown hosts" else fetches
    variables = Variables(user=candidates[0]["proxy_user"])
    found = [tuple(map(number, row)) for row in query(expanded(sql_of(title), variables))]
    compare(found, list(EXPECTED_ROWS[title](rows, variables)), least=0 if "before" in title else 1)


def compare(found: list[tuple[Any, ...]], expected: list[tuple[Any, ...]], least: int = 1) -> None:
    assert len(found) == len(expected) >= least
    for row, other in zip(sorted(found, key=repr), sorted(expected, key=repr), strict=True):
        assert nearly_equal(row, other)


def number(value: Any) -> Any:
    """Convert decimals to float; Grafana shows both the same."""
    return value if value is None or not hasattr(value, "as_tuple") else float(value)


def test_gaps_in_the_time_range_are_shown(seeded: AccessLog, query: Query) -> None:
    with psycopg.connect(seeded.dsn, autocommit=True) as connection:
        for place, (start, end) in enumerate(
            [(-3, -2.5), (-3, -1.9), (-1, -0.5), (-0.1, 0.1), (-9, 9), (0.1, 0.2)]
        ):
            connection.execute(
                "INSERT INTO access_log_gap VALUES (gen_random_uuid(), %s, %s, %s, 'rejected', 1)",
                (f"n{place}", _TO + timedelta(days=start), _TO + timedelta(days=end)),
            )
        try:
            gaps = [row for row in query(expanded(sql_of("Gaps"))) if row[2].startswith("n")]
            assert [row[2:] for row in gaps] == [
                (name, "rejected", 1) for name in ("n3", "n2", "n1", "n4")
            ]
            on_node = query(expanded(sql_of("Gaps"), Variables(node=("n2",))))
            assert [row[2] for row in on_node] == ["n2"]
        finally:
            connection.execute("DELETE FROM access_log_gap WHERE node LIKE 'n%'")


def test_proxies_are_shown(seeded: AccessLog, query: Query) -> None:
    with psycopg.connect(seeded.dsn, autocommit=True) as connection:
        for node, minutes in (("p1", 0), ("p2", 5)):
            connection.execute(
                "INSERT INTO access_log_run (run_id, node, version, started_at, last_seen_at, seen, written,"
                " dropped, rejected, spooled, rows_per_s, owner) SELECT gen_random_uuid(), %s, '0.1.0',"
                " now() - interval '1 hour', now() - %s * interval '1 minute', 9, 5, 1, 1, 1, 2.5, session_user",
                (node, minutes),
            )
        try:
            shown = query(expanded(sql_of("Proxies")))
            assert [(*row[:3], *row[4:]) for row in shown] == [
                ("p1", "running", "0.1.0", 2.5, 5, 1, 1, 1, 1),
                ("p2", "silent", "0.1.0", None, 5, 1, 1, 1, 1),
            ]
            on_node = query(expanded(sql_of("Proxies"), Variables(node=("p2",))))
            assert [row[0] for row in on_node] == ["p2"]
        finally:
            connection.execute("DELETE FROM access_log_run WHERE node LIKE 'p%'")


def test_affected_packages_are_shown(rows: list[Row], seeded: AccessLog, query: Query) -> None:
    assert query(expanded(sql_of("Affected packages"))) == []
    fetches = [row for row in selected(rows, _ALL) if is_fetch(row)]
    first, second = sorted({row["purl"] for row in fetches})[:2]
    with psycopg.connect(seeded.dsn, autocommit=True) as connection:
        for purl, advisory, verdict in (
            (first, "TEST-1", "affected"),
            (first, "TEST-2", "affected"),
            (second, "TEST-3", "possible"),
            ("pkg:npm/not-fetched@1", "TEST-4", "affected"),
        ):
            connection.execute(
                "INSERT INTO advisory_match VALUES (%s, %s, %s, 'high', '')",
                (purl, advisory, verdict),
            )
        try:
            shown = query(expanded(sql_of("Affected packages")))
            build = next(row["proxy_user"] for row in fetches if row["proxy_user"])
            of_build = query(expanded(sql_of("Affected packages"), Variables(user=build)))
        finally:
            connection.execute("DELETE FROM advisory_match")
    expected = {}
    for purl in (first, second):
        found = [row for row in fetches if row["purl"] == purl]
        expected[purl] = (len(found), callers(found), max(row["started_at"] for row in found))
    assert shown == [
        ("affected", "TEST-1", "high", first, *expected[first]),
        ("affected", "TEST-2", "high", first, *expected[first]),
        ("possible", "TEST-3", "high", second, *expected[second]),
    ]
    of_this = {row["purl"] for row in fetches if row["proxy_user"] == build} & {first, second}
    assert {row[3] for row in of_build} == of_this


def test_text_typed_into_the_dashboard_cannot_inject_sql(query: Query) -> None:
    hostile = Variables(user="x' OR true --", remote=("'; DROP TABLE access_log; --",))
    for panel in PANELS:
        if panel not in {"Gaps", "Unknown hosts"}:
            assert query(expanded(sql_of(panel), hostile)) == []
    assert query(expanded(sql_of("Unknown hosts"), hostile)) == []


@pytest.mark.parametrize(("name", "least"), [("remote", 9), ("node", 3)])
def test_variables_list_the_values_in_the_time_range(
    name: str, least: int, rows: list[Row], query: Query
) -> None:
    names = {row[name] for row in selected(rows, Variables()) if row[name] is not None}
    assert sorted(row[0] for row in query(expanded(VARIABLES[name]["query"]))) == sorted(names)
    assert len(names) >= least


def test_every_panel_is_tested() -> None:
    assert set(PANELS) == {*EXPECTED_ROWS, "Gaps", "Proxies", "Affected packages"}
    assert len(PANELS) + len(ROWS) == len(DASHBOARD["panels"])


def test_proxies_have_a_row_of_their_own() -> None:
    (row,) = ROWS
    below = [it["title"] for it in PANELS.values() if it["gridPos"]["y"] > row["gridPos"]["y"]]
    assert below == ["Requests by proxy", "Delay of rows", "Gaps", "Proxies"]
    assert (row["title"], row["collapsed"]) == ("Proxies and completeness", False)


def test_dashboard_can_be_imported_into_any_grafana() -> None:
    assert DASHBOARD["id"] is None
    assert VARIABLES["datasource"]["type"] == "datasource"
    chosen = {"type": VARIABLES["datasource"]["query"], "uid": "${datasource}"}
    for panel in PANELS.values():
        assert panel["datasource"] == chosen
        assert [target["datasource"] for target in panel["targets"]] == [chosen]
    for name in ("remote", "node"):
        assert VARIABLES[name]["datasource"] == chosen
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    cells = [cell for panel in DASHBOARD["panels"] for cell in covered(panel["gridPos"])]
    assert len(cells) == len(set(cells)), "panels overlap"
    assert all(x < _GRID_WIDTH for x, _ in cells)


def covered(place: dict[str, int]) -> Iterator[tuple[int, int]]:
    columns = range(place["x"], place["x"] + place["w"])
    return itertools.product(columns, range(place["y"], place["y"] + place["h"]))


def sql_of(title: str) -> str:
    (target,) = PANELS[title]["targets"]
    sql: str = target["rawSql"]
    return sql
