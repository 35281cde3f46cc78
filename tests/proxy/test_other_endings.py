"""Flow endings that do not come from the network: logins, replays, mitmweb users, filters, shutdown and imports."""

from __future__ import annotations

import base64
import json
import re
import ssl
import urllib.request
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

import pytest
from mitmproxy.connection import ConnectionState
from mitmproxy.io import FlowWriter
from mitmproxy.test import tflow

from tests.support.access_log import SCRIPT, Row
from tests.support.certificates import certificate
from tests.support.http1_client import RawClient
from tests.support.logged_proxy import Ending, LoggedProxy, logged_proxy
from tests.support.proxy import Mitm
from tests.support.upstream import RawUpstream
from tests.support.wait import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.support.postgres import Postgres


@pytest.fixture(scope="module")
def upstream() -> Iterator[RawUpstream]:
    with RawUpstream() as running:
        yield running


@pytest.fixture(scope="module")
def recording(upstream: RawUpstream, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Record flows with a proxy that has no access log, as a flow file and as HAR.

    Two responses are complete, one ends in its body, and one upstream closes before its response.
    """
    folder = tmp_path_factory.mktemp("recorder")
    flows = folder / "recorded.flows"
    har = f"hardump={folder / 'recorded.har'}"
    with Mitm(folder, "-w", str(flows), "--set", har) as proxy:
        for path in ("/ok", "/cut-sized", "/close-before-head", "/gzip?size=5000"):
            with RawClient(proxy.address) as client:
                client.request("GET", upstream.url + path, "User-Agent: recorded")
                assert client.read_response()
    return flows


# -- logins and recordings ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def restricted(
    postgres: Postgres, recording: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LoggedProxy]:
    """Run a proxy that requires a login, replays recorded responses, and does not log health checks."""
    with logged_proxy(
        postgres,
        tmp_path_factory.mktemp("guarded"),
        *("--proxyauth", "build-42:s3cret"),
        *("--server-replay", str(recording), "--set", "server_replay_reuse=true"),
        *("--set", "artifactapi_filter=!(~u /health | ~d mitm.it)"),
    ) as running:
        yield running


LOGIN = "Proxy-Authorization: Basic " + base64.b64encode(b"build-42:s3cret").decode()


def test_request_without_login_is_rejected(restricted: LoggedProxy, upstream: RawUpstream) -> None:
    response, row = restricted.send_request(f"{upstream.url}/status/201")
    assert response
    assert Ending.from_row(row) == (407, "proxy_auth", 0, len(response.body), "addon")
    assert row["proxy_user"] is None


def test_tunnel_without_login_is_rejected(restricted: LoggedProxy) -> None:
    agent = restricted.new_agent()
    with restricted.client() as client:
        response = client.connect("localhost", 443, f"User-Agent: {agent}")
    row = restricted.row_for_agent(agent)
    assert response
    assert Ending.from_row(row) == (407, "proxy_auth", None, len(response.body), "addon")
    assert (row["method"], row["host"], row["port"]) == ("CONNECT", "localhost", 443)


def test_login_is_logged_as_proxy_user(restricted: LoggedProxy, upstream: RawUpstream) -> None:
    _, row = restricted.send_request(f"{upstream.url}/status/201", LOGIN)
    assert Ending.from_row(row) == (201, None, 0, 4, "upstream")
    assert row["proxy_user"] == "build-42"


def test_login_is_logged_although_the_client_rejects_the_certificate(
    postgres: Postgres, tmp_path: Path
) -> None:
    options = ("--proxyauth", "build-42:s3cret", "--ssl-insecure")
    with (
        RawUpstream(certificate(tmp_path)) as upstream,
        logged_proxy(postgres, tmp_path, *options) as proxied,
    ):
        with proxied.client() as client:
            assert client.connect("localhost", upstream.port, LOGIN)
            with pytest.raises(ssl.SSLError):
                client.start_tls("localhost")  # trusts no authority
        assert proxied.wait_row("error_type = 'tls_client'")["proxy_user"] == "build-42"


def test_response_replayed_from_recording(restricted: LoggedProxy, upstream: RawUpstream) -> None:
    before = len(upstream.requests)
    response, row = restricted.send_request(f"{upstream.url}/ok", LOGIN)
    assert response
    assert Ending.from_row(row) == (200, None, 0, 3, "replay")
    assert row["server_ip"] is None
    assert len(upstream.requests) == before


def test_filter_excludes_flows(restricted: LoggedProxy, upstream: RawUpstream) -> None:
    with restricted.client() as client:
        client.request("GET", f"{upstream.url}/health", LOGIN)
        response = client.read_response()
        assert response
        assert response.status == 404
        client.request("GET", "http://mitm.it/", LOGIN)
        assert client.read_response()
    _, row = restricted.send_request(f"{upstream.url}/status/202", LOGIN)
    assert row["status_code"] == 202
    assert not restricted.rows("path = '/health' OR host = 'mitm.it'")
    written = len(restricted.rows())
    restricted.proxy.terminate()
    stopped = rf"artifactapi: stopped; {written} rows? written, none lost\."
    assert re.search(stopped, restricted.proxy.output())


# -- mitmweb users -----------------------------------------------------------------------------


class MitmwebClient:
    """A client of mitmweb's HTTP interface."""

    def __init__(self, url: str) -> None:
        self._base = url.partition("?")[0].rstrip("/")
        self._token = parse_qs(urlsplit(url).query)["token"][0]

    def call(self, path: str, document: object = None) -> Any:
        """Send a GET, or a POST with a JSON document; return the parsed response."""
        headers = {"Authorization": f"Bearer {self._token}"}
        body = None
        if document is not None:
            headers |= {
                "Content-Type": "application/json",
                "X-XSRFToken": "x",
                "Cookie": "_mitmproxy_xsrf=x; _xsrf=x",
            }
            body = json.dumps(document).encode()
        request = urllib.request.Request(self._base + path, body, headers)  # noqa: S310
        with urllib.request.urlopen(request) as response:  # noqa: S310
            text = response.read()
        return json.loads(text) if text else None

    def intercepted(self) -> str | None:
        """Return the id of the intercepted flow, if there is one."""
        waiting = [flow["id"] for flow in self.call("/flows") if flow["intercepted"]]
        return waiting[0] if waiting else None


@pytest.fixture(scope="module")
def web(postgres: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoggedProxy]:
    """Run a mitmweb that intercepts some requests and some responses."""
    with logged_proxy(
        postgres,
        tmp_path_factory.mktemp("web"),
        *("--set", "intercept=~u hold-request & ~q | ~u hold-response & ~s"),
        program="mitmweb",
    ) as running:
        yield running


@pytest.mark.parametrize("message", ["request", "response"])
def test_flow_killed_by_user(web: LoggedProxy, upstream: RawUpstream, message: str) -> None:
    agent = web.new_agent()
    page = MitmwebClient(web.proxy.web_url)
    with web.client() as client:
        client.request("GET", f"{upstream.url}/ok?hold-{message}=", f"User-Agent: {agent}")
        held = eventually(page.intercepted)
        page.call(f"/flows/{held}/kill", {})
        assert not web.rows("user_agent = %s", agent)
    # mitmproxy keeps the client connection of a killed flow open, so the row is written when the
    # client disconnects.
    assert Ending.from_row(web.row_for_agent(agent)) == (None, "killed", 0, None, None)


def test_response_that_nobody_received(web: LoggedProxy, upstream: RawUpstream) -> None:
    """The client leaves while its response is intercepted."""
    agent = web.new_agent()
    page = MitmwebClient(web.proxy.web_url)
    with web.client() as client:
        client.request("GET", f"{upstream.url}/ok?hold-response=", f"User-Agent: {agent}")
        held = eventually(page.intercepted)
    row = web.row_for_agent(agent)
    page.call(f"/flows/{held}/resume", {})
    assert Ending.from_row(row) == (None, "_OTHER", 0, None, None)


def test_response_changed_by_user(web: LoggedProxy, upstream: RawUpstream) -> None:
    agent = web.new_agent()
    page = MitmwebClient(web.proxy.web_url)
    with web.client() as client:
        client.request("GET", f"{upstream.url}/ok?hold-response=", f"User-Agent: {agent}")
        held = eventually(page.intercepted)
        assert not web.rows("user_agent = %s", agent)
        page.call(
            "/commands/flow.set", {"arguments": ["~u hold-response & ~s", "status_code", "299"]}
        )
        page.call(f"/flows/{held}/resume", {})
        response = client.read_response()
        row = web.row_for_agent(agent)
    assert response
    assert response.status == 299
    assert Ending.from_row(row) == (299, None, 0, 3, "upstream")


def test_replayed_flow_is_second_row(web: LoggedProxy, upstream: RawUpstream) -> None:
    _, first = web.send_request(f"{upstream.url}/status/209")
    page = MitmwebClient(web.proxy.web_url)
    page.call(f"/flows/{first['flow_id']}/replay", {})
    rows = web.wait_rows(2, "flow_id = %s", first["flow_id"])
    assert rows[0]["started_at"] == first["started_at"] < rows[1]["started_at"]
    assert Ending.from_row(rows[1]) == Ending.from_row(first) == (209, None, 0, 4, "upstream")


def test_replay_to_stopped_upstream_is_connect_error(web: LoggedProxy) -> None:
    with RawUpstream() as own_upstream:
        _, first = web.send_request(f"{own_upstream.url}/status/208")
    page = MitmwebClient(web.proxy.web_url)
    page.call(f"/flows/{first['flow_id']}/replay", {})
    _, replayed = web.wait_rows(2, "flow_id = %s", first["flow_id"])
    assert replayed["error_type"] == "connect"
    assert replayed["server_ip"] is None
    assert replayed["connect_ms"] is None


# -- replay and shutdown -----------------------------------------------------------------------


def test_replay_from_file(postgres: Postgres, recording: Path, tmp_path: Path) -> None:
    with logged_proxy(postgres, tmp_path, "-n", "-C", str(recording), listens=False) as proxied:
        proxied.proxy.wait()
        rows = proxied.wait_rows(4, "user_agent = 'recorded'")
    assert [Ending.from_row(row) for row in rows] == [
        (200, None, 0, 3, "upstream"),
        (None, "upstream_closed", 0, None, None),
        (None, "upstream_closed", 0, None, None),
        (200, None, 0, rows[3]["response_bytes"], "upstream"),
    ]


def test_intercepted_response_at_shutdown(postgres: Postgres, tmp_path: Path) -> None:
    intercept = ("--set", "intercept=~s")
    with (
        RawUpstream() as upstream,
        logged_proxy(postgres, tmp_path, *intercept, program="mitmweb") as proxied,
        proxied.client() as client,
    ):
        client.request("GET", f"{upstream.url}/ok")
        eventually(MitmwebClient(proxied.proxy.web_url).intercepted)
        proxied.proxy.terminate()
        (row,) = proxied.wait_rows(1, "true")
    assert Ending.from_row(row) == (None, "shutdown", 0, None, None)


def test_open_flows_are_logged_at_shutdown(postgres: Postgres, tmp_path: Path) -> None:
    secure = certificate(tmp_path)
    options = ("--set", "stream_large_bodies=10", "--ssl-insecure")
    with (
        RawUpstream() as upstream,
        RawUpstream(secure) as https,
        logged_proxy(postgres, tmp_path / "proxied", *options) as proxied,
        proxied.client() as waiting,
        proxied.client() as streaming,
        proxied.client() as tunnel,
        proxied.client() as uploading,
    ):
        waiting.request("GET", f"{upstream.url}/slow-head")
        streaming.request("GET", f"{upstream.url}/slow-body")
        uploading.request("POST", f"{upstream.url}/echo", body=b"x" * 500, length=1000)
        assert tunnel.connect("localhost", https.port)
        eventually(lambda: len(upstream.requests) == 3)
        eventually(
            lambda: (
                upstream.requests[2].body_length == 500
                or upstream.requests[1].body_length == 500
                or upstream.requests[0].body_length == 500
            )
        )
        received = b""
        while len(received.partition(b"\r\n\r\n")[2]) < 500:
            received += streaming.receive()
        proxied.proxy.terminate()
        rows = {row["path"]: Ending.from_row(row) for row in proxied.wait_rows(4, "true")}
    assert rows == {
        "/slow-head": (None, "shutdown", 0, None, None),
        "/slow-body": (200, "shutdown", 0, 500, "upstream"),
        "/echo": (None, "shutdown", 500, None, None),
        None: (200, "shutdown", None, None, "upstream"),
    }


# -- imports -----------------------------------------------------------------------------------


QUIET = ("--set", "flow_detail=0")


def import_files(
    postgres: Postgres, folder: Path, *files: Path, config: str = ""
) -> tuple[list[Row], str]:
    """Read each file with a new proxy; return all rows and the output of the first proxy."""
    first = ("-n", "-r", str(files[0]), *QUIET)
    with logged_proxy(postgres, folder, *first, listens=False, config=config) as proxied:
        proxied.proxy.wait()
        for file in files[1:]:
            arguments = ["-n", "-r", str(file), "--set", f"artifactapi_dsn={proxied.dsn}"]
            with Mitm(folder, *arguments, scripts=[SCRIPT], listens=False) as again:
                assert again.wait() == 0
        rows = proxied.rows()
        proxied.wait_rows(len(rows), "true")
        return rows, proxied.proxy.output()


def test_import_of_flow_file(postgres: Postgres, recording: Path, tmp_path: Path) -> None:
    rows, output = import_files(postgres, tmp_path, recording, recording)
    assert [row["path"] for row in rows] == ["/ok", "/cut-sized", "/close-before-head", "/gzip"]
    assert [Ending.from_row(row)[:2] for row in rows] == [
        (200, None),
        (None, "upstream_closed"),
        (None, "upstream_closed"),
        (200, None),
    ]
    assert all(row["started_at"] < row["logged_at"] for row in rows)
    assert all(row["client_port"] for row in rows)
    assert "4 rows written, none lost" in output


def test_import_of_har_file(postgres: Postgres, recording: Path, tmp_path: Path) -> None:
    rows, _ = import_files(postgres, tmp_path, har := recording.with_suffix(".har"), har)
    assert len(rows) == len(json.loads(har.read_text())["log"]["entries"])
    times = [
        entry["startedDateTime"][:23] for entry in json.loads(har.read_text())["log"]["entries"]
    ]
    assert [row["started_at"].isoformat()[:23] for row in rows] == sorted(times)


def test_large_import_drops_no_row(postgres: Postgres, tmp_path: Path) -> None:
    file = tmp_path / "large.flows"
    write_flows(file, 2000)
    config = "buffer: {max_entries: 100}\nbatch: {max_entries: 50}\n"
    rows, output = import_files(postgres, tmp_path / "proxied", file, config=config)
    assert len(rows) == 2000
    assert "2000 rows written, none lost" in output


def write_flows(file: Path, count: int) -> None:
    """Write a flow file with mitmproxy's own writer.

    Every tenth flow has a response and an error, and as many have neither.
    """
    with file.open("wb") as stream:
        writer = FlowWriter(stream)  # type: ignore[no-untyped-call]
        for index in range(count):
            flow = tflow.tflow(resp=index % 10 != 1, err=index % 10 == 0)
            flow.request.timestamp_start = 1_700_000_000.0 + index
            flow.client_conn.state = ConnectionState.CLOSED
            writer.add(flow)
