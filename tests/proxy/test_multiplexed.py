"""Each HTTP/2 stream becomes one row, however the stream or its connection ends."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from h2.errors import ErrorCodes

from tests.support.access_log import SCRIPT
from tests.support.certificates import certificate
from tests.support.fault_addon import fault_addons
from tests.support.http2_client import Http2Client
from tests.support.logged_proxy import Ending, LoggedProxy, logged_proxy
from tests.support.proxy import Mitm
from tests.support.upstream import RawUpstream
from tests.support.wait import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.support.postgres import Postgres

# With the eager strategy, mitmproxy offers the client only the protocols that the upstream speaks.
LAZY_CONNECTION = ("--set", "connection_strategy=lazy")


@pytest.fixture(scope="module")
def proxies(
    postgres: Postgres, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, LoggedProxy]]:
    """Run a proxy that buffers bodies and one that streams them."""
    plain = tmp_path_factory.mktemp("plain")
    streamed = tmp_path_factory.mktemp("streaming")
    with (
        logged_proxy(
            postgres, plain, "--ssl-insecure", *LAZY_CONNECTION, scripts=fault_addons(plain, SCRIPT)
        ) as buffering,
        logged_proxy(
            postgres,
            streamed,
            *LAZY_CONNECTION,
            *("--ssl-insecure", "--set", "stream_large_bodies=10"),
            scripts=fault_addons(streamed, SCRIPT),
        ) as streaming,
    ):
        yield {"plain": buffering, "streaming": streaming}


@pytest.fixture(scope="module")
def http1(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RawUpstream]:
    """Run an upstream that speaks only HTTP/1."""
    with RawUpstream(certificate(tmp_path_factory.mktemp("tls"))) as running:
        yield running


@pytest.fixture(scope="module")
def http2(
    http1: RawUpstream, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, int]]:
    """Run a gateway that offers the same upstream over HTTP/2; return its address."""
    with Mitm(
        tmp_path_factory.mktemp("gateway"),
        *LAZY_CONNECTION,
        *("--mode", f"reverse:{http1.url}@0", "--ssl-insecure"),
        *("--set", "stream_large_bodies=1"),
    ) as gateway:
        yield gateway.address


@pytest.fixture(scope="module", params=["plain", "streaming"])
def proxied(request: pytest.FixtureRequest, proxies: dict[str, LoggedProxy]) -> LoggedProxy:
    """Run the test with each of the two proxies."""
    proxy: LoggedProxy = proxies[request.param]
    return proxy


@pytest.fixture(scope="module", params=["http1", "http2"])
def upstream(
    request: pytest.FixtureRequest, http1: RawUpstream, http2: tuple[str, int]
) -> tuple[str, int]:
    """Run the test with each of the two upstreams."""
    return http1.address if request.param == "http1" else http2


def connect(proxied: LoggedProxy, upstream: tuple[str, int]) -> Http2Client:
    return Http2Client.through(
        proxied.proxy.address, "127.0.0.1", upstream[1], proxied.proxy.ca_path
    )


def test_parallel_streams_are_separate_rows(
    proxied: LoggedProxy, upstream: tuple[str, int]
) -> None:
    agent = ("user-agent", proxied.new_agent())
    with connect(proxied, upstream) as client:
        numbers = [client.request(f"/chunked?size={size}", agent) for size in range(900, 1000, 10)]
        numbers += [client.request(f"/sized?size={size}", agent) for size in range(800, 900, 10)]
        streams = client.wait(*numbers)
        rows = proxied.wait_rows(20, "user_agent = %s", agent[1])
    assert all(stream.ended and stream.status == 200 for stream in streams)
    assert sorted(row["response_bytes"] for row in rows) == list(range(800, 1000, 10))
    assert {Ending.from_row(row)[:3] for row in rows} == {(200, None, 0)}
    assert {row["http_version"] for row in rows} == {"HTTP/2.0"}
    assert len({row["client_port"] for row in rows}) == 1


@pytest.mark.parametrize("with_length", [True, False])
def test_upload_size_is_logged(
    proxied: LoggedProxy, upstream: tuple[str, int], http2: tuple[str, int], with_length: bool
) -> None:
    if not with_length and upstream != http2:
        pytest.skip("mitmproxy cannot signal the end of such a body to an HTTP/1 upstream")
    agent = ("user-agent", proxied.new_agent())
    with connect(proxied, upstream) as client:
        extra = (("content-length", "50000"),) if with_length else ()
        number = client.request("/echo", agent, *extra, method="POST", end=False)
        client.send_body(number, b"x" * 50000)
        (stream,) = client.wait(number)
        row = proxied.row_for_agent(agent[1])
    assert stream.status == row["status_code"]
    assert row["request_bytes"] == 50000
    assert row["response_bytes"] == len(stream.body)


@pytest.mark.parametrize("code", [ErrorCodes.CANCEL, ErrorCodes.INTERNAL_ERROR])
def test_client_resets_stream(
    proxied: LoggedProxy, http1: RawUpstream, upstream: tuple[str, int], code: ErrorCodes
) -> None:
    http1.hold()
    agent, before = proxied.new_agent(), len(http1.requests)
    with connect(proxied, upstream) as client:
        number = client.request("/slow-head", ("user-agent", agent))
        eventually(lambda: len(http1.requests) > before)
        client.reset(number, code)
        row = proxied.row_for_agent(agent)
        other = client.request("/ok", ("user-agent", "after " + agent))
        client.wait(other)
        assert proxied.row_for_agent("after " + agent)["status_code"] == 200
    http1.release()
    # With HTTP/2 on both sides, mitmproxy does not report which side reset a stream.
    sender_known = upstream == http1.address or code is ErrorCodes.CANCEL
    assert Ending.from_row(row)[0] is None
    assert row["error_type"] == ("client_disconnected" if sender_known else "_OTHER")
    assert row["error"].startswith("stream reset by ")


@pytest.mark.parametrize("goaway", [True, False])
def test_client_disconnects_with_open_streams(
    proxied: LoggedProxy, tmp_path: Path, goaway: bool
) -> None:
    agent = proxied.new_agent()
    with RawUpstream(certificate(tmp_path)) as upstream:
        with connect(proxied, upstream.address) as client:
            for _ in range(3):
                client.request("/slow-head", ("user-agent", agent))
            eventually(lambda: len(upstream.requests) == 3)
            if goaway:
                client.goaway()
        rows = proxied.wait_rows(3, "user_agent = %s", agent)
    assert {Ending.from_row(row) for row in rows} == {(None, "client_disconnected", 0, None, None)}


@pytest.mark.parametrize(
    ("path", "size"), [("/close-before-head", None), ("/cut-sized", 100), ("/cut-chunked", 1500)]
)
def test_upstream_fails(
    proxied: LoggedProxy, http1: RawUpstream, upstream: tuple[str, int], path: str, size: int | None
) -> None:
    agent = proxied.new_agent()
    with connect(proxied, upstream) as client:
        (stream,) = client.wait(client.request(path, ("user-agent", agent)))
        row = proxied.row_for_agent(agent)
    if path == "/close-before-head" and upstream != http1.address:
        # The 502 comes from the gateway, which is a normal upstream here.
        assert Ending.from_row(row) == (502, None, 0, len(stream.body), "upstream")
        return
    assert row["error"]
    if stream.status == 200:
        assert stream.reset is not None
        assert size == len(stream.body)
        assert Ending.from_row(row)[2:] == (0, size, "upstream")
    else:
        assert stream.status == 502
        assert Ending.from_row(row)[2:] == (0, None, None)
    # With HTTP/2 on both sides, mitmproxy does not report which side reset a stream.
    if "stream reset by" in row["error"]:
        assert row["error_type"] == "_OTHER"
        assert row["status_code"] == (200 if stream.status == 200 else None)
    else:
        assert row["error_type"] == "upstream_closed"
        assert row["status_code"] == stream.status


@pytest.mark.parametrize("hook", ["requestheaders", "request", "responseheaders", "response"])
def test_flow_killed_by_another_addon(
    proxies: dict[str, LoggedProxy], http1: RawUpstream, hook: str
) -> None:
    proxied = proxies["plain"]
    agent = proxied.new_agent()
    with connect(proxied, http1.address) as client:
        number = client.request("/ok", ("user-agent", agent), ("x-fault-late", f"{hook} kill"))
        (stream,) = client.wait(number)
        row = proxied.row_for_agent(agent)
    assert stream.status is None
    assert Ending.from_row(row)[:2] == (None, "killed")
