"""A streamed body passes through without the access log keeping any of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import psutil

from tests.support.http1_client import RawClient
from tests.support.logged_proxy import Ending, logged_proxy
from tests.support.proxy import Mitm
from tests.support.upstream import RawUpstream

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.postgres import Postgres

SIZE = 200_000_000
ALLOWED = 10_000_000  # bytes of resident memory more than without us

STREAM = ("--set", "stream_large_bodies=1m", "--set", "flow_detail=0")


def growth(proxy: Mitm, url: str, size: int, agent: str) -> int:
    """By how much one download makes the proxy larger at its largest, after one small download."""
    process = psutil.Process(proxy.pid)
    with RawClient(proxy.address) as client:
        client.request("GET", f"{url}?size=2000000", "User-Agent: warm-up")
        assert client.read_response()
    with RawClient(proxy.address) as client:
        before = most = process.memory_info().rss
        client.request("GET", f"{url}?size={size}", f"User-Agent: {agent}")
        head = client.receive()
        received = len(head.partition(b"\r\n\r\n")[2])
        while received < size:
            data = client.receive()
            assert data
            received += len(data)
            most = max(most, process.memory_info().rss)
    assert received == size
    return most - before


def test_a_large_download_is_not_kept(postgres: Postgres, tmp_path: Path) -> None:
    paths = ("/sized", "/until-eof")
    with RawUpstream() as upstream:
        with Mitm(tmp_path / "without", *STREAM) as proxy:
            without = [growth(proxy, upstream.url + path, SIZE, path) for path in paths]
        with logged_proxy(postgres, tmp_path / "with", *STREAM) as proxied:
            with_us = [growth(proxied.proxy, upstream.url + path, SIZE, path) for path in paths]
            rows = [proxied.row_for_agent(path) for path in paths]
            proxied.wait_rows(2, "user_agent = 'warm-up'")
    for row, ours, theirs in zip(rows, with_us, without, strict=True):
        assert Ending.from_row(row) == (200, None, 0, SIZE, "upstream")
        assert ours - theirs < ALLOWED
