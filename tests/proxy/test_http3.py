"""Each HTTP/3 stream becomes one row, also after a reset or a disconnect."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.support.certificates import certificate
from tests.support.http3 import ErrorCode, Http3Upstream, send_requests
from tests.support.logged_proxy import Ending, LoggedProxy, logged_proxy

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.postgres import Postgres


@pytest.fixture(scope="module")
def upstream(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Http3Upstream]:
    with Http3Upstream(certificate(tmp_path_factory.mktemp("certificate"))) as running:
        yield running


@pytest.fixture(scope="module", params=[(), ("--set", "stream_large_bodies=10")])
def proxied(
    request: pytest.FixtureRequest,
    postgres: Postgres,
    upstream: Http3Upstream,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[LoggedProxy]:
    """Run the test with a gateway that buffers bodies and with one that streams them."""
    mode = f"reverse:http3://127.0.0.1:{upstream.port}@0"
    folder = tmp_path_factory.mktemp("http3")
    with logged_proxy(
        postgres, folder, "--mode", mode, "--ssl-insecure", *request.param
    ) as running:
        yield running


def test_parallel_streams_are_separate_rows(proxied: LoggedProxy) -> None:
    sizes = list(range(1000, 1010))
    agent = proxied.new_agent()
    streams = send_requests(proxied.proxy.port, agent, *(f"/size/{size}" for size in sizes))
    rows = proxied.wait_rows(10, "user_agent = %s", agent)
    assert sorted(len(stream.body) for stream in streams) == sizes
    assert sorted(row["response_bytes"] for row in rows) == sizes
    assert {(row["status_code"], row["http_version"]) for row in rows} == {(200, "HTTP/3")}


def test_upstream_resets_stream(proxied: LoggedProxy) -> None:
    agent = proxied.new_agent()
    (stream,) = send_requests(proxied.proxy.port, agent, "/reset")
    row = proxied.row_for_agent(agent)
    # mitmproxy does not report which side reset a stream, so the row cannot tell whether the
    # client received the 502.
    if stream.status == 200:
        assert Ending.from_row(row) == (200, "_OTHER", 0, len(stream.body), "upstream")
    else:
        assert stream.status == 502
        assert Ending.from_row(row) == (None, "_OTHER", 0, None, None)


@pytest.mark.parametrize("reset", [ErrorCode.H3_REQUEST_CANCELLED, None])
def test_client_cancels_streams_or_disconnects(
    proxied: LoggedProxy, upstream: Http3Upstream, reset: int | None
) -> None:
    agent, before = proxied.new_agent(), upstream.request_count
    send_requests(
        proxied.proxy.port,
        agent,
        *("/wait", "/wait"),
        reset=reset,
        when=lambda: upstream.request_count == before + 2,
    )
    rows = proxied.wait_rows(2, "user_agent = %s", agent)
    assert {Ending.from_row(row) for row in rows} == {(None, "client_disconnected", 0, None, None)}
