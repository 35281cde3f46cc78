"""The `artifactapi` commands and the SQL in the docs run, and print what the docs show.

The log holds the rows of `just demo`. Tests in tests/proxy run `artifactapi run`.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
import sys
import textwrap
import zipfile
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import psycopg
import pytest
import yaml
from psycopg.conninfo import conninfo_to_dict

from exporter import Exporter, Settings
from exporter.postgres.schema import ensure_schema
from exporter.rows.entry_builder import EntryBuilder
from exporter.run import Run
from exporter.settings import JournalSettings, RemotesSettings, SpoolSettings
from exporter.status_file import StatusFile, read_statuses
from exporter.write.database import Database
from exporter.write.ledger import RunCounts, RunLedger
from tests.support.access_log import temporary_schema
from tests.support.environment import clean_environment
from tests.support.registries import REMOTES
from tests.support.samples import make_exchange
from tests.support.wait import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

    from exporter import AccessLogEntry
    from tests.support.postgres import Postgres

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LOCK_FILES = {  # of the builds in the docs
    "requirements.txt": "demo-parser==2.4.1\ntiny-http==0.9.0\n",
    "package-lock.json": """\
{
  "name": "demo",
  "lockfileVersion": 3,
  "packages": {
    "": {"name": "demo", "dependencies": {"left-padding": "1.3.0"}},
    "node_modules/left-padding": {
      "version": "1.3.0",
      "resolved": "https://localhost/npm/left-padding/-/left-padding-1.3.0.tgz",
      "integrity": "sha512-z4PhNX7vuL3xVChQ1m2AB9Yg5AULVxXcg/SpIdNs6c5H0NE8XYXysP+DGNKHfuwvY7kxvUdBeoGlODJ6+SfaPg=="
    }
  }
}
""",
}
_FOLDER = "/etc/artifactapi"  # of the example files in the docs
_WHEEL = "demo-parser/demo_parser-2.4.1-py3-none-any.whl"
_TINY_WHEEL = "tiny-http/tiny_http-0.9.0-py3-none-any.whl"


class Request(NamedTuple):
    """A request of the demo: who made it, its URL, and the response."""

    user: str
    url: str
    status: int
    size: int | None
    error_type: str | None = None


REQUESTS = (
    Request("build-42", "https://localhost:45121/pypi/simple/demo-parser/", 200, 316),
    Request("build-42", f"https://localhost:45121/pypi/packages/{_WHEEL}.metadata", 200, 55),
    Request("build-42", "https://localhost:45121/pypi/simple/tiny-http/", 200, 310),
    Request("build-42", f"https://localhost:45121/pypi/packages/{_TINY_WHEEL}.metadata", 200, 53),
    Request("build-42", f"https://localhost:45121/pypi/packages/{_WHEEL}", 200, 141_140),
    Request("build-42", f"https://localhost:45121/pypi/packages/{_TINY_WHEEL}", 200, 141_119),
    Request("build-42", "https://localhost:45121/npm/left-padding", 200, 349),
    Request(
        "build-42", "https://localhost:45121/npm/left-padding/-/left-padding-1.3.0.tgz", 200, 20_329
    ),
    Request("build-43", f"https://localhost:45121/pypi/packages/{_WHEEL}", 200, 141_140),
    Request("build-43", "https://localhost:45121/pypi/simple/internal-tools/", 404, 9),
    Request("build-43", "http://localhost:50793/", 502, None, "connect"),
)


class Example(NamedTuple):
    """A command in the docs, and the lines that the docs show below it; None if they show none."""

    page: str
    command: str
    output: list[str] | None


def code_blocks(page: Path) -> list[str]:
    """The indented code blocks of a page, without their indentation."""
    blocks = re.findall(
        r"(?:^    .*\n(?:\n(?=    ))?)+", page.read_text(encoding="utf-8"), re.MULTILINE
    )
    return [re.sub(r"^    ", "", block, flags=re.MULTILINE).rstrip("\n") for block in blocks]


def examples() -> list[Example]:
    found = []
    for page in PAGES:
        for block in code_blocks(page):
            lines = block.replace("\\\n", "").splitlines()
            starts = [
                number
                for number, line in enumerate(lines)
                if re.match(r"(?:\$ )?(?:uv run )?artifactapi ", line)
                and not re.search(r"artifactapi run", line)
            ]
            for start, end in itertools.pairwise([*starts, len(lines)]):
                command = re.sub(r"^(?:\$ )?(?:uv run )?", "", lines[start])
                shows_output = lines[start].startswith("$")
                output = lines[start + 1 : end] if shows_output else None
                found.append(Example(page.name, command, output))
    return found


def statements() -> list[str]:
    """The queries on the page about the schema."""
    blocks = code_blocks(ROOT / "docs" / "schema.md")
    return [block for block in blocks if block.startswith("SELECT")]


def statement(page: str, start: str) -> str:
    """The SQL on a page that starts with this text, to the end of its code block."""
    (text,) = re.findall(
        rf"^ +{start}[^`]*?(?=\n\n|\n*\Z)", (ROOT / page).read_text(), re.MULTILINE
    )
    return str(text)


@pytest.fixture(scope="module")
def dsn(postgres: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A log with the rows of the demo."""
    remotes = tmp_path_factory.mktemp("docs") / "remotes.yaml"
    remotes.write_text(REMOTES, encoding="utf-8")
    builder = EntryBuilder(Settings(node="proxy-1", remotes=RemotesSettings(file=str(remotes))))
    entries = []
    start = datetime.now(UTC).timestamp() - len(REQUESTS) / 10
    with temporary_schema(postgres) as dsn:
        for number, request in enumerate(REQUESTS):
            scheme, _, rest = request.url.partition("://")
            address, _, path = rest.partition("/")
            host, _, port = address.partition(":")
            at = start + number / 10
            exchange = make_exchange(
                number,
                started_at=at,
                head_at=at + 0.002 if request.size else None,
                ended_at=at + 0.0043,
                proxy_user=request.user,
                scheme=scheme.encode(),
                host=host,
                port=int(port),
                target=f"/{path}".encode(),
                status_code=request.status,
                response_bytes=request.size,
                error_type=request.error_type,
            )
            entries.append(builder.build(exchange))
        _write_as_a_proxy(dsn, entries)
        yield dsn


def _write_as_a_proxy(dsn: str, entries: list[AccessLogEntry]) -> None:
    """Write the rows in a run that goes on while the tests run."""
    counts = RunCounts(0, 0, 0, len(entries), 0)
    ledger = RunLedger(Run.start("proxy-1"), lambda: counts)
    database = Database(Settings().with_dsn(dsn).database, ledger=ledger)
    assert database.write(entries) == []
    database.close()
    with psycopg.connect(dsn) as connection:
        connection.execute(
            "UPDATE access_log_run SET last_seen_at = now() + interval '1 hour', rows_per_s = 0.9"
        )


@pytest.fixture
def running_proxy(tmp_path: Path) -> Iterator[None]:
    """What a proxy that has written the demo's rows tells `artifactapi status`."""
    nowhere = Settings(
        node="proxy-1", spool=SpoolSettings(max_bytes=0), journal=JournalSettings(max_bytes=0)
    )
    exporter = Exporter(nowhere.with_dsn("host=localhost dbname=logs"))
    exporter.stop()
    count = len(REQUESTS)
    status = {
        **exporter.status(),
        "seen": count,
        "written": count,
        "retries": 0,
        "failures": 0,
        "away": False,
        "last_written_at": datetime.now(UTC).isoformat(),
        "journal": "on",
        "spool_max_bytes": 268_435_456,
        "journal_bytes": 16_777_216,
        "journal_used_bytes": 65_536,
        "batch_rows": {"buckets": {"4": 0, "16": 2, "+Inf": 2}, "sum": count},
        "batch_seconds": {"buckets": {"0.005": 2, "+Inf": 2}, "sum": 0.009},
    }
    folder = tmp_path / "home" / "status"
    file = StatusFile(folder, "run", lambda: status)
    eventually(lambda: read_statuses(folder))
    yield
    file.stop()


@pytest.fixture
def folder(dsn: str, tmp_path: Path, running_proxy: None) -> Path:
    """A folder with the files that commands in the docs name."""
    del running_proxy
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    shutil.copy(ROOT / "configs" / "artifactapi.yaml", tmp_path)
    parameters = "\n".join(f"{name}={value}" for name, value in conninfo_to_dict(dsn).items())
    (tmp_path / "services").write_text(f"[logs]\n{parameters}\n", encoding="utf-8")
    for name, text in LOCK_FILES.items():
        (tmp_path / name).write_text(text)
    advisory = b'{"id": "TEST-1", "modified": "2026-01-01T00:00:00Z", "affected": []}'
    with zipfile.ZipFile(tmp_path / "advisories.zip", "w") as archive:
        archive.writestr("TEST-1.json", advisory)
    (tmp_path / "etc").mkdir()
    (tmp_path / "archive").mkdir()
    for page in PAGES:
        for block in code_blocks(page):
            if found := re.match(rf"# {_FOLDER}/(\S+)\n", block):
                text = block.replace(_FOLDER, str(tmp_path / "etc"))
                (tmp_path / "etc" / found[1]).write_text(text, encoding="utf-8")
    return tmp_path


def run(example: Example, dsn: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run the command as a user would, with its pipes and files."""
    command = example.command.replace("tail -f", "tail").replace(_FOLDER, str(folder / "etc"))
    for program in ("jq", "goaccess"):
        if f"| {program}" in command and shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    # At noon, neither the start of the rows nor the output is on another day.
    hour = datetime.now(UTC).hour
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        check=False,
        capture_output=True,
        text=True,
        cwd=folder,
        timeout=60,
        env={
            **clean_environment(),
            "ARTIFACTAPI_DSN": dsn,
            "ARTIFACTAPI_HOME": str(folder / "home"),
            "COLUMNS": "100",  # a report with one column of tables
            "LC_ALL": "C.UTF-8",
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PGSERVICEFILE": str(folder / "services"),
            "TZ": f"NOON{hour - 12:+}",
        },
    )


def masked(line: str) -> str:
    """A line without what differs from run to run: times, ports, widths, pages of the database."""
    for pattern, name in {
        r"\d{4}-\d\d-\d\d( \d\d:\d\d(:\d\d)?)?": "DATE",
        r"\d\d:\d\d:\d\d\.\d+": "TIME",
        r"\b[\d.]+ ms\b|\b[\d.]+ s(?= ago)": "DURATION",
        r"process \d+": "process PID",
        r"Log: [\d.]+ [kM]B": "Log: SIZE",
        r"localhost:\d+": "localhost:PORT",
        r'"test_\d+"|\btest_\d+(?=\.)': "public",
        r'"public"': "public",
        r"[\u2500]+": "\u2500",
        r"\s+": " ",
    }.items():
        line = re.sub(pattern, name, line)
    return line.strip()


def groups(lines: list[str]) -> list[list[str]]:
    """The lines between the lines `...`, which stand for any lines."""
    text = "\n".join(masked(line) for line in lines if line.strip())
    return [group.strip("\n").splitlines() for group in text.split("\n...")]


def is_in_order(groups: list[list[str]], lines: list[str]) -> bool:
    """Whether the lines start with the first group, and the others follow in this order."""
    start = 0
    for number, group in enumerate(groups):
        fits = [
            at
            for at in range(start, len(lines) - len(group) + 1)
            if lines[at : at + len(group)] == group
        ]
        if not fits or (not number and fits[0]):
            return False
        start = fits[0] + len(group)
    return len(groups) > 1 or start == len(lines)


def test_the_docs_hold_examples() -> None:
    assert sum(example.page == "README.md" for example in examples()) >= 6
    assert sum(example.output is not None for example in examples()) >= 12
    assert len(statements()) > 3


@pytest.mark.parametrize("example", examples(), ids=lambda it: f"{it.page}: {it.command[:60]}")
def test_command_runs_and_prints_what_the_docs_show(
    dsn: str, folder: Path, example: Example
) -> None:
    done = run(example, dsn, folder)
    assert done.returncode == 0, done.stderr
    if example.output is not None:
        (printed,) = groups(done.stdout.splitlines()) or [[]]
        assert is_in_order(groups(example.output), printed), done.stdout


def recipe_scripts() -> dict[str, str]:
    """The shell scripts of the recipes for CI systems, by the name of the step."""
    blocks = re.findall(
        r"^```(\w+)\n(.*?)^```", (ROOT / "docs/ci.md").read_text(), re.MULTILINE | re.DOTALL
    )
    github, gitlab = (yaml.safe_load(text) for language, text in blocks if language == "yaml")
    (jenkins,) = (text for language, text in blocks if language == "groovy")
    scripts = {
        f"github {s['name']}": s["run"] for s in github["jobs"]["build"]["steps"] if "run" in s
    }
    scripts["gitlab"] = "\n".join(gitlab["build"]["script"])
    shells = re.findall(r"sh (?:'''(.*?)'''|'([^']*)')", jenkins, re.DOTALL)
    scripts |= {f"jenkins {n}": textwrap.dedent(a or b) for n, (a, b) in enumerate(shells)}
    return scripts


def test_recipes_verify_every_build() -> None:
    scripts = recipe_scripts()
    assert set(scripts) == {"github Install", "github Verify", "gitlab", "jenkins 0", "jenkins 1"}
    assert sum("artifactapi verify" in script for script in scripts.values()) == 3


@pytest.mark.parametrize("name", recipe_scripts())
def test_recipe_runs(dsn: str, folder: Path, name: str) -> None:
    """With clients that only print which proxy they would use."""
    client = '#!/bin/sh\necho "$(basename "$0") $HTTPS_PROXY $SSL_CERT_FILE"\n'
    for program in ("uv", "npm"):
        (folder / program).write_text(client)
        (folder / program).chmod(0o755)
    script = f"export BUILD=build-42 PATH={folder}:$PATH\n{recipe_scripts()[name]}"
    done = run(Example("ci.md", f"set -eu\n{script}", None), dsn, folder)
    assert done.returncode == 0, done.stderr
    clients = [line for line in done.stdout.splitlines() if line.startswith(("uv ", "npm "))]
    proxy = "http://build-42:x@proxy.example:8080 /etc/ssl/mitmproxy-ca-cert.pem"
    assert clients == (
        [] if "erify" in name or name == "jenkins 1" else [f"uv {proxy}", f"npm {proxy}"]
    )
    assert ("As locked: 3 artifacts." in done.stdout) == ("artifactapi verify" in script)


@pytest.mark.parametrize("query", statements())
def test_query_runs(dsn: str, query: str) -> None:
    with psycopg.connect(dsn) as connection:
        connection.execute(query.encode())


def test_uninstalling_leaves_nothing_in_the_schema(postgres: Postgres) -> None:
    with temporary_schema(postgres) as dsn, psycopg.connect(dsn) as connection:
        ensure_schema(connection)
        connection.execute(statement("docs/operations.md", "DROP TABLE access_log, ").encode())
        for table, column in (("pg_class", "relnamespace"), ("pg_proc", "pronamespace")):
            left = f"SELECT * FROM {table} WHERE {column} = current_schema()::regnamespace"
            assert connection.execute(left.encode()).fetchall() == []


def test_reader_role_can_turn_off_jit(postgres: Postgres) -> None:
    with psycopg.connect(postgres.dsn()) as connection:
        connection.execute("CREATE ROLE artifactapi_reader")
        connection.execute(statement("docs/database.md", "ALTER ROLE").encode())
        connection.rollback()
