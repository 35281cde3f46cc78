"""The command in the start message, run in another terminal: it shows the rows."""

from __future__ import annotations

import os
import re
import subprocess
from typing import TYPE_CHECKING

import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from exporter.postgres.connection import connect
from exporter.postgres.schema import ensure_schema, grants
from exporter.settings import DatabaseSettings
from tests.support.access_log import SCRIPT, AccessLog
from tests.support.command import COMMAND, started
from tests.support.http1_client import fetch
from tests.support.proxy import Mitm
from tests.support.upstream import RawUpstream
from tests.support.wait import eventually

if TYPE_CHECKING:
    from pathlib import Path

_LINE = re.compile(r"artifactapi: (?:logging to \S+; )?show the rows with: (.*)\n")


@pytest.fixture(autouse=True, params=[False, True], ids=["", "on PATH"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> bool:
    """Whether our command is on PATH, here as a link."""
    if request.param:
        folder = tmp_path / "bin"
        folder.mkdir()
        (folder / "artifactapi").symlink_to(COMMAND)
        monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return bool(request.param)


@pytest.mark.parametrize("source", ["option", "environment", "file"])
def test_shown_command_shows_the_rows(dsn: str, tmp_path: Path, source: str, *, path: bool) -> None:
    config = tmp_path / "our settings.yaml"
    config.write_text(f"database: {{dsn: '{dsn} password=hunter2'}}\n")
    arguments = {
        "option": ("--set", f"artifactapi_dsn={dsn}"),
        "environment": (),
        "file": ("--set", f"artifactapi_config={config}"),
    }[source]
    env = {"ARTIFACTAPI_DSN": dsn} if source == "environment" else {}
    with (
        RawUpstream() as upstream,
        Mitm(tmp_path, *arguments, scripts=[SCRIPT], env=env) as proxy,
    ):
        found = eventually(lambda: _LINE.search(proxy.output()))
        assert found
        command = found[1]
        assert fetch(proxy.address, f"{upstream.url}/ok", "User-Agent: shown")
        AccessLog(dsn).row_for_agent("shown")
    assert "hunter2" not in proxy.output()
    assert command.endswith(" tail -f")
    assert command.startswith("artifactapi ") == path
    done = subprocess.run(
        ["sh", "-c", command.removesuffix(" -f")],
        check=False,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert f"{upstream.url}/ok" in done.stdout, done.stderr


def test_run_shows_the_database_that_it_was_given(dsn: str, tmp_path: Path) -> None:
    output = tmp_path / "output"
    conf = ("--set", f"confdir={tmp_path / 'conf'}")
    listen = ("--listen-host", "127.0.0.1", "--listen-port", "0")
    with started(output, "--dsn", f"{dsn} password=hunter2", "run", *listen, *conf):
        found = eventually(lambda: _LINE.search(output.read_text()), 30)
    assert found
    assert " --dsn " in found[1]
    assert "hunter2" not in output.read_text()


def test_role_that_can_only_write_is_shown_no_command_that_fails(dsn: str, tmp_path: Path) -> None:
    schema = str(conninfo_to_dict(dsn)["options"]).partition("=")[2]
    writer, reader = f"{schema}_writer", f"{schema}_reader"
    with connect(dsn, DatabaseSettings()) as owner:
        ensure_schema(owner)
        owner.execute(f"CREATE ROLE {writer} LOGIN; CREATE ROLE {reader} LOGIN".encode())
        owner.execute(grants(schema, writer, reader).encode())
    config = tmp_path / "settings.yaml"
    try:
        for read in ("", make_conninfo(dsn, user=reader)):
            config.write_text(f"read: {{dsn: '{read}'}}\n")
            options = ("--set", f"artifactapi_dsn={make_conninfo(dsn, user=writer)}")
            folder = tmp_path / ("with" if read else "without")
            folder.mkdir()
            with Mitm(
                folder, *options, "--set", f"artifactapi_config={config}", scripts=[SCRIPT]
            ) as proxy:
                eventually(lambda: "can only write; to show" in proxy.output() or read)  # noqa: B023
            found = _LINE.search(proxy.output())
            assert (found is not None) == bool(read)
            if found:
                command = ["sh", "-c", found[1].removesuffix(" -f")]
                done = subprocess.run(command, check=False, capture_output=True, text=True)
                assert "No rows match." in done.stderr
    finally:
        with connect(dsn, DatabaseSettings()) as owner:
            owner.execute(
                f"DROP OWNED BY {writer}, {reader}; DROP ROLE {writer}, {reader}".encode()
            )
