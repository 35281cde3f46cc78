"""`artifactapi affected --keep`: stored advisories, and what reports, the page and SQL show of them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from click.testing import CliRunner

from addon.cli.main import main
from exporter import Settings
from exporter.postgres.connection import connect
from exporter.postgres.schema import ensure_schema, grants, schema_name
from exporter.read import advisory_store
from exporter.read.advisory_store import load_kept
from exporter.read.kept_advisories import compared_at, kept_state, marks
from exporter.read.report import make_report
from exporter.read.report_html import report_html
from exporter.read.selection import Selection
from exporter.read.session import read_only
from tests.support.citus import CLUSTER_DSN
from tests.support.command import write

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from click.testing import Result

    Query = Callable[..., list[tuple[Any, ...]]]

pytestmark = pytest.mark.slow

_PURL = "pkg:npm/left-pad@1.3.0"


def fetch(dsn: str, *numbers: int, purl: str = _PURL, **changes: Any) -> None:
    package = purl.partition("/")[2].partition("@")[0]
    values = {"artifact_kind": "artifact", "purl": purl, "package": package, "ecosystem": "npm"}
    write(dsn, *numbers, **{**values, **changes})


def run(dsn: str, *arguments: str | Path) -> Result:
    return CliRunner(env={"ARTIFACTAPI_DSN": dsn}).invoke(main, list(map(str, arguments)))


def advisory(number: int, name: str, *events: dict[str, str], **changes: Any) -> dict[str, Any]:
    ranges = [{"type": "SEMVER", "events": list(events)}]
    package = {"ecosystem": "npm", "name": name}
    affected = [{"package": package, "ranges": ranges, "versions": ["9.9.9"]}]
    return {"id": f"TEST-{number}", "summary": f"Summary {number}", "affected": affected, **changes}


@pytest.fixture
def osv(tmp_path: Path) -> Path:
    """Three advisories: two are about left-pad 1.3.0; the third may be about odd."""
    path = tmp_path / "osv.jsonl"
    documents = [
        advisory(1, "left-pad", {"introduced": "1.0.0"}, {"fixed": "1.3.1"}, aliases=["CVE-1"]),
        advisory(2, "left-pad", {"introduced": "0"}, database_specific={"severity": "HIGH"}),
        advisory(3, "odd", {"introduced": "0"}, {"fixed": "2.0.0"}, summary="NUL \0 and more"),
    ]
    path.write_text("\n".join(map(json.dumps, documents)))
    return path


@pytest.fixture
def kept(dsn: str, osv: Path) -> str:
    """A log with fetches, and the advisories kept."""
    fetch(dsn, 1, 2, 3)
    fetch(dsn, 4, proxy_user="build-43")
    fetch(dsn, 5, purl="pkg:npm/safe@1.0.0")
    fetch(dsn, 6, purl="pkg:npm/odd@canary")
    fetch(dsn, 7, method="HEAD")
    done = run(dsn, "affected", "--keep", osv)
    assert done.exit_code == 1, done.output
    return dsn


def test_kept_advisories_answer_without_sources(kept: str, osv: Path) -> None:
    from_sources = json.loads(run(kept, "affected", osv, "--json").stdout)
    done = run(kept, "affected", "--json")
    assert done.exit_code == 1
    from_store = json.loads(done.stdout)
    assert from_store["kept"]["advisories"] == 3
    for document in (from_sources, from_store):
        for name in ("kept", "files"):
            document.pop(name)
        for hit in document["hits"]:  # PostgreSQL cannot store NUL
            hit["advisory"]["summary"] = hit["advisory"]["summary"].replace("\0", "\ufffd")
    assert from_store == from_sources
    assert "The advisories were stored" in run(kept, "affected").stdout


def test_the_store_holds_what_was_read(kept: str, osv: Path) -> None:
    from exporter.advisories.sources import SourceReader  # noqa: PLC0415 - only here

    reader = SourceReader()
    reader.read(str(osv))
    with connect(kept, Settings().database) as connection, read_only(connection, 10):
        found = list(load_kept(connection))
    assert [(each.key, each.ranges, each.versions) for each in found] == [
        (each.key, each.ranges, each.versions) for each in reader.advisories
    ]
    assert [each.advisory.aliases for each in found] == ["CVE-1", "", ""]


@pytest.mark.usefixtures("kept")
def test_the_view_has_each_fetch_with_each_advisory(query: Query) -> None:
    rows = query(
        "SELECT advisory_id, verdict, severity, purl, proxy_user, count(*) FROM access_log_affected"
        " WHERE started_at >= '2023-11-14' GROUP BY 1, 2, 3, 4, 5 ORDER BY 1, 5"
    )
    assert rows == [
        ("TEST-1", "affected", "", _PURL, "build-42", 3),
        ("TEST-1", "affected", "", _PURL, "build-43", 1),
        ("TEST-2", "affected", "high", _PURL, "build-42", 3),
        ("TEST-2", "affected", "high", _PURL, "build-43", 1),
        ("TEST-3", "possible", "", "pkg:npm/odd@canary", "build-42", 1),
    ]


def test_marks_are_those_of_the_page(kept: str) -> None:
    with psycopg.connect(kept) as connection:
        found = marks(connection, [_PURL, "pkg:npm/odd@canary", "pkg:npm/safe@1.0.0", _PURL])
        assert compared_at(connection) is not None
    assert {purl: (mark.verdict, mark.advisories) for purl, mark in found.items()} == {
        _PURL: ("affected", ["TEST-1", "TEST-2"]),
        "pkg:npm/odd@canary": ("possible", ["TEST-3"]),
    }


def test_a_report_marks_affected_packages_and_says_how_old_the_advisories_are(kept: str) -> None:
    fetch(kept, 20, purl="pkg:npm/later@1.0.0")
    selection = Selection.parse({"since": "2023-11-14T00:00Z", "until": "2023-11-16T00:00Z"})
    with connect(kept, Settings().database) as connection:
        report = make_report(connection, selection)
    assert report.kept is not None
    assert (report.kept.advisories, report.kept.packages, report.kept.unchecked) == (3, 2, 1)
    top = [(each.purl, each.verdict, each.fetches, each.users) for each in report.kept.top]
    assert top == [(_PURL, "affected", 4, 2), ("pkg:npm/odd@canary", "possible", 1, 1)]
    assert set(report.marks) == {_PURL, "pkg:npm/odd@canary"}
    span = ("--since", "2023-11-14T00:00Z", "--until", "2023-11-16T00:00Z")
    text = " ".join(run(kept, "report", *span).stdout.split())
    for part in (
        "Affected packages: 2",
        "TEST-1 and 1 more",
        "affected: npm left-pad",
        "possible: npm odd",
        "1 package fetched since then was not compared",
    ):
        assert part in text
    page = report_html(report)
    assert "<h2>Affected packages: 2</h2>" in page
    assert '<strong class="bad">affected</strong> npm left-pad 1.3.0' in page
    assert '<strong class="unsure">possible</strong> npm odd canary' in page


def test_a_report_without_kept_advisories_does_not_mention_them(dsn: str) -> None:
    fetch(dsn, 1)
    with connect(dsn, Settings().database) as connection:
        report = make_report(connection, Selection.parse({"since": "2023-11-14T00:00Z"}))
    assert (report.kept, report.marks) == (None, {})
    assert "ffected" not in report_html(report)


def test_keep_without_sources_compares_again(kept: str, query: Query) -> None:
    stored = query("SELECT kept_at FROM advisory_state")
    fetch(kept, 20, purl="pkg:npm/left-pad@1.2.0")
    assert query("SELECT count(*) FROM advisory_match WHERE purl LIKE '%1.2.0'") == [(0,)]
    assert run(kept, "affected", "--keep").exit_code == 1
    assert query("SELECT advisory_id FROM advisory_match WHERE purl LIKE '%1.2.0' ORDER BY 1") == [
        ("TEST-1",),
        ("TEST-2",),
    ]
    assert query("SELECT kept_at, compared FROM advisory_state") == [(*stored[0], 4)]
    with psycopg.connect(kept) as connection:
        state = kept_state(connection)
    assert state is not None
    assert (state.unchecked, state.advisories, state.packages) == (0, 3, 2)


def test_keep_replaces_what_was_kept(kept: str, tmp_path: Path, query: Query) -> None:
    one = tmp_path / "one.txt"
    one.write_text("pkg:npm/safe@1.0.0\n")
    assert run(kept, "affected", "--keep", one, "--user", "nobody").exit_code == 0
    assert query("SELECT advisory_id, package FROM advisory") == [("one.txt", "npm/safe")]
    # What is kept does not depend on the filters of the answer.
    assert query("SELECT purl FROM advisory_match") == [("pkg:npm/safe@1.0.0",)]


def test_too_many_advisories_are_rejected_and_nothing_is_lost(
    kept: str, osv: Path, query: Query, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(advisory_store, "MAX_KEPT", 2)
    done = run(kept, "affected", "--keep", osv)
    assert done.exit_code == 3
    assert "TEST-3 cannot be kept: there can be 2 packages in all advisories" in done.stderr
    assert query("SELECT count(*) FROM advisory") == [(3,)]
    assert query("SELECT count(*) FROM advisory_match") == [(3,)]


def test_without_kept_advisories_sources_are_needed(dsn: str) -> None:
    write(dsn)
    done = run(dsn, "affected")
    assert done.exit_code == 3
    assert "No advisories are stored; name SOURCES" in done.stderr


def test_a_reader_can_use_kept_advisories_but_not_store_any(kept: str, osv: Path) -> None:
    with connect(kept, Settings().database) as connection:
        ensure_schema(connection)
        schema = schema_name(connection)
        reader, former, proxy = (f"{schema}_{name}" for name in ("reader", "former", "proxy"))
        for role in (reader, former, proxy):
            connection.execute(f"CREATE ROLE {role} LOGIN".encode())
        text = grants(schema, proxy, reader, is_distributed=bool(CLUSTER_DSN))
        connection.execute(text.encode())
        # A role that got its grants before there were advisories.
        old = text.replace(reader, former)
        for name in ("advisory", "advisory_match", "advisory_state", "access_log_affected"):
            old = old.replace(f'"{schema}"."{name}", ', "").replace(f', "{schema}"."{name}"', "")
        connection.execute(old.encode())
        try:
            as_reader = kept.replace("user=postgres", f"user={reader}")
            assert run(as_reader, "affected").exit_code == 1
            for role in (reader, proxy):
                as_role = kept.replace("user=postgres", f"user={role}")
                done = run(as_role, "affected", "--keep", osv)
                assert done.exit_code == 3
                assert "This database role cannot store advisories" in done.stderr
            as_former = kept.replace("user=postgres", f"user={former}")
            assert run(as_former, "report", "--since", "2023-11-14T00:00Z").exit_code == 0
            with psycopg.connect(as_former) as session:
                assert marks(session, [_PURL]) == {}
                assert compared_at(session) is None
        finally:
            connection.execute(
                f"DROP OWNED BY {reader}, {former}, {proxy}; DROP ROLE {reader}, {former}, {proxy}".encode()
            )
