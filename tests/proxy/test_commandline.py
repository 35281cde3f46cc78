"""The subcommands of `artifactapi`, run as processes."""

from __future__ import annotations

import contextlib
import json
import signal
from typing import TYPE_CHECKING

import psycopg
import pytest
from click.testing import CliRunner

from addon.cli.main import main
from tests.support.access_log import SCRIPT, AccessLog
from tests.support.command import call, started, write
from tests.support.http1_client import fetch
from tests.support.proxy import free_port
from tests.support.upstream import RawUpstream
from tests.support.wait import eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


def test_path_prints_script_and_invalid_config_fails(tmp_path: Path) -> None:
    assert call("path").stdout == f"{SCRIPT}\n"
    assert call("--config", str(tmp_path / "none.yaml"), "path").returncode == 1


def test_dsn_prints_no_password(home: Path) -> None:
    printed = call("dsn", ARTIFACTAPI_DSN="postgresql://me:hunter2@db.example:5433/log").stdout
    assert "hunter2" not in printed
    assert {"user=me", "host=db.example", "port=5433", "dbname=log"} <= set(printed.split())
    embedded = call("dsn", ARTIFACTAPI_HOME=str(home)).stdout
    assert f"host={home / 'postgres'}" in embedded


def test_dsn_option_overrides_environment() -> None:
    printed = call("--dsn", "host=first", "dsn", ARTIFACTAPI_DSN="host=second").stdout
    assert printed == "host=first\n"


def test_psql_passes_arguments_and_exit_code(dsn: str) -> None:
    result = call("psql", "-AtXc", "SELECT 6 * 7", ARTIFACTAPI_DSN=dsn)
    assert (result.stdout, result.returncode) == ("42\n", 0)
    assert call("psql", "-Xc", "SELECT nothing", ARTIFACTAPI_DSN=dsn).returncode == 1


def test_psql_starts_and_stops_embedded_server(home: Path) -> None:
    result = call("psql", "-AtXc", "SHOW listen_addresses", ARTIFACTAPI_HOME=str(home))
    assert (result.stdout, result.stderr) == ("\n", "")
    assert not (home / "postgres" / "postmaster.pid").exists(), "the server has stopped"


def test_init_creates_schema_and_prints_working_grants(
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
            dsn.replace("user=postgres", f"user=cli_{role}") for role in ("proxy", "reader")
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


@pytest.mark.parametrize(
    ("options", "paths"),
    [
        (["--who", "192.0.2.77"], ["/b"]),
        (["--who", "build-42"], ["/a"]),
        (["--who", "*"], ["/a", "/b"]),
        (["--user", "*"], ["/a"]),
        (["--client", "192.0.2.64/26"], ["/b"]),
        (["--client", "192.0.2.7"], ["/a"]),
        (["--method", "put"], ["/b"]),
        (["--node", "far-*"], ["/b"]),
        (["--since", "yesterday", "--until", "now"], []),
        (["--until", "today"], ["/a", "/b"]),
    ],
)
@pytest.mark.parametrize("command", [["tail"], ["export", "csv"], ["export", "goaccess"]])
def test_commands_filter_by_who_client_method_node_and_day(
    dsn: str, command: list[str], options: list[str], paths: list[str]
) -> None:
    write(dsn, 1, path="/a")
    write(dsn, 2, path="/b", client_ip="192.0.2.77", proxy_user=None, method="PUT", node="far-1")
    done = CliRunner().invoke(main, ["--dsn", dsn, *command, *options], catch_exceptions=False)
    assert done.exit_code == 0
    assert [path for path in ("/a", "/b") if path in done.stdout] == paths


def test_report_filters_by_who_client_method_and_node(dsn: str) -> None:
    write(dsn, 1, node="a")
    write(dsn, 2, client_ip="192.0.2.77", proxy_user=None, method="PUT", node="b")
    options = ["--since", "2023-01-01", "--node", "b", "--client", "192.0.2.77", "--method", "put"]
    done = CliRunner().invoke(main, ["--dsn", dsn, "report", "--json", *options])
    summary = json.loads(done.stdout)
    assert summary["requests"] == 1
    assert summary["filters"] == {"node": "b", "client": "192.0.2.77", "method": "put"}


@pytest.mark.parametrize("command", [["tail"], ["report"], ["export", "csv"]])
@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--error", "dnss"], "expected any, none, dns, connect, connect_timeout, tls_upstream"),
        (["--since", "1h", "--until", "2h"], "since must be earlier than until."),
        (["--status", "99"], "status '99' is not valid; expected 100 to 999, 4xx or none."),
        (["--method", "GE T"], "expected one word such as GET or POST."),
        (["--client", "192.0.2.300"], "or a network such as 192.0.2.0/24."),
        (["--since", "someday"], "a day such as today, yesterday or monday, or a time such as"),
    ],
)
def test_filter_that_cannot_match_is_rejected_with_the_valid_choices(
    command: list[str], options: list[str], sentence: str
) -> None:
    """Before a connection is made: nothing listens at this address."""
    done = CliRunner().invoke(main, ["--dsn", "host=/nowhere", *command, *options])
    assert done.exit_code == 2
    assert sentence in " ".join(done.stderr.split())


@contextlib.contextmanager
def _two_roles(dsn: str, query: Callable[..., list[tuple[object, ...]]]) -> Iterator[list[str]]:
    """Create a role that can only write and one that can only read. Yield their DSNs."""
    names = ("proxy", "reader")
    grants = call(
        *("init", "--proxy-role", "only_proxy", "--reader-role", "only_reader"), ARTIFACTAPI_DSN=dsn
    )
    query("CREATE ROLE only_proxy LOGIN; CREATE ROLE only_reader LOGIN")
    try:
        query(grants.stdout)
        yield [dsn.replace("user=postgres", f"user=only_{name}") for name in names]
    finally:
        query("DROP OWNED BY only_proxy, only_reader; DROP ROLE only_proxy, only_reader")


def test_commands_that_read_use_the_readers_dsn_of_the_settings_file(
    dsn: str, query: Callable[..., list[tuple[object, ...]]], tmp_path: Path
) -> None:
    write(dsn, 1, path="/the-row")
    config = tmp_path / "settings.yaml"
    with _two_roles(dsn, query) as (proxy, reader):
        config.write_text(f"database: {{dsn: '{proxy}'}}\nread: {{dsn: '{reader}'}}\n")
        options = ("--config", str(config))
        for command in (["tail"], ["export", "csv"], ["psql", "-c", "TABLE access_log"]):
            for env in ({}, {"ARTIFACTAPI_DSN": proxy}):
                done = call(*options, *command, **env)
                assert (done.returncode, "/the-row" in done.stdout) == (0, True), done.stderr
        assert "1 request" in call(*options, "report", "--since", "2023-01-01").stdout
        assert call(*options, "gaps").returncode == 0
        assert "user=only_reader" in call(*options, "dsn").stdout
        for command in (["tail"], ["export", "csv"], ["report"], ["gaps"]):
            done = call(*options, "--dsn", proxy, *command)
            assert done.returncode > 0
            assert "This database role cannot read the log; set read.dsn" in done.stderr
        shown = call(*options, "--dsn", dsn, "psql", "-AtXc", "SELECT current_user").stdout
        assert shown == "postgres\n"


def test_init_uses_the_proxys_database(dsn: str, tmp_path: Path) -> None:
    config = tmp_path / "settings.yaml"
    config.write_text(f"database: {{dsn: '{dsn}'}}\nread: {{dsn: 'host=/nowhere'}}\n")
    assert "The schema is ready" in call("--config", str(config), "init").stdout
    assert AccessLog(dsn).rows() == []
    assert "/nowhere" in call("--config", str(config), "tail").stderr


def test_invalid_read_dsn_is_named_without_its_password(tmp_path: Path) -> None:
    config = tmp_path / "settings.yaml"
    config.write_text("read: {dsn: 'postgresql://me:p@ss/w0rd@h/x'}")
    done = call("--config", str(config), "tail")
    assert done.returncode == 1
    assert "(read.dsn) is not valid" in done.stderr
    assert "w0rd" not in done.stderr


@pytest.mark.parametrize("command", [["tail"], ["report"], ["export", "csv"], ["gaps"]])
def test_reader_of_a_database_without_the_tables_gets_advice(
    dsn: str, query: Callable[..., list[tuple[object, ...]]], command: list[str]
) -> None:
    query("CREATE ROLE early_reader LOGIN")
    try:
        query(
            "DO $$ BEGIN EXECUTE format('GRANT USAGE ON SCHEMA %I TO early_reader',"
            " current_schema()); END $$"
        )
        done = call("--dsn", dsn.replace("user=postgres", "user=early_reader"), *command)
    finally:
        query("DROP OWNED BY early_reader; DROP ROLE early_reader")
    assert done.returncode > 0
    assert "has no log" in done.stderr
    assert "artifactapi init" in done.stderr


@pytest.mark.parametrize(
    "command",
    [["tail"], ["tail", "-f"], ["report"], ["export", "csv"], ["gaps"], ["init"], ["psql"]],
)
def test_unavailable_database_gives_error_without_traceback_or_password(command: list[str]) -> None:
    result = call(
        *command, ARTIFACTAPI_DSN=f"host=127.0.0.1 port={free_port()} user=me password=hunter2"
    )
    assert result.returncode != 0
    assert "refused" in result.stderr
    assert "Traceback" not in result.stderr
    assert "hunter2" not in result.stderr


def test_run_passes_config_and_dsn_to_the_proxy(dsn: str, tmp_path: Path) -> None:
    output, config = tmp_path / "output", tmp_path / "settings.yaml"
    config.write_text("node: from-the-file\nbatch: {max_seconds: 0.1}\n")
    port = free_port()
    options = ("--config", config.name, "--dsn", dsn)
    listen = ("--listen-host", "127.0.0.1", "-p", str(port), "--set", f"confdir={tmp_path}")
    with (
        RawUpstream() as upstream,
        contextlib.chdir(tmp_path),
        started(output, *options, "run", *listen, ARTIFACTAPI_DSN="host=/nowhere"),
    ):
        eventually(lambda: "listening at" in output.read_text(), timeout=20)
        assert fetch(("127.0.0.1", port), f"{upstream.url}/ok", "User-Agent: options")
        assert AccessLog(dsn).row_for_agent("options")["node"] == "from-the-file"


def test_run_starts_mitmdump_with_access_log(dsn: str, tmp_path: Path) -> None:
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
    assert AccessLog(dsn).row_for_agent("run")["status_code"] == 200
    assert "1 row written, none lost" in output.read_text()
