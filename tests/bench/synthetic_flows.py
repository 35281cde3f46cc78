"""Make mitmproxy flows and the exchanges that artifactapi captures from them; measures nothing."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import time
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlsplit

from mitmproxy import http
from mitmproxy.connection import Client, ConnectionState, Server
from mitmproxy.master import Master
from mitmproxy.options import Options
from mitmproxy.proxy.layers.http._hooks import (
    HttpRequestHeadersHook,
    HttpRequestHook,
    HttpResponseHeadersHook,
    HttpResponseHook,
)

from addon.flow.tracker import FlowTracker
from tests.bench.url_catalog import ECOSYSTEMS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mitmproxy.addonmanager import AddonManager

    from exporter import Exchange

REPEATING_URLS = 500
_CONNECTIONS = 64
_BODY = b"x" * 600
_HASH_DIGITS = 64
_FLOWS_AT_ONCE = 1000
_INTERVAL_SECONDS = 0.001  # between the starts of two flows

_numbers = itertools.count()
_clients: list[Client] = []
_servers: list[Server] = []


class GeneratedUrl(NamedTuple):
    """One URL, and the User-Agent that requests it."""

    scheme: bytes
    host: str
    port: int
    target: bytes
    agent: bytes


class PendingFlow(NamedTuple):
    """A flow that has no response yet, and its response."""

    flow: http.HTTPFlow
    response: http.Response


def generate_url(number: int) -> GeneratedUrl:
    """Return the URL with this number. All ecosystems and artifacts, indexes and sidecars alternate."""
    ecosystem = ECOSYSTEMS[number % len(ECOSYSTEMS)]
    kind = number // len(ECOSYSTEMS) % 10
    template = ecosystem.artifact if kind < 6 else ecosystem.listing
    if kind == 9:
        template = ecosystem.sidecar
    name = f"package-{number}"
    digest = hashlib.sha256(name.encode()).hexdigest()[:_HASH_DIGITS]
    url = template.format(
        n=name,
        u=name.replace("-", "_"),
        v=f"{1 + number % 9}.{number // 7 % 50}.{number % 10}",
        h=digest,
        h2=f"{digest[:2]}/{digest[2:4]}/{digest[4:]}",
        a=name[0],
    )
    parts = urlsplit(url)
    query = f"?page={number}&token=s3cret" if kind in {7, 9} else ""
    port = parts.port or (443 if parts.scheme == "https" else 80)
    target = f"{parts.path}{query}".encode()
    return GeneratedUrl(
        parts.scheme.encode(),
        parts.hostname or "",
        port,
        target,
        ecosystem.agent.format().encode(),
    )


def make_flows(count: int, *, new_urls: bool) -> list[PendingFlow]:
    """Make flows of several clients, started one after the other a moment ago.

    Every flow of a process has its own key. With `new_urls`, it also has its own URL; otherwise the
    flows share a few hundred URLs.
    """
    if not _clients:
        _make_connections()
    now = time.time() - count * _INTERVAL_SECONDS
    return [
        _make_flow(next(_numbers), now + index * _INTERVAL_SECONDS, new_urls=new_urls)
        for index in range(count)
    ]


def make_master(loop: asyncio.AbstractEventLoop) -> Master:
    """Return a mitmproxy master without addons, whose log handler is removed."""
    master = Master(Options(), event_loop=loop)
    master._legacy_log_events.uninstall()
    return master


async def run_flows(manager: AddonManager, flows: list[PendingFlow]) -> None:
    """Trigger the hooks of each flow, in the order that the proxy uses."""
    for flow, response in flows:
        await manager.handle_lifecycle(HttpRequestHeadersHook(flow))
        await manager.handle_lifecycle(HttpRequestHook(flow))
        flow.response = response
        await manager.handle_lifecycle(HttpResponseHeadersHook(flow))
        await manager.handle_lifecycle(HttpResponseHook(flow))


def capture_exchanges(count: int, *, new_urls: bool) -> list[Exchange]:
    """Return the exchanges that artifactapi captures from this number of flows."""
    exchanges: list[Exchange] = []

    def keep(exchange: Exchange) -> bool:
        exchanges.append(exchange)
        return True

    tracker = FlowTracker()
    tracker.log_access = keep
    loop = asyncio.new_event_loop()
    master = make_master(loop)
    master.addons.add(tracker)
    for start in range(0, count, _FLOWS_AT_ONCE):
        flows = make_flows(min(_FLOWS_AT_ONCE, count - start), new_urls=new_urls)
        loop.run_until_complete(run_flows(master.addons, flows))
    loop.close()
    return exchanges


def _make_connections() -> None:
    now = time.time()
    for number in range(_CONNECTIONS):
        _clients.append(
            Client(
                peername=(f"192.0.2.{number}", 50_000 + number),
                sockname=("192.0.2.250", 8080),
                state=ConnectionState.OPEN,
                timestamp_start=now,
            )
        )
        _servers.append(
            Server(
                address=("origin.example", 443),
                peername=(f"198.51.100.{number}", 443),
                sockname=("192.0.2.250", 40_000 + number),
                timestamp_start=now,
                timestamp_tcp_setup=now + 0.01,
                timestamp_tls_setup=now + 0.02,
                tls=True,
                tls_version="TLSv1.3",
            )
        )
        _servers[-1].state = ConnectionState.OPEN  # the address can no longer change


def _make_flow(number: int, started_at: float, *, new_urls: bool) -> PendingFlow:
    url = generate_url(number if new_urls else number % REPEATING_URLS)
    flow = http.HTTPFlow(_clients[number % _CONNECTIONS], _servers[number % _CONNECTIONS], True)
    flow.metadata["proxyauth"] = (f"build-{number % 40}", "x")
    flow.request = http.Request(
        url.host,
        url.port,
        b"GET",
        url.scheme,
        b"",
        url.target,
        b"HTTP/1.1",
        http.Headers(_request_fields(url)),
        b"",
        None,
        started_at,
        started_at + 0.0001,
    )
    response = http.Response(
        b"HTTP/1.1",
        200,
        b"OK",
        http.Headers(_response_fields()),
        _BODY,
        None,
        started_at + 0.004,
        started_at + 0.005,
    )
    return PendingFlow(flow, response)


def _request_fields(url: GeneratedUrl) -> Iterator[tuple[bytes, bytes]]:
    """Yield the request headers, with new bytes objects like those of a parser."""
    yield b"Host", url.host.encode()
    yield b"User-Agent", bytes(bytearray(url.agent))
    yield b"Accept", b"*/*"
    yield b"Accept-Encoding", b"gzip, deflate"
    yield b"Connection", b"keep-alive"


def _response_fields() -> Iterator[tuple[bytes, bytes]]:
    yield b"Date", b"Thu, 01 Jan 2026 00:00:00 GMT"
    yield b"Content-Type", b"application/octet-stream"
    yield b"Content-Length", str(len(_BODY)).encode()
    yield b"ETag", b'"0123456789abcdef"'
    yield b"Age", b"120"
    yield b"X-Cache", b"HIT, HIT"
    yield b"X-Served-By", b"cache-one, cache-two"
    yield b"Vary", b"Accept-Encoding"
