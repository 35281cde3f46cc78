"""What a supervisor of the proxy relies on: a stop in time that loses nothing, and a warning at the start."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.access_log import SCRIPT, AccessLog
from tests.support.command import call
from tests.support.http1_client import fetch
from tests.support.proxy import Mitm, free_port
from tests.support.upstream import RawUpstream
from tests.support.wait import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.slow

_REQUESTS = 20
_DOCKER_STOP_SECONDS = 10  # then SIGKILL


@pytest.fixture
def upstream() -> Iterator[RawUpstream]:
    with RawUpstream() as server:
        yield server


def send(proxy: Mitm, url: str) -> None:
    for _ in range(_REQUESTS):
        response = fetch(proxy.address, f"{url}/ok")
        assert response
        assert response.status == 200


@pytest.mark.parametrize("is_silent", [False, True], ids=["refuses", "never answers"])
def test_sigterm_during_an_outage_ends_in_time_and_loses_nothing(
    is_silent: bool, dsn: str, tmp_path: Path, upstream: RawUpstream
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1] if is_silent else free_port()
        target = f"host=127.0.0.1 port={port} dbname=logs sslmode=disable gssencmode=disable"
        with Mitm(tmp_path, scripts=[SCRIPT], env={"ARTIFACTAPI_DSN": target}) as proxy:
            send(proxy, upstream.url)
            started_at = time.monotonic()
            assert proxy.terminate(_DOCKER_STOP_SECONDS) == 0
            assert time.monotonic() - started_at < _DOCKER_STOP_SECONDS - 1
            assert f"0 rows written, {_REQUESTS} kept on disk for the next run, none lost" in (
                proxy.output()
            )
    assert call("--dsn", dsn, "spool", "--redirect").returncode == 0
    with Mitm(tmp_path, scripts=[SCRIPT], env={"ARTIFACTAPI_DSN": dsn}):
        assert len(AccessLog(dsn).wait_rows(_REQUESTS)) == _REQUESTS


def unwritable(folder: Path) -> Path:
    """A folder in which this user can create nothing; root can create nothing in /sys."""
    if os.geteuid() == 0:
        return Path("/sys/artifactapi")
    folder.mkdir(mode=0o500)
    return folder / "home"


@pytest.mark.skipif(not Path("/sys/kernel").exists(), reason="root can write to every folder here")
def test_unwritable_home_is_reported_at_the_start_and_the_log_goes_on(
    dsn: str, tmp_path: Path, upstream: RawUpstream
) -> None:
    home = unwritable(tmp_path / "closed")
    env = {"ARTIFACTAPI_DSN": dsn, "ARTIFACTAPI_HOME": str(home)}
    with Mitm(tmp_path / "proxy", scripts=[SCRIPT], env=env) as proxy:
        warning = eventually(
            lambda: [it for it in proxy.output().splitlines() if "spool not writable" in it]
        )
        assert f"({home}/spool); set ARTIFACTAPI_HOME to a folder" in warning[0]
        send(proxy, upstream.url)
        AccessLog(dsn).wait_rows(_REQUESTS)
        assert proxy.terminate() == 0
        assert proxy.output().count("spool not writable") == 1
        assert f"{_REQUESTS} rows written, none lost" in proxy.output()
