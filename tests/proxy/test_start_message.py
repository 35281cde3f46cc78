"""The command in the start message, run in another terminal: it shows the rows."""

from __future__ import annotations

import os
import re
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.support.access_log import SCRIPT, AccessLog
from tests.support.command import COMMAND, started
from tests.support.http1_client import fetch
from tests.support.proxy import Mitm
from tests.support.upstream import RawUpstream
from tests.support.wait import eventually

if TYPE_CHECKING:
    from pathlib import Path

_LINE = re.compile(r"artifactapi: logging to \S+; show the rows with: (.*)\n")


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
    with started(output, "--dsn", f"{dsn} password=hunter2", "run", "-n", *conf):
        found = eventually(lambda: _LINE.search(output.read_text()))
    assert found
    assert " --dsn " in found[1]
    assert "hunter2" not in output.read_text()
