"""The script edited, moved to another database and taken away while traffic flows."""

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

EDITS = 2


class Traffic:
    """Four clients that ask without a pause while a `with` lasts; `answered` are their User-Agents."""

    def __init__(self, proxy: tuple[str, int], url: str) -> None:
        self.answered: list[str] = []
        self._proxy, self._url = proxy, url
        self._enough = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(n,)) for n in range(4)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._enough.set()
        for thread in self._threads:
            thread.join()

    def more(self, count: int = 50) -> None:
        """Wait until so many more are answered."""
        goal = len(self.answered) + count
        eventually(lambda: len(self.answered) >= goal, timeout=20)

    def _ask(self, worker: int) -> None:
        with RawClient(self._proxy) as client:
            number = 0
            while not self._enough.wait(0.005):
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
    """A checkout's shape of our own, so that the script can be touched: the same packages, linked."""
    for package in ("exporter", "configs"):
        (tmp_path / package).symlink_to(SCRIPT.parents[1] / package)
    (tmp_path / "addon").mkdir()
    for path in SCRIPT.parent.glob("*.py"):
        (tmp_path / "addon" / path.name).write_bytes(path.read_bytes())
    return tmp_path / "addon" / SCRIPT.name


def _sessions(dsn: str, folder: Path) -> int:
    """How many connections the writers have; each writes under the name of its test's folder."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        sql = "SELECT count(*) FROM pg_stat_activity WHERE application_name = %s"
        row = connection.execute(sql, (folder.name[-60:],)).fetchone()
    return int(row[0]) if row else 0


def _named(dsn: str, folder: Path) -> str:
    return f"{dsn} application_name={folder.name[-60:]}"


def _edit(script: Path, proxy: Mitm) -> None:
    """Save the script anew, and wait until it is loaded."""
    starts = proxy.output().count("rows go to")
    saved = script.stat().st_mtime + 10
    os.utime(script, (saved, saved))
    eventually(lambda: proxy.output().count("rows go to") > starts)


def test_an_edit_amid_traffic_loses_no_row_and_leaves_one_writer(
    dsn: str, tmp_path: Path, script: Path, upstream: RawUpstream
) -> None:
    env = {"ARTIFACTAPI_DSN": _named(dsn, tmp_path)}
    with Mitm(tmp_path / "mitm", scripts=[script], env=env) as proxy:
        with Traffic(proxy.address, upstream.url) as traffic:
            traffic.more()
            threads = psutil.Process(proxy.pid).num_threads()
            for _ in range(EDITS):
                _edit(script, proxy)
                traffic.more()
            traffic.more()
            assert _sessions(dsn, tmp_path) == 1
        waiting = upstream.url + "/slow-head"
        with RawClient(proxy.address) as client:
            client.request("GET", waiting, "User-Agent: under way")
            eventually(lambda: any(it.path == "/slow-head" for it in upstream.requests))
            _edit(script, proxy)
            upstream.release()
            assert client.read_response()
        assert AccessLog(dsn).row_for_agent("under way")["status_code"] == 200
        assert _sessions(dsn, tmp_path) == 1
        assert psutil.Process(proxy.pid).num_threads() <= threads
        assert proxy.terminate() == 0
    rows = [row["user_agent"] for row in AccessLog(dsn).rows()]
    assert sorted(rows) == sorted([*traffic.answered, "under way"])
    assert "Traceback" not in proxy.output()
    eventually(lambda: _sessions(dsn, tmp_path) == 0)


def test_another_database_and_then_none_at_run_time(
    postgres: Postgres, dsn: str, tmp_path: Path, upstream: RawUpstream
) -> None:
    env = {"ARTIFACTAPI_DSN": _named(dsn, tmp_path)}
    with temporary_schema(postgres) as other:
        with Mitm(tmp_path / "mitm", scripts=[SCRIPT], env=env, program="mitmweb") as proxy:
            page = WebInterface(proxy.web_url)
            with Traffic(proxy.address, upstream.url) as traffic:
                traffic.more()
                assert page.set_options(artifactapi_dsn=_named(other, tmp_path))[0] == 200
                traffic.more()
            AccessLog(other).wait_rows(1)
            assert fetch(proxy.address, f"{upstream.url}/ok", "User-Agent: moved")
            AccessLog(other).row_for_agent("moved")
            assert _sessions(dsn, tmp_path) == 1, "the connection to the first is closed"
            assert page.set_options(scripts=[])[0] == 200
            eventually(lambda: "rows written, none lost" in proxy.output())
            eventually(lambda: _sessions(dsn, tmp_path) == 0)
            response = fetch(proxy.address, f"{upstream.url}/ok", "User-Agent: not logged")
            assert response
            assert response.status == 200
            assert page.get("/access-log")[0] == 503
            assert page.set_options(scripts=[str(SCRIPT)])[0] == 200
            eventually(lambda: page.get("/access-log")[0] == 200)
            text = page.get("/access-log")[1]
            assert "127.0.0.1" in text, "the rows of the first database, by the instance that runs"
        rows = [
            row["user_agent"] for log in (AccessLog(dsn), AccessLog(other)) for row in log.rows()
        ]
        assert sorted(rows) == sorted([*traffic.answered, "moved"])
        assert "Traceback" not in proxy.output()
