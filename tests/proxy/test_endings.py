"""However a flow ends on the wire, there is one row, and it says what the client really got."""

from __future__ import annotations

import asyncio
import ssl
from typing import TYPE_CHECKING

import pytest

from tests.support.access_log import SCRIPT, Row
from tests.support.certificates import Kind, certificate
from tests.support.endings import UPGRADE, gzipped
from tests.support.fault_addon import fault_addons
from tests.support.logged_proxy import Ending, LoggedProxy, logged_proxy
from tests.support.proxy import free_port
from tests.support.socket_server import SocketServer
from tests.support.upstream import RawUpstream
from tests.support.wait import eventually
from tests.support.websocket_client import WebSocketClient

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator

    from tests.support.http1_client import RawClient, Response
    from tests.support.postgres import Postgres


@pytest.fixture(scope="module")
def upstream() -> Iterator[RawUpstream]:
    with RawUpstream() as running:
        yield running


@pytest.fixture(scope="module")
def proxied(postgres: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoggedProxy]:
    """A proxy that buffers bodies, between two addons that meddle."""
    folder = tmp_path_factory.mktemp("plain")
    (folder / "mapped.txt").write_text("from a file\n")
    with logged_proxy(
        postgres,
        folder,
        *("--map-local", f"|/mapped|{folder / 'mapped.txt'}"),
        *("--set", "block_list=:~u /blocked-444:444"),
        *("--set", "block_list=:~u /blocked-451:451"),
        *("--modify-body", "/~u modify-me/ok/changed by modify_body"),
        *("--set", "connection_strategy=lazy"),
        scripts=fault_addons(folder, SCRIPT),
    ) as running:
        yield running


@pytest.fixture(scope="module")
def streaming(
    postgres: Postgres, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LoggedProxy]:
    """A proxy that streams whatever is longer than 10 bytes."""
    folder = tmp_path_factory.mktemp("streaming")
    scripts = fault_addons(folder, SCRIPT)
    with logged_proxy(
        postgres, folder, "--set", "stream_large_bodies=10", scripts=scripts
    ) as running:
        yield running


@pytest.fixture(scope="module")
def limited(postgres: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoggedProxy]:
    """A proxy that accepts only small bodies."""
    folder = tmp_path_factory.mktemp("limited")
    options = ("--set", "body_size_limit=5k", "--set", "connection_strategy=lazy")
    with logged_proxy(postgres, folder, *options) as running:
        yield running


@pytest.fixture(scope="module")
def impatient(
    postgres: Postgres, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LoggedProxy]:
    """A proxy with a short inactivity timeout."""
    folder = tmp_path_factory.mktemp("impatient")
    options = ("--set", "tcp_timeout=1", "--set", "connection_strategy=lazy")
    with logged_proxy(postgres, folder, *options) as running:
        yield running


@pytest.fixture(scope="module", params=["plain", "streaming"])
def either(
    request: pytest.FixtureRequest, proxied: LoggedProxy, streaming: LoggedProxy
) -> LoggedProxy:
    """Each of the two in turn."""
    return proxied if request.param == "plain" else streaming


def ask(
    proxied: LoggedProxy, url: str, *headers: str, method: str = "GET", body: bytes = b""
) -> tuple[Response | None, Row]:
    """Send one request on a connection of its own; what came back, and the one row of it."""
    agent = proxied.new_agent()
    with proxied.client() as client:
        client.request(method, url, f"User-Agent: {agent}", *headers, body=body)
        response = client.read_response(method)
        row = proxied.row_for_agent(agent)
    return response, row


def same(response: Response | None, row: Row) -> None:
    """The row says what the client got: this status, this much of the body."""
    assert row["status_code"] == (response.status if response else None)
    if response is not None and row["response_source"] is not None:
        assert row["response_bytes"] == len(response.body)


# -- well --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "status", "size"),
    [
        ("GET", "/ok", 200, 3),
        ("HEAD", "/head", 200, 0),
        ("GET", "/204", 204, 0),
        ("GET", "/304", 304, 0),
        ("GET", "/sized?size=70000", 200, 70000),
        ("GET", "/gzip?size=50000", 200, len(gzipped(50000))),
        ("GET", "/chunked?size=40000", 200, 40000),
        ("GET", "/until-eof?size=40000", 200, 40000),
        ("GET", "/redirect", 302, 11),
        ("GET", "/status/599", 599, 4),
        ("GET", "/status/999", 999, 4),
        ("M-SEARCH", "/ok", 200, 3),
    ],
)
def test_a_response_that_ends_well(
    either: LoggedProxy,
    upstream: RawUpstream,
    method: str,
    path: str,
    status: int,
    size: int,
) -> None:
    response, row = ask(either, upstream.url + path, method=method)
    assert Ending.from_row(row) == (status, None, 0, size, "upstream")
    assert row["error"] is None
    assert row["duration_ms"] >= row["ttfb_ms"] >= 0
    same(response, row)


@pytest.mark.parametrize("size", [5, 100_000])
def test_an_upload(either: LoggedProxy, upstream: RawUpstream, size: int) -> None:
    response, row = ask(either, f"{upstream.url}/echo", method="POST", body=b"x" * size)
    assert response
    assert int(response.body) == size
    assert Ending.from_row(row) == (200, None, size, len(response.body), "upstream")


def test_an_upload_in_chunks(either: LoggedProxy, upstream: RawUpstream) -> None:
    agent = either.new_agent()
    with either.client() as client:
        url = f"{upstream.url}/echo"
        client.request("POST", url, f"User-Agent: {agent}", "Transfer-Encoding: chunked")
        for _ in range(50):
            client.send(b"3e8\r\n" + b"y" * 1000 + b"\r\n")
        client.send(b"0\r\n\r\n")
        response = client.read_response()
        assert response
        assert response.body == b"50000"
        assert Ending.from_row(either.row_for_agent(agent)) == (200, None, 50000, 5, "upstream")


def test_requests_on_one_connection(proxied: LoggedProxy, upstream: RawUpstream) -> None:
    agent = proxied.new_agent()
    with proxied.client() as client:
        for _ in range(3):
            client.request("GET", f"{upstream.url}/ok", f"User-Agent: {agent}")
            assert client.read_response()
        rows = proxied.wait_rows(3, "user_agent = %s", agent)
    assert [row["connect_ms"] is None for row in rows] == [False, True, True]


# -- upstream fails ------------------------------------------------------------------------------


def test_upstream_refuses_the_connection(proxied: LoggedProxy) -> None:
    response, row = ask(proxied, f"http://127.0.0.1:{free_port()}/")
    assert Ending.from_row(row) == (502, "connect", 0, None, None)
    same(response, row)


def test_a_name_that_does_not_exist(proxied: LoggedProxy) -> None:
    response, row = ask(proxied, "http://nothing.invalid/")
    assert Ending.from_row(row) == (502, "dns", 0, None, None)
    same(response, row)


@pytest.mark.parametrize(
    ("path", "error_type", "size"),
    [
        ("/close-before-head", "upstream_closed", None),
        ("/reset-before-head", "upstream_closed", None),
        ("/close-in-head", "upstream_closed", None),
        ("/close-after-head", "upstream_closed", 0),
        ("/cut-sized", "upstream_closed", 100),
        ("/cut-chunked", "upstream_closed", 1500),
        ("/garbage", "protocol", None),
        ("/bad-chunk", "protocol", None),
        ("/cl-and-te", "protocol", None),
        ("/two-lengths", "protocol", None),
    ],
)
def test_an_upstream_that_fails(
    either: LoggedProxy,
    upstream: RawUpstream,
    path: str,
    error_type: str,
    size: int | None,
) -> None:
    streams = "streaming" in str(either.proxy.folder)
    response, row = ask(either, upstream.url + path)
    same(response, row)
    assert row["error_type"] == error_type, row
    assert row["error"]
    if streams and size is not None:
        assert Ending.from_row(row) == (200, error_type, 0, size, "upstream")
    else:
        assert Ending.from_row(row) == (502, error_type, 0, None, None)


def test_trailers_that_mitmproxy_cannot_pass_on(
    proxied: LoggedProxy, upstream: RawUpstream
) -> None:
    agent = proxied.new_agent()
    with proxied.client() as client:
        client.request("GET", f"{upstream.url}/trailers", f"User-Agent: {agent}")
        eventually(lambda: "HTTP trailers are not implemented" in proxied.proxy.output())
    assert Ending.from_row(proxied.row_for_agent(agent)) == (
        None,
        "client_disconnected",
        0,
        None,
        None,
    )


@pytest.mark.parametrize("path", ["/slow-head", "/slow-body"])
def test_an_upstream_that_says_nothing_for_too_long(
    impatient: LoggedProxy, upstream: RawUpstream, path: str
) -> None:
    upstream.hold()
    response, row = ask(impatient, upstream.url + path)
    assert response is None
    assert Ending.from_row(row) == (None, "upstream_timeout", 0, None, None)
    upstream.release()


# The upstream closes: mitmproxy sometimes keeps its connection open after a body that is too large.
@pytest.mark.parametrize(
    ("path", "agrees"),
    [
        ("/sized?close&size=6000", False),
        ("/chunked?close&size=9000", False),
        ("/sized?close&size=5000", True),
    ],
)
def test_a_response_over_the_limit(
    limited: LoggedProxy, upstream: RawUpstream, path: str, agrees: bool
) -> None:
    response, row = ask(limited, upstream.url + path)
    same(response, row)
    expected = (200, None, 0, 5000, "upstream") if agrees else (502, "too_large", 0, None, None)
    assert Ending.from_row(row) == expected


def test_an_upload_over_the_limit(limited: LoggedProxy, upstream: RawUpstream) -> None:
    response, row = ask(limited, f"{upstream.url}/echo", method="POST", body=b"x" * 6000)
    same(response, row)
    assert Ending.from_row(row) == (413, "too_large", None, None, None)


# -- TLS to upstream ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def secure(postgres: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoggedProxy]:
    """A proxy that trusts one upstream certificate."""
    folder = tmp_path_factory.mktemp("secure")
    trusted = certificate(folder)
    options = ("--set", f"ssl_verify_upstream_trusted_ca={trusted}")
    with logged_proxy(postgres, folder, *options, scripts=fault_addons(folder, SCRIPT)) as running:
        yield running


@pytest.fixture(scope="module")
def https(secure: LoggedProxy) -> Iterator[RawUpstream]:
    with RawUpstream(secure.proxy.folder / "good.pem") as running:
        yield running


def ask_inside(
    proxied: LoggedProxy, upstream: RawUpstream | Plain, path: str, *headers: str
) -> tuple[Response | None, Row]:
    """Send one request through a tunnel of its own."""
    agent = proxied.new_agent()
    with proxied.client() as client:
        opened = client.connect("localhost", upstream.port)
        assert opened
        assert opened.status == 200
        client.start_tls("localhost", proxied.proxy.ca_path)
        client.request(
            "GET", path, f"User-Agent: {agent}", f"Host: localhost:{upstream.port}", *headers
        )
        response = client.read_response()
        row = proxied.row_for_agent(agent)
    return response, row


def test_a_request_in_a_tunnel(secure: LoggedProxy, https: RawUpstream) -> None:
    response, row = ask_inside(secure, https, "/sized?size=12345")
    assert Ending.from_row(row) == (200, None, 0, 12345, "upstream")
    assert (row["scheme"], row["host"], row["port"]) == ("https", "localhost", https.port)
    assert row["tls_version"] == "TLSv1.3"
    assert row["connect_ms"] > 0
    same(response, row)


@pytest.mark.parametrize("kind", ["wrong-host", "expired"])
def test_a_bad_certificate(secure: LoggedProxy, kind: Kind) -> None:
    with RawUpstream(certificate(secure.proxy.folder, kind)) as bad:
        response, row = ask_inside(secure, bad, "/ok")
    same(response, row)
    assert Ending.from_row(row) == (502, "tls_upstream", 0, None, None)


class Plain(SocketServer):
    """Answers whatever comes in plain text."""

    @property
    def port(self) -> int:
        """Where it listens."""
        return self.address[1]

    async def _serve(self, client: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        await loop.sock_recv(client, 10000)
        await loop.sock_sendall(client, b"HTTP/1.1 400 Bad Request\r\n\r\n")
        client.close()


def test_an_upstream_that_speaks_no_tls(secure: LoggedProxy) -> None:
    with Plain() as plain:
        response, row = ask_inside(secure, plain, "/ok")
    same(response, row)
    assert Ending.from_row(row) == (502, "tls_upstream", 0, None, None)


# -- the client goes ---------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["close", "reset"])
def test_a_client_that_leaves_while_it_waits(
    either: LoggedProxy, upstream: RawUpstream, end: str
) -> None:
    upstream.hold()
    agent, before = either.new_agent(), len(upstream.requests)
    with either.client() as client:
        client.request("GET", f"{upstream.url}/slow-head", f"User-Agent: {agent}")
        eventually(lambda: len(upstream.requests) > before)
        getattr(client, end)()
        row = either.row_for_agent(agent)
    assert Ending.from_row(row) == (None, "client_disconnected", 0, None, None)
    upstream.release()


@pytest.mark.parametrize("path", ["/slow-body?size=20000", "/slow-chunked?size=20000"])
def test_a_client_that_leaves_in_a_response(
    either: LoggedProxy, upstream: RawUpstream, path: str
) -> None:
    upstream.hold()
    streams = "streaming" in str(either.proxy.folder)
    agent, before = either.new_agent(), len(upstream.requests)
    half = 10000 if "body" in path else 20000
    with either.client() as client:
        client.request("GET", upstream.url + path, f"User-Agent: {agent}")
        eventually(lambda: len(upstream.requests) > before)
        got = b""
        while streams and len(got.partition(b"\r\n\r\n")[2]) < half:
            got += client.receive()
        client.close()
        row = either.row_for_agent(agent)
    if streams:
        assert Ending.from_row(row) == (200, "client_disconnected", 0, half, "upstream")
    else:
        assert Ending.from_row(row) == (None, "client_disconnected", 0, None, None)
    upstream.release()


def test_a_client_that_leaves_in_an_upload(either: LoggedProxy, upstream: RawUpstream) -> None:
    streams = "streaming" in str(either.proxy.folder)
    agent, before = either.new_agent(), len(upstream.requests)
    with either.client() as client:
        client.request(
            "POST", f"{upstream.url}/echo", f"User-Agent: {agent}", body=b"z" * 3000, length=9000
        )
        eventually(lambda: not streams or len(upstream.requests) > before)
        eventually(lambda: not streams or upstream.requests[-1].body_length == 3000)
        client.close()
        row = either.row_for_agent(agent)
    assert Ending.from_row(row) == (
        None,
        "client_disconnected",
        3000 if streams else None,
        None,
        None,
    )


def test_an_answer_before_the_upload_is_over(streaming: LoggedProxy, upstream: RawUpstream) -> None:
    agent = streaming.new_agent()
    with streaming.client() as client:
        url = f"{upstream.url}/early-413"
        client.request("POST", url, f"User-Agent: {agent}", body=b"z" * 3000, length=9000)
        response = client.read_response()
        assert response
        assert response.status == 413
        client.close()
        row = streaming.row_for_agent(agent)
    assert Ending.from_row(row)[:2] == (413, None)
    assert Ending.from_row(row)[3:] == (10, "upstream")
    assert row["request_bytes"] == 3000


def test_an_upstream_gone_in_an_upload(streaming: LoggedProxy, upstream: RawUpstream) -> None:
    upstream.release()
    agent = streaming.new_agent()
    with streaming.client() as client:
        url = f"{upstream.url}/reset-in-upload"
        client.request("POST", url, f"User-Agent: {agent}", body=b"z" * 3000, length=9000)
        response = client.read_response()
        row = streaming.row_for_agent(agent)
    same(response, row)
    assert Ending.from_row(row) == (502, "upstream_closed", 3000, None, None)


@pytest.mark.parametrize(
    ("lines", "status"),
    [
        (("Content-Length: 5", "Transfer-Encoding: chunked"), 400),
        (("Content-Length: five",), 400),
        (("Content-Length: 5", "Content-Length: 7"), 400),
    ],
)
def test_a_request_mitmproxy_refuses(
    proxied: LoggedProxy, upstream: RawUpstream, lines: tuple[str, ...], status: int
) -> None:
    response, row = ask(proxied, f"{upstream.url}/echo", *lines, method="POST")
    assert response
    assert response.status == status
    assert Ending.from_row(row) == (status, "protocol", None, None, None)


# -- other addons ------------------------------------------------------------------------------

HOOKS = ("requestheaders", "request", "responseheaders", "response")


@pytest.mark.parametrize("who", ["X-Fault", "X-Fault-Late"])
@pytest.mark.parametrize("hook", HOOKS)
def test_killed_by_another_addon(
    either: LoggedProxy, upstream: RawUpstream, who: str, hook: str
) -> None:
    response, row = ask(either, f"{upstream.url}/sized?size=2000", f"{who}: {hook} kill")
    if "streaming" in str(either.proxy.folder) and hook == "response":
        # all of it had gone out before; only the connection ends early
        assert response
        assert Ending.from_row(row) == (200, "killed", 0, 2000, "upstream")
    else:
        assert response is None
        assert row["request_bytes"] in (0, None)
        assert Ending.from_row(row)[:2] == (None, "killed")
        assert Ending.from_row(row)[3:] == (None, None)


@pytest.mark.parametrize("who", ["X-Fault", "X-Fault-Late"])
@pytest.mark.parametrize("hook", HOOKS[:2])
def test_answered_by_another_addon(
    either: LoggedProxy, upstream: RawUpstream, who: str, hook: str
) -> None:
    response, row = ask(either, f"{upstream.url}/ok", f"{who}: {hook} answer")
    same(response, row)
    assert Ending.from_row(row) == (403, None, 0, 9, "addon")
    assert row["server_ip"] is None


@pytest.mark.parametrize("who", ["X-Fault", "X-Fault-Late"])
def test_changed_by_another_addon(proxied: LoggedProxy, upstream: RawUpstream, who: str) -> None:
    response, row = ask(proxied, f"{upstream.url}/ok", f"{who}: response change")
    same(response, row)
    assert Ending.from_row(row) == (299, None, 0, 4321, "upstream")


@pytest.mark.parametrize("who", ["X-Fault", "X-Fault-Late"])
@pytest.mark.parametrize(("deed", "size"), [("stream", 2000), ("double", 4000)])
@pytest.mark.parametrize("path", ["/sized?size=2000", "/cut-sized?size=9000&sent=2000"])
def test_streamed_by_another_addon(
    proxied: LoggedProxy, upstream: RawUpstream, who: str, deed: str, size: int, path: str
) -> None:
    response, row = ask(proxied, upstream.url + path, f"{who}: responseheaders {deed}")
    same(response, row)
    assert Ending.from_row(row) == (
        200,
        "upstream_closed" if "cut" in path else None,
        0,
        size,
        "upstream",
    )


def test_modify_body(proxied: LoggedProxy, upstream: RawUpstream) -> None:
    response, row = ask(proxied, f"{upstream.url}/ok?modify-me")
    same(response, row)
    assert Ending.from_row(row) == (200, None, 0, len("changed by modify_body\n"), "upstream")


@pytest.mark.parametrize(
    ("url", "facts"),
    [
        ("http://any.invalid/mapped", (200, None, 0, 12, "addon")),
        ("http://any.invalid/blocked-451", (451, None, 0, 0, "addon")),
        ("http://any.invalid/blocked-444", (None, "killed", 0, None, None)),
    ],
)
def test_answered_by_an_option(proxied: LoggedProxy, url: str, facts: Ending) -> None:
    response, row = ask(proxied, url)
    same(response, row)
    assert Ending.from_row(row) == facts


def test_the_page_of_mitmproxy(proxied: LoggedProxy) -> None:
    response, row = ask(proxied, "http://mitm.it/")
    assert response
    assert response.status == 200
    same(response, row)
    assert (row["host"], row["response_source"]) == ("mitm.it", "addon")


# -- other protocols ---------------------------------------------------------------------------


def open_websocket(upstream: RawUpstream, path: str, client: RawClient) -> WebSocketClient:
    return WebSocketClient(client, f"127.0.0.1:{upstream.port}", upstream.url + path)


def test_a_websocket(proxied: LoggedProxy, upstream: RawUpstream) -> None:
    with proxied.client() as client:
        websocket = open_websocket(upstream, "/websocket", client)
        for message in ("one", b"\x00" * 5000, "\N{SNOWMAN}"):
            websocket.send(message)
            assert websocket.receive() == message
        assert not proxied.rows("path = '/websocket'")
        websocket.close()
        row = proxied.wait_row("path = '/websocket'")
    assert Ending.from_row(row) == (101, None, 5006, 5006, "upstream")
    assert row["error"] is None
    assert row["duration_ms"] > row["ttfb_ms"]


def test_a_websocket_that_is_left(proxied: LoggedProxy, upstream: RawUpstream) -> None:
    with proxied.client() as client:
        websocket = open_websocket(upstream, "/websocket?left", client)
        websocket.send("one")
        assert websocket.receive() == "one"
        websocket.abort()
        row = proxied.wait_row("path = '/websocket' AND query IS NOT NULL")
    assert Ending.from_row(row) == (101, "client_disconnected", 3, 3, "upstream")
    assert "1006" in row["error"]


def test_a_websocket_that_upstream_drops(proxied: LoggedProxy, upstream: RawUpstream) -> None:
    with proxied.client() as client:
        websocket = open_websocket(upstream, "/websocket-abrupt", client)
        websocket.send("one")
        assert websocket.receive() == "one"
        assert websocket.receive() is None
        row = proxied.wait_row("path = '/websocket-abrupt'")
    assert Ending.from_row(row) == (101, "upstream_closed", 3, 3, "upstream")
    assert "1006" in row["error"]


@pytest.mark.parametrize(
    ("code", "error_type"),
    [(1000, None), (1001, None), (1011, "upstream_closed"), (4001, "upstream_closed")],
)
def test_a_websocket_closed_with_a_code(
    proxied: LoggedProxy, upstream: RawUpstream, code: int, error_type: str | None
) -> None:
    with proxied.client() as client:
        websocket = open_websocket(upstream, f"/websocket-bye?code={code}&n{code}=", client)
        websocket.send("one")
        assert websocket.receive() == "one"
        assert websocket.receive() is None
        assert websocket.close_code == code
        row = proxied.wait_row("path = '/websocket-bye' AND strpos(query, %s) > 0", f"n{code}=")
    assert Ending.from_row(row) == (101, error_type, 3, 3, "upstream")
    assert (str(code) in (row["error"] or "")) == (error_type is not None)


def test_a_websocket_that_is_refused(proxied: LoggedProxy, upstream: RawUpstream) -> None:
    with proxied.client() as client:
        websocket = open_websocket(upstream, "/status/418", client)
        assert websocket.rejected == 418
        row = proxied.wait_row("path = '/status/418'")
    assert Ending.from_row(row) == (418, None, 0, 4, "upstream")


def test_another_protocol(proxied: LoggedProxy, upstream: RawUpstream) -> None:
    agent = proxied.new_agent()
    with proxied.client() as client:
        client.request(
            "GET",
            f"{upstream.url}/upgrade",
            "Connection: Upgrade",
            f"Upgrade: {UPGRADE}",
            f"User-Agent: {agent}",
        )
        response = client.read_response()
        assert response
        assert response.status == 101
        client.send(b"echo")
        assert client.receive() == b"echo"
    assert Ending.from_row(proxied.row_for_agent(agent)) == (101, None, 0, None, "upstream")


# -- CONNECT -----------------------------------------------------------------------------------


def connect(
    proxied: LoggedProxy, host: str, port: int, *headers: str
) -> tuple[Response | None, Row]:
    """Ask for a tunnel, and leave."""
    agent = proxied.new_agent()
    with proxied.client() as client:
        response = client.connect(host, port, f"User-Agent: {agent}", *headers)
    return response, proxied.row_for_agent(agent)


def test_a_tunnel_to_nowhere(secure: LoggedProxy) -> None:
    response, row = connect(secure, "127.0.0.1", free_port())
    assert response
    assert response.status == 502
    assert Ending.from_row(row)[:2] == (502, "connect")
    assert (row["method"], row["path"], row["response_source"]) == ("CONNECT", None, "addon")
    same(response, row)


def test_a_tunnel_an_addon_refuses(secure: LoggedProxy, https: RawUpstream) -> None:
    response, row = connect(secure, "localhost", https.port, "X-Fault-Late: http_connect answer")
    assert Ending.from_row(row) == (403, None, None, 9, "addon")
    same(response, row)


@pytest.mark.parametrize("who", ["X-Fault", "X-Fault-Late"])
def test_a_tunnel_an_addon_kills(secure: LoggedProxy, https: RawUpstream, who: str) -> None:
    response, row = connect(secure, "localhost", https.port, f"{who}: http_connect kill")
    assert response is None
    assert Ending.from_row(row) == (None, "killed", None, None, None)


def test_a_tunnel_nobody_uses(secure: LoggedProxy, https: RawUpstream) -> None:
    response, row = connect(secure, "localhost", https.port)
    assert response
    assert Ending.from_row(row) == (200, None, None, None, "upstream")
    assert (row["method"], row["host"], row["port"]) == ("CONNECT", "localhost", https.port)


def test_a_client_that_does_not_trust_us(secure: LoggedProxy, https: RawUpstream) -> None:
    with secure.client() as client:
        assert client.connect("127.0.0.1", https.port)
        with pytest.raises(ssl.SSLError):
            client.start_tls("localhost")
    row = secure.wait_row("error_type = 'tls_client'")
    assert Ending.from_row(row) == (None, "tls_client", None, None, None)
    assert (row["host"], row["port"], row["method"], row["scheme"]) == (
        "localhost",
        https.port,
        None,
        "https",
    )
    assert row["error"]
