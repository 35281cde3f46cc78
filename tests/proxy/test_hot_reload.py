"""Reload the script, change its database and unload it, all under traffic."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING, Self

import psutil
import psycopg
import pytest

from tests.support.access_log import SCRIPT, AccessLog, temporary_schema
from tests.support.http1_client import RawClient, fetch
from tests.support.mitmweb import WebInterface
from tests.support.proxy import Mitm
from tests.support.upstream import RawUpstream
from tests.support.wait import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.support.postgres import Postgres

RELOADS = 2


class Traffic:
    """Four clients that send requests continuously inside a `with` block.

    `answered` lists the User-Agent of each answered request.
    """

    def __init__(self, proxy: tuple[str, int], url: str) -> None:
        self.answered: list[str] = []
        self._proxy, self._url = proxy, url
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._send_requests, args=(n,)) for n in range(4)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def wait_more(self, count: int = 50) -> None:
        """Wait until this many more requests are answered."""
        goal = len(self.answered) + count
        eventually(lambda: len(self.answered) >= goal, timeout=20)

    def _send_requests(self, worker: int) -> None:
        with RawClient(self._proxy) as client:
            number = 0
            while not self._stop.wait(0.005):
                agent = f"{worker}-{number}"
                client.request("GET", f"{self._url}/ok", f"User-Agent: {agent}")
                response = client.read_response()
                assert response
                assert response.status == 200
                self.answered.append(agent)
                number += 1


@pytest.fixture
def upstream() -> Iterator[RawUpstream]:
    with RawUpstream() as server:
        yield server


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """A copy of the script that the test may modify, beside links to the rest of the checkout."""
    for folder in ("exporter", "configs"):
        (tmp_path / folder).symlink_to(SCRIPT.parents[1] / folder)
    addon = tmp_path / "addon"
    addon.mkdir()
    for path in SCRIPT.parent.iterdir():
        if path != SCRIPT:
            (addon / path.name).symlink_to(path)
    (addon / SCRIPT.name).write_bytes(SCRIPT.read_bytes())
    return addon / SCRIPT.name


def _writer_connections(dsn: str, folder: Path) -> int:
    """Count the writers' connections. Their application_name is the name of the test's folder."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        sql = "SELECT count(*) FROM pg_stat_activity WHERE application_name = %s"
        row = connection.execute(sql, (folder.name[-60:],)).fetchone()
    return int(row[0]) if row else 0


def _with_application_name(dsn: str, folder: Path) -> str:
    return f"{dsn} application_name={folder.name[-60:]}"


def _touch(script: Path, proxy: Mitm) -> None:
    """Touch the script, and wait until mitmproxy has reloaded it."""
    loads = proxy.output().count("artifactapi: logging to")
    modified_at = script.stat().st_mtime + 10
    os.utime(script, (modified_at, modified_at))
    eventually(lambda: proxy.output().count("artifactapi: logging to") > loads)


def test_reload_under_traffic_loses_no_row_and_leaves_one_writer(
    dsn: str, tmp_path: Path, script: Path, upstream: RawUpstream
) -> None:
    env = {"ARTIFACTAPI_DSN": _with_application_name(dsn, tmp_path)}
    with Mitm(tmp_path / "mitm", scripts=[script], env=env) as proxy:
        with Traffic(proxy.address, upstream.url) as traffic:
            traffic.wait_more()
            threads = psutil.Process(proxy.pid).num_threads()
            for _ in range(RELOADS):
                _touch(script, proxy)
                traffic.wait_more()
            traffic.wait_more()
            assert _writer_connections(dsn, tmp_path) == 1
        with RawClient(proxy.address) as client:
            client.request("GET", f"{upstream.url}/slow-head", "User-Agent: in progress")
            eventually(lambda: any(request.path == "/slow-head" for request in upstream.requests))
            _touch(script, proxy)
            upstream.release()
            assert client.read_response()
        assert AccessLog(dsn).row_for_agent("in progress")["status_code"] == 200
        assert _writer_connections(dsn, tmp_path) == 1
        assert psutil.Process(proxy.pid).num_threads() <= threads
        assert proxy.terminate() == 0
    rows = [row["user_agent"] for row in AccessLog(dsn).rows()]
    assert sorted(rows) == sorted([*traffic.answered, "in progress"])
    assert "Traceback" not in proxy.output()
    eventually(lambda: _writer_connections(dsn, tmp_path) == 0)


def test_change_of_database_and_unload_lose_no_row(
    postgres: Postgres, dsn: str, tmp_path: Path, upstream: RawUpstream
) -> None:
    env = {"ARTIFACTAPI_DSN": _with_application_name(dsn, tmp_path)}
    with temporary_schema(postgres) as other:
        with Mitm(tmp_path / "mitm", scripts=[SCRIPT], env=env, program="mitmweb") as proxy:
            page = WebInterface(proxy.web_url)
            with Traffic(proxy.address, upstream.url) as traffic:
                traffic.wait_more()
                assert (
                    page.set_options(artifactapi_dsn=_with_application_name(other, tmp_path))[0]
                    == 200
                )
                traffic.wait_more()
            AccessLog(other).wait_rows(1)
            assert fetch(proxy.address, f"{upstream.url}/ok", "User-Agent: moved")
            AccessLog(other).row_for_agent("moved")
            assert _writer_connections(dsn, tmp_path) == 1, (
                "the connection to the first database is closed"
            )
            assert page.set_options(scripts=[])[0] == 200
            eventually(lambda: "rows written, none lost" in proxy.output())
            eventually(lambda: _writer_connections(dsn, tmp_path) == 0)
            response = fetch(proxy.address, f"{upstream.url}/ok", "User-Agent: not logged")
            assert response
            assert response.status == 200
            assert page.get("/access-log")[0] == 503
            assert page.set_options(scripts=[str(SCRIPT)])[0] == 200
            eventually(lambda: page.get("/access-log")[0] == 200)
            text = page.get("/access-log")[1]
            assert "127.0.0.1" in text, "rows of the first database, read by the new instance"
        rows = [
            row["user_agent"] for log in (AccessLog(dsn), AccessLog(other)) for row in log.rows()
        ]
        assert sorted(rows) == sorted([*traffic.answered, "moved"])
        assert "Traceback" not in proxy.output()
