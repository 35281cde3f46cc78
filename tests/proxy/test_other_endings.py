"""Ends that a wire alone does not make: logins, recordings, replays, a user in the UI, a filter, a stop."""

from __future__ import annotations

import base64
import json
import urllib.request
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

import pytest
from mitmproxy.connection import ConnectionState
from mitmproxy.io import FlowWriter
from mitmproxy.test import tflow

from tests.support.access_log import SCRIPT, Row
from tests.support.certificates import certificate
from tests.support.http1_client import RawClient, Response
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


def ask(proxied: LoggedProxy, url: str, *headers: str) -> tuple[Response | None, Row]:
    agent = proxied.new_agent()
    with proxied.client() as client:
        client.request("GET", url, f"User-Agent: {agent}", *headers)
        response = client.read_response()
    return response, proxied.row_for_agent(agent)


@pytest.fixture(scope="module")
def recording(upstream: RawUpstream, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Flows of a proxy without us: one that went well, one that was cut off while it streamed, a refused one."""
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
def guarded(
    postgres: Postgres, recording: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LoggedProxy]:
    """A proxy that asks for a login, answers from a recording, and logs no health checks."""
    with logged_proxy(
        postgres,
        tmp_path_factory.mktemp("guarded"),
        *("--proxyauth", "build-42:s3cret"),
        *("--server-replay", str(recording), "--set", "server_replay_reuse=true"),
        *("--set", "artifactapi_filter=!(~u /health | ~d mitm.it)"),
    ) as running:
        yield running


LOGIN = "Proxy-Authorization: Basic " + base64.b64encode(b"build-42:s3cret").decode()


def test_no_login(guarded: LoggedProxy, upstream: RawUpstream) -> None:
    response, row = ask(guarded, f"{upstream.url}/status/201")
    assert response
    assert Ending.from_row(row) == (407, "proxy_auth", 0, len(response.body), "addon")
    assert row["proxy_user"] is None


def test_no_login_for_a_tunnel(guarded: LoggedProxy) -> None:
    agent = guarded.new_agent()
    with guarded.client() as client:
        response = client.connect("localhost", 443, f"User-Agent: {agent}")
    row = guarded.row_for_agent(agent)
    assert response
    assert Ending.from_row(row) == (407, "proxy_auth", None, len(response.body), "addon")
    assert (row["method"], row["host"], row["port"]) == ("CONNECT", "localhost", 443)


def test_a_login(guarded: LoggedProxy, upstream: RawUpstream) -> None:
    _, row = ask(guarded, f"{upstream.url}/status/201", LOGIN)
    assert Ending.from_row(row) == (201, None, 0, 4, "upstream")
    assert row["proxy_user"] == "build-42"


def test_an_answer_from_a_recording(guarded: LoggedProxy, upstream: RawUpstream) -> None:
    before = len(upstream.requests)
    response, row = ask(guarded, f"{upstream.url}/ok", LOGIN)
    assert response
    assert Ending.from_row(row) == (200, None, 0, 3, "replay")
    assert row["server_ip"] is None
    assert len(upstream.requests) == before


def test_the_filter(guarded: LoggedProxy, upstream: RawUpstream) -> None:
    with guarded.client() as client:
        client.request("GET", f"{upstream.url}/health", LOGIN)
        response = client.read_response()
        assert response
        assert response.status == 404
        client.request("GET", "http://mitm.it/", LOGIN)
        assert client.read_response()
    _, row = ask(guarded, f"{upstream.url}/status/202", LOGIN)
    assert row["status_code"] == 202
    assert not guarded.rows("path = '/health' OR host = 'mitm.it'")
    written = len(guarded.rows())
    guarded.proxy.terminate()
    assert f"artifactapi: stopped; {written} rows written, none lost." in guarded.proxy.output()


# -- a user in the UI --------------------------------------------------------------------------


class Web:
    """A browser on mitmweb's page."""

    def __init__(self, url: str) -> None:
        self._base = url.partition("?")[0].rstrip("/")
        self._token = parse_qs(urlsplit(url).query)["token"][0]

    def ask(self, path: str, document: object = None) -> Any:
        """GET, or POST a document."""
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
        """The id of the flow that waits for its user."""
        waiting = [flow["id"] for flow in self.ask("/flows") if flow["intercepted"]]
        return waiting[0] if waiting else None


@pytest.fixture(scope="module")
def web(postgres: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LoggedProxy]:
    """A mitmweb that holds some requests and some responses."""
    with logged_proxy(
        postgres,
        tmp_path_factory.mktemp("web"),
        *("--set", "intercept=~u hold-request & ~q | ~u hold-response & ~s"),
        program="mitmweb",
    ) as running:
        yield running


@pytest.mark.parametrize("what", ["request", "response"])
def test_killed_by_a_user(web: LoggedProxy, upstream: RawUpstream, what: str) -> None:
    agent = web.new_agent()
    page = Web(web.proxy.web_url)
    with web.client() as client:
        client.request("GET", f"{upstream.url}/ok?hold-{what}=", f"User-Agent: {agent}")
        held = eventually(page.intercepted)
        page.ask(f"/flows/{held}/kill", {})
        assert not web.rows("user_agent = %s", agent)
    # mitmproxy leaves the client of a killed flow waiting, until it goes away by itself
    assert Ending.from_row(web.row_for_agent(agent)) == (None, "killed", 0, None, None)


def test_changed_by_a_user(web: LoggedProxy, upstream: RawUpstream) -> None:
    agent = web.new_agent()
    page = Web(web.proxy.web_url)
    with web.client() as client:
        client.request("GET", f"{upstream.url}/ok?hold-response=", f"User-Agent: {agent}")
        held = eventually(page.intercepted)
        assert not web.rows("user_agent = %s", agent)
        page.ask(
            "/commands/flow.set", {"arguments": ["~u hold-response & ~s", "status_code", "299"]}
        )
        page.ask(f"/flows/{held}/resume", {})
        response = client.read_response()
        row = web.row_for_agent(agent)
    assert response
    assert response.status == 299
    assert Ending.from_row(row) == (299, None, 0, 3, "upstream")


def test_replayed_by_a_user(web: LoggedProxy, upstream: RawUpstream) -> None:
    _, first = ask(web, f"{upstream.url}/status/209")
    page = Web(web.proxy.web_url)
    page.ask(f"/flows/{first['flow_id']}/replay", {})
    rows = web.wait_rows(2, "flow_id = %s", first["flow_id"])
    assert rows[0]["started_at"] == first["started_at"] < rows[1]["started_at"]
    assert Ending.from_row(rows[1]) == Ending.from_row(first) == (209, None, 0, 4, "upstream")


def test_replayed_after_upstream_is_gone(web: LoggedProxy) -> None:
    with RawUpstream() as own:
        _, first = ask(web, f"{own.url}/status/208")
    page = Web(web.proxy.web_url)
    page.ask(f"/flows/{first['flow_id']}/replay", {})
    _, again = web.wait_rows(2, "flow_id = %s", first["flow_id"])
    assert again["error_type"] == "connect"
    assert again["server_ip"] is None
    assert again["connect_ms"] is None


# -- replays and stops -------------------------------------------------------------------------


def test_replayed_from_a_file(postgres: Postgres, recording: Path, tmp_path: Path) -> None:
    with logged_proxy(postgres, tmp_path, "-n", "-C", str(recording), listens=False) as proxied:
        proxied.proxy.wait()
        rows = proxied.wait_rows(4, "user_agent = 'recorded'")
    assert [Ending.from_row(row) for row in rows] == [
        (200, None, 0, 3, "upstream"),
        (None, "upstream_closed", 0, None, None),
        (None, "upstream_closed", 0, None, None),
        (200, None, 0, rows[3]["response_bytes"], "upstream"),
    ]


def test_a_stop_with_flows_under_way(postgres: Postgres, tmp_path: Path) -> None:
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
        got = b""
        while len(got.partition(b"\r\n\r\n")[2]) < 500:
            got += streaming.receive()
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


def load(postgres: Postgres, folder: Path, *files: Path, config: str = "") -> tuple[list[Row], str]:
    """What is in the log after each of these files was read by a proxy of its own."""
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


def test_an_import(postgres: Postgres, recording: Path, tmp_path: Path) -> None:
    rows, output = load(postgres, tmp_path, recording, recording)
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


def test_an_import_of_a_har(postgres: Postgres, recording: Path, tmp_path: Path) -> None:
    rows, _ = load(postgres, tmp_path, har := recording.with_suffix(".har"), har)
    assert len(rows) == len(json.loads(har.read_text())["log"]["entries"])
    times = [
        entry["startedDateTime"][:23] for entry in json.loads(har.read_text())["log"]["entries"]
    ]
    assert [row["started_at"].isoformat()[:23] for row in rows] == sorted(times)


def test_a_large_import_drops_nothing(postgres: Postgres, tmp_path: Path) -> None:
    file = tmp_path / "large.flows"
    write_flows(file, 2000)
    config = "buffer: {max_entries: 100}\nbatch: {max_entries: 50}\n"
    rows, output = load(postgres, tmp_path / "proxied", file, config=config)
    assert len(rows) == 2000
    assert "2000 rows written, none lost" in output


def write_flows(file: Path, number: int) -> None:
    """A flow file as mitmproxy writes it, some flows with both a response and an error."""
    with file.open("wb") as stream:
        writer = FlowWriter(stream)  # type: ignore[no-untyped-call]
        for index in range(number):
            flow = tflow.tflow(resp=True, err=index % 10 == 0)
            flow.request.timestamp_start = 1_700_000_000.0 + index
            flow.client_conn.state = ConnectionState.CLOSED
            writer.add(flow)
