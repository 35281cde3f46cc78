"""Run a real mitmdump and check the rows that client requests produce in PostgreSQL."""

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
from tests.support.logged_proxy import logged_proxy
from tests.support.proxy import Mitm, free_port
from tests.support.relay import Relay
from tests.support.upstream import RawUpstream
from tests.support.wait import eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.support.postgres import Postgres

type Mode = Literal["regular", "reverse", "upstream", "socks5"]

STOPPED_LINE = re.compile(r"artifactapi: stopped; (\d+) rows? written, none lost\.")
# With the eager strategy, mitmproxy offers the client only the protocols that the upstream speaks.
OFFER_HTTP2 = ("--set", "connection_strategy=lazy")
PROMISED_SECONDS = 2.0
SLACK_SECONDS = 1.5  # for the commit, on a busy machine


@dataclass
class ProxySetup:
    """A proxy that listens in every mode, with its access log and its upstreams."""

    log: AccessLog
    proxy: Mitm
    plain: RawUpstream
    secure: RawUpstream
    ports: dict[str, int]
    ca: Path

    def open(self, mode: Mode, upstream: RawUpstream) -> RawClient:
        """Open a connection on which a client can reach the upstream; it has no TLS yet."""
        secure = upstream is self.secure
        if mode == "reverse":
            return RawClient(("127.0.0.1", self.ports["reverse-tls" if secure else "reverse"]))
        client = RawClient(("127.0.0.1", self.ports[mode]))
        if mode == "socks5":
            _socks_connect(client, upstream)
        elif secure:
            response = client.connect(upstream.host, upstream.port)
            assert response
            assert response.status == 200
        return client


@pytest.fixture(scope="module")
def setup(postgres: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProxySetup]:
    """Run the proxy; check its exit code and its last log line at the end."""
    folder = tmp_path_factory.mktemp("setup")
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
            *("--map-remote", rf"|https?://mapped[.]example(:\d+)?/|{plain.url}/mirror/"),
            scripts=[SCRIPT],
            env={"ARTIFACTAPI_DSN": dsn, "ARTIFACTAPI_HOME": str(folder / "home")},
        ) as proxy:
            eventually(lambda: proxy.output().count("listening at") == len(names))
            yield ProxySetup(AccessLog(dsn), proxy, plain, secure, ports, proxy.ca_path)
            assert proxy.terminate() == 0
        output = proxy.output()
        assert len(STOPPED_LINE.findall(output)) == 1, output
        assert "Traceback" not in output


def _socks_connect(client: RawClient, upstream: RawUpstream) -> None:
    """Negotiate SOCKS5 (RFC 1928) without authentication, then CONNECT to an IPv4 address."""
    client.send(b"\x05\x01\x00")
    assert client.receive() == b"\x05\x00"
    address = socket.inet_aton(upstream.host) + struct.pack("!H", upstream.port)
    client.send(b"\x05\x01\x00\x01" + address)
    assert client.receive()[:2] == b"\x05\x00"


def _target(mode: Mode, upstream: RawUpstream, secure: bool) -> str:
    absolute = not secure and mode in ("regular", "upstream")
    return f"{upstream.url if absolute else ''}/sized?size=3456&token=s3cret"


def _assert_row(row: Row, upstream: RawUpstream, version: str, *, via_proxy: bool) -> None:
    secure = upstream.url.startswith("https")
    assert row["method"] == "GET"
    assert (row["scheme"], row["host"]) == ("https" if secure else "http", upstream.host)
    assert (row["port"], row["path"]) == (upstream.port, "/sized")
    assert row["query"] == "size=REDACTED&token=REDACTED"
    assert row["http_version"] == version
    assert (row["status_code"], row["error_type"], row["error"]) == (200, None, None)
    assert (row["request_bytes"], row["response_bytes"]) == (0, 3456)
    assert str(row["client_ip"]) == "127.0.0.1"
    if not via_proxy:  # mitmproxy does not report the address of its upstream proxy
        assert str(row["server_ip"]) == "127.0.0.1"
    assert 0 < row["client_port"] < 65536
    assert row["tls_version"] == ("TLSv1.3" if secure else None)
    assert row["response_source"] == "upstream"
    assert 0 <= row["ttfb_ms"] <= row["duration_ms"] < 10_000
    assert via_proxy or 0 < row["connect_ms"] < 10_000
    assert row["node"] == socket.gethostname()
    assert row["logged_at"] >= row["started_at"]
    assert row["proxy_user"] is None


# -- proxy modes -------------------------------------------------------------------------------


@pytest.mark.parametrize("secure", [False, True], ids=["http", "https"])
@pytest.mark.parametrize("mode", ["regular", "reverse", "upstream", "socks5"])
def test_http1_in_every_mode(setup: ProxySetup, mode: Mode, secure: bool) -> None:
    upstream = setup.secure if secure else setup.plain
    agent = f"h1-{mode}-{secure}"
    with setup.open(mode, upstream) as client:
        if secure:
            client.start_tls(upstream.host, setup.ca)
        target = _target(mode, upstream, secure)
        host = f"{upstream.host}:{upstream.port}"
        client.request("GET", target, f"Host: {host}", f"User-Agent: {agent}")
        response = client.read_response()
    assert response
    assert (response.status, len(response.body)) == (200, 3456)
    _assert_row(setup.log.row_for_agent(agent), upstream, "HTTP/1.1", via_proxy=mode == "upstream")


@pytest.mark.parametrize("mode", ["regular", "reverse", "upstream", "socks5"])
def test_http2_in_every_mode(setup: ProxySetup, mode: Mode) -> None:
    upstream, agent = setup.secure, f"h2-{mode}"
    with contextlib.closing(setup.open(mode, upstream)) as raw:
        assert raw.start_tls(upstream.host, setup.ca, ["h2"]) == "h2"
        client = Http2Client(raw, f"{upstream.host}:{upstream.port}")
        number = client.request(_target(mode, upstream, secure=True), ("user-agent", agent))
        (stream,) = client.wait(number)
    assert (stream.status, len(stream.body)) == (200, 3456)
    _assert_row(setup.log.row_for_agent(agent), upstream, "HTTP/2.0", via_proxy=mode == "upstream")


@pytest.mark.parametrize("names", ["host", "sni"])
@pytest.mark.parametrize("secure", [False, True], ids=["http", "https"])
@pytest.mark.parametrize("mode", ["socks5", "regular", "upstream"])
def test_name_of_a_client_that_resolves_names_itself(
    setup: ProxySetup, mode: Mode, secure: bool, names: str
) -> None:
    """It opens a tunnel to an address. The Host header, or else the TLS handshake, has the name."""
    if not secure and (mode != "socks5" or names == "sni"):
        pytest.skip("there is no tunnel, or no name")
    upstream, agent = setup.secure if secure else setup.plain, f"resolved-{mode}-{secure}-{names}"
    with setup.open(mode, upstream) as client:
        if secure:
            client.start_tls("pypi.example", setup.ca)
        host = "Host: pypi.example:8080\r\n" if names == "host" else ""
        head = f"GET /sized?size=3456 HTTP/1.1\r\n{host}User-Agent: {agent}\r\n\r\n"
        client.send(head.encode())
        assert client.read_response()
    row = setup.log.row_for_agent(agent)
    assert (row["host"], row["port"]) == ("pypi.example", upstream.port)
    assert row["path"] == "/sized"


def test_host_header_does_not_replace_the_host_of_the_target(setup: ProxySetup) -> None:
    fetch(
        setup.proxy.address,
        f"{setup.plain.url}/sized?size=1",
        "Host: pypi.example",
        "User-Agent: absolute",
    )
    assert setup.log.row_for_agent("absolute")["host"] == "127.0.0.1"


# -- another URL than the client asked for -----------------------------------------------------


def test_map_remote_keeps_what_the_client_asked_for(setup: ProxySetup) -> None:
    """The row is about what was fetched."""
    url = "http://mapped.example:8080/sized?size=7&token=s3cret"
    fetch(setup.proxy.address, url, "User-Agent: mapped")
    row = setup.log.row_for_agent("mapped")
    assert (row["scheme"], row["host"]) == ("http", setup.plain.host)
    assert (row["port"], row["path"]) == (setup.plain.port, "/mirror/sized")
    assert row["requested_url"] == "http://mapped.example:8080/sized?size=REDACTED&token=REDACTED"


@pytest.mark.parametrize("mode", ["socks5", "regular"])
def test_map_remote_in_a_tunnel_to_an_address(setup: ProxySetup, mode: Mode) -> None:
    """The client asked for the name, not for the address, which here is also that of the mapping."""
    agent = f"mapped-{mode}"
    with setup.open(mode, setup.secure) as client:
        client.start_tls("mapped.example", setup.ca)
        client.request("GET", "/sized?size=7", "Host: mapped.example", f"User-Agent: {agent}")
        assert client.read_response()
    row = setup.log.row_for_agent(agent)
    assert (row["host"], row["path"]) == (setup.plain.host, "/mirror/sized")
    assert row["requested_url"] == f"https://mapped.example:{setup.secure.port}/sized?size=REDACTED"


@pytest.mark.parametrize("http2", [False, True], ids=["http1", "http2"])
def test_reverse_mode_keeps_the_name_of_the_tls_handshake(setup: ProxySetup, http2: bool) -> None:
    """Mitmproxy replaces the Host header before any addon sees it."""
    agent = f"reverse-{http2}"
    with contextlib.closing(setup.open("reverse", setup.secure)) as client:
        client.start_tls("pypi.example", setup.ca, ["h2"] if http2 else [])
        if http2:
            stream = Http2Client(client, "pypi.example")
            stream.wait(stream.request("/sized?size=7", ("user-agent", agent)))
        else:
            client.request("GET", "/sized?size=7", "Host: pypi.example", f"User-Agent: {agent}")
            assert client.read_response()
    row = setup.log.row_for_agent(agent)
    assert (row["host"], row["port"]) == (setup.secure.host, setup.secure.port)
    port = setup.ports["reverse-tls"]
    assert row["requested_url"] == f"https://pypi.example:{port}/sized?size=REDACTED"


def test_reverse_mode_without_a_name(setup: ProxySetup) -> None:
    with setup.open("reverse", setup.plain) as client:
        client.request("GET", "/ok", "Host: pypi.example", "User-Agent: nameless")
        assert client.read_response()
    row = setup.log.row_for_agent("nameless")
    assert (row["host"], row["requested_url"]) == (setup.plain.host, None)


def test_reverse_mode_that_keeps_the_host_header(postgres: Postgres, tmp_path: Path) -> None:
    """The upstream has an unknown name, so the name that the client asked for identifies the package."""
    with (
        RawUpstream() as upstream,
        logged_proxy(
            postgres,
            tmp_path,
            *("--mode", f"reverse:{upstream.url}@0", "--set", "keep_host_header"),
        ) as log,
    ):
        for host in ("pypi.example", "pypi.example:8080", f"127.0.0.1:{upstream.port}"):
            with log.client() as client:
                agent = log.new_agent()
                client.request("GET", "/simple/demo/", f"Host: {host}", f"User-Agent: {agent}")
                assert client.read_response()
            row = log.row_for_agent(agent)
            assert (row["host"], row["port"]) == ("127.0.0.1", upstream.port)
            if "pypi" in host:
                assert row["requested_url"] == f"http://{host}/simple/demo/"
                assert (row["remote"], row["purl"]) == ("pypi", "pkg:pypi/demo")
            else:
                assert (row["requested_url"], row["purl"]) == (None, None)


def test_parallel_http2_streams_are_separate_rows(setup: ProxySetup) -> None:
    with Http2Client.through(
        setup.proxy.address, setup.secure.host, setup.secure.port, setup.ca
    ) as client:
        numbers = [
            client.request(f"/sized?size={size}", ("user-agent", f"side-{size}"))
            for size in range(1000, 1020)
        ]
        client.wait(*numbers)
    rows = setup.log.wait_rows(20, "user_agent LIKE 'side-%%'")
    assert sorted(row["response_bytes"] for row in rows) == list(range(1000, 1020))


def test_upload_size_is_logged(setup: ProxySetup) -> None:
    fetch(
        setup.proxy.address,
        f"{setup.plain.url}/echo",
        "User-Agent: upload",
        method="POST",
        body=b"x" * 70_000,
    )
    row = setup.log.row_for_agent("upload")
    assert (row["method"], row["request_bytes"], row["response_bytes"]) == ("POST", 70_000, 5)


def test_unreachable_upstream_is_logged(setup: ProxySetup) -> None:
    response = fetch(setup.proxy.address, f"http://127.0.0.1:{free_port()}/", "User-Agent: nobody")
    assert response
    assert response.status == 502
    row = setup.log.row_for_agent("nobody")
    assert (row["status_code"], row["error_type"]) == (502, "connect")
    assert (row["response_bytes"], row["server_ip"]) == (None, None)


def test_failed_client_handshake_is_logged(setup: ProxySetup) -> None:
    with setup.open("regular", setup.secure) as client, pytest.raises(OSError, match="CERTIFICATE"):
        client.start_tls("localhost")  # trusts no authority
    (row,) = setup.log.wait_rows(1, "error_type = 'tls_client'")
    assert (row["host"], row["port"]) == ("localhost", setup.secure.port)
    assert row["status_code"] is None


# -- load --------------------------------------------------------------------------------------


def test_concurrent_requests_have_one_row_each(setup: ProxySetup) -> None:
    statuses = (200, 404, 301, 503)
    numbers: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in range(1000):
        numbers.put(number)
    received: dict[str, tuple[int, int]] = {}

    def work() -> None:
        with RawClient(setup.proxy.address) as client, contextlib.suppress(queue.Empty):
            while True:
                number = numbers.get_nowait()
                agent = f"many-{number}"
                path = f"/sized?size={number}" if number % 2 else f"/status/{statuses[number % 4]}"
                client.request("GET", f"{setup.plain.url}{path}", f"User-Agent: {agent}")
                response = client.read_response()
                assert response
                received[agent] = (response.status, len(response.body))

    _run_in_threads(work, 16)
    assert len(received) == 1000
    rows = setup.log.wait_rows(1000, "user_agent LIKE 'many-%%'")
    assert {
        row["user_agent"]: (row["status_code"], row["response_bytes"]) for row in rows
    } == received
    assert len(rows) == 1000


# -- startup and shutdown ----------------------------------------------------------------------


def test_shutdown_under_load_loses_no_row(dsn: str, tmp_path: Path) -> None:
    log = AccessLog(dsn)
    statuses: dict[str, int] = {}  # of the complete responses, by user agent
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
                    statuses[agent] = response.status

        threads = [threading.Thread(target=work, args=(worker,)) for worker in range(8)]
        for thread in threads:
            thread.start()
        eventually(lambda: len(statuses) > 300)
        assert proxy.terminate() == 0
        for thread in threads:
            thread.join()
        output = proxy.output()
    rows = {row["user_agent"]: row for row in log.rows()}
    assert set(statuses) <= set(rows)
    # A response that mitmproxy sends after artifactapi stopped has a row with the error "shutdown".
    # Each connection can have at most one.
    interrupted = [agent for agent in statuses if rows[agent]["error_type"] == "shutdown"]
    assert len(interrupted) <= len(threads)
    assert all(rows[agent]["status_code"] is None for agent in interrupted)
    finished = set(statuses) - set(interrupted)
    assert {agent: rows[agent]["status_code"] for agent in finished} == {
        agent: statuses[agent] for agent in finished
    }
    (count,) = STOPPED_LINE.findall(output)
    assert int(count) == len(log.rows())


def test_rows_are_buffered_until_postgres_is_available(
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


def test_startup_log_hides_password_and_single_row_arrives_within_two_seconds(
    setup: ProxySetup, dsn: str, tmp_path: Path
) -> None:
    with Mitm(
        tmp_path,
        "--set",
        "artifactapi_fliter=~all",
        scripts=[SCRIPT],
        env={"ARTIFACTAPI_DSN": f"{dsn} password=hunter2"},
    ) as proxy:
        eventually(lambda: "artifactapi: logging to" in proxy.output())
        fetch(proxy.address, f"{setup.plain.url}/ok", "User-Agent: alone")
        received_at = time.monotonic()
        AccessLog(dsn).row_for_agent("alone")
        assert time.monotonic() - received_at < PROMISED_SECONDS + SLACK_SECONDS
    output = proxy.output()
    port = re.search(r"port=(\d+)", dsn)
    assert port
    assert output.count(f"logging to postgres@127.0.0.1:{port[1]}/postgres\n") == 1
    assert len(re.findall(r": show the rows with: \S*artifactapi tail -f\n", output)) == 1
    assert "hunter2" not in output
    assert "unknown option artifactapi_fliter; it has no effect. The options are" in output, (
        "the log names a misspelled option"
    )


INVALID_SETTINGS = {
    "no file": (None, "config=absent.yaml", "absent.yaml: can't be read"),
    "unknown key": ("bufer: {}", "config=settings.yaml", "settings.yaml: bufer is not a setting"),
    "wrong value": (
        "batch: {max_entries: 0}",
        "config=settings.yaml",
        "settings.yaml: batch.max_entries is 0, expected a whole number, from 1 to 10000.",
    ),
    "bad filter": (None, "filter=~bad(", "artifactapi_filter: Invalid filter expression: '~bad('."),
    "bad dsn": (
        None,
        "dsn=host",
        "expected key=value pairs or a postgresql:// URI with the password percent-encoded.",
    ),
}


def test_invalid_setting_stops_startup_with_one_message(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:  # in parallel, because each proxy takes seconds to start
        proxies = {}
        for case, (settings, option, _) in INVALID_SETTINGS.items():
            folder = tmp_path / case
            folder.mkdir()
            if settings is not None:
                (folder / "settings.yaml").write_text(settings)
            proxy = Mitm(
                folder,
                "--set",
                f"artifactapi_{option}",
                scripts=[SCRIPT],
                listens=False,
                timeout=60,
            )
            proxies[case] = stack.enter_context(proxy)
        assert {case: proxy.wait(60) for case, proxy in proxies.items()} == dict.fromkeys(
            INVALID_SETTINGS, 1
        )
    for case, (_, _, sentence) in INVALID_SETTINGS.items():
        output = proxies[case].output()
        assert output.count(sentence) == 1, output
        assert "Traceback" not in output
        assert "logging to" not in output


# -- the embedded server -----------------------------------------------------------------------


def test_proxies_share_the_embedded_server_and_survive_a_kill(
    setup: ProxySetup, home: Path, tmp_path: Path
) -> None:
    pid_file = home / "postgres" / "postmaster.pid"
    settings = tmp_path / "settings.yaml"
    settings.write_text("batch: {max_seconds: 0.2}")

    def start(name: str) -> Mitm:
        option = ("--set", f"artifactapi_config={settings}")
        return Mitm(tmp_path / name, *option, scripts=[SCRIPT])

    def send_request(proxy: Mitm, agent: str) -> None:
        assert fetch(proxy.address, f"{setup.plain.url}/ok", f"User-Agent: {agent}")

    with contextlib.ExitStack() as stack:
        first, second = (stack.enter_context(start(name)) for name in ("1", "2"))
        send_request(first, "first")
        send_request(second, "second")
        log = AccessLog(EmbeddedServer().dsn)
        log.wait_rows(2)
        assert pid_file.stat().st_mode & 0o077 == 0
        assert first.terminate() == 0
        send_request(second, "still there")
        log.row_for_agent("still there")
        second.kill()
        assert pid_file.exists(), "the killed proxy cannot stop the server"
        with start("3") as third:
            send_request(third, "next")
            log.row_for_agent("next")
    assert not pid_file.exists(), "the last proxy stops the server"


def _run_in_threads(work: Callable[[], None], count: int) -> None:
    """Run `work` in several threads; fail if any of them raised."""
    errors: list[BaseException] = []

    def catch_errors() -> None:
        try:
            work()
        except BaseException as e:  # noqa: BLE001 - reported below
            errors.append(e)

    threads = [threading.Thread(target=catch_errors) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
