"""The upstream, relay, proxy and clients in `tests/support` work as documented and release everything."""

import asyncio
import contextlib
import gzip
import socket
import ssl
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.support.certificates import Kind, certificate
from tests.support.endings import UPGRADE, gzipped
from tests.support.http1_client import RawClient, Response, fetch
from tests.support.http2_client import Http2Client
from tests.support.loop_thread import LoopThread
from tests.support.proxy import Mitm
from tests.support.relay import Relay
from tests.support.server_connection import body
from tests.support.upstream import RawUpstream
from tests.support.wait import eventually
from tests.support.websocket_client import WebSocketClient

SHORT_SECONDS = 0.3


@pytest.fixture(autouse=True)
def _no_leaks() -> Iterator[None]:
    """Check that every test closes its threads and file descriptors."""
    threads = set(threading.enumerate())
    process = psutil.Process()
    files = process.num_fds()
    yield
    assert set(threading.enumerate()) == threads
    assert process.num_fds() <= files  # fewer: the garbage collector closed one of an earlier test


@pytest.fixture
def upstream() -> Iterator[RawUpstream]:
    with RawUpstream() as running:
        yield running


def send_request(upstream: RawUpstream, target: str, method: str = "GET") -> Response | None:
    with RawClient(upstream.address) as client:
        client.request(method, target)
        return client.read_response(method)


# -- waiting -----------------------------------------------------------------------------------


def test_eventually_returns_the_truthy_value() -> None:
    values = iter([0, "", 7])
    assert eventually(lambda: next(values)) == 7


def test_eventually_fails_with_the_last_value() -> None:
    with pytest.raises(AssertionError, match=r"still \[\]"):
        eventually(list[int], 0.05)


def test_loop_thread_raises_errors_of_callbacks() -> None:
    async def raise_later() -> None:
        asyncio.get_running_loop().call_soon(int, "not a number")

    with pytest.raises(BaseExceptionGroup, match="LoopThread"), LoopThread() as loop:
        loop.call(raise_later())


# -- the upstream ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "status", "size"),
    [
        ("/ok", 200, 3),
        ("/head", 200, 5000),
        ("/204", 204, 0),
        ("/304", 304, 0),
        ("/sized?size=200000", 200, 200000),
        ("/chunked?size=40000", 200, 40000),
        ("/trailers", 200, 1000),
        ("/until-eof?size=70000", 200, 70000),
        ("/gzip?size=5000", 200, len(gzipped(5000))),
        ("/redirect", 302, 11),
        ("/status/204", 204, 0),
        ("/status/999", 999, 4),
        ("/many-headers?size=5000", 200, 3),
        ("/unheard-of", 404, 15),
    ],
)
def test_complete_responses(upstream: RawUpstream, target: str, status: int, size: int) -> None:
    response = send_request(upstream, target)
    assert response
    assert (response.status, len(response.body), response.complete) == (status, size, True)


def test_bodies_are_equal_in_every_encoding(upstream: RawUpstream) -> None:
    size = 100_000
    for path in ("/sized", "/chunked", "/until-eof"):
        response = send_request(upstream, f"{path}?size={size}")
        assert response
        assert response.body == body(size)
    compressed = send_request(upstream, f"/gzip?size={size}")
    assert compressed
    assert gzip.decompress(compressed.body) == body(size)


@pytest.mark.parametrize("target", ["/ok", "/head", "/sized", "/chunked", "/until-eof", "/gzip"])
def test_head_has_no_body(upstream: RawUpstream, target: str) -> None:
    with RawClient(upstream.address) as client:
        client.request("HEAD", target, "Connection: close")
        response = client.read_response("HEAD")
        assert response
        assert (response.status, client.read_all()) == (200, b"")


@pytest.mark.parametrize(
    ("target", "size"),
    [
        ("/close-after-head", 0),
        ("/cut-sized?size=1000&sent=100", 100),
        ("/cut-chunked?size=2000", 2500),
        ("/bad-chunk", None),
    ],
)
def test_incomplete_responses(upstream: RawUpstream, target: str, size: int | None) -> None:
    with RawClient(upstream.address) as client:
        client.request("GET", target)
        if size is None:
            assert client.read_all().endswith(b"zz\r\nnot a length\r\n0\r\n\r\n")
            return
        response = client.read_response()
        assert response
        assert (response.status, len(response.body), response.complete) == (200, size, False)


@pytest.mark.parametrize(
    ("target", "received", "reset"),
    [
        ("/close-before-head", b"", False),
        ("/reset-before-head", b"", True),
        ("/close-in-head", b"HTTP/1.1 200 OK\r\nContent-Length", False),
        ("/garbage", b"\x16\x03\x00 this is not HTTP at all\r\n\r\n", False),
    ],
)
def test_no_response(upstream: RawUpstream, target: str, received: bytes, reset: bool) -> None:
    with RawClient(upstream.address) as client:
        client.request("GET", target)
        assert (client.read_all(), client.was_reset) == (received, reset)


@pytest.mark.parametrize("target", ["/cl-and-te", "/two-lengths"])
def test_contradictory_lengths(upstream: RawUpstream, target: str) -> None:
    with RawClient(upstream.address) as client:
        client.request("GET", target, "Connection: close")
        head = client.read_all().split(b"\r\n\r\n")[0]
        assert head.lower().count(b"\r\ncontent-length") + head.count(b"Transfer-Encoding") == 2


def test_interim_response(upstream: RawUpstream) -> None:
    response = send_request(upstream, "/1xx-then-200")
    assert response
    assert (response.status, response.interim) == (200, [103])


@pytest.mark.parametrize(
    ("target", "size"), [("/slow-head", 3), ("/slow-body", 1000), ("/slow-chunked", 1000)]
)
def test_slow_responses_wait_for_release(upstream: RawUpstream, target: str, size: int) -> None:
    with RawClient(upstream.address, timeout=SHORT_SECONDS) as client:
        client.request("GET", target)
        with pytest.raises(TimeoutError):
            client.read_response()
    upstream.release()
    response = send_request(upstream, target)
    assert response
    assert (len(response.body), response.complete) == (size, True)


def test_waiting_response_ends_with_the_server() -> None:
    with RawUpstream() as upstream, RawClient(upstream.address) as client:
        client.request("GET", "/slow-head")
        eventually(lambda: upstream.requests)


def test_client_that_does_not_read_cannot_block_shutdown() -> None:
    with RawUpstream() as upstream, RawClient(upstream.address) as client:
        client.request("GET", "/sized?size=50000000")
        eventually(lambda: upstream.requests)


def test_reset_during_body(upstream: RawUpstream) -> None:
    with RawClient(upstream.address) as client:
        client.request("GET", "/reset-in-body")
        eventually(lambda: upstream.requests)
        upstream.release()
        response = client.read_response()
        assert response
        assert (len(response.body), client.was_reset) == (500, True)


def test_response_before_end_of_upload(upstream: RawUpstream) -> None:
    with RawClient(upstream.address) as client:
        client.request("POST", "/early-413", body=b"x" * 10, length=1000)
        response = client.read_response("POST")
        assert response
        assert response.status == 413
        client.send(b"x" * 990)
        assert client.read_all() == b""
    assert upstream.requests[0].body_length == 1000


def test_reset_during_upload(upstream: RawUpstream) -> None:
    upstream.release()
    with RawClient(upstream.address) as client:
        client.request("POST", "/reset-in-upload", body=b"x" * 10, length=1000)
        assert client.read_all() == b""
        assert client.was_reset


def test_upstream_records_requests(upstream: RawUpstream) -> None:
    with RawClient(upstream.address) as client:
        client.request("POST", "/echo?a=b", "X-Thing: \xe9", body=b"x" * 70000)
        response = client.read_response("POST")
        assert response
        assert response.body == b"70000"
        client.request("PUT", "/echo", "Transfer-Encoding: chunked")
        client.send(b"5\r\nhello\r\n3;x=y\r\nyou\r\n0\r\nX-Trailer: 1\r\n\r\n")
        response = client.read_response("PUT")
        assert response
        assert response.body == b"8"
        client.request("POST", "/echo", body=b"half", length=8)
    eventually(lambda: len(upstream.requests) == 3 and upstream.connections == 0)
    first, second, third = upstream.requests
    assert (first.method, first.target, first.body_length) == ("POST", "/echo?a=b", 70000)
    assert first.header("x-thing") == "\xc3\xa9"
    assert (second.method, second.body_length, second.complete) == ("PUT", 8, True)
    assert (third.body_length, third.complete) == (4, False)
    assert upstream.accepted == 1


def test_upgrade_to_another_protocol(upstream: RawUpstream) -> None:
    with RawClient(upstream.address) as client:
        client.request("GET", "/upgrade", "Connection: Upgrade", f"Upgrade: {UPGRADE}")
        response = client.read_response()
        assert response
        assert response.status == 101
        client.send(b"\x00not HTTP")
        assert client.receive() == b"\x00not HTTP"


def websocket(upstream: RawUpstream, target: str) -> WebSocketClient:
    address = upstream.address
    return WebSocketClient(RawClient(address), f"{upstream.host}:{upstream.port}", target)


def test_websocket_echoes_and_closes(upstream: RawUpstream) -> None:
    with websocket(upstream, "/websocket") as client:
        for message in ("grüezi", b"\x00\xff", "x" * 100_000):
            client.send(message)
            assert client.receive() == message
        client.close(1001)
        assert client.close_code == 1001


def test_upstream_drops_websocket(upstream: RawUpstream) -> None:
    with websocket(upstream, "/websocket-abrupt") as client:
        client.send("one")
        assert [client.receive(), client.receive()] == ["one", None]
        assert client.close_code == 1006


def test_upstream_closes_websocket(upstream: RawUpstream) -> None:
    with websocket(upstream, "/websocket-bye?code=1011") as client:
        client.send("one")
        assert [client.receive(), client.receive()] == ["one", None]
        assert client.close_code == 1011


def test_upstream_rejects_websocket(upstream: RawUpstream) -> None:
    with websocket(upstream, "/status/403") as client:
        assert client.rejected == 403


def test_client_aborts_websocket(upstream: RawUpstream) -> None:
    client = websocket(upstream, "/websocket")
    client.abort()
    eventually(lambda: upstream.connections == 0)


@pytest.mark.parametrize(
    ("kind", "problem"),
    [("good", None), ("wrong-host", "doesn't match|not valid for"), ("expired", "expired")],
)
def test_tls_certificates(tmp_path: Path, kind: Kind, problem: str | None) -> None:
    pem = certificate(tmp_path, kind)
    with RawUpstream(pem) as upstream, RawClient(upstream.address) as client:
        if problem:
            with pytest.raises(ssl.SSLCertVerificationError, match=problem):
                client.start_tls("localhost", pem)
            return
        client.start_tls("localhost", pem)
        client.request("GET", "/ok")
        assert client.read_response()
        assert upstream.url.startswith("https://127.0.0.1:")


def test_client_that_never_starts_tls(tmp_path: Path) -> None:
    pem = certificate(tmp_path)
    with RawUpstream(pem) as upstream, RawClient(upstream.address):
        eventually(lambda: upstream.accepted)
    with RawUpstream(pem) as upstream, RawClient(upstream.address):
        pass


def test_ipv6() -> None:
    with RawUpstream(host="::1") as upstream:
        assert send_request(upstream, "/ok")
        assert upstream.url == f"http://[::1]:{upstream.port}"


# -- the relay ---------------------------------------------------------------------------------


@pytest.fixture
def relay(upstream: RawUpstream) -> Iterator[Relay]:
    with Relay(upstream.address) as running:
        yield running


def fetch_through(relay: Relay, target: str, timeout: float = 10.0) -> Response | None:
    with RawClient(relay.address, timeout) as client:
        client.request("GET", target)
        return client.read_response()


def test_relay_forwards_everything(relay: Relay) -> None:
    response = fetch_through(relay, "/sized?size=5000000")
    assert response
    assert response.body == body(5_000_000)
    closing = fetch_through(relay, "/until-eof?size=70000")
    assert closing
    assert closing.complete
    eventually(lambda: relay.connections == 0)
    assert relay.accepted == 2


def test_relay_forwards_half_close_and_reset(relay: Relay, upstream: RawUpstream) -> None:
    with RawClient(relay.address) as client:
        client.request("GET", "/ok")
        client.half_close()
        assert client.read_response()
    with RawClient(relay.address) as client:
        client.request("GET", "/reset-before-head")
        assert client.read_all() == b""
        assert client.was_reset
    eventually(lambda: upstream.connections == 0)


def test_relay_cut_and_mend(relay: Relay, upstream: RawUpstream) -> None:
    with RawClient(relay.address) as client:
        client.request("GET", "/slow-head")
        eventually(lambda: upstream.requests)
        relay.cut()
        assert client.read_all() == b""
        assert client.was_reset
    with pytest.raises(ConnectionRefusedError):
        RawClient(relay.address)
    relay.mend()
    assert fetch_through(relay, "/ok")


def test_relay_without_a_target_resets() -> None:
    with RawUpstream() as upstream:
        gone = upstream.address
    with Relay(gone) as relay:
        with contextlib.suppress(ConnectionResetError), RawClient(relay.address) as client:
            # The RST can also arrive before `connect` returns; then the client cannot be created.
            assert client.read_all() == b""
            assert client.was_reset
        assert relay.accepted == 1


def test_blackhole_accepts_and_holds_data(relay: Relay, upstream: RawUpstream) -> None:
    with RawClient(relay.address, SHORT_SECONDS) as client:
        client.request("GET", "/ok")
        assert client.read_response()
        relay.blackhole()
        client.request("POST", "/echo", body=b"x" * 20_000_000)  # the relay accepts all of it
        with pytest.raises(TimeoutError):
            client.read_response("POST")
        with RawClient(relay.address, SHORT_SECONDS) as second, pytest.raises(TimeoutError):
            second.receive()
        assert len(upstream.requests) == 1
        relay.mend()
        client._sock.settimeout(10)
        response = client.read_response("POST")
        assert response
        assert response.body == b"20000000"


def test_zero_window_accepts_nothing(relay: Relay) -> None:
    with RawClient(relay.address, SHORT_SECONDS) as client:
        client.request("GET", "/ok")
        assert client.read_response()
        relay.zero_window()
        with pytest.raises(TimeoutError):
            client.request("POST", "/echo", body=b"x" * 20_000_000)
        relay.mend()
    assert fetch_through(relay, "/ok")


def test_delay_adds_latency(relay: Relay) -> None:
    relay.delay(0.2)
    begin = time.monotonic()
    response = fetch_through(relay, "/sized?size=2000000")
    seconds = time.monotonic() - begin
    assert response
    assert response.complete
    assert 0.4 <= seconds < 4


def test_trickle_sends_byte_by_byte(relay: Relay) -> None:
    relay.trickle(0.001)
    with RawClient(relay.address) as client:
        client.request("GET", "/ok", "Connection: close")
        pieces = list(iter(client.receive, b""))
    everything = b"".join(pieces)
    assert everything.endswith(b"\r\n\r\nok\n")
    assert len(pieces) > len(everything) / 2


@pytest.mark.parametrize("size", [0, 1, 50, 70_000])
def test_cut_after_bytes(relay: Relay, size: int) -> None:
    relay.cut_after("to_client", size)
    with RawClient(relay.address) as client:
        client.request("GET", "/sized?size=100000")
        assert len(client.read_all()) == size
        assert client.was_reset
    assert relay.struck
    assert fetch_through(relay, "/ok"), "the relay cuts only once"


def test_cut_during_upload(relay: Relay, upstream: RawUpstream) -> None:
    head = b"POST /echo HTTP/1.1\r\nContent-Length: 1000\r\n\r\n"
    relay.cut_after("to_server", len(head) + 10)
    with RawClient(relay.address) as client:
        client.send(head + b"x" * 1000)
        assert client.read_all() == b""
    eventually(lambda: upstream.requests and upstream.connections == 0)
    assert upstream.requests[0].body_length == 10


# -- PostgreSQL messages -----------------------------------------------------------------------

STARTUP = struct.pack("!ii", 8, 3 << 16)
SSL_REQUEST = struct.pack("!ii", 8, 80877103)


def encode_message(letter: str, data: bytes = b"") -> bytes:
    """Return a PostgreSQL protocol message."""
    return letter.encode() + struct.pack("!i", len(data) + 4) + data


class Listener:
    """The target of a relay; the test itself acts as the server."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "socket"
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self.path))
        self._listener.listen()

    def accept(self) -> socket.socket:
        """Accept the relay's next connection."""
        self._listener.settimeout(10)
        server, _ = self._listener.accept()
        server.settimeout(SHORT_SECONDS)
        return server

    def close(self) -> None:
        """Stop listening."""
        self._listener.close()


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[Listener]:
    running = Listener(tmp_path)
    yield running
    running.close()


@pytest.fixture
def postgres_relay(listener: Listener) -> Iterator[Relay]:
    with Relay(listener.path, postgres=True) as running:
        yield running


def read_exactly(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size and (more := sock.recv(size - len(data))):
        data += more
    return data


def test_relay_recognizes_postgres_messages(postgres_relay: Relay, listener: Listener) -> None:
    with RawClient(postgres_relay.address) as client, listener.accept() as server:
        for sent in (SSL_REQUEST, STARTUP):
            client.send(sent[:3])
            client.send(sent[3:])
            assert read_exactly(server, 8) == sent
            server.sendall(b"N" if sent is SSL_REQUEST else encode_message("R", b"\0\0\0\0"))
            assert client.receive()
        query = encode_message("Q", b"SELECT 1\0") + encode_message("d", b"x" * 100_000)
        client.send(query)
        assert read_exactly(server, len(query)) == query
        server.sendall(encode_message("C") + encode_message("Z", b"I"))
        eventually(lambda: postgres_relay.seen["to_client"][-1] == "Z")
    assert postgres_relay.seen["to_server"] == ["sslrequest", "startup", "Q", "d"]
    assert postgres_relay.seen["to_client"] == ["answer:N", "R", "C", "Z"]


def test_encrypted_messages_are_forwarded_unparsed(
    postgres_relay: Relay, listener: Listener
) -> None:
    with RawClient(postgres_relay.address) as client, listener.accept() as server:
        client.send(SSL_REQUEST)
        assert read_exactly(server, 8) == SSL_REQUEST
        server.sendall(b"S")
        assert client.receive() == b"S"
        client.send(b"\x16\x03\x01")
        assert read_exactly(server, 3) == b"\x16\x03\x01"
    assert postgres_relay.seen["to_server"] == ["sslrequest", "encrypted"]


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("index", [0, 1, 2])
def test_cut_at_a_message(
    postgres_relay: Relay, listener: Listener, index: int, inside: bool
) -> None:
    messages = [STARTUP, encode_message("Q", b"SELECT 1\0"), encode_message("d", b"x" * 10_000)]
    postgres_relay.cut_at_message("to_server", index, inside=inside)
    with RawClient(postgres_relay.address) as client, listener.accept() as server:
        client.send(b"".join(messages))
        complete = b"".join(messages[:index])
        half = messages[index][: len(messages[index]) // 2] if inside else b""
        assert read_exactly(server, 20_000) == complete + half
        assert client.read_all() == b""
        assert client.was_reset


def test_cut_at_a_reply(postgres_relay: Relay, listener: Listener) -> None:
    with RawClient(postgres_relay.address) as client, listener.accept() as server:
        client.send(STARTUP)
        read_exactly(server, 8)
        server.sendall(encode_message("R"))
        assert client.receive() == encode_message("R")
        postgres_relay.cut_at_message("to_client", 1)
        server.sendall(encode_message("C") + encode_message("Z"))
        assert client.read_all() == encode_message("C")


def test_relay_swallows_messages(postgres_relay: Relay, listener: Listener) -> None:
    with RawClient(postgres_relay.address, SHORT_SECONDS) as client, listener.accept() as server:
        postgres_relay.swallow_from_message("to_client", 1)
        server.sendall(encode_message("C") + encode_message("Z") + encode_message("N"))
        assert client.receive() == encode_message("C")
        with pytest.raises(TimeoutError):
            client.receive()
        client.send(STARTUP)
        assert read_exactly(server, 8) == STARTUP
        server.sendall(encode_message("Z"))
        with pytest.raises(TimeoutError):
            client.receive()


# -- the proxy ---------------------------------------------------------------------------------

HTTP2_TO_HTTP1 = ["connection_strategy=lazy", "upstream_cert=false"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("proxy")  # shared, so that the authority is created only once


def test_proxy_runs_scripts_and_stops(folder: Path, upstream: RawUpstream) -> None:
    scripts = [folder / "one.py", folder / "two.py"]
    for script in scripts:
        script.write_text(
            "import os\n"
            "def response(flow):\n"
            f"    print('{script.stem}', flow.response.status_code, os.environ['WORD'])\n"
        )
    with Mitm(folder, "--set", "body_size_limit=1m", scripts=scripts, env={"WORD": "x"}) as proxy:
        response = fetch(proxy.address, f"{upstream.url}/ok")
        assert response
        assert response.body == b"ok\n"
        assert proxy.url == f"http://127.0.0.1:{proxy.port}"
        eventually(lambda: "one 200 x" in proxy.output() and "two 200 x" in proxy.output())
        assert proxy.terminate() == 0
        assert not psutil.pid_exists(proxy.pid)


def test_proxy_that_fails_to_start_raises_its_output(folder: Path) -> None:
    with pytest.raises(RuntimeError, match="no-such-option"), Mitm(folder, "--no-such-option"):
        pass


def test_proxy_reads_files_without_listening(folder: Path) -> None:
    (folder / "none.flows").write_bytes(b"")
    with Mitm(folder, "-n", "-r", "none.flows", listens=False) as proxy:
        assert proxy.wait() == 0


def test_mitmweb_has_a_url_with_token(folder: Path, upstream: RawUpstream) -> None:
    with Mitm(folder, program="mitmweb") as proxy:
        assert fetch(proxy.address, f"{upstream.url}/ok")
        assert "?token=" in proxy.web_url


def test_killed_proxy_and_cleartext_http2(folder: Path, upstream: RawUpstream) -> None:
    with Mitm(folder, "--mode", f"reverse:{upstream.url}@0") as proxy:
        with Http2Client(RawClient(proxy.address), "localhost", "http") as client:
            assert client.wait(client.request("/ok"))[0].status is None
            assert client.closed, "mitmproxy now supports HTTP/2 without TLS"
        proxy.kill()
        assert proxy.terminate() == -9


@pytest.fixture(scope="module")
def pem(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return certificate(tmp_path_factory.mktemp("server"))


@pytest.fixture(scope="module")
def proxy(folder: Path, pem: Path) -> Iterator[Mitm]:
    values = [f"ssl_verify_upstream_trusted_ca={pem}", "stream_large_bodies=1", *HTTP2_TO_HTTP1]
    with Mitm(folder, *(part for value in values for part in ("--set", value))) as running:
        yield running


def test_https_through_the_proxy(proxy: Mitm, pem: Path) -> None:
    with RawUpstream(pem) as upstream:
        url = f"{upstream.url}/sized?size=7"
        response = fetch(proxy.address, url, ca=proxy.ca_path)
        assert response
        assert response.body == body(7)
        with pytest.raises(ssl.SSLCertVerificationError):
            fetch(proxy.address, url)
        assert [arrival.target for arrival in upstream.requests] == ["/sized?size=7"]


def test_http2_through_the_proxy(proxy: Mitm, pem: Path) -> None:
    with (
        RawUpstream(pem) as upstream,
        Http2Client.through(proxy.address, *upstream.address, proxy.ca_path) as client,
    ):
        slow = client.request("/slow-head")
        sized = client.request("/sized?size=300000")
        upload = client.request("/echo", method="POST", body=b"x" * 300_000)
        one, two = client.wait(sized, upload)
        assert (one.status, one.body == body(300_000), two.body) == (200, True, b"300000")
        client.reset(slow)
        assert not client.streams[slow].ended
        assert client.wait(client.request("/status/599"))[0].status == 599
        client.goaway()
        client.raw.read_all()


def test_websocket_through_the_proxy(proxy: Mitm, upstream: RawUpstream) -> None:
    host = f"{upstream.host}:{upstream.port}"
    raw = RawClient(proxy.address)
    with WebSocketClient(raw, host, f"http://{host}/websocket") as client:
        client.send("through")
        assert client.receive() == "through"
        client.close()
        assert client.close_code == 1000


def test_client_disconnects_during_upload(proxy: Mitm, upstream: RawUpstream) -> None:
    with RawClient(proxy.address) as client:
        client.request("POST", f"{upstream.url}/echo", body=b"x" * 10, length=1000)
        eventually(lambda: upstream.requests and upstream.requests[0].body_length == 10)
    eventually(lambda: upstream.connections == 0)
    assert not upstream.requests[0].complete


def test_client_resets_while_waiting(proxy: Mitm, upstream: RawUpstream) -> None:
    client = RawClient(proxy.address)
    client.request("GET", f"{upstream.url}/slow-head")
    eventually(lambda: upstream.requests)
    client.reset()
    eventually(lambda: "Client disconnected." in proxy.output())


def test_process_ends_with_the_block(folder: Path) -> None:
    with Mitm(folder, "-n", listens=False) as proxy:
        process = psutil.Process(proxy.pid)
    assert not process.is_running()
