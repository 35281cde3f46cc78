"""`artifactapi affected`: which fetched packages advisories name, and who fetched them."""

from __future__ import annotations

import csv
import io
import json
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from click.testing import CliRunner

from addon.cli.main import main
from exporter import Settings
from exporter.advisories.names import parse_purl, search_key
from exporter.postgres.connection import connect
from exporter.postgres.schema import ensure_schema, grants, schema_name
from exporter.retention.prune import prune
from tests.support.citus import CLUSTER_DSN
from tests.support.command import call, write

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from click.testing import Result

    Query = Callable[..., list[tuple[Any, ...]]]

pytestmark = pytest.mark.slow

_FIRST = datetime.fromtimestamp(1_700_000_000, UTC)  # the time of sample 0


def fetch(dsn: str, *numbers: int, purl: str, package: str, **changes: Any) -> None:
    """Log requests for a package that fetch it, unless the changes say something else."""
    ecosystem = purl.removeprefix("pkg:").partition("/")[0]
    values = {"artifact_kind": "artifact", "purl": purl, "package": package, "ecosystem": ecosystem}
    write(dsn, *numbers, **{**values, **changes})


def left_pad(dsn: str, *numbers: int, version: str = "1.3.0", **changes: Any) -> None:
    fetch(dsn, *numbers, purl=f"pkg:npm/left-pad@{version}", package="left-pad", **changes)


def affected(dsn: str, *arguments: str | Path) -> Result:
    """Run the command in this process, which takes a tenth of the time of another one."""
    environment = {"ARTIFACTAPI_DSN": dsn, "COLUMNS": "200"}
    return CliRunner(env=environment).invoke(main, ["affected", *map(str, arguments)])


def answer(dsn: str, *arguments: str | Path) -> dict[str, Any]:
    done = affected(dsn, *arguments, "--json")
    assert not done.stderr
    return {**json.loads(done.stdout), "status": done.exit_code}


def local(at: datetime) -> str:
    return f"{at.astimezone():%Y-%m-%d %H:%M}"


@pytest.fixture
def bad(tmp_path: Path) -> Path:
    """A list with one compromised version."""
    path = tmp_path / "bad.txt"
    path.write_text("left-pad@1.3.0\n")
    return path


def osv(tmp_path: Path, *affected_packages: dict[str, Any], **changes: Any) -> Path:
    path = tmp_path / "osv.json"
    document = {"id": "TEST-1", "summary": "A summary", "affected": affected_packages, **changes}
    path.write_text(json.dumps(document))
    return path


def ranged(ecosystem: str, name: str, *events: dict[str, str]) -> dict[str, Any]:
    ranges = [{"type": "ECOSYSTEM", "events": list(events)}]
    return {"package": {"ecosystem": ecosystem, "name": name}, "ranges": ranges}


def test_a_hit_says_who_fetched_what_when_and_from_where(dsn: str, bad: Path) -> None:
    left_pad(dsn, 1, 3, sha256="\\x" + "01" * 32, remote="npm", cache_status="MISS")
    left_pad(dsn, 2, proxy_user="build-43", client_ip="192.0.2.8", remote="npm", cache_status="HIT")
    left_pad(dsn, 4, version="1.2.0")
    fetch(dsn, 5, purl="pkg:npm/%40x/left-pad@1.3.0", package="@x/left-pad")
    fetch(dsn, 6, purl="pkg:pypi/left-pad@1.3.0", package="left-pad")
    found = answer(dsn, bad, "--type", "npm")
    assert found["status"] == 1
    (hit,) = found["hits"]
    assert hit["advisory"]["id"] == "bad.txt"
    assert (hit["verdict"], hit["purl"]) == ("affected", "pkg:npm/left-pad@1.3.0")
    assert (hit["package"], hit["version"]) == ("npm/left-pad", "1.3.0")
    fetches = hit["fetches"]
    assert datetime.fromisoformat(fetches["first_at"]) == _FIRST + timedelta(milliseconds=1)
    assert datetime.fromisoformat(fetches["last_at"]) == _FIRST + timedelta(milliseconds=3)
    del fetches["first_at"], fetches["last_at"]
    assert fetches == {
        "requests": 3,
        "bytes": 3 * 1234,
        "users": ["build-42", "build-43"],
        "user_count": 2,
        "clients": ["192.0.2.7", "192.0.2.8"],
        "client_count": 2,
        "anonymous_clients": [],
        "anonymous_client_count": 0,
        "remotes": ["npm"],
        "from_cache": True,
        "sha256": ["01" * 32],
    }
    assert found["looked_at"] == []


def test_the_table_names_the_advisory_the_package_and_the_builds(dsn: str, tmp_path: Path) -> None:
    left_pad(dsn, *range(1, 4))
    for number in range(10, 17):
        left_pad(dsn, number, proxy_user=f"build-{number}")
    path = osv(
        tmp_path,
        ranged("npm", "left-pad", {"introduced": "1.3.0"}),
        database_specific={"severity": "HIGH"},
    )
    done = affected(dsn, path)
    assert done.exit_code == 1
    text = " ".join(done.stdout.split())
    assert "1 affected package was fetched, by 8 users." in text
    assert "TEST-1 high A summary" in text
    assert f"npm left-pad 1.3.0 10 12.3 kB {local(_FIRST)} {local(_FIRST)}" in text
    assert "build-10, build-11, build-12, build-13, build-14 and 3 more" in text


def test_clients_without_a_login_are_named_beside_builds(
    dsn: str, bad: Path, tmp_path: Path
) -> None:
    left_pad(dsn, 1)
    left_pad(dsn, 2, proxy_user=None, client_ip="192.0.2.8")
    left_pad(dsn, 3, proxy_user=None, client_ip="192.0.2.9", method="HEAD")
    left_pad(dsn, 4, client_ip="192.0.2.10", method="HEAD")
    arguments = (bad, "--type", "npm")
    found = answer(dsn, *arguments)
    fetches = found["hits"][0]["fetches"]
    assert fetches["clients"] == ["192.0.2.7", "192.0.2.8"]
    assert (fetches["anonymous_clients"], fetches["anonymous_client_count"]) == (["192.0.2.8"], 1)
    page = tmp_path / "page.html"
    assert affected(dsn, *arguments, "--html", page).exit_code == 1
    for shown in (affected(dsn, *arguments).stdout, page.read_text(encoding="utf-8")):
        text = " ".join(shown.split())
        assert "1 affected package was fetched, by 1 user and 1 client without a login." in text
        assert "build-42; without a login: 192.0.2.8" in text
        assert "build-42; without a login: 192.0.2.9" in text
    rows = list(csv.DictReader(io.StringIO(affected(dsn, *arguments, "--csv").stdout)))
    assert [row["anonymous_clients"] for row in rows] == ["192.0.2.8", "192.0.2.9"]
    with connect(dsn, Settings().database) as connection:
        assert len(list(prune(connection, datetime(2023, 11, 15, tzinfo=UTC), None))) == 1
    (hit,) = answer(dsn, *arguments)["hits"]
    assert (hit["pruned"]["users"], hit["pruned"]["is_anonymous"]) == (["build-42"], True)
    assert affected(dsn, *arguments, "--html", page).exit_code == 1
    for shown in (affected(dsn, *arguments).stdout, page.read_text(encoding="utf-8")):
        text = " ".join(shown.split())
        assert "1 affected package was fetched, by 1 user and clients without a login." in text
        assert "build-42; others without a login" in text


def test_only_looked_at_is_not_fetched(dsn: str, bad: Path) -> None:
    left_pad(dsn, 1, method="HEAD")
    left_pad(dsn, 2, status_code=404)
    left_pad(dsn, 3, artifact_complete=False)
    left_pad(dsn, 4, status_code=None, error_type="client_disconnected")
    left_pad(dsn, 5, status_code=403)
    left_pad(dsn, 6, artifact_kind="sidecar")
    fetch(dsn, 7, purl="pkg:npm/left-pad", package="left-pad", artifact_kind="index")
    left_pad(dsn, 8, version="1.2.0", method="HEAD")
    found = answer(dsn, bad, "--type", "npm")
    assert found["status"] == 0
    assert found["hits"] == []
    looks = {
        (each["looks"]["how"], each["version"]): each["looks"]["requests"]
        for each in found["looked_at"]
    }
    assert looks == {
        ("HEAD", "1.3.0"): 1,
        ("not found", "1.3.0"): 1,
        ("partial download", "1.3.0"): 1,
        ("failed", "1.3.0"): 1,
        ("refused", "1.3.0"): 1,
        ("metadata", "1.3.0"): 1,
        ("index", None): 1,
    }
    text = affected(dsn, bad, "--type", "npm").stdout
    assert text.startswith("No affected package was fetched.")
    assert "Only looked at, not fetched" in text
    assert "partial download" in text


def test_versions_that_cannot_be_compared_are_possible(dsn: str, tmp_path: Path) -> None:
    fetch(dsn, 1, purl="pkg:composer/a/b", package="a/b")
    fetch(dsn, 2, purl="pkg:npm/odd@canary", package="odd")
    fetch(dsn, 3, purl="pkg:deb/debian/curl@7.88-1?arch=amd64", package="debian/curl")
    path = osv(
        tmp_path,
        ranged("Packagist", "a/b", {"introduced": "0"}, {"fixed": "1.0"}),
        ranged("npm", "odd", {"introduced": "0"}, {"fixed": "1.0.0"}),
        ranged("Debian:12", "curl", {"introduced": "0"}, {"fixed": "1:1.0-1"}),
    )
    found = answer(dsn, path)
    assert found["status"] == 2
    assert [(hit["verdict"], hit["package"]) for hit in found["hits"]] == [
        ("possible", "composer/a/b"),
        ("possible", "deb/debian/curl"),
        ("possible", "npm/odd"),
    ]
    text = " ".join(affected(dsn, path).stdout.split())
    assert "3 fetched packages may be affected." in text
    assert "1 package of distributions is named as the source package" in text


def test_a_gap_makes_no_uncertain(dsn: str, bad: Path, query: Query) -> None:
    left_pad(dsn, 1, version="1.2.0")
    query(
        "INSERT INTO access_log_gap (gap_id, node, from_at, to_at, reason, entries)"
        " VALUES (gen_random_uuid(), 'n', '2026-03-02', '2026-03-03', 'rejected', 7)"
    )
    done = affected(dsn, bad, "--type", "npm")
    assert done.exit_code == 2
    assert "but the log has gaps" in done.stdout
    assert "1 gap in this time: 7 requests are missing" in done.stdout
    assert affected(dsn, bad, "--type", "npm", "--until", "2026-03-01T00:00Z").exit_code == 0
    left_pad(dsn, 2)
    assert affected(dsn, bad, "--type", "npm").exit_code == 1


def test_filters_apply(dsn: str, bad: Path) -> None:
    left_pad(dsn, 1)
    left_pad(dsn, 86_400_000, proxy_user="build-43", client_ip="192.0.2.8")
    arguments = (bad, "--type", "npm")
    for filters, users in {
        (): ["build-42", "build-43"],
        ("--user", "build-43"): ["build-43"],
        ("--client", "192.0.2.7"): ["build-42"],
        ("--since", "2023-11-15T12:00Z"): ["build-43"],
        ("--until", "2023-11-15T12:00Z"): ["build-42"],
        ("--user", "build-44"): None,
        ("--package", "other"): None,
        ("--since", "2023-12-01T00:00Z"): None,
    }.items():
        found = answer(dsn, *arguments, *filters)
        assert found["status"] == (0 if users is None else 1), filters
        assert [hit["fetches"]["users"] for hit in found["hits"]] == (
            [] if users is None else [users]
        )


def test_fetches_whose_rows_were_removed_are_still_known(dsn: str, bad: Path, query: Query) -> None:
    left_pad(dsn, 1, 2)
    left_pad(dsn, 86_400_000, version="1.2.0")
    query("DROP TABLE access_log_20231114")
    arguments = (bad, "--type", "npm")
    found = answer(dsn, *arguments)
    assert found["status"] == 1
    (hit,) = found["hits"]
    assert hit["fetches"] is None
    assert (hit["ever"]["fetches"], hit["ever"]["first_user"]) == (2, "build-42")
    text = affected(dsn, *arguments).stdout
    assert "ever; first build-42" in text
    assert f"The rows before {local(_FIRST + timedelta(days=1))} were removed" in text
    assert answer(dsn, *arguments, "--since", "2023-11-15T00:00Z")["status"] == 0
    assert answer(dsn, *arguments, "--until", "2023-11-14T00:00Z")["status"] == 0
    # Whether this build made one of the fetches is not known any more.
    assert answer(dsn, *arguments, "--user", "build-43")["status"] == 2
    text = " ".join(affected(dsn, *arguments, "--user", "build-43").stdout.split())
    assert "whether earlier fetches of 1 affected package match the filters" in text
    # Fetches of another package do not count.
    assert answer(dsn, *arguments, "--package", "other*")["status"] == 0
    assert answer(dsn, *arguments, "--package", "left-*")["status"] == 2


def test_removed_fetches_around_the_selected_time_are_uncertain(
    dsn: str, bad: Path, query: Query
) -> None:
    left_pad(dsn, 1, 2 * 86_400_000)
    left_pad(dsn, 3 * 86_400_000, version="1.2.0")
    query("DROP TABLE access_log_20231114, access_log_20231116")
    arguments = (bad, "--type", "npm")
    between = ("--since", "2023-11-15T00:00Z", "--until", "2023-11-15T12:00Z")
    assert answer(dsn, *arguments, *between)["status"] == 2
    first_day = ("--since", "2023-11-14T00:00Z", "--until", "2023-11-15T00:00Z")
    assert answer(dsn, *arguments, *first_day)["status"] == 1


def test_rollups_still_tell_who_fetched_what_on_pruned_days(dsn: str, bad: Path) -> None:
    day_ms = 86_400_000
    left_pad(dsn, 1, 2)
    left_pad(dsn, 3, proxy_user="build-43")
    left_pad(dsn, 4, version="1.2.0", proxy_user="build-44")
    left_pad(dsn, day_ms, proxy_user="build-45")
    left_pad(dsn, 2 * day_ms, proxy_user="build-46")
    with connect(dsn, Settings().database) as connection:
        assert len(list(prune(connection, datetime(2023, 11, 16, tzinfo=UTC), None))) == 2
    arguments = (bad, "--type", "npm")
    (hit,) = answer(dsn, *arguments)["hits"]
    assert hit["fetches"]["users"] == ["build-46"]
    assert hit["pruned"] == {
        "purl": "pkg:npm/left-pad@1.3.0",
        "from_at": "2023-11-14T00:00:00Z",
        "until_at": "2023-11-16T00:00:00Z",
        "users": ["build-42", "build-43", "build-45"],
        "user_count": 3,
        "is_anonymous": False,
    }
    text = affected(dsn, *arguments).stdout
    assert "1 affected package was fetched, by 4 users." in text
    assert "build-42, build-43, build-45 (by day)" in " ".join(text.split())
    for filters, users in {
        ("--user", "build-43"): ["build-43"],
        ("--user", "build-4*", "--until", "2023-11-15T00:00Z"): ["build-42", "build-43"],
        ("--since", "2023-11-15T00:00Z", "--until", "2023-11-16T00:00Z"): ["build-45"],
    }.items():
        (hit,) = answer(dsn, *arguments, *filters)["hits"]
        assert hit["pruned"]["users"] == users
        assert hit["fetches"] is None
    # Every fetch is remembered with its user, so that this is a sure no.
    assert answer(dsn, *arguments, "--user", "build-44")["status"] == 0
    # The rollups do not know addresses.
    assert answer(dsn, *arguments, "--client", "198.51.100.1")["status"] == 2


def test_archived_rows_tell_what_rollups_do_not(dsn: str, bad: Path, tmp_path: Path) -> None:
    pytest.importorskip("duckdb")
    left_pad(dsn, 1, 2, client_ip="192.0.2.8")
    left_pad(dsn, 3, method="HEAD", client_ip="192.0.2.8")
    left_pad(dsn, 86_400_000, proxy_user="build-43")
    archive = tmp_path / "archive"
    archive.mkdir()
    with connect(dsn, Settings().database) as connection:
        assert len(list(prune(connection, datetime(2023, 11, 15, tzinfo=UTC), archive))) == 1
    arguments = (bad, "--type", "npm", "--client", "192.0.2.8")
    assert answer(dsn, *arguments)["status"] == 2
    found = answer(dsn, *arguments, "--archive", archive)
    assert found["status"] == 1
    (hit,) = found["hits"]
    assert (hit["fetches"]["requests"], hit["fetches"]["users"]) == (2, ["build-42"])
    assert [look["looks"]["how"] for look in found["looked_at"]] == ["HEAD"]
    (hit,) = answer(dsn, *arguments[:3], "--archive", archive)["hits"]
    assert (hit["fetches"]["requests"], hit["pruned"], hit["ever"]) == (3, None, None)


def test_csv_is_safe_to_open(dsn: str, tmp_path: Path) -> None:
    left_pad(dsn, 1, proxy_user="=cmd|' /C calc'!A0")
    path = osv(tmp_path, ranged("npm", "left-pad", {"introduced": "0"}), summary='@SUM(1)\x1b[2J"')
    done = affected(dsn, path, "--csv")
    assert done.exit_code == 1
    (row,) = csv.DictReader(io.StringIO(done.stdout))
    assert row["users"] == "'=cmd|' /C calc'!A0"
    assert row["summary"] == "'@SUM(1)\\x1b[2J\""
    assert (row["verdict"], row["advisory"], row["how"], row["requests"]) == (
        *("affected", "TEST-1", "fetched", "1"),
    )


def test_the_page_shows_everything_and_runs_nothing(dsn: str, tmp_path: Path) -> None:
    left_pad(dsn, 1, proxy_user="<script>alert(1)</script>", sha256="\\x" + "01" * 32, remote="npm")
    left_pad(dsn, 2, method="HEAD", proxy_user="build-43")
    fetch(dsn, 3, purl="pkg:npm/odd@canary", package="odd", proxy_user=None)
    path = osv(
        tmp_path,
        ranged("npm", "left-pad", {"introduced": "0"}),
        ranged("npm", "odd", {"introduced": "0"}, {"fixed": "1.0.0"}),
        summary="<img src=x onerror=alert(1)>\x1b[2J",
        aliases=["CVE-2026-1"],
    )
    page = tmp_path / "page.html"
    done = affected(dsn, path, "--html", page)
    assert done.exit_code == 1
    headline = "1 affected package was fetched, by 1 user; 1 more may be affected."
    assert done.stdout == f"{headline}\n"
    text = page.read_text(encoding="utf-8")
    assert f"<title>{headline}</title>" in text
    assert "default-src 'none'" in text
    assert "<script" not in text
    assert "<img" not in text
    assert "\x1b" not in text
    for part in (
        *("&lt;script&gt;alert(1)&lt;/script&gt;", "onerror=alert(1)&gt;\\x1b[2J", "CVE-2026-1"),
        *("npm left-pad 1.3.0", "01" * 32, "192.0.2.7", "npm odd canary", "build-43", "HEAD"),
    ):
        assert part in text


def test_control_characters_never_reach_the_terminal(dsn: str, tmp_path: Path) -> None:
    left_pad(dsn, 1, proxy_user="a\x1b[2Jb")
    left_pad(dsn, 2, method="HEAD", proxy_user="a\u202eb")
    path = osv(
        tmp_path,
        ranged("npm", "left-pad", {"introduced": "0"}),
        id="X\x1b]0;title\x07",
        summary="a\x1b[31m\u009b2J",
        aliases=["\x1b[1m"],
        database_specific={"severity": "\x1b[5m"},
    )
    for arguments in ((), ("--json",), ("--csv",)):
        done = affected(dsn, path, *arguments)
        assert done.exit_code == 1
        assert all(character.isprintable() or character == "\n" for character in done.stdout)


def test_no_answer_is_status_3(dsn: str, bad: Path, tmp_path: Path) -> None:
    left_pad(dsn, 1)
    nowhere = "host=127.0.0.1 port=1 dbname=x"
    (tmp_path / "settings.yaml").write_text("unknown: 1\n")
    for arguments, message in {
        ("affected", str(bad)): "the ecosystem of 'left-pad@1.3.0' is not known",
        ("affected", "nowhere.json"): "nowhere.json: no such file or folder",
        ("affected",): "No advisories are stored; name SOURCES",
        ("affected", str(bad), "--since", "never"): "since 'never' is not valid",
        ("affected", str(bad), "--type", "n p m"): "--type 'n p m' is not an ecosystem",
        (
            "affected",
            str(bad),
            "--type",
            "nmp",
        ): "--type 'nmp' is not an ecosystem; expected one such as",
        ("affected", str(bad), "--json", "--csv"): "--json and --csv exclude each other",
        ("--dsn", nowhere, "affected", str(bad), "--type", "npm"): "onnection",
        ("--config", str(tmp_path / "settings.yaml"), "affected", str(bad)): "unknown",
    }.items():
        done = CliRunner(env={"ARTIFACTAPI_DSN": dsn}).invoke(main, arguments)
        assert done.exit_code == 3, done.output
        assert message in done.stderr
        assert not done.stdout


def test_the_exit_status_is_that_of_the_process(dsn: str, bad: Path) -> None:
    left_pad(dsn, 1)
    for arguments, status in {("--type", "npm"): 1, ("--type", "Debian"): 0, (): 3}.items():
        assert call("affected", str(bad), *arguments, ARTIFACTAPI_DSN=dsn).returncode == status


@pytest.mark.parametrize(
    "purl",
    [
        "pkg:npm/%40Scope/left-pad@1.3.0",
        "pkg:pypi/foo-bar@1.0?x=y",
        "pkg:nuget/Newtonsoft.Json@13.0.1",
        "pkg:cargo/serde_json@1.0.0",
        "pkg:golang/github.com/BurntSushi/toml@v1.0.0",
        "pkg:maven/org.x/y@1.0?type=pom",
        "pkg:deb/debian/g%2B%2B-12@12.2.0-14%2Bdeb12u1?arch=amd64",
        "pkg:oci/app?repository_url=ghcr.example/x/app&tag=1",
        "pkg:github/actions/checkout@v4#action.yml",
        "pkg:github/a/b#file",
        "pkg:pub/http_parser@1.0.0",
        "pkg:hackage/aeson",
        "pkg:swift/github.com/apple/swift-nio@2.0.0",
    ],
)
def test_search_keys_mean_the_same_in_sql_and_python(dsn: str, query: Query, purl: str) -> None:
    with connect(dsn, Settings().database) as connection:
        ensure_schema(connection)
    package = parse_purl(purl)
    assert package is not None
    assert query("SELECT access_log_package_key(%s)", purl) == [(search_key(package.key),)]


def test_sources_that_name_nothing_are_no_answer(dsn: str, bad: Path, tmp_path: Path) -> None:
    left_pad(dsn, 1)
    assert affected(dsn, bad, "--type", "npm", "--keep").exit_code == 1
    empty = tmp_path / "empty.json"
    for text in ("", "# a comment\n", '{"id": "TEST-1", "modified": "2026", "affected": []}'):
        empty.write_text(text)
        done = affected(dsn, empty)
        assert done.exit_code == 2
        assert done.stdout.startswith("Nothing was compared, because the sources name no package.")
        done = affected(dsn, empty, "--keep")
        assert done.exit_code == 3
        assert "the stored advisories were not replaced" in done.stderr
    assert affected(dsn).exit_code == 1  # with the stored ones


def test_an_empty_log_has_no_hits(dsn: str, bad: Path) -> None:
    write(dsn)
    assert answer(dsn, bad, "--type", "npm")["status"] == 0


def test_a_reader_role_can_ask(dsn: str, bad: Path) -> None:
    left_pad(dsn, 1)
    with psycopg.connect(dsn, autocommit=True) as connection:
        schema = schema_name(connection)
        reader = f"{schema}_reader"
        connection.execute(f"CREATE ROLE {reader} LOGIN".encode())
        connection.execute(
            grants(schema, reader, reader, is_distributed=bool(CLUSTER_DSN)).encode()
        )
        try:
            as_reader = dsn.replace("user=postgres", f"user={reader}")
            assert answer(as_reader, bad, "--type", "npm")["status"] == 1
        finally:
            connection.execute(f"DROP OWNED BY {reader}; DROP ROLE {reader}".encode())
