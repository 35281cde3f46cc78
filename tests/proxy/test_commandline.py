"""The subcommands of `artifactapi`, run as processes."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

import psycopg
import pytest

from tests.support.access_log import SCRIPT, AccessLog
from tests.support.command import call, started, write
from tests.support.http1_client import fetch
from tests.support.proxy import free_port
from tests.support.upstream import RawUpstream
from tests.support.wait import eventually

if TYPE_CHECKING:
    from collections.abc import Callable
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
    "command",
    [["tail"], ["tail", "-f"], ["report"], ["export", "csv"], ["init"], ["psql"]],
)
def test_unavailable_database_gives_error_without_traceback_or_password(command: list[str]) -> None:
    result = call(
        *command, ARTIFACTAPI_DSN=f"host=127.0.0.1 port={free_port()} user=me password=hunter2"
    )
    assert result.returncode != 0
    assert "refused" in result.stderr
    assert "Traceback" not in result.stderr
    assert "hunter2" not in result.stderr


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
    assert "1 rows written, none lost" in output.read_text()
