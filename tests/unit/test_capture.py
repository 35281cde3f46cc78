"""Test the flow tracker: any flow, however it ends, becomes exactly one exchange of bounded size."""

from __future__ import annotations

import itertools
import time
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mitmproxy import ctx, http, options
from mitmproxy.connection import Client, ConnectionState, Server
from mitmproxy.flow import Error
from mitmproxy.proxy.context import Context
from mitmproxy.tls import TlsData
from msgspec.structs import astuple

from addon.flow import capture as module
from addon.flow.capture import _end, _ordinary_end, capture
from addon.flow.state import FlowState
from addon.flow.tracker import FlowTracker
from exporter import Settings
from exporter.rows.entry_builder import EntryBuilder
from exporter.rows.text import CUT
from exporter.write.encoding import decode, encode, memory_bytes
from exporter.write.journal import _SEGMENT_BYTES
from exporter.write.journal_file import RECORD

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from exporter import AccessLogEntry, Exchange

builder = EntryBuilder(Settings(node="test"))


@pytest.fixture(scope="module", autouse=True)
def context() -> Iterator[None]:
    """Provide the mitmproxy options that the hooks read."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ctx, "options", options.Options(), raising=False)
        yield


def tracker_into(logged: list[Exchange]) -> FlowTracker:
    """Return a tracker that appends what it logs."""
    tracker = FlowTracker()
    tracker.log_access = lambda exchange: logged.append(exchange) or True  # type: ignore[func-returns-value]
    return tracker


def play(flow: http.HTTPFlow, *hooks: str) -> list[Exchange]:
    """Fire these hooks in order and return the exchanges that are logged."""
    logged: list[Exchange] = []
    tracker = tracker_into(logged)
    for hook in hooks:
        getattr(tracker, hook, lambda _: None)(flow)
        tracker.update([flow])
    tracker.end_all()
    assert tracker.failures == 0
    return logged


def make_flow(**changes: Any) -> http.HTTPFlow:
    """Return a live flow; `changes` replace raw values of its request."""
    client = Client(peername=("192.0.2.1", 5000), sockname=("192.0.2.2", 8080))
    client.state = ConnectionState.OPEN
    flow = http.HTTPFlow(client, Server(address=("h.example", 80)))
    now = time.time()
    request: dict[str, Any] = {
        "host": "h.example",
        "port": 80,
        "method": b"GET",
        "scheme": b"http",
        "authority": b"",
        "path": b"/",
        "http_version": b"HTTP/1.1",
        "headers": http.Headers(),
        "content": b"",
        "trailers": None,
        "timestamp_start": now,
        "timestamp_end": now,
    }
    flow.request = http.Request(**(request | changes))
    flow.live = True
    return flow


def make_saved_flow() -> http.HTTPFlow:
    """Return a flow as mitmproxy reads it from a file."""
    flow = make_flow()
    flow.live = None  # type: ignore[assignment]
    flow.client_conn.state = ConnectionState.CLOSED
    return flow


def add_response(flow: http.HTTPFlow, status: int = 200, headers: Sequence[Any] = ()) -> None:
    """Set the response of a flow."""
    flow.response = http.Response(
        b"HTTP/1.1", status, b"", http.Headers(headers), b"body", None, time.time(), time.time()
    )


ENDINGS = {
    "response": ("requestheaders", "request", "responseheaders", "response"),
    "response before the request ends": (
        "requestheaders",
        "responseheaders",
        "response",
        "request",
    ),
    "error before the request ends": ("requestheaders", "error"),
    "error before the response": ("requestheaders", "request", "error"),
    "error during the response": ("requestheaders", "request", "responseheaders", "error"),
    "error after the response": (
        "requestheaders",
        "request",
        "responseheaders",
        "response",
        "error",
    ),
    "shutdown": ("requestheaders", "request"),
    "tunnel refused": ("http_connect", "http_connect_error"),
    "tunnel unused": ("http_connect", "http_connected"),
}

short = st.binary(max_size=40)
text = st.text(st.characters(exclude_categories=()), max_size=40)
fields = st.lists(st.tuples(short, short), max_size=30)
times = st.one_of(
    st.floats(allow_nan=False, allow_infinity=False), st.sampled_from([0.0, 7_258_118_400.0, 1.5e9])
)


@pytest.mark.slow
@settings(max_examples=300)
@given(
    ending=st.sampled_from(sorted(ENDINGS)),
    method=short,
    path=st.binary(max_size=300),
    host=text,
    scheme=short,
    headers=fields,
    response_headers=fields,
    status=st.sampled_from([0, 100, 101, 200, 407, 599, 999, 70_000, -1]),
    started=times,
    message=text,
    live=st.booleans(),
)
def test_any_flow_becomes_one_exchange_and_one_row(
    ending: str,
    method: bytes,
    path: bytes,
    host: str,
    scheme: bytes,
    headers: list[tuple[bytes, bytes]],
    response_headers: list[tuple[bytes, bytes]],
    status: int,
    started: float,
    message: str,
    live: bool,
) -> None:
    flow = make_flow(
        method=method,
        path=path,
        host=host,
        scheme=scheme,
        headers=http.Headers(headers),
        timestamp_start=started,
    )
    flow.live = live
    hooks = ENDINGS[ending]
    if "response" in hooks or "responseheaders" in hooks or "http_connected" in hooks:
        add_response(flow, status, response_headers)
    if "error" in hooks:
        flow.error = Error(message)
    (exchange,) = play(flow, *hooks)
    row: AccessLogEntry = builder.build(decode(encode(exchange)))
    assert row.status_code in (None, status, 400, 502)
    assert row.flow_id == flow.id
    for value in row:
        assert value != ""  # COPY would read it as NULL
        assert not isinstance(value, str) or "\x00" not in value
        if isinstance(value, str):
            value.encode()


@pytest.mark.parametrize(
    "attribute",
    ["", "is_connect", "is_import", "answered_by_addon", "cut_by_shutdown", "orphaned"],
)
@pytest.mark.parametrize("status", [101, 200, 304, 502])
def test_ordinary_ends_are_those_of_every_flow(attribute: str, status: int) -> None:
    found = 0
    for streamed, replay, error, content in itertools.product(
        (False, True), (None, "request", "response"), (None, Error("closed")), (None, b"body")
    ):
        flow = make_flow(content=b"sent")
        add_response(flow, status)
        assert flow.response is not None
        flow.response.data.content = content
        flow.response.stream = streamed
        flow.is_replay, flow.error = replay, error
        state = FlowState()
        state.has_response_head = state.has_whole_response = state.ended = True
        if attribute:
            setattr(state, attribute, True)
        end = _ordinary_end(flow, state)
        assert end in (None, _end(flow, state))
        found += end is not None
    assert found == (1 if not attribute and status != 101 else 0)


def test_a_saved_flow_without_a_response_ends_with_its_request() -> None:
    """Whatever other addons do with it until then."""
    flow = make_saved_flow()
    logged: list[Exchange] = []
    tracker = tracker_into(logged)
    tracker.requestheaders(flow)
    tracker.update([flow])
    assert not logged
    flow.request.path = "/changed"
    tracker.update([flow])
    (exchange,) = logged
    assert exchange.target == b"/changed"
    assert exchange.requested_url == (b"http", "h.example", 80, b"/")
    tracker.update([flow])
    tracker.end_all()
    assert logged == [exchange]


@pytest.mark.parametrize("created_at", [None, "yesterday", 10**400, 1])
def test_a_saved_flow_may_have_been_created_at_any_time(created_at: Any) -> None:
    flow = make_saved_flow()
    flow.timestamp_created = created_at
    begun: list[object] = []
    logged: list[Exchange] = []
    tracker = FlowTracker()
    tracker.begin = begun.append
    tracker.log_access = lambda exchange: logged.append(exchange) or True  # type: ignore[func-returns-value]
    tracker.requestheaders(flow)
    begun.append(tracker.oldest_open_at())
    for _ in range(2):
        tracker.update([flow])
    assert len(logged) == 1
    assert begun == 2 * [1.0 if created_at == 1 else 0.0]
    assert {type(at) for at in begun} == {float}


def test_a_tls_failure_that_cannot_be_read_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    tunnel = make_flow(method=b"CONNECT")
    tunnel.metadata["proxyauth"] = {"name": "of another addon"}
    client = tunnel.client_conn
    client.timestamp_start = 5.0
    unreadable: list[float] = []
    tracker = FlowTracker()
    tracker.log_access = lambda _: pytest.fail("it was logged")
    tracker.count_unreadable = unreadable.append
    tracker.http_connect(tunnel)
    tracker.http_connected(tunnel)
    tracker.tls_failed_client(TlsData(client, Context(client, options.Options())))
    assert unreadable == [5.0]
    assert tracker.open_count == 0
    assert "could not be read" in caplog.text


def test_megabyte_values_are_cut_and_marked() -> None:
    large = b"x" * 1_000_000
    flow = make_flow(
        method=large,
        path=b"/" + large + b"?" + large + b"=1",
        host="h" * 1_000_000,
        headers=http.Headers([(b"User-Agent", large)]),
        http_version=large,
    )
    add_response(flow, headers=[(b"Content-Type", large)] + [(b"X-Cache", large)] * 100)
    (exchange,) = play(flow, *ENDINGS["response"])
    total_length = sum(
        len(value) for value in astuple(exchange) if isinstance(value, (bytes, str))
    ) + sum(len(name) + len(value) for name, value in exchange.response_fields)
    assert total_length < 120_000
    assert len(encode(exchange)[0]) + RECORD.size <= _SEGMENT_BYTES
    row = builder.build(exchange)
    for value in (row.path, row.user_agent, row.host, row.content_type, row.method):
        assert value
        assert value.endswith(CUT)


def test_response_fields_are_found_in_any_letter_case() -> None:
    for number, name in enumerate((b"X-Cache", b"x-cache", b"X-CACHE")):
        flow = make_flow()
        add_response(flow, headers=[(b"X-Other-%d" % number, b"HIT"), (name, b"HIT")])
        (exchange,) = play(flow, *ENDINGS["response"])
        assert exchange.response_fields == ((b"x-cache", b"HIT"),)


def test_headers_are_found_among_five_thousand() -> None:
    many = [(b"X-%d" % number, b"y" * 100) for number in range(5000)]
    flow = make_flow(headers=http.Headers([*many, (b"user-AGENT", b"last")]))
    add_response(flow, headers=[*many, (b"content-TYPE", b"text/plain")])
    (exchange,) = play(flow, *ENDINGS["response"])
    row = builder.build(exchange)
    assert (row.user_agent, row.content_type) == ("last", "text/plain")
    assert len(exchange.response_fields) == 1


def test_no_duration_if_the_clock_was_set_back() -> None:
    flow = make_flow(timestamp_start=time.time() + 3600)
    add_response(flow)
    row = builder.build(play(flow, *ENDINGS["response"])[0])
    assert (row.duration_ms, row.ttfb_ms) == (None, None)


def test_exchange_does_not_keep_the_body() -> None:
    body = bytearray(1_000_000)
    flow = make_flow(content=bytes(body))
    add_response(flow)
    (exchange,) = play(flow, *ENDINGS["response"])
    assert exchange.request_bytes == 1_000_000
    assert memory_bytes(encode(exchange)) < 10_000


@pytest.mark.parametrize(
    ("path", "status", "max_bytes", "body"),
    [
        (b"/debian/dists/sid/main/binary-amd64/Packages.xz", 200, 4, b"body"),
        (b"/debian/dists/sid/main/binary-amd64/by-hash/SHA256/00", 200, 4, b"body"),
        (b"/debian/dists/sid/main/binary-amd64/Packages.xz", 200, 3, None),
        (b"/debian/dists/sid/main/binary-amd64/Packages.xz", 404, 4, None),
        (b"/debian/pool/main/c/curl/curl_8.5.0-1_amd64.deb", 200, 4, None),
    ],
)
def test_exchange_keeps_the_index_of_debian_packages(
    path: bytes, status: int, max_bytes: int, body: bytes | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_INDEX_BYTES", max_bytes)
    flow = make_flow(path=path)
    add_response(flow, status)
    state = FlowState()
    state.ended = True

    assert capture(flow, state, with_indexes=True).body == body
    assert capture(flow, state).body is None


def test_unused_tunnel_is_logged_after_a_reload() -> None:
    logged: list[Exchange] = []
    before, after = FlowTracker(), tracker_into(logged)
    idle, used = make_flow(method=b"CONNECT"), make_flow(method=b"CONNECT")
    for tunnel in (idle, used):
        before.http_connect(tunnel)
        tunnel.response = http.Response.make(200)
        before.http_connected(tunnel)
        before.update([tunnel])
    after.take_over(before.hand_over())
    tunneled = make_flow()
    tunneled.client_conn = used.client_conn
    after.requestheaders(tunneled)
    after.update([tunneled])
    after.client_disconnected(idle.client_conn)
    assert [(x.method, x.status_code, x.error_type) for x in logged] == [(b"CONNECT", 200, None)]
    after.end_all()
    assert [x.error_type for x in logged] == [None, "shutdown"]
