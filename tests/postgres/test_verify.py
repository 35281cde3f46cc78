"""`artifactapi verify`: what it finds in rows, what it only notes, and its exit statuses.

tests/clients/test_locked_installs.py has real clients. Rows here are built from URLs, as the proxy does.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
import uuid
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import psycopg
import pytest
from click.testing import CliRunner

from addon.cli.main import main
from exporter import Settings, insert_access_log_batch
from exporter.postgres.schema import ensure_schema
from exporter.read.lock_comparison import comparison_key
from exporter.rows.entry_builder import EntryBuilder
from exporter.write.database import Database
from exporter.write.gaps import Gap
from tests.support.command import call
from tests.support.proxy import free_port
from tests.support.samples import make_exchange

if TYPE_CHECKING:
    import subprocess
    from pathlib import Path

pytestmark = pytest.mark.slow

FILES, INDEX = "files.pythonhosted.example", "pypi.example"
NPM = "registry.npmjs.example"
WHEEL = b"the bytes of a wheel"
SHA256 = hashlib.sha256(WHEEL).hexdigest()
DEMO = f"https://{FILES}/packages/demo-1.0-py3-none-any.whl"
LEFT = f"https://{NPM}/left/-/left-1.0.0.tgz"
_START = 1_700_000_000.0  # of the sample exchanges


class Build:
    """Writes rows of requests, and verifies them."""

    def __init__(self, dsn: str, folder: Path) -> None:
        self.dsn = dsn
        self.folder = folder
        self._builder = EntryBuilder(Settings(node="test"))
        self._number = 0

    def request(self, url: str, **changes: Any) -> None:
        """Write the row of one request; by default a GET of a whole file."""
        parts = urlsplit(url)
        self._number += 1
        exchange = make_exchange(
            self._number, host=parts.hostname, target=f"{parts.path}".encode(), **changes
        )
        entry = self._builder.build(exchange)
        with psycopg.connect(self.dsn, autocommit=True) as connection:
            ensure_schema(connection)
            connection.execute("SELECT access_log_ensure_partition(%s)", (entry.started_at[:10],))
            insert_access_log_batch(connection, [entry])

    def lock(self, name: str, text: str) -> str:
        """Write a lock file; return its path."""
        path = self.folder / name
        path.write_text(text)
        return str(path)

    def verify(self, *arguments: str, user: str = "build-42") -> Result:
        """Run the command with --json."""
        command = [
            "--dsn",
            self.dsn,
            "verify",
            "--json",
            "--wait",
            "0s",
            "--user",
            user,
            *arguments,
        ]
        done = CliRunner().invoke(main, command)
        assert done.stdout, done.stderr
        return Result(done.exit_code, json.loads(done.stdout))


class Result:
    """What the command printed."""

    def __init__(self, exit_code: int, document: dict[str, Any]) -> None:
        self.exit_code = exit_code
        self.document = document
        self.comparison: dict[str, Any] = document["comparison"]

    @property
    def findings(self) -> list[tuple[str, str]]:
        """Kind and package of each finding."""
        return [(each["kind"], each["purl"]) for each in self.comparison["findings"]]

    @property
    def details(self) -> list[str]:
        """What was expected."""
        return [each["detail"] for each in self.comparison["findings"]]

    @property
    def not_fetched(self) -> dict[str, str]:
        """Reasons by package."""
        return {each["purl"]: each["reason"] for each in self.comparison["not_fetched"]}


@pytest.fixture
def build(dsn: str, tmp_path: Path) -> Build:
    with psycopg.connect(dsn, autocommit=True) as connection:
        ensure_schema(connection)
    return Build(dsn, tmp_path)


def uv_lock(*packages: tuple[str, str, str], host: str = FILES, sha256: str = SHA256) -> str:
    """Return a uv.lock; a package is a name, a version and the file names, by space."""
    text = "version = 1\n"
    for name, version, files in packages:
        text += f'[[package]]\nname = "{name}"\nversion = "{version}"\n'
        text += f'source = {{ registry = "https://{INDEX}/simple" }}\nwheels = [\n'
        for file in files.split():
            text += f'{{ url = "https://{host}/packages/{file}", hash = "sha256:{sha256}" }},\n'
        text += "]\n"
    return text


def npm_lock(**packages: str) -> str:
    """Return a package-lock.json with versions by name."""
    entries = {
        f"node_modules/{name}": {
            "version": version,
            "resolved": f"https://{NPM}/{name}/-/{name}-{version}.tgz",
        }
        for name, version in packages.items()
    }
    return json.dumps({"lockfileVersion": 3, "packages": entries})


@pytest.fixture
def demo_lock(build: Build) -> str:
    return build.lock("uv.lock", uv_lock(("demo", "1.0", "demo-1.0-py3-none-any.whl")))


def test_fetch_with_equal_digest_is_as_locked(build: Build, demo_lock: str) -> None:
    build.request(f"https://{INDEX}/simple/demo/")
    build.request(DEMO, body=WHEEL)
    result = build.verify(demo_lock)
    assert (result.exit_code, result.findings, result.not_fetched) == (0, [], {})
    assert result.document["status"] == "as locked"
    assert result.comparison["digests"]["equal"] == 1
    assert result.comparison["as_locked"] == 1
    assert result.document["requests"] == 2


def test_archived_days_are_read(build: Build, demo_lock: str, tmp_path: Path) -> None:
    build.request(DEMO, body=WHEEL)
    build.request(DEMO.replace("demo", "other"))
    before = build.verify(demo_lock)
    assert len(before.findings) == 1
    archive = tmp_path / "archive"
    done = call("--dsn", build.dsn, "prune", "--keep", "30d", "--archive", str(archive))
    assert (done.returncode, done.stderr) == (0, "")

    assert build.verify(demo_lock).document["requests"] == 0
    after = build.verify(demo_lock, "--archive", str(archive))
    assert after.document == before.document


def test_unknown_digest_is_counted_and_no_finding(build: Build, demo_lock: str) -> None:
    build.request(DEMO)
    build.request(DEMO, status_code=304, response_bytes=0)
    result = build.verify(demo_lock)
    assert (result.exit_code, result.findings) == (0, [])
    assert result.comparison["digests"]["not_recorded"] == 1  # both are in one group


def test_installing_twice_changes_nothing(build: Build, demo_lock: str) -> None:
    for _ in range(2):
        build.request(DEMO, body=WHEEL)
    result = build.verify(demo_lock)
    assert (result.exit_code, result.comparison["as_locked"]) == (0, 1)


def test_other_digest_is_found(build: Build, demo_lock: str) -> None:
    build.request(DEMO, body=WHEEL)
    build.request(DEMO, body=b"other bytes")
    result = build.verify(demo_lock)
    assert result.exit_code == 1
    assert result.findings == [("other digest", "pkg:pypi/demo@1.0")]
    assert result.details == [
        f"SHA-256 is {hashlib.sha256(b'other bytes').hexdigest()}, locked is {SHA256}"
    ]
    assert result.comparison["as_locked"] == 0


def test_other_version_and_unknown_package_are_found(build: Build, demo_lock: str) -> None:
    build.request(f"https://{FILES}/packages/demo-1.1-py3-none-any.whl")
    build.request(f"https://{FILES}/packages/evil-1.0-py3-none-any.whl")
    result = build.verify(demo_lock)
    assert result.exit_code == 1
    assert result.findings == [
        ("not locked", "pkg:pypi/demo@1.1"),
        ("not locked", "pkg:pypi/evil@1.0"),
    ]
    assert result.details == ["locked is 1.0", "in no lock file"]
    assert result.not_fetched == {"pkg:pypi/demo@1.0": "no request"}


def test_other_file_of_a_locked_version_is_found(build: Build, demo_lock: str) -> None:
    build.request(f"https://{FILES}/packages/ab/cd/{'e' * 60}/demo-1.0.tar.gz", body=b"an sdist")
    result = build.verify(demo_lock)
    assert result.findings == [("other file", "pkg:pypi/demo@1.0")]
    assert result.details == ["demo-1.0.tar.gz, locked is demo-1.0-py3-none-any.whl"]


def test_any_locked_file_of_a_version_will_do(build: Build) -> None:
    files = "demo-1.0-py3-none-any.whl demo-1.0-cp313-cp313-win_amd64.whl"
    build.request(DEMO, body=WHEEL)
    result = build.verify(build.lock("uv.lock", uv_lock(("demo", "1.0", files))))
    assert (result.exit_code, result.not_fetched) == (0, {})


def test_other_known_host_is_found_unless_allowed(build: Build, demo_lock: str) -> None:
    build.request(
        "https://nexus.corp.example/repository/pypi/packages/demo/1.0/demo-1.0-py3-none-any.whl"
    )
    result = build.verify(demo_lock)
    assert result.findings == [("other host", "pkg:pypi/demo@1.0")]
    assert result.details == [f"from nexus.corp.example, expected {FILES}, {INDEX}"]
    assert build.verify(demo_lock, "--allow-host", "*.CORP.example").exit_code == 0
    assert build.verify(demo_lock, "--allow-host", "mirror.example").exit_code == 1


def test_host_that_no_remote_describes_is_found(build: Build, demo_lock: str) -> None:
    build.request("https://evil.example/any/demo-1.0-py3-none-any.whl")
    build.request("https://evil.example/script.sh")
    result = build.verify(demo_lock)
    assert result.findings == [("other host", "pkg:pypi/demo@1.0")]
    assert result.document["unknown_hosts"] == {"evil.example": 1}


def test_lookalike_of_a_registry_is_found(build: Build, demo_lock: str) -> None:
    """The remotes table takes it for the registry itself, because it does not know top-level domains."""
    build.request("https://files.pythonhosted.evil/packages/demo-1.0-py3-none-any.whl")
    assert build.verify(demo_lock).findings == [("other host", "pkg:pypi/demo@1.0")]


def test_registry_in_lock_file_serves_files_from_its_second_host(build: Build) -> None:
    lock = f"--index-url https://{INDEX}/simple\ndemo==1.0 --hash=sha256:{SHA256}\n"
    build.request(DEMO, body=WHEEL)
    result = build.verify(build.lock("requirements.txt", lock))
    assert (result.exit_code, result.comparison["digests"]["equal"]) == (0, 1)


def test_lock_file_without_hosts_uses_the_allowed_ones(build: Build) -> None:
    lock = build.lock("requirements.txt", f"demo==1.0.0 --hash=sha256:{SHA256}\n")
    build.request(DEMO, body=WHEEL)  # 1.0 = 1.0.0
    result = build.verify(lock)
    assert (result.exit_code, result.comparison["hosts_not_in_lock_file"]) == (0, 1)
    assert build.verify(lock, "--allow-host", FILES).exit_code == 0
    other = build.verify(lock, "--allow-host", "nexus.corp.example")
    assert other.details == [f"from {FILES}, expected nexus.corp.example"]


def test_redirect_from_the_locked_host_excuses_one_fetch(build: Build, demo_lock: str) -> None:
    location = ((b"location", b"https://cdn.example/1234"),)
    build.request(DEMO, status_code=302, response_fields=location, response_bytes=0)
    build.request("https://cdn.example/1234", response_fields=(), body=WHEEL)
    good = build.verify(demo_lock)
    assert (good.exit_code, good.comparison["digests"]["equal"]) == (0, 1)
    build.request("https://evil.example/any/demo-1.0-py3-none-any.whl")
    assert build.verify(demo_lock).findings == [("other host", "pkg:pypi/demo@1.0")]


def test_not_fetched_tells_why(build: Build) -> None:
    lock = npm_lock(read="1.0.0", cached="1.0.0", failed="1.0.0")
    build.request(f"https://{NPM}/read")
    build.request(f"https://{NPM}/failed/-/failed-1.0.0.tgz", status_code=404)
    wheel = uv_lock(("part", "1.0", "part-1.0-py3-none-any.whl"))
    build.request(
        f"https://{FILES}/packages/part-1.0-py3-none-any.whl",
        status_code=206,
        response_fields=((b"content-range", b"bytes 900-999/1000"),),
        response_bytes=100,
    )
    result = build.verify(build.lock("package-lock.json", lock), build.lock("uv.lock", wheel))
    assert result.exit_code == 0
    assert result.not_fetched == {
        "pkg:npm/read@1.0.0": "only its metadata was requested",
        "pkg:npm/cached@1.0.0": "no request",
        "pkg:npm/failed@1.0.0": "the download failed",
        "pkg:pypi/part@1.0": "only a part was read",
    }


def test_failed_partial_and_head_requests_are_no_fetches(build: Build, demo_lock: str) -> None:
    url = f"https://{FILES}/packages/evil-1.0-py3-none-any.whl"
    build.request(DEMO, body=WHEEL)
    build.request(url, status_code=404)
    build.request(url, method=b"HEAD")
    build.request(
        url, status_code=None, error_type="client_disconnected", error="gone", head_at=None
    )
    assert build.verify(demo_lock).exit_code == 0


def test_other_ecosystems_are_findings_only_if_strict(build: Build, demo_lock: str) -> None:
    build.request(DEMO, body=WHEEL)
    build.request(LEFT)
    result = build.verify(demo_lock)
    assert (result.exit_code, result.comparison["other_ecosystems"]) == (0, {"npm": 1})
    assert build.verify(demo_lock, "--strict").findings == [("not locked", "pkg:npm/left@1.0.0")]
    both = build.verify(demo_lock, build.lock("package-lock.json", npm_lock(left="1.0.0")))
    assert (both.exit_code, both.comparison["as_locked"]) == (0, 2)


def test_allowed_package_is_no_finding(build: Build, demo_lock: str) -> None:
    build.request(f"https://{FILES}/packages/setuptools-80.0-py3-none-any.whl")
    result = build.verify(demo_lock, "--allow-package", "setup*")
    assert (result.exit_code, result.comparison["allowed"]) == (0, {"pkg:pypi/setuptools@80.0": 1})
    assert build.verify(demo_lock, "--allow-package", "wheel").exit_code == 1


def test_composer_package_is_a_commit_on_github(build: Build) -> None:
    commit, other = "0" * 39 + "1", "0" * 39 + "2"
    api = "https://api.github.example/repos/acme/tool/zipball"
    place = {"type": "zip", "url": f"{api}/{commit}", "reference": commit, "shasum": ""}
    package = {"name": "acme/tool", "version": "v1.0.0", "dist": place}
    lock = build.lock("composer.lock", json.dumps({"packages": [package]}))
    stored = "https://codeload.github.example/acme/tool/legacy.zip"
    location = ((b"location", f"{stored}/{commit}".encode()),)
    build.request(f"{api}/{commit}", status_code=302, response_fields=location, response_bytes=0)
    build.request(f"{stored}/{commit}", response_fields=())
    good = build.verify(lock)
    assert (good.exit_code, good.not_fetched, good.comparison["as_locked"]) == (0, {}, 1)
    build.request(f"{api}/{other}", response_fields=())
    assert build.verify(lock).findings == [("not locked", f"pkg:github/acme/tool@{other}")]


@pytest.mark.parametrize(("lists_poms", "exit_code"), [(True, 1), (False, 0)])
def test_gradle_lists_metadata_only_if_it_verifies_it(
    build: Build, lists_poms: bool, exit_code: int
) -> None:
    pom = (
        f'<artifact name="tool-1.0.pom"><sha256 value="{SHA256}"/></artifact>' if lists_poms else ""
    )
    lock = build.lock(
        "verification-metadata.xml",
        '<verification-metadata><components><component group="org.acme" name="tool" version="1.0">'
        f'<artifact name="tool-1.0.jar"><sha256 value="{SHA256}"/></artifact>{pom}'
        "</component></components></verification-metadata>",
    )
    base = "https://repo1.maven.example/maven2/org/acme"
    build.request(f"{base}/tool/1.0/tool-1.0.jar", body=WHEEL)
    build.request(f"{base}/parent/1.0/parent-1.0.pom")
    result = build.verify(lock)
    assert (result.exit_code, result.comparison["digests"]["equal"]) == (exit_code, 1)


def test_only_the_named_build_counts(build: Build, demo_lock: str) -> None:
    build.request(DEMO, body=WHEEL)
    build.request(f"https://{FILES}/packages/evil-1.0-py3-none-any.whl", proxy_user="build-43")
    assert build.verify(demo_lock).exit_code == 0
    assert build.verify(demo_lock, user="build-43").exit_code == 1


def test_build_without_requests_is_uncertain(build: Build, demo_lock: str) -> None:
    build.request(DEMO, body=WHEEL)
    result = build.verify(demo_lock, user="build-typo")
    assert (result.exit_code, result.document["status"]) == (2, "uncertain")
    assert result.document["reasons"] == ["The log has no request of this build."]


@pytest.mark.parametrize(
    ("from_s", "to_s", "exit_code"),
    [(-30, -20, 2), (1, 2, 2), (500, 600, 2), (700, 800, 0), (-900, -800, 0)],
)
def test_gap_around_the_build_is_uncertain(
    build: Build, demo_lock: str, from_s: float, to_s: float, exit_code: int
) -> None:
    build.request(DEMO, body=WHEEL)
    write_gap(build.dsn, _START + from_s, _START + to_s)
    result = build.verify(demo_lock)
    assert result.exit_code == exit_code
    assert len(result.document["gaps"]) == (exit_code == 2)
    build.request(f"https://{FILES}/packages/evil-1.0-py3-none-any.whl")
    assert build.verify(demo_lock).exit_code == 1  # a finding is certain


def write_gap(dsn: str, start: float, end: float) -> None:
    first, last = (datetime.fromtimestamp(at, UTC).isoformat() for at in (start, end))
    database = Database(Settings().with_dsn(dsn).database)
    database.write_gaps([Gap(str(uuid.uuid4()), "test", first, last, "buffer_full", 7)])
    database.close()


def test_text_is_readable_and_has_no_control_characters(build: Build) -> None:
    lock = build.lock("requirements.txt", "demo==1.0\nloose\x1b[31m>=1\nother==2\n./\x1b[31m\n")
    build.request(DEMO)
    build.request(f"https://{FILES}/packages/evil-1.0-py3-none-any.whl")
    done = command(build.dsn, lock)
    assert done.returncode == 3
    assert r"loose\x1b[31m" in done.stderr
    lock = build.lock("requirements.txt", "demo==1.0\nother==2\n./\x1b[31m\n")
    done = command(build.dsn, lock)
    assert done.returncode == 1
    assert "\x1b" not in done.stdout
    printed = " ".join(done.stdout.split())
    for text in (
        "requirements.txt: 2 packages (requirements)",
        "not locked pypi evil 1.0 1 in no lock file",
        "Note: 1 locked but not fetched (no request): pypi other 2",
        r"Note: 1 not from a registry, not checked: ./\x1b[31m (from a folder or from git)",
        "1 finding; 1 artifact as locked.",
    ):
        assert text in printed


def command(dsn: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return call(
        "--dsn", dsn, "verify", "--user", "build-42", "--wait", "0s", *arguments, COLUMNS="200"
    )


def test_errors_have_exit_status_3_and_one_sentence(build: Build, demo_lock: str) -> None:
    missing = command(build.dsn, "absent/uv.lock")
    assert (missing.returncode, missing.stdout) == (3, "")
    assert missing.stderr == "Error: absent/uv.lock cannot be read: No such file or directory.\n"
    unknown = command(build.dsn, "--format", "cobol", demo_lock)
    assert unknown.returncode == 3
    assert unknown.stderr.startswith(
        "Error: There is no format 'cobol'; expected one of pylock, uv"
    )
    unreachable = command(f"host=127.0.0.1 port={free_port()}", demo_lock)
    assert unreachable.returncode == 3
    assert len(unreachable.stderr.splitlines()) == 1
    dsn = call("--dsn", "nonsense", "verify", demo_lock, "--user", "x")
    assert dsn.returncode == 3


def test_build_must_be_named(build: Build, demo_lock: str) -> None:
    done = call("--dsn", build.dsn, "verify", demo_lock)
    assert done.returncode == 3
    assert "Name the build with --user, --who, --client or --since." in done.stderr


def test_waits_until_no_row_arrives(build: Build, demo_lock: str) -> None:
    """A row that arrives while it waits counts, and makes it wait again."""
    build.request(f"https://{INDEX}/simple/demo/")
    command = ["--dsn", build.dsn, "verify", "--user", "build-42", "--wait", "1s", demo_lock]
    late = threading.Timer(0.5, build.request, (DEMO,), {"body": b"late and other"})
    late.start()
    started_at = time.monotonic()
    done = CliRunner().invoke(main, command)
    late.join()
    assert done.exit_code == 1, done.output
    assert time.monotonic() - started_at >= 1.5


def test_does_not_wait_if_the_time_is_over(build: Build, demo_lock: str) -> None:
    build.request(DEMO, body=WHEEL)
    command = ["--dsn", build.dsn, "verify", "--until", "2024-01-01", "--wait", "50s", demo_lock]
    started_at = time.monotonic()
    assert CliRunner().invoke(main, [*command, "--user", "build-42"]).exit_code == 0
    assert time.monotonic() - started_at < 40


@pytest.mark.parametrize(
    ("last_seen_s", "ended", "spooled", "reason"),
    [
        (60, "NULL", 0, "The proxy test has not reported since "),
        (60, "'unknown'", 0, "The proxy test has not reported since "),
        (60, "'stopped'", 0, None),
        (-700, "NULL", 0, None),
        (700, "NULL", 0, None),
        (None, "NULL", 0, None),
        (None, "NULL", 3, "3 rows wait on the disk of the proxy test."),
    ],
)
def test_proxy_that_may_know_more_is_uncertain(
    build: Build,
    demo_lock: str,
    last_seen_s: float | None,
    ended: str,
    spooled: int,
    reason: str | None,
) -> None:
    """`last_seen_s` counts from the build; None: the proxy has just reported."""
    start = time.time() - 1800
    build.request(DEMO, body=WHEEL, started_at=start, head_at=start + 0.1, ended_at=start + 0.2)
    seen = "now()" if last_seen_s is None else f"to_timestamp({start + last_seen_s})"
    with psycopg.connect(build.dsn) as connection:
        connection.execute(
            "INSERT INTO access_log_run (run_id, node, started_at, last_seen_at, ended_at, end_reason, seen,"
            " written, dropped, rejected, spooled, owner)"
            f" SELECT gen_random_uuid(), 'test', {seen} - interval '1 day', {seen},"
            f" CASE WHEN {ended}::text IS NOT NULL THEN {seen} END, {ended}, 1, 1, 0, 0, {spooled}, current_user"
        )
    result = build.verify(demo_lock)
    assert result.exit_code == (2 if reason else 0)
    assert [each for each in result.document["reasons"] if not each.startswith(reason or "-")] == []


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("pkg:pypi/zope.interface@1.0", "pkg:pypi/zope-interface@1.0.0"),
        ("pkg:pypi/demo@1.0-1", "pkg:pypi/Demo@1.0.post1"),
        ("pkg:nuget/Newtonsoft.Json@13.0.3", "pkg:nuget/newtonsoft.json@13.0.3"),
        ("pkg:helm/redis@1.0.0?repository_url=a.example", "pkg:helm/redis@1.0.0"),
    ],
)
def test_equal_packages_have_one_key(one: str, other: str) -> None:
    assert comparison_key(one) == comparison_key(other)
