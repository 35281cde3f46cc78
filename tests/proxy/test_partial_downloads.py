"""A wheel whose metadata was read with range requests was not downloaded; one that came in parts was."""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING

from tests.support.logged_proxy import logged_proxy
from tests.support.socket_server import SocketServer

if TYPE_CHECKING:
    import socket
    from pathlib import Path

    from tests.support.http1_client import RawClient
    from tests.support.postgres import Postgres

SIZE = 1_000_000
_RANGE = re.compile(rb"range: bytes=(\d+)-(\d+)", re.IGNORECASE)
_REMOTES = "remotes:\n  - {name: wheels, host: 127.0.0.1, format: pypi}\n"


class RangeServer(SocketServer):
    """Serves one file, whole or in the range that was asked for."""

    async def _serve(self, client: socket.socket) -> None:
        reader, writer = await asyncio.open_connection(sock=client)
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                found = _RANGE.search(head)
                start, last = (int(it) for it in found.groups()) if found else (0, SIZE - 1)
                status = b"206 Partial Content" if found else b"200 OK"
                extra = f"Content-Range: bytes {start}-{last}/{SIZE}\r\n" if found else ""
                length = (
                    f"Content-Length: {last - start + 1}\r\nAccept-Ranges: bytes\r\n{extra}\r\n"
                )
                body = b"" if head.startswith(b"HEAD") else bytes(last - start + 1)
                writer.write(b"HTTP/1.1 " + status + b"\r\n" + length.encode() + body)
                await writer.drain()
        except (OSError, EOFError):
            pass
        finally:
            writer.close()


def test_metadata_reads_are_partial_and_a_file_fetched_in_parts_counts_once(
    postgres: Postgres, tmp_path: Path
) -> None:
    remotes = tmp_path / "remotes.yaml"
    remotes.write_text(_REMOTES)
    config = f"batch: {{max_seconds: 0.05}}\nremotes: {{file: {remotes}}}\n"
    with (
        RangeServer() as server,
        logged_proxy(postgres, tmp_path / "proxy", config=config) as proxied,
        proxied.client() as client,
    ):
        host, port = server.address
        wheel = f"http://{host}:{port}/packages/demo-1.0-py3-none-any.whl"
        ask(client, "HEAD", wheel)
        for start, last in ((SIZE - 5000, SIZE - 1), (990_000, 994_999), (985_000, 989_999)):
            ask(client, "GET", wheel, f"Range: bytes={start}-{last}")
        other = f"http://{host}:{port}/packages/other-1.0-py3-none-any.whl"
        for start in range(0, SIZE, 250_000):
            ask(client, "GET", other, f"Range: bytes={start}-{start + 249_999}")
        rows = proxied.wait_rows(8, "true")
        found = [(row["purl"], row["status_code"], row["artifact_complete"]) for row in rows]
        demo, parts = "pkg:pypi/demo@1.0", "pkg:pypi/other@1.0"
        assert sorted(found, key=str) == sorted(
            [
                (demo, 200, None),
                *[(demo, 206, False)] * 3,
                *[(parts, 206, False)] * 3,
                (parts, 206, True),
            ],
            key=str,
        )


def ask(client: RawClient, method: str, url: str, *headers: str) -> None:
    client.request(method, url, *headers)
    assert client.read_response(method)
