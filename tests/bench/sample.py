"""Flows as mitmproxy hands them to its addons, and what our hook makes of them; measures nothing."""

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
from tests.bench.catalogue import ECOSYSTEMS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mitmproxy.addonmanager import AddonManager

    from exporter import Exchange

REPEATING_URLS = 500
_CONNECTIONS = 64
_BODY = b"x" * 600
_HASH_PLACES = 64
_AT_ONCE = 1000
_INTERVAL_SECONDS = 0.001  # between the beginnings of two flows

_numbers = itertools.count()
_clients: list[Client] = []
_servers: list[Server] = []


class Asked(NamedTuple):
    """One URL and who asks for it."""

    scheme: bytes
    host: str
    port: int
    target: bytes
    agent: bytes


class Exchanged(NamedTuple):
    """A flow that has not been answered, and its answer."""

    flow: http.HTTPFlow
    response: http.Response


def asked(number: int) -> Asked:
    """The URL of this number: artifacts, indexes and sidecars of all ecosystems, each its own."""
    ecosystem = ECOSYSTEMS[number % len(ECOSYSTEMS)]
    kind = number // len(ECOSYSTEMS) % 10
    template = ecosystem.artifact if kind < 6 else ecosystem.listing
    if kind == 9:
        template = ecosystem.sidecar
    name = f"package-{number}"
    digest = hashlib.sha256(name.encode()).hexdigest()[:_HASH_PLACES]
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
    return Asked(
        parts.scheme.encode(),
        parts.hostname or "",
        port,
        target,
        ecosystem.agent.format().encode(),
    )


def make_flows(count: int, *, new_urls: bool) -> list[Exchanged]:
    """Flows of some clients that asked a moment ago, one after the other.

    No two flows of a process have the same key; with `new_urls` no two have the same URL either,
    else they ask for the same few hundred.
    """
    if not _clients:
        _connect()
    now = time.time() - count * _INTERVAL_SECONDS
    return [
        _make_flow(next(_numbers), now + place * _INTERVAL_SECONDS, new_urls=new_urls)
        for place in range(count)
    ]


def make_master(loop: asyncio.AbstractEventLoop) -> Master:
    """A mitmproxy without addons, which takes part in nobody's logging."""
    master = Master(Options(), event_loop=loop)
    master._legacy_log_events.uninstall()
    return master


async def drive(manager: AddonManager, exchanged: list[Exchanged]) -> None:
    """Let the flows pass through the addons as the proxy does."""
    for flow, response in exchanged:
        await manager.handle_lifecycle(HttpRequestHeadersHook(flow))
        await manager.handle_lifecycle(HttpRequestHook(flow))
        flow.response = response
        await manager.handle_lifecycle(HttpResponseHeadersHook(flow))
        await manager.handle_lifecycle(HttpResponseHook(flow))


def capture_exchanges(count: int, *, new_urls: bool) -> list[Exchange]:
    """What our hook hands on of so many flows."""
    found: list[Exchange] = []

    def keep(exchange: Exchange) -> bool:
        found.append(exchange)
        return True

    flows = FlowTracker()
    flows.log_access = keep
    loop = asyncio.new_event_loop()
    master = make_master(loop)
    master.addons.add(flows)
    for start in range(0, count, _AT_ONCE):
        part = make_flows(min(_AT_ONCE, count - start), new_urls=new_urls)
        loop.run_until_complete(drive(master.addons, part))
    loop.close()
    return found


def _connect() -> None:
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
        _servers[-1].state = ConnectionState.OPEN  # from here on its address is fixed


def _make_flow(number: int, started_at: float, *, new_urls: bool) -> Exchanged:
    url = asked(number if new_urls else number % REPEATING_URLS)
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
    return Exchanged(flow, response)


def _request_fields(url: Asked) -> Iterator[tuple[bytes, bytes]]:
    """New bytes each time, as a parser makes them."""
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
