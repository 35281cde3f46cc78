"""Every way a flow can end produces one row with what the client received."""

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
def buffering(
    postgres: Postgres, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LoggedProxy]:
    """Run a proxy that buffers bodies, with a fault addon before and after artifactapi."""
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
    """Run a proxy that streams bodies longer than 10 bytes."""
    folder = tmp_path_factory.mktemp("streaming")
    scripts = fault_addons(folder, SCRIPT)
    with logged_proxy(
        postgres, folder, "--set", "stream_large_bodies=10", scripts=scripts
    ) as running:
        yield running


@pytest.fixture(scope="module")
def limited(postgres: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoggedProxy]:
    """Run a proxy that rejects bodies over 5 KiB."""
    folder = tmp_path_factory.mktemp("limited")
    options = ("--set", "body_size_limit=5k", "--set", "connection_strategy=lazy")
    with logged_proxy(postgres, folder, *options) as running:
        yield running


@pytest.fixture(scope="module")
def short_timeout(
    postgres: Postgres, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LoggedProxy]:
    """Run a proxy with an inactivity timeout of one second."""
    folder = tmp_path_factory.mktemp("short_timeout")
    options = ("--set", "tcp_timeout=1", "--set", "connection_strategy=lazy")
    with logged_proxy(postgres, folder, *options) as running:
        yield running


@pytest.fixture(scope="module", params=["plain", "streaming"])
def proxied(
    request: pytest.FixtureRequest, buffering: LoggedProxy, streaming: LoggedProxy
) -> LoggedProxy:
    """Run the test with each of the two proxies."""
    return buffering if request.param == "plain" else streaming


def assert_row_matches(response: Response | None, row: Row) -> None:
    """Check that the row has the status and the body size that the client received."""
    assert row["status_code"] == (response.status if response else None)
    if response is not None and row["response_source"] is not None:
        assert row["response_bytes"] == len(response.body)


# -- complete responses ------------------------------------------------------------------------


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
def test_complete_responses(
    proxied: LoggedProxy,
    upstream: RawUpstream,
    method: str,
    path: str,
    status: int,
    size: int,
) -> None:
    response, row = proxied.send_request(upstream.url + path, method=method)
    assert Ending.from_row(row) == (status, None, 0, size, "upstream")
    assert row["error"] is None
    assert row["duration_ms"] >= row["ttfb_ms"] >= 0
    assert_row_matches(response, row)


@pytest.mark.parametrize("size", [5, 100_000])
def test_upload_size_is_logged(proxied: LoggedProxy, upstream: RawUpstream, size: int) -> None:
    response, row = proxied.send_request(f"{upstream.url}/echo", method="POST", body=b"x" * size)
    assert response
    assert int(response.body) == size
    assert Ending.from_row(row) == (200, None, size, len(response.body), "upstream")


def test_chunked_upload_size_is_logged(proxied: LoggedProxy, upstream: RawUpstream) -> None:
    agent = proxied.new_agent()
    with proxied.client() as client:
        url = f"{upstream.url}/echo"
        client.request("POST", url, f"User-Agent: {agent}", "Transfer-Encoding: chunked")
        for _ in range(50):
            client.send(b"3e8\r\n" + b"y" * 1000 + b"\r\n")
        client.send(b"0\r\n\r\n")
        response = client.read_response()
        assert response
        assert response.body == b"50000"
        assert Ending.from_row(proxied.row_for_agent(agent)) == (200, None, 50000, 5, "upstream")


def test_only_first_request_on_a_connection_has_connect_ms(
    buffering: LoggedProxy, upstream: RawUpstream
) -> None:
    agent = buffering.new_agent()
    with buffering.client() as client:
        for _ in range(3):
            client.request("GET", f"{upstream.url}/ok", f"User-Agent: {agent}")
            assert client.read_response()
        rows = buffering.wait_rows(3, "user_agent = %s", agent)
    assert [row["connect_ms"] is None for row in rows] == [False, True, True]


# -- upstream fails ----------------------------------------------------------------------------


def test_refused_connection_is_connect_error(buffering: LoggedProxy) -> None:
    response, row = buffering.send_request(f"http://127.0.0.1:{free_port()}/")
    assert Ending.from_row(row) == (502, "connect", 0, None, None)
    assert_row_matches(response, row)


def test_unknown_host_is_dns_error(buffering: LoggedProxy) -> None:
    response, row = buffering.send_request("http://nothing.invalid/")
    assert Ending.from_row(row) == (502, "dns", 0, None, None)
    assert_row_matches(response, row)


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
def test_failed_responses(
    proxied: LoggedProxy,
    upstream: RawUpstream,
    path: str,
    error_type: str,
    size: int | None,
) -> None:
    streams = "streaming" in str(proxied.proxy.folder)
    response, row = proxied.send_request(upstream.url + path)
    assert_row_matches(response, row)
    assert row["error_type"] == error_type, row
    assert row["error"]
    if streams and size is not None:
        assert Ending.from_row(row) == (200, error_type, 0, size, "upstream")
    else:
        assert Ending.from_row(row) == (502, error_type, 0, None, None)


def test_unsupported_trailers_are_logged_when_client_disconnects(
    buffering: LoggedProxy, upstream: RawUpstream
) -> None:
    agent = buffering.new_agent()
    with buffering.client() as client:
        client.request("GET", f"{upstream.url}/trailers", f"User-Agent: {agent}")
        eventually(lambda: "HTTP trailers are not implemented" in buffering.proxy.output())
    assert Ending.from_row(buffering.row_for_agent(agent)) == (
        None,
        "client_disconnected",
        0,
        None,
        None,
    )


@pytest.mark.parametrize("path", ["/slow-head", "/slow-body"])
def test_idle_upstream_is_timeout(
    short_timeout: LoggedProxy, upstream: RawUpstream, path: str
) -> None:
    upstream.hold()
    response, row = short_timeout.send_request(upstream.url + path)
    assert response is None
    assert Ending.from_row(row) == (None, "upstream_timeout", 0, None, None)
    upstream.release()


# The upstream closes: mitmproxy sometimes keeps its connection open after a body that is too large.
@pytest.mark.parametrize(
    ("path", "within_limit"),
    [
        ("/sized?close&size=6000", False),
        ("/chunked?close&size=9000", False),
        ("/sized?close&size=5000", True),
    ],
)
def test_response_size_limit(
    limited: LoggedProxy, upstream: RawUpstream, path: str, within_limit: bool
) -> None:
    response, row = limited.send_request(upstream.url + path)
    assert_row_matches(response, row)
    expected = (
        (200, None, 0, 5000, "upstream") if within_limit else (502, "too_large", 0, None, None)
    )
    assert Ending.from_row(row) == expected


def test_upload_over_size_limit(limited: LoggedProxy, upstream: RawUpstream) -> None:
    response, row = limited.send_request(f"{upstream.url}/echo", method="POST", body=b"x" * 6000)
    assert_row_matches(response, row)
    assert Ending.from_row(row) == (413, "too_large", None, None, None)


# -- TLS to upstream ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def verifying(
    postgres: Postgres, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LoggedProxy]:
    """Run a proxy that trusts one upstream certificate."""
    folder = tmp_path_factory.mktemp("verifying")
    trusted = certificate(folder)
    options = ("--set", f"ssl_verify_upstream_trusted_ca={trusted}")
    with logged_proxy(postgres, folder, *options, scripts=fault_addons(folder, SCRIPT)) as running:
        yield running


@pytest.fixture(scope="module")
def https_upstream(verifying: LoggedProxy) -> Iterator[RawUpstream]:
    with RawUpstream(verifying.proxy.folder / "good.pem") as running:
        yield running


def send_in_tunnel(
    proxied: LoggedProxy, upstream: RawUpstream | PlainTextServer, path: str, *headers: str
) -> tuple[Response | None, Row]:
    """Send one request through a new tunnel; return its response and its row."""
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


def test_https_request_through_tunnel(verifying: LoggedProxy, https_upstream: RawUpstream) -> None:
    response, row = send_in_tunnel(verifying, https_upstream, "/sized?size=12345")
    assert Ending.from_row(row) == (200, None, 0, 12345, "upstream")
    assert (row["scheme"], row["host"], row["port"]) == ("https", "localhost", https_upstream.port)
    assert row["tls_version"] == "TLSv1.3"
    assert row["connect_ms"] > 0
    assert_row_matches(response, row)


@pytest.mark.parametrize("kind", ["wrong-host", "expired"])
def test_bad_upstream_certificate_is_tls_error(verifying: LoggedProxy, kind: Kind) -> None:
    with RawUpstream(certificate(verifying.proxy.folder, kind)) as bad:
        response, row = send_in_tunnel(verifying, bad, "/ok")
    assert_row_matches(response, row)
    assert Ending.from_row(row) == (502, "tls_upstream", 0, None, None)


class PlainTextServer(SocketServer):
    """Answers the first bytes of a connection with a plain-text error."""

    @property
    def port(self) -> int:
        """The listening port."""
        return self.address[1]

    async def _serve(self, client: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        await loop.sock_recv(client, 10000)
        await loop.sock_sendall(client, b"HTTP/1.1 400 Bad Request\r\n\r\n")
        client.close()


def test_upstream_without_tls_is_tls_error(verifying: LoggedProxy) -> None:
    with PlainTextServer() as plain:
        response, row = send_in_tunnel(verifying, plain, "/ok")
    assert_row_matches(response, row)
    assert Ending.from_row(row) == (502, "tls_upstream", 0, None, None)


# -- client disconnects ------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["close", "reset"])
def test_client_disconnects_before_response(
    proxied: LoggedProxy, upstream: RawUpstream, end: str
) -> None:
    upstream.hold()
    agent, before = proxied.new_agent(), len(upstream.requests)
    with proxied.client() as client:
        client.request("GET", f"{upstream.url}/slow-head", f"User-Agent: {agent}")
        eventually(lambda: len(upstream.requests) > before)
        getattr(client, end)()
        row = proxied.row_for_agent(agent)
    assert Ending.from_row(row) == (None, "client_disconnected", 0, None, None)
    upstream.release()


@pytest.mark.parametrize("path", ["/slow-body?size=20000", "/slow-chunked?size=20000"])
def test_client_disconnects_during_response(
    proxied: LoggedProxy, upstream: RawUpstream, path: str
) -> None:
    upstream.hold()
    streams = "streaming" in str(proxied.proxy.folder)
    agent, before = proxied.new_agent(), len(upstream.requests)
    half = 10000 if "body" in path else 20000
    with proxied.client() as client:
        client.request("GET", upstream.url + path, f"User-Agent: {agent}")
        eventually(lambda: len(upstream.requests) > before)
        got = b""
        while streams and len(got.partition(b"\r\n\r\n")[2]) < half:
            got += client.receive()
        client.close()
        row = proxied.row_for_agent(agent)
    if streams:
        assert Ending.from_row(row) == (200, "client_disconnected", 0, half, "upstream")
    else:
        assert Ending.from_row(row) == (None, "client_disconnected", 0, None, None)
    upstream.release()


def test_client_disconnects_during_upload(proxied: LoggedProxy, upstream: RawUpstream) -> None:
    streams = "streaming" in str(proxied.proxy.folder)
    agent, before = proxied.new_agent(), len(upstream.requests)
    with proxied.client() as client:
        client.request(
            "POST", f"{upstream.url}/echo", f"User-Agent: {agent}", body=b"z" * 3000, length=9000
        )
        eventually(lambda: not streams or len(upstream.requests) > before)
        eventually(lambda: not streams or upstream.requests[-1].body_length == 3000)
        client.close()
        row = proxied.row_for_agent(agent)
    assert Ending.from_row(row) == (
        None,
        "client_disconnected",
        3000 if streams else None,
        None,
        None,
    )


def test_response_before_end_of_upload(streaming: LoggedProxy, upstream: RawUpstream) -> None:
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


def test_upstream_resets_during_upload(streaming: LoggedProxy, upstream: RawUpstream) -> None:
    upstream.release()
    agent = streaming.new_agent()
    with streaming.client() as client:
        url = f"{upstream.url}/reset-in-upload"
        client.request("POST", url, f"User-Agent: {agent}", body=b"z" * 3000, length=9000)
        response = client.read_response()
        row = streaming.row_for_agent(agent)
    assert_row_matches(response, row)
    assert Ending.from_row(row) == (502, "upstream_closed", 3000, None, None)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        (("Content-Length: 5", "Transfer-Encoding: chunked"), 400),
        (("Content-Length: five",), 400),
        (("Content-Length: 5", "Content-Length: 7"), 400),
    ],
)
def test_invalid_request_is_protocol_error(
    buffering: LoggedProxy, upstream: RawUpstream, headers: tuple[str, ...], status: int
) -> None:
    response, row = buffering.send_request(f"{upstream.url}/echo", *headers, method="POST")
    assert response
    assert response.status == status
    assert Ending.from_row(row) == (status, "protocol", None, None, None)


# -- other addons ------------------------------------------------------------------------------

HOOKS = ("requestheaders", "request", "responseheaders", "response")


@pytest.mark.parametrize("header", ["X-Fault", "X-Fault-Late"])
@pytest.mark.parametrize("hook", HOOKS)
def test_flow_killed_by_another_addon(
    proxied: LoggedProxy, upstream: RawUpstream, header: str, hook: str
) -> None:
    response, row = proxied.send_request(
        f"{upstream.url}/sized?size=2000", f"{header}: {hook} kill"
    )
    if "streaming" in str(proxied.proxy.folder) and hook == "response":
        # The whole body was already sent; only the connection closes early.
        assert response
        assert Ending.from_row(row) == (200, "killed", 0, 2000, "upstream")
    else:
        assert response is None
        assert row["request_bytes"] in (0, None)
        assert Ending.from_row(row)[:2] == (None, "killed")
        assert Ending.from_row(row)[3:] == (None, None)


@pytest.mark.parametrize("header", ["X-Fault", "X-Fault-Late"])
@pytest.mark.parametrize("hook", HOOKS[:2])
def test_response_made_by_another_addon(
    proxied: LoggedProxy, upstream: RawUpstream, header: str, hook: str
) -> None:
    response, row = proxied.send_request(f"{upstream.url}/ok", f"{header}: {hook} answer")
    assert_row_matches(response, row)
    assert Ending.from_row(row) == (403, None, 0, 9, "addon")
    assert row["server_ip"] is None


@pytest.mark.parametrize("header", ["X-Fault", "X-Fault-Late"])
def test_response_changed_by_another_addon(
    buffering: LoggedProxy, upstream: RawUpstream, header: str
) -> None:
    response, row = buffering.send_request(f"{upstream.url}/ok", f"{header}: response change")
    assert_row_matches(response, row)
    assert Ending.from_row(row) == (299, None, 0, 4321, "upstream")


@pytest.mark.parametrize("header", ["X-Fault", "X-Fault-Late"])
@pytest.mark.parametrize(("action", "size"), [("stream", 2000), ("double", 4000)])
@pytest.mark.parametrize("path", ["/sized?size=2000", "/cut-sized?size=9000&sent=2000"])
def test_response_streamed_by_another_addon(
    buffering: LoggedProxy, upstream: RawUpstream, header: str, action: str, size: int, path: str
) -> None:
    response, row = buffering.send_request(
        upstream.url + path, f"{header}: responseheaders {action}"
    )
    assert_row_matches(response, row)
    assert Ending.from_row(row) == (
        200,
        "upstream_closed" if "cut" in path else None,
        0,
        size,
        "upstream",
    )


def test_modify_body_changes_logged_size(buffering: LoggedProxy, upstream: RawUpstream) -> None:
    response, row = buffering.send_request(f"{upstream.url}/ok?modify-me")
    assert_row_matches(response, row)
    assert Ending.from_row(row) == (200, None, 0, len("changed by modify_body\n"), "upstream")


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://any.invalid/mapped", (200, None, 0, 12, "addon")),
        ("http://any.invalid/blocked-451", (451, None, 0, 0, "addon")),
        ("http://any.invalid/blocked-444", (None, "killed", 0, None, None)),
    ],
)
def test_response_made_by_a_mitmproxy_option(
    buffering: LoggedProxy, url: str, expected: Ending
) -> None:
    response, row = buffering.send_request(url)
    assert_row_matches(response, row)
    assert Ending.from_row(row) == expected


def test_mitmproxy_onboarding_page(buffering: LoggedProxy) -> None:
    response, row = buffering.send_request("http://mitm.it/")
    assert response
    assert response.status == 200
    assert_row_matches(response, row)
    assert (row["host"], row["response_source"]) == ("mitm.it", "addon")


# -- other protocols ---------------------------------------------------------------------------


def connect_websocket(upstream: RawUpstream, path: str, client: RawClient) -> WebSocketClient:
    return WebSocketClient(client, f"127.0.0.1:{upstream.port}", upstream.url + path)


def test_websocket_is_logged_when_it_closes(buffering: LoggedProxy, upstream: RawUpstream) -> None:
    with buffering.client() as client:
        websocket = connect_websocket(upstream, "/websocket", client)
        for message in ("one", b"\x00" * 5000, "\N{SNOWMAN}"):
            websocket.send(message)
            assert websocket.receive() == message
        assert not buffering.rows("path = '/websocket'")
        websocket.close()
        row = buffering.wait_row("path = '/websocket'")
    assert Ending.from_row(row) == (101, None, 5006, 5006, "upstream")
    assert row["error"] is None
    assert row["duration_ms"] > row["ttfb_ms"]


def test_client_drops_websocket(buffering: LoggedProxy, upstream: RawUpstream) -> None:
    with buffering.client() as client:
        websocket = connect_websocket(upstream, "/websocket?left", client)
        websocket.send("one")
        assert websocket.receive() == "one"
        websocket.abort()
        row = buffering.wait_row("path = '/websocket' AND query IS NOT NULL")
    assert Ending.from_row(row) == (101, "client_disconnected", 3, 3, "upstream")
    assert "1006" in row["error"]


def test_upstream_drops_websocket(buffering: LoggedProxy, upstream: RawUpstream) -> None:
    with buffering.client() as client:
        websocket = connect_websocket(upstream, "/websocket-abrupt", client)
        websocket.send("one")
        assert websocket.receive() == "one"
        assert websocket.receive() is None
        row = buffering.wait_row("path = '/websocket-abrupt'")
    assert Ending.from_row(row) == (101, "upstream_closed", 3, 3, "upstream")
    assert "1006" in row["error"]


@pytest.mark.parametrize(
    ("code", "error_type"),
    [(1000, None), (1001, None), (1011, "upstream_closed"), (4001, "upstream_closed")],
)
def test_websocket_close_codes(
    buffering: LoggedProxy, upstream: RawUpstream, code: int, error_type: str | None
) -> None:
    with buffering.client() as client:
        websocket = connect_websocket(upstream, f"/websocket-bye?code={code}&n{code}=", client)
        websocket.send("one")
        assert websocket.receive() == "one"
        assert websocket.receive() is None
        assert websocket.close_code == code
        row = buffering.wait_row("path = '/websocket-bye' AND strpos(query, %s) > 0", f"n{code}=")
    assert Ending.from_row(row) == (101, error_type, 3, 3, "upstream")
    assert (str(code) in (row["error"] or "")) == (error_type is not None)


def test_rejected_websocket(buffering: LoggedProxy, upstream: RawUpstream) -> None:
    with buffering.client() as client:
        websocket = connect_websocket(upstream, "/status/418", client)
        assert websocket.rejected == 418
        row = buffering.wait_row("path = '/status/418'")
    assert Ending.from_row(row) == (418, None, 0, 4, "upstream")


def test_upgrade_to_another_protocol(buffering: LoggedProxy, upstream: RawUpstream) -> None:
    agent = buffering.new_agent()
    with buffering.client() as client:
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
    assert Ending.from_row(buffering.row_for_agent(agent)) == (101, None, 0, None, "upstream")


# -- CONNECT -----------------------------------------------------------------------------------


def connect(
    proxied: LoggedProxy, host: str, port: int, *headers: str
) -> tuple[Response | None, Row]:
    """Open a tunnel and close it; return the response and the row of the CONNECT."""
    agent = proxied.new_agent()
    with proxied.client() as client:
        response = client.connect(host, port, f"User-Agent: {agent}", *headers)
    return response, proxied.row_for_agent(agent)


def test_tunnel_to_closed_port(verifying: LoggedProxy) -> None:
    response, row = connect(verifying, "127.0.0.1", free_port())
    assert response
    assert response.status == 502
    assert Ending.from_row(row)[:2] == (502, "connect")
    assert (row["method"], row["path"], row["response_source"]) == ("CONNECT", None, "addon")
    assert_row_matches(response, row)


def test_tunnel_rejected_by_another_addon(
    verifying: LoggedProxy, https_upstream: RawUpstream
) -> None:
    response, row = connect(
        verifying, "localhost", https_upstream.port, "X-Fault-Late: http_connect answer"
    )
    assert Ending.from_row(row) == (403, None, None, 9, "addon")
    assert_row_matches(response, row)


@pytest.mark.parametrize("header", ["X-Fault", "X-Fault-Late"])
def test_tunnel_killed_by_another_addon(
    verifying: LoggedProxy, https_upstream: RawUpstream, header: str
) -> None:
    response, row = connect(
        verifying, "localhost", https_upstream.port, f"{header}: http_connect kill"
    )
    assert response is None
    assert Ending.from_row(row) == (None, "killed", None, None, None)


def test_unused_tunnel(verifying: LoggedProxy, https_upstream: RawUpstream) -> None:
    response, row = connect(verifying, "localhost", https_upstream.port)
    assert response
    assert Ending.from_row(row) == (200, None, None, None, "upstream")
    assert (row["method"], row["host"], row["port"]) == (
        "CONNECT",
        "localhost",
        https_upstream.port,
    )


def test_client_rejects_proxy_certificate(
    verifying: LoggedProxy, https_upstream: RawUpstream
) -> None:
    with verifying.client() as client:
        assert client.connect("127.0.0.1", https_upstream.port)
        with pytest.raises(ssl.SSLError):
            client.start_tls("localhost")
    row = verifying.wait_row("error_type = 'tls_client'")
    assert Ending.from_row(row) == (None, "tls_client", None, None, None)
    assert (row["host"], row["port"], row["method"], row["scheme"]) == (
        "localhost",
        https_upstream.port,
        None,
        "https",
    )
    assert row["error"]
