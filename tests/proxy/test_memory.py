"""The access log keeps no part of a streamed body in memory."""

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
MAX_EXTRA_BYTES = 10_000_000  # of resident memory, compared with a proxy without artifactapi

STREAM = ("--set", "stream_large_bodies=1m", "--set", "flow_detail=0")


def measure_growth(proxy: Mitm, url: str, size: int, agent: str) -> int:
    """Return by how many bytes one download raises the proxy's peak memory, after a small one."""
    process = psutil.Process(proxy.pid)
    with RawClient(proxy.address) as client:
        client.request("GET", f"{url}?size=2000000", "User-Agent: warm-up")
        assert client.read_response()
    with RawClient(proxy.address) as client:
        before = peak = process.memory_info().rss
        client.request("GET", f"{url}?size={size}", f"User-Agent: {agent}")
        head = client.receive()
        received = len(head.partition(b"\r\n\r\n")[2])
        while received < size:
            data = client.receive()
            assert data
            received += len(data)
            peak = max(peak, process.memory_info().rss)
    assert received == size
    return peak - before


def test_streamed_download_does_not_grow_memory(postgres: Postgres, tmp_path: Path) -> None:
    paths = ("/sized", "/until-eof")
    with RawUpstream() as upstream:
        with Mitm(tmp_path / "without", *STREAM) as proxy:
            growth_without = [
                measure_growth(proxy, upstream.url + path, SIZE, path) for path in paths
            ]
        with logged_proxy(postgres, tmp_path / "with", *STREAM) as proxied:
            growth_with = [
                measure_growth(proxied.proxy, upstream.url + path, SIZE, path) for path in paths
            ]
            rows = [proxied.row_for_agent(path) for path in paths]
            proxied.wait_rows(2, "user_agent = 'warm-up'")
    for row, with_log, without_log in zip(rows, growth_with, growth_without, strict=True):
        assert Ending.from_row(row) == (200, None, 0, SIZE, "upstream")
        assert with_log - without_log < MAX_EXTRA_BYTES
