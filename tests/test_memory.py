"""A streamed body passes through without the access log keeping any of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import psutil

from tests.support.clients import RawClient
from tests.support.proxy import Mitm
from tests.support.rig import Facts, Rig
from tests.support.upstream import RawUpstream

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.postgres import Postgres

SIZE = 100_000_000
ALLOWED = 10_000_000  # bytes of resident memory more than without us

STREAM = ("--set", "stream_large_bodies=1m", "--set", "flow_detail=0")


def growth(proxy: Mitm, url: str, size: int, agent: str) -> int:
    """By how much one download makes the proxy larger at its largest, after one small download."""
    process = psutil.Process(proxy.pid)
    with RawClient(proxy.address, timeout=60) as client:
        client.request("GET", f"{url}?size=2000000", "User-Agent: warm-up")
        assert client.read_response()
        before = most = process.memory_info().rss
        client.request("GET", f"{url}?size={size}", f"User-Agent: {agent}")
        head = client.receive()
        received, end = len(head.partition(b"\r\n\r\n")[2]), b""
        # The end of a sized body is its size, that of a chunked one its last chunk.
        while not (end == b"0\r\n\r\n" if b"chunked" in head else received == size):
            data = client.receive()
            assert data
            received, end = received + len(data), (end + data)[-5:]
            most = max(most, process.memory_info().rss)
    assert received >= size
    return most - before


def test_a_large_download_is_not_kept(postgres: Postgres, tmp_path: Path) -> None:
    path = "/chunked"
    with RawUpstream() as upstream:
        with Mitm(tmp_path / "without", *STREAM) as alone:
            without = growth(alone, upstream.url + path, SIZE, "alone")
        with Rig(postgres, tmp_path / "with", *STREAM) as rig:
            with_us = growth(rig.proxy, upstream.url + path, SIZE, "large")
            rig.of("warm-up")
            assert Facts.of(rig.of("large")) == (200, None, 0, SIZE, "upstream")
    assert with_us - without < ALLOWED
