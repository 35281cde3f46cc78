"""A real mitmdump, from the client's request to the row in Postgres."""

from __future__ import annotations

import contextlib
import queue
import re
import socket
import struct
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import pytest

from exporter.postgres.embedded import EmbeddedServer
from tests.support.access_log import SCRIPT, AccessLog, Row, temporary_schema
from tests.support.certificates import certificate
from tests.support.http1_client import RawClient, fetch
from tests.support.http2_client import Http2Client
from tests.support.proxy import Mitm, free_port
from tests.support.relay import Relay
from tests.support.upstream import RawUpstream
from tests.support.wait import eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.support.postgres import Postgres

type Mode = Literal["regular", "reverse", "upstream", "socks5"]

GOODBYE = re.compile(r"artifactapi: stopped; (\d+) rows written, none lost\.")
# Else mitmproxy asks the upstream first, and offers its clients no more than that speaks.
OFFER_HTTP2 = ("--set", "connection_strategy=lazy")
PROMISED_SECONDS = 2.0
SLACK_SECONDS = 1.5  # the commit, a busy machine


@dataclass
class World:
    """One proxy in all modes at once, and what is around it."""

    log: AccessLog
    proxy: Mitm
    plain: RawUpstream
    secure: RawUpstream
    ports: dict[str, int]
    ca: Path

    def open(self, mode: Mode, upstream: RawUpstream) -> RawClient:
        """A connection on which the upstream can be asked, without TLS so far."""
        secure = upstream is self.secure
        if mode == "reverse":
            return RawClient(("127.0.0.1", self.ports["reverse-tls" if secure else "reverse"]))
        client = RawClient(("127.0.0.1", self.ports[mode]))
        if mode == "socks5":
            _socks_connect(client, upstream)
        elif secure:
            answer = client.connect(upstream.host, upstream.port)
            assert answer
            assert answer.status == 200
        return client


@pytest.fixture(scope="module")
def world(postgres: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("world")
    pem = certificate(folder)
    names = ("regular", "reverse", "reverse-tls", "upstream", "socks5")
    ports = {name: free_port() for name in names}
    with (
        temporary_schema(postgres) as dsn,
        RawUpstream() as plain,
        RawUpstream(pem) as secure,
        Mitm(folder / "second", "--ignore-hosts", ".*") as second,
    ):
        modes = {
            "regular": "regular",
            "reverse": f"reverse:{plain.url}",
            "reverse-tls": f"reverse:{secure.url}",
            "upstream": f"upstream:{second.url}",
            "socks5": "socks5",
        }
        arguments = [part for name in names for part in ("--mode", f"{modes[name]}@{ports[name]}")]
        settings = folder / "settings.yaml"
        settings.write_text("batch: {max_seconds: 0.2}")
        with Mitm(
            folder / "first",
            *arguments,
            "--set",
            f"artifactapi_config={settings}",
            "--set",
            f"ssl_verify_upstream_trusted_ca={pem}",
            *OFFER_HTTP2,
            scripts=[SCRIPT],
            env={"ARTIFACTAPI_DSN": dsn, "ARTIFACTAPI_HOME": str(folder / "home")},
        ) as proxy:
            eventually(lambda: proxy.output().count("listening at") == len(names))
            yield World(AccessLog(dsn), proxy, plain, secure, ports, proxy.ca_path)
            assert proxy.terminate() == 0
        output = proxy.output()
        assert len(GOODBYE.findall(output)) == 1, output
        assert "Traceback" not in output


def _socks_connect(client: RawClient, upstream: RawUpstream) -> None:
    """RFC 1928: no authentication, then CONNECT to an IPv4 address."""
    client.send(b"\x05\x01\x00")
    assert client.receive() == b"\x05\x00"
    address = socket.inet_aton(upstream.host) + struct.pack("!H", upstream.port)
    client.send(b"\x05\x01\x00\x01" + address)
    assert client.receive()[:2] == b"\x05\x00"


def _target(mode: Mode, upstream: RawUpstream, secure: bool) -> str:
    whole = not secure and mode in ("regular", "upstream")
    return f"{upstream.url if whole else ''}/sized?size=3456&token=s3cret"


def _check(row: Row, upstream: RawUpstream, version: str, *, via: bool) -> None:
    secure = upstream.url.startswith("https")
    assert row["method"] == "GET"
    assert (row["scheme"], row["host"]) == ("https" if secure else "http", upstream.host)
    assert (row["port"], row["path"]) == (upstream.port, "/sized")
    assert row["query"] == "size=REDACTED&token=REDACTED"
    assert row["http_version"] == version
    assert (row["status_code"], row["error_type"], row["error"]) == (200, None, None)
    assert (row["request_bytes"], row["response_bytes"]) == (0, 3456)
    assert str(row["client_ip"]) == "127.0.0.1"
    if not via:  # mitmproxy does not say where the proxy above it is
        assert str(row["server_ip"]) == "127.0.0.1"
    assert 0 < row["client_port"] < 65536
    assert row["tls_version"] == ("TLSv1.3" if secure else None)
    assert row["response_source"] == "upstream"
    assert 0 <= row["ttfb_ms"] <= row["duration_ms"] < 10_000
    assert via or 0 < row["connect_ms"] < 10_000
    assert row["node"] == socket.gethostname()
    assert row["logged_at"] >= row["started_at"]
    assert row["proxy_user"] is None


# -- each way of asking ------------------------------------------------------------------------


@pytest.mark.parametrize("secure", [False, True], ids=["http", "https"])
@pytest.mark.parametrize("mode", ["regular", "reverse", "upstream", "socks5"])
def test_http1_in_every_mode(world: World, mode: Mode, secure: bool) -> None:
    upstream = world.secure if secure else world.plain
    agent = f"h1-{mode}-{secure}"
    with world.open(mode, upstream) as client:
        if secure:
            client.start_tls(upstream.host, world.ca)
        target = _target(mode, upstream, secure)
        host = f"{upstream.host}:{upstream.port}"
        client.request("GET", target, f"Host: {host}", f"User-Agent: {agent}")
        response = client.read_response()
    assert response
    assert (response.status, len(response.body)) == (200, 3456)
    _check(world.log.row_for_agent(agent), upstream, "HTTP/1.1", via=mode == "upstream")


@pytest.mark.parametrize("mode", ["regular", "reverse", "upstream", "socks5"])
def test_http2_in_every_mode(world: World, mode: Mode) -> None:
    upstream, agent = world.secure, f"h2-{mode}"
    with contextlib.closing(world.open(mode, upstream)) as raw:
        assert raw.start_tls(upstream.host, world.ca, ["h2"]) == "h2"
        client = Http2Client(raw, f"{upstream.host}:{upstream.port}")
        number = client.request(_target(mode, upstream, secure=True), ("user-agent", agent))
        (stream,) = client.wait(number)
    assert (stream.status, len(stream.body)) == (200, 3456)
    _check(world.log.row_for_agent(agent), upstream, "HTTP/2.0", via=mode == "upstream")


def test_streams_side_by_side_are_rows_of_their_own(world: World) -> None:
    with Http2Client.through(
        world.proxy.address, world.secure.host, world.secure.port, world.ca
    ) as client:
        numbers = [
            client.request(f"/sized?size={size}", ("user-agent", f"side-{size}"))
            for size in range(1000, 1020)
        ]
        client.wait(*numbers)
    rows = world.log.wait_rows(20, "user_agent LIKE 'side-%%'")
    assert sorted(row["response_bytes"] for row in rows) == list(range(1000, 1020))


def test_an_upload_is_counted(world: World) -> None:
    fetch(
        world.proxy.address,
        f"{world.plain.url}/echo",
        "User-Agent: upload",
        method="POST",
        body=b"x" * 70_000,
    )
    row = world.log.row_for_agent("upload")
    assert (row["method"], row["request_bytes"], row["response_bytes"]) == ("POST", 70_000, 5)


def test_an_upstream_that_is_not_there_is_a_row(world: World) -> None:
    response = fetch(world.proxy.address, f"http://127.0.0.1:{free_port()}/", "User-Agent: nobody")
    assert response
    assert response.status == 502
    row = world.log.row_for_agent("nobody")
    assert (row["status_code"], row["error_type"]) == (502, "connect")
    assert (row["response_bytes"], row["server_ip"]) == (None, None)


def test_a_client_that_does_not_trust_us_is_a_row(world: World) -> None:
    with world.open("regular", world.secure) as client, pytest.raises(OSError, match="CERTIFICATE"):
        client.start_tls("localhost")  # trusts nobody
    (row,) = world.log.wait_rows(1, "error_type = 'tls_client'")
    assert (row["host"], row["port"]) == ("localhost", world.secure.port)
    assert row["status_code"] is None


# -- many -------------------------------------------------------------------------------------


def test_a_thousand_requests_over_sixteen_connections_are_a_thousand_rows(world: World) -> None:
    statuses = (200, 404, 301, 503)
    numbers: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in range(1000):
        numbers.put(number)
    got: dict[str, tuple[int, int]] = {}

    def work() -> None:
        with RawClient(world.proxy.address) as client, contextlib.suppress(queue.Empty):
            while True:
                number = numbers.get_nowait()
                agent = f"many-{number}"
                path = f"/sized?size={number}" if number % 2 else f"/status/{statuses[number % 4]}"
                client.request("GET", f"{world.plain.url}{path}", f"User-Agent: {agent}")
                response = client.read_response()
                assert response
                got[agent] = (response.status, len(response.body))

    _in_threads(work, 16)
    assert len(got) == 1000
    rows = world.log.wait_rows(1000, "user_agent LIKE 'many-%%'")
    assert {row["user_agent"]: (row["status_code"], row["response_bytes"]) for row in rows} == got
    assert len(rows) == 1000


# -- the start and the end ---------------------------------------------------------------------


def test_a_stop_amid_traffic_loses_nothing_that_was_answered(dsn: str, tmp_path: Path) -> None:
    log = AccessLog(dsn)
    answered: dict[str, int] = {}
    with (
        RawUpstream() as upstream,
        Mitm(tmp_path, scripts=[SCRIPT], env={"ARTIFACTAPI_DSN": dsn}) as proxy,
    ):

        def work(worker: int) -> None:
            with contextlib.suppress(OSError), RawClient(proxy.address) as client:
                for number in range(100_000):
                    agent = f"{worker}-{number}"
                    client.request("GET", f"{upstream.url}/sized", f"User-Agent: {agent}")
                    response = client.read_response()
                    if response is None or not response.complete:
                        return
                    answered[agent] = response.status

        threads = [threading.Thread(target=work, args=(worker,)) for worker in range(8)]
        for thread in threads:
            thread.start()
        eventually(lambda: len(answered) > 300)
        assert proxy.terminate() == 0
        for thread in threads:
            thread.join()
        output = proxy.output()
    rows = {row["user_agent"]: row for row in log.rows()}
    assert set(answered) <= set(rows)
    # What mitmproxy still sends after our end is known to be cut by the stop, and no more.
    unknown = [agent for agent in answered if rows[agent]["error_type"] == "shutdown"]
    assert len(unknown) <= len(threads)
    assert all(rows[agent]["status_code"] is None for agent in unknown)
    known = set(answered) - set(unknown)
    assert {agent: rows[agent]["status_code"] for agent in known} == {
        agent: answered[agent] for agent in known
    }
    (count,) = GOODBYE.findall(output)
    assert int(count) == len(log.rows())


def test_postgres_that_comes_later_gets_what_was_asked_before(
    postgres: Postgres, dsn: str, tmp_path: Path
) -> None:
    with Relay(("127.0.0.1", postgres.port)) as relay, RawUpstream() as upstream:
        relay.cut()
        env = {"ARTIFACTAPI_DSN": f"{dsn} port={relay.address[1]}"}
        with Mitm(tmp_path, scripts=[SCRIPT], env=env) as proxy:
            eventually(lambda: "PostgreSQL unavailable; buffering rows" in proxy.output())
            response = fetch(proxy.address, f"{upstream.url}/ok", "User-Agent: early")
            assert response
            assert response.status == 200
            assert AccessLog(dsn).rows() == []
            relay.mend()
            AccessLog(dsn).row_for_agent("early")
            eventually(lambda: "PostgreSQL available again" in proxy.output())
            assert "rror" not in proxy.output()


def test_the_start_line_names_no_password_and_a_row_alone_is_there_within_two_seconds(
    world: World, dsn: str, tmp_path: Path
) -> None:
    with Mitm(
        tmp_path,
        "--set",
        "artifactapi_fliter=~all",
        scripts=[SCRIPT],
        env={"ARTIFACTAPI_DSN": f"{dsn} password=hunter2"},
    ) as proxy:
        eventually(lambda: "artifactapi: logging to" in proxy.output())
        fetch(proxy.address, f"{world.plain.url}/ok", "User-Agent: alone")
        answered = time.monotonic()
        AccessLog(dsn).row_for_agent("alone")
        assert time.monotonic() - answered < PROMISED_SECONDS + SLACK_SECONDS
    output = proxy.output()
    port = re.search(r"port=(\d+)", dsn)
    assert port
    line = f"logging to postgres@127.0.0.1:{port[1]}/postgres; show the rows with: artifactapi tail -f"
    assert output.count(line) == 1
    assert "hunter2" not in output
    assert "unknown option artifactapi_fliter; it has no effect. The options are" in output, (
        "a misspelt option is told"
    )


WRONG = {
    "no file": (None, "config=absent.yaml", "absent.yaml: can't be read"),
    "unknown key": ("bufer: {}", "config=it.yaml", "it.yaml: bufer is not a setting"),
    "wrong value": (
        "batch: {max_entries: 0}",
        "config=it.yaml",
        "it.yaml: batch.max_entries is 0, expected int >= 1.",
    ),
    "bad filter": (None, "filter=~bad(", "artifactapi_filter: Invalid filter expression: '~bad('."),
    "bad dsn": (
        None,
        "dsn=host",
        "expected key=value pairs or a postgresql:// URI with the password percent-encoded.",
    ),
}


def test_a_wrong_setting_stops_the_start_with_one_sentence(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:  # side by side, since each takes seconds
        proxies = {}
        for case, (settings, option, _) in WRONG.items():
            folder = tmp_path / case
            folder.mkdir()
            if settings is not None:
                (folder / "it.yaml").write_text(settings)
            proxy = Mitm(
                folder,
                "--set",
                f"artifactapi_{option}",
                scripts=[SCRIPT],
                listens=False,
                timeout=60,
            )
            proxies[case] = stack.enter_context(proxy)
        assert {case: proxy.wait(60) for case, proxy in proxies.items()} == dict.fromkeys(WRONG, 1)
    for case, (_, _, sentence) in WRONG.items():
        output = proxies[case].output()
        assert output.count(sentence) == 1, output
        assert "Traceback" not in output
        assert "logging to" not in output


# -- the embedded server -----------------------------------------------------------------------


def test_two_proxies_share_the_embedded_server_and_a_kill_leaves_no_trace(
    world: World, home: Path, tmp_path: Path
) -> None:
    pid_file = home / "postgres" / "postmaster.pid"
    settings = tmp_path / "settings.yaml"
    settings.write_text("batch: {max_seconds: 0.2}")

    def start(name: str) -> Mitm:
        option = ("--set", f"artifactapi_config={settings}")
        return Mitm(tmp_path / name, *option, scripts=[SCRIPT])

    def ask(proxy: Mitm, agent: str) -> None:
        assert fetch(proxy.address, f"{world.plain.url}/ok", f"User-Agent: {agent}")

    with contextlib.ExitStack() as stack:
        first, second = (stack.enter_context(start(name)) for name in ("1", "2"))
        ask(first, "first")
        ask(second, "second")
        log = AccessLog(EmbeddedServer().dsn)
        log.wait_rows(2)
        assert pid_file.stat().st_mode & 0o077 == 0
        assert first.terminate() == 0
        ask(second, "still there")
        log.row_for_agent("still there")
        second.kill()
        assert pid_file.exists(), "nobody was left to stop it"
        with start("3") as third:
            ask(third, "next")
            log.row_for_agent("next")
    assert not pid_file.exists(), "the last one stops it"


def _in_threads(work: Callable[[], None], count: int) -> None:
    faults: list[BaseException] = []

    def guarded() -> None:
        try:
            work()
        except BaseException as e:  # noqa: BLE001 - reported below
            faults.append(e)

    threads = [threading.Thread(target=guarded) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
