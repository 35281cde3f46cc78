"""The command `artifactapi`, each of its subcommands run as a user runs it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import psycopg
import pytest

from exporter import Settings
from exporter.database import Database, insert_access_log_batch
from exporter.schema import ensure_schema
from tests.support.accesslog import SCRIPT, AccessLog
from tests.support.clients import fetch
from tests.support.proxy import free_port
from tests.support.samples import make_entry
from tests.support.upstream import RawUpstream
from tests.support.wait import eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

COMMAND = str(Path(sys.executable).with_name("artifactapi"))


def call(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run `artifactapi` to its end."""
    return subprocess.run(
        [COMMAND, *arguments],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, **env},
        timeout=60,
    )


@contextlib.contextmanager
def started(output: Path, *arguments: str, **env: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run `artifactapi` beside the test, its output in a file, and interrupt it at the end."""
    with output.open("wb") as file:
        process = subprocess.Popen(
            [COMMAND, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **env},
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
            process.wait(20)


def write(dsn: str, *numbers: int, **changes: object) -> None:
    """Put rows into the table, one after another."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        ensure_schema(connection)
        for number in numbers:
            entry = make_entry(number, **changes)
            day = entry.started_at[:10]
            connection.execute("SELECT access_log_ensure_partition(%s)", (day,))
            insert_access_log_batch(connection, [entry])


def test_path_is_the_script(tmp_path: Path) -> None:
    assert call("path").stdout == f"{SCRIPT}\n"
    assert call("--config", str(tmp_path / "none.yaml"), "path").returncode == 1


def test_dsn_shows_no_password(home: Path) -> None:
    shown = call("dsn", ARTIFACTAPI_DSN="postgresql://me:hunter2@db.example:5433/log").stdout
    assert "hunter2" not in shown
    assert {"user=me", "host=db.example", "port=5433", "dbname=log"} <= set(shown.split())
    embedded = call("dsn", ARTIFACTAPI_HOME=str(home)).stdout
    assert f"host={home / 'postgres'}" in embedded


def test_the_option_comes_before_the_variable() -> None:
    shown = call("--dsn", "host=first", "dsn", ARTIFACTAPI_DSN="host=second").stdout
    assert shown == "host=first\n"


def test_psql_takes_its_own_arguments_and_gives_its_own_exit_code(dsn: str) -> None:
    done = call("psql", "-AtXc", "SELECT 6 * 7", ARTIFACTAPI_DSN=dsn)
    assert (done.stdout, done.returncode) == ("42\n", 0)
    assert call("psql", "-Xc", "SELECT nothing", ARTIFACTAPI_DSN=dsn).returncode == 1


def test_psql_starts_the_embedded_server_when_nothing_else_has(home: Path) -> None:
    done = call("psql", "-AtXc", "SHOW listen_addresses", ARTIFACTAPI_HOME=str(home))
    assert (done.stdout, done.stderr) == ("\n", "")
    assert not (home / "postgres" / "postmaster.pid").exists(), "it is stopped again"


def test_init_makes_the_schema_and_prints_grants_that_work(
    dsn: str, query: Callable[..., list[tuple[object, ...]]]
) -> None:
    roles = ("--proxy-role", "cli_proxy", "--reader-role", "cli_reader")
    first = call("init", *roles, ARTIFACTAPI_DSN=dsn)
    assert first.returncode == 0, first.stderr
    assert call("init", *roles, ARTIFACTAPI_DSN=dsn).stdout == first.stdout
    try:
        query("CREATE ROLE cli_proxy LOGIN; CREATE ROLE cli_reader LOGIN")
        query(first.stdout)
        proxy, reader = (
            dsn.replace("user=postgres", f"user=cli_{it}") for it in ("proxy", "reader")
        )
        write(proxy, 1)
        assert len(AccessLog(reader).rows()) == 1
        with (
            psycopg.connect(proxy) as connection,
            pytest.raises(psycopg.errors.InsufficientPrivilege),
        ):
            connection.execute("SELECT count(*) FROM access_log")
        with (
            psycopg.connect(reader) as connection,
            pytest.raises(psycopg.errors.InsufficientPrivilege),
        ):
            connection.execute("DELETE FROM access_log")
    finally:
        query("DROP OWNED BY cli_proxy, cli_reader; DROP ROLE cli_proxy, cli_reader")


def test_tail_shows_the_newest_and_is_plain_in_a_pipe(dsn: str) -> None:
    write(dsn, *range(5))
    lines = call("tail", "-n", "3", ARTIFACTAPI_DSN=dsn).stdout.splitlines()
    assert lines[0].split()[:3] == ["time", "status", "method"]
    assert len(lines) == 4
    assert all("https://registry.example/simple/demo/" in line for line in lines[1:])
    assert all("\x1b" not in line for line in lines)


def test_tail_makes_what_a_client_sent_printable(dsn: str) -> None:
    write(dsn, 1, path="/\x1b]0;owned\x07\x1b[2J\r\n\u202e[red]x", proxy_user="a\x1b[31m")
    shown = call("tail", ARTIFACTAPI_DSN=dsn).stdout
    assert r"/\x1b]0;owned\x07\x1b[2J\r\n\u202e[red]x" in shown
    assert len(shown.splitlines()) == 2
    assert "\x1b" not in shown


def test_tail_follows(dsn: str, tmp_path: Path) -> None:
    write(dsn, 1, path="/before")
    output = tmp_path / "tail"
    with started(output, "tail", "-f", ARTIFACTAPI_DSN=dsn) as process:
        eventually(lambda: "/before" in output.read_text())
        write(dsn, 2, path="/after")
        eventually(lambda: "/after" in output.read_text())
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
    assert "Traceback" not in output.read_text()
    assert output.read_text().count("/before") == 1


def test_tail_follows_for_longer_than_a_call_may_take_and_shows_no_old_row_as_new(
    dsn: str, tmp_path: Path
) -> None:
    database = Database(Settings().with_dsn(dsn).database)
    database.write([make_entry(n, path=f"/old-{n}") for n in range(3)])
    config, output = tmp_path / "short.yaml", tmp_path / "output"
    config.write_text("database: {call_seconds: 0.5}\n")
    with started(output, "--dsn", dsn, "--config", str(config), "tail", "-n", "1", "-f"):
        eventually(lambda: "/old-2" in output.read_text(), 20)
        for number in range(10, 14):
            database.write([make_entry(number, path=f"/new-{number}")])
            eventually(lambda number=number: f"/new-{number}" in output.read_text())  # type: ignore[misc]
    database.close()
    shown = [line.split("/")[-1].strip() for line in output.read_text().splitlines()[1:]]
    assert shown == ["old-2", "new-10", "new-11", "new-12", "new-13"]


@pytest.mark.parametrize("command", ["tail", "init", "psql"])
def test_a_database_that_is_away_is_one_sentence(command: str) -> None:
    done = call(
        command, ARTIFACTAPI_DSN=f"host=127.0.0.1 port={free_port()} user=me password=hunter2"
    )
    assert done.returncode != 0
    assert "refused" in done.stderr
    assert "Traceback" not in done.stderr
    assert "hunter2" not in done.stderr


def test_run_is_mitmdump_with_the_log_on(dsn: str, tmp_path: Path) -> None:
    output, port = tmp_path / "output", free_port()
    listen = ("--listen-host", "127.0.0.1", "-p", str(port))
    confdir = ("--set", f"confdir={tmp_path}")
    with (
        RawUpstream() as upstream,
        started(output, "run", *listen, *confdir, ARTIFACTAPI_DSN=dsn) as process,
    ):
        eventually(lambda: "listening at" in output.read_text(), timeout=20)
        assert fetch(("127.0.0.1", port), f"{upstream.url}/ok", "User-Agent: run")
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    assert AccessLog(dsn).of("run")["status_code"] == 200
    assert "1 entries written, none lost" in output.read_text()
