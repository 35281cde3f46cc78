"""The metrics of running proxies, scraped by a real Prometheus, across reloads, floods and stops."""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING

import psutil
import pytest

from tests.support.access_log import SCRIPT, AccessLog
from tests.support.http1_client import fetch
from tests.support.metrics import logged_address, scrape
from tests.support.prometheus import PROMETHEUS, Prometheus
from tests.support.proxy import Mitm, free_port
from tests.support.upstream import RawUpstream
from tests.support.wait import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_UNSETTLED = (
    "artifactapi_requests_seen_total - artifactapi_requests_written_total - artifactapi_requests_dropped_total"
    " - artifactapi_requests_rejected_total - artifactapi_requests_waiting - artifactapi_requests_spooled"
)


@pytest.fixture
def upstream() -> Iterator[RawUpstream]:
    with RawUpstream() as server:
        yield server


def config(folder: Path, listen: str, node: str = "proxy-1") -> Path:
    """Write a settings file."""
    folder.mkdir(exist_ok=True)
    path = folder / "artifactapi.yaml"
    path.write_text(
        f"node: {node}\nbatch: {{max_seconds: 0.05}}\nmetrics: {{listen: '{listen}'}}\n"
    )
    return path


def proxy(folder: Path, dsn: str, settings: Path, script: Path = SCRIPT) -> Mitm:
    options = ("--set", f"artifactapi_config={settings}")
    return Mitm(folder, *options, scripts=[script], env={"ARTIFACTAPI_DSN": dsn})


def send(to: Mitm, url: str, count: int) -> None:
    for _ in range(count):
        response = fetch(to.address, f"{url}/ok")
        assert response
        assert response.status == 200


def listens(address: tuple[str, int]) -> bool:
    with socket.socket() as client:
        return client.connect_ex(address) == 0


def threads(of: Mitm) -> int:
    return psutil.Process(of.pid).num_threads()


@pytest.mark.slow
@pytest.mark.skipif(PROMETHEUS is None, reason="prometheus is not installed (Debian: prometheus)")
def test_prometheus_scrapes_two_proxies(dsn: str, tmp_path: Path, upstream: RawUpstream) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    with (
        proxy(first, dsn, config(first, "127.0.0.1:0", "proxy-1")) as one,
        proxy(second, dsn, config(second, "[::1]:0", "proxy-2")) as two,
    ):
        addresses = [logged_address(one.output), logged_address(two.output)]
        names = [f"127.0.0.1:{addresses[0][1]}", f"[::1]:{addresses[1][1]}"]
        targets = [("127.0.0.1", addresses[0][1]), ("[::1]", addresses[1][1])]
        with Prometheus(tmp_path, targets) as prometheus:
            send(one, upstream.url, 7)
            send(two, upstream.url, 3)
            AccessLog(dsn).wait_rows(10)
            counts = dict(zip(names, (7.0, 3.0), strict=True))
            eventually(
                lambda: prometheus.query("artifactapi_requests_written_total") == counts, timeout=20
            )
            assert prometheus.query(_UNSETTLED) == dict.fromkeys(names, 0.0)
            assert prometheus.query("artifactapi_batch_rows_sum") == counts
            assert prometheus.query("artifactapi_batch_duration_seconds_sum > 0").keys() == {*names}
            assert prometheus.query("artifactapi_node_info{node='proxy-2'}") == {names[1]: 1.0}
            recent = "time() - artifactapi_last_write_timestamp_seconds < 60"
            assert prometheus.query(recent).keys() == {*names}
            assert prometheus.query("process_resident_memory_bytes > 1e7").keys() == {*names}
            assert prometheus.scrape_errors() == dict.fromkeys(names, "")
            assert set(prometheus.alerts().values()) == {("ok", "inactive")}


@pytest.mark.slow
def test_port_in_use_is_a_warning_and_the_second_proxy_logs(
    dsn: str, tmp_path: Path, upstream: RawUpstream
) -> None:
    listen = f"127.0.0.1:{free_port()}"
    first, second = tmp_path / "first", tmp_path / "second"
    with proxy(first, dsn, config(first, listen)) as one:
        address = logged_address(one.output)
        with proxy(second, dsn, config(second, listen)) as two:
            eventually(lambda: f"no metrics: metrics.listen is {listen}: Address" in two.output())
            send(two, upstream.url, 2)
            AccessLog(dsn).wait_rows(2)
            assert scrape(address)["artifactapi_requests_seen_total"] == 0
            assert two.terminate() == 0
        assert one.terminate() == 0
    assert not listens(address)


@pytest.mark.slow
def test_reload_keeps_the_endpoint_or_moves_it(
    dsn: str, tmp_path: Path, upstream: RawUpstream
) -> None:
    settings = config(tmp_path, "127.0.0.1:0")
    script = tmp_path / "reloaded.py"
    script.write_text(f"import runpy\naddons = runpy.run_path({str(SCRIPT)!r})['addons']\n")

    modified_at = script.stat().st_mtime

    def touch() -> None:
        nonlocal modified_at
        modified_at += 10
        os.utime(script, (modified_at, modified_at))

    def reload() -> None:
        loads = running.output().count("artifactapi: logging to")
        touch()
        eventually(lambda: running.output().count("artifactapi: logging to") > loads)

    with proxy(tmp_path, dsn, settings, script) as running:
        address = logged_address(running.output)
        send(running, upstream.url, 1)
        AccessLog(dsn).wait_rows(1)
        before = threads(running)
        reload()
        send(running, upstream.url, 1)
        assert scrape(address)["artifactapi_requests_seen_total"] == 2, "the same run, on its port"
        assert threads(running) <= before

        config(tmp_path, "[::1]:0")
        reload()
        eventually(lambda: logged_address(running.output)[0] == "::1")
        moved = logged_address(running.output)
        assert scrape(moved)["artifactapi_requests_seen_total"] == 2
        eventually(lambda: not listens(address))
        eventually(lambda: threads(running) <= before)

        config(tmp_path, "")
        reload()
        eventually(lambda: not listens(("127.0.0.1", moved[1])) and threads(running) < before)
        config(tmp_path, "127.0.0.1:0")
        reload()
        again = eventually(lambda: (found := logged_address(running.output)) != moved and found)
        assert again
        script.write_text("addons = []\n")  # the addon is gone, and nobody takes the log over
        touch()
        eventually(lambda: not listens(again), timeout=20)
        send(running, upstream.url, 1)
        assert running.terminate() == 0
    assert "Traceback" not in running.output()
    assert len(AccessLog(dsn).rows()) == 2


@pytest.mark.slow
def test_hostile_scrapers_hold_up_neither_requests_nor_the_stop(
    dsn: str, tmp_path: Path, upstream: RawUpstream
) -> None:
    with proxy(tmp_path, dsn, config(tmp_path, "127.0.0.1:0")) as running:
        address = logged_address(running.output)
        before = threads(running)
        sockets = []
        for number in range(40):
            client = socket.create_connection(address, timeout=10)
            client.sendall(b"GET /metrics HTTP/1.1\r\n"[: number % 23])
            sockets.append(client)
            send(running, upstream.url, 1)
        AccessLog(dsn).wait_rows(40)
        assert threads(running) <= before
        assert running.terminate() == 0
        assert "40 rows written, none lost" in running.output()
        for client in sockets:
            client.close()
    assert not listens(address)
