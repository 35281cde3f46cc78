"""The endpoint for metrics: what it answers, whom it bears with, and that it ends."""

from __future__ import annotations

import logging
import socket
import sys
import threading
from typing import TYPE_CHECKING, Any

import pytest

from exporter import Exporter, Settings
from exporter.metrics import endpoint
from exporter.metrics.server import MetricsServer
from exporter.settings import JournalSettings, SpoolSettings
from tests.support.metrics import get, logged_address, scrape
from tests.support.wait import eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_ANY_PORT = "127.0.0.1:0"


@pytest.fixture(scope="module")
def status() -> dict[str, Any]:
    """The figures of a log that has ended."""
    settings = Settings(
        node='proxy "1"\n\\', spool=SpoolSettings(max_bytes=0), journal=JournalSettings(max_bytes=0)
    )
    exporter = Exporter(settings.with_dsn("host=/nowhere password=s3cret"))
    exporter.stop()
    return exporter.status()


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture) -> Callable[[], str]:
    """What the log says so far, since the fixtures are set up."""
    caplog.set_level(logging.INFO, logger="exporter")
    return lambda: "\n".join(record.getMessage() for record in caplog.records)


@pytest.fixture
def server(status: dict[str, Any], logged: Callable[[], str]) -> Iterator[MetricsServer]:
    del logged
    server = MetricsServer(_ANY_PORT, lambda: status)
    yield server
    server.stop()


@pytest.fixture
def address(server: MetricsServer, logged: Callable[[], str]) -> tuple[str, int]:
    del server
    return logged_address(logged)


def test_metrics_are_offered_in_both_formats(address: tuple[str, int]) -> None:
    assert scrape(address)["artifactapi_requests_seen_total"] == 0
    text = get(address, accept="*/*")
    assert text.headers["content-type"].startswith("text/plain; version=")
    assert "artifactapi_requests_seen_total 0.0\n" in text.body
    assert "# EOF" not in text.body


def test_labels_and_texts_hold_no_secret_and_no_id_of_the_run(
    address: tuple[str, int], status: dict[str, Any]
) -> None:
    body = get(address).body
    assert "s3cret" not in body
    assert "/nowhere" not in body
    assert status["run_id"] not in body
    assert r'artifactapi_node_info{node="proxy \"1\"\n\\"} 1.0' in body


def test_figures_without_a_value_are_absent(
    address: tuple[str, int], status: dict[str, Any]
) -> None:
    found = scrape(address)
    assert status["journal"] == "journal.max_bytes is 0"
    assert found["artifactapi_journal_available"] == 0
    assert "artifactapi_journal_limit_bytes" not in found
    assert status["last_written_at"] is None
    assert "artifactapi_last_write_timestamp_seconds" not in found


@pytest.mark.parametrize(
    ("path", "method", "answer"),
    [
        ("/", "GET", (404, "The metrics are at /metrics.\n")),
        ("/metrics/", "GET", (404, "The metrics are at /metrics.\n")),
        ("/metrics", "POST", (405, "Use GET.\n")),
        ("/metrics?a=b", "HEAD", (200, "")),
    ],
)
def test_other_requests(
    address: tuple[str, int], path: str, method: str, answer: tuple[int, str]
) -> None:
    found = get(address, path, method=method)
    assert (found.status, found.body) == answer
    assert found.headers["connection"] == "close"
    assert found.headers.get("allow") == ("GET, HEAD" if method == "POST" else None)


@pytest.mark.parametrize(
    ("sent", "status_line"),
    [
        (b"\x16\x03\x01\x02\x00", b"HTTP/1.1 400 Bad Request"),  # TLS
        (b"GET /metrics HTTP/1.1\r\n\r\n", b"HTTP/1.1 400 Bad Request"),  # no Host
        (b"GET /" + b"a" * 20_000, b"HTTP/1.1 431 Request Header Fields Too Large"),
    ],
)
def test_malformed_request(address: tuple[str, int], sent: bytes, status_line: bytes) -> None:
    with socket.create_connection(address, timeout=5) as client:
        client.sendall(sent)
        assert client.recv(4096).startswith(status_line)
    assert scrape(address)


def test_slow_client_is_cut_off(address: tuple[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoint, "_CLIENT_SECONDS", 0.3)
    with socket.create_connection(address, timeout=5) as client:
        client.sendall(b"GET /metrics HTTP/1.1\r\nHost: a\r\n")
        assert client.recv(1) == b""


def test_client_that_reads_nothing_is_cut_off(
    address: tuple[str, int], monkeypatch: pytest.MonkeyPatch, status: dict[str, Any]
) -> None:
    monkeypatch.setattr(endpoint, "_CLIENT_SECONDS", 0.3)
    monkeypatch.setitem(status, "node", "n" * 8_000_000)  # more than the socket holds
    with socket.create_connection(address, timeout=5) as client:
        client.sendall(b"GET /metrics HTTP/1.1\r\nHost: a\r\n\r\n")
        eventually(lambda: not _is_served(client))
    monkeypatch.setitem(status, "node", "n")
    assert scrape(address)


def _is_served(client: socket.socket) -> bool:
    """Whether the server's side of this connection is open."""
    with client.dup() as writable:
        try:
            writable.sendall(b"x")
        except OSError:
            return False
    return True


def test_clients_that_do_nothing_do_not_keep_others_out(address: tuple[str, int]) -> None:
    idle = [socket.create_connection(address, timeout=5) for _ in range(6)]
    try:
        assert scrape(address)
        assert idle[0].recv(1) == b"", "the oldest one had to go"
    finally:
        for client in idle:
            client.close()


def test_flood_of_clients_is_answered_slowly(address: tuple[str, int]) -> None:
    """What a scraper can make the proxy compute is bounded."""
    answered = []
    stop = threading.Event()

    def flood() -> None:
        while not stop.is_set():
            try:
                get(address)
            except OSError:
                continue
            answered.append(1)

    threads = [threading.Thread(target=flood) for _ in range(4)]
    for thread in threads:
        thread.start()
    stop.wait(1.5)
    stop.set()
    for thread in threads:
        thread.join()
    assert 3 <= len(answered) <= 25


def test_bug_in_the_figures_is_reported_once_and_ends_nothing(
    logged: Callable[[], str], status: dict[str, Any]
) -> None:
    values = dict(status)
    del values["seen"]
    server = MetricsServer(_ANY_PORT, lambda: values)
    try:
        address = logged_address(logged)
        for _ in range(2):
            assert get(address).status == 500
        assert logged().count("no metrics: 'seen' (KeyError)") == 1
        values["seen"] = 1
        assert scrape(address)
    finally:
        server.stop()


def test_address_in_use_is_a_warning_until_it_is_free(
    address: tuple[str, int],
    server: MetricsServer,
    logged: Callable[[], str],
    status: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(endpoint, "_BIND_RETRY_SECONDS", 0.05)
    listen = f"127.0.0.1:{address[1]}"
    other = MetricsServer(listen, lambda: {**status, "seen": 7})
    try:
        warning = (
            f"artifactapi: no metrics: metrics.listen is {listen}: Address already in use; "
            "trying again every 0.05 s"
        )
        eventually(lambda: warning in logged())
        assert scrape(address)["artifactapi_requests_seen_total"] == 0
        server.stop()
        eventually(lambda: f"metrics at http://{listen}/metrics" in logged())
        assert scrape(address)["artifactapi_requests_seen_total"] == 7
        assert logged().count(warning) == 1
        assert max(record.levelno for record in caplog.records) == logging.WARNING
    finally:
        other.stop()


def test_address_that_the_machine_does_not_have_is_a_warning(
    logged: Callable[[], str], status: dict[str, Any]
) -> None:
    server = MetricsServer("192.0.2.1:9464", lambda: status)
    eventually(lambda: "metrics.listen is 192.0.2.1:9464: Cannot assign" in logged())
    server.stop()


def test_change_of_the_address(
    address: tuple[str, int],
    server: MetricsServer,
    logged: Callable[[], str],
    status: dict[str, Any],
) -> None:
    del status
    server.reconfigure("")
    eventually(lambda: not _listens(address))
    eventually(lambda: not _threads())
    server.reconfigure(f"127.0.0.1:{address[1]}")
    server.reconfigure(_ANY_PORT)
    server.reconfigure(f"127.0.0.1:{address[1]}")  # the former one has just been told to leave it
    eventually(lambda: logged().endswith(f"127.0.0.1:{address[1]}/metrics"))
    eventually(lambda: len(_threads()) == 1)
    assert scrape(address)
    server.stop()
    assert not _threads()
    server.reconfigure(_ANY_PORT)
    assert not _threads(), "a stop is final"


def test_stop_closes_connections_that_are_open(
    address: tuple[str, int], server: MetricsServer
) -> None:
    with socket.create_connection(address, timeout=5) as client:
        client.sendall(b"GET /metrics HTTP/1.1\r\n")
        assert scrape(address)
        server.stop()
        assert client.recv(1) == b""
    assert not _listens(address)
    assert not _threads()


@pytest.mark.parametrize(
    ("listen", "hosts"),
    [
        (":0", ["127.0.0.1", "::1"]),
        ("0.0.0.0:0", ["127.0.0.1"]),
        ("[::1]:0", ["::1"]),
        ("localhost:0", ["127.0.0.1"]),
    ],
)
def test_addresses(
    listen: str, hosts: list[str], logged: Callable[[], str], status: dict[str, Any]
) -> None:
    if "::1" in hosts and not socket.has_dualstack_ipv6():
        pytest.skip("this machine has no IPv6")
    server = MetricsServer(listen, lambda: status)
    try:
        _, port = logged_address(logged)
        for host in hosts:
            assert scrape((host, port))
    finally:
        server.stop()


@pytest.mark.parametrize("package", ["prometheus_client", "h11"])
def test_missing_package_is_one_sentence(
    package: str,
    logged: Callable[[], str],
    status: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    for name in ("answer", "families"):
        monkeypatch.delitem(sys.modules, f"exporter.metrics.{name}", raising=False)
    server = MetricsServer(_ANY_PORT, lambda: status)
    eventually(lambda: not _threads())
    assert logged() == (
        f"artifactapi: no metrics: metrics.listen is set, but the package {package.replace('_', '-')} is not "
        "installed; run: pip install prometheus-client h11"
    )
    assert caplog.records[0].levelno == logging.WARNING
    server.stop()


def _threads() -> list[threading.Thread]:
    return [it for it in threading.enumerate() if it.name == endpoint.THREAD_NAME]


def _listens(address: tuple[str, int]) -> bool:
    with socket.socket() as client:
        return client.connect_ex(address) == 0
