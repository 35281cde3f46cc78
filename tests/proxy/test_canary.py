"""A secret sent in every position of a request and a response is found in no table, file or line of ours."""

from __future__ import annotations

import base64
import re
import secrets
import subprocess
from typing import TYPE_CHECKING

import pytest

from exporter.postgres.embedded import programs
from tests.support.access_log import SCRIPT
from tests.support.certificates import certificate
from tests.support.logged_proxy import LoggedProxy, logged_proxy
from tests.support.proxy import Mitm, free_port
from tests.support.socket_server import SocketServer
from tests.support.upstream import RawUpstream
from tests.support.wait import eventually

if TYPE_CHECKING:
    import socket
    from collections.abc import Iterator
    from pathlib import Path

    from tests.support.postgres import Postgres

# Of letters and digits only, so that no encoding changes it.
CANARY = "zq" + secrets.token_hex(16)
JWT = f"eyJhbGciOiJIUzI1NiJ9.eyJ{CANARY}.{CANARY}"
BASIC = base64.b64encode(f"build-42:{CANARY}".encode()).decode()
ENCODED = (CANARY, BASIC, base64.b64encode(CANARY.encode()).decode().rstrip("="))

# What our own loggers call themselves; mitmproxy's own lines show URLs, as they always did.
OURS = re.compile(r"(?i)access log|artifactapi|postgres")


class Leaky(SocketServer):
    """Answers each request with the canary in every place, in the manner its path asks for."""

    async def _serve(self, client: socket.socket) -> None:
        head = b""
        while more := await self._loop.sock_recv(client, 100_000):
            head += more
            if head.endswith(CANARY.encode()):  # the body
                await self._loop.sock_sendall(client, self._answer(head.split(b" ", 2)[1]))
                break
        client.close()

    def _answer(self, target: bytes) -> bytes:
        fields = (
            f"Set-Cookie: session={CANARY}\r\nLocation: http://u:{CANARY}@elsewhere.invalid/?t={CANARY}\r\n"
            f"Authorization: Bearer {CANARY}\r\nX-Cache: {CANARY}\r\nETag: {CANARY}\r\n"
        )
        way = target.split(b"/")[3 if target.startswith(b"http") else 1].decode()
        return WAYS[way].format(fields=fields).encode()


OK = "HTTP/1.1 200 OK\r\n"
WAYS = {
    "whole": f"HTTP/1.1 302 Found\r\nContent-Length: 34\r\n{{fields}}\r\n{CANARY}",
    "garbage": f"password={CANARY}\r\n{{fields}}\r\n\r\n",
    "half": f"{OK}{{fields}}",
    "bad-line": f"HTTP/1.1 {CANARY} OK\r\n{{fields}}\r\n",
    "bad-length": f"{OK}Content-Length: {CANARY}\r\n{{fields}}\r\n",
    "bad-coding": f"{OK}Transfer-Encoding: {CANARY}\r\n{{fields}}\r\n",
    "bad-field": f"{OK}{CANARY} {CANARY}\r\n{{fields}}\r\n",
    "bad-chunk": f"{OK}Transfer-Encoding: chunked\r\n{{fields}}\r\n{CANARY}\r\n",
    "cut": f"{OK}Content-Length: 5000\r\n{{fields}}\r\n{CANARY}",
    "smuggle": f"{OK}Content-Length: 5\r\nTransfer-Encoding: chunked, {CANARY}\r\n{{fields}}\r\n",
}


@pytest.fixture
def proxied(postgres: Postgres, tmp_path: Path) -> Iterator[LoggedProxy]:
    """A proxy with a login, and passwords in all of its settings."""
    with logged_proxy(
        postgres,
        tmp_path / "proxied",
        *("--proxyauth", f"build-42:{CANARY}", "--ssl-insecure"),
        *("--set", "flow_detail=0"),
        env={"ARTIFACTAPI_HOME": str(tmp_path / "proxied" / "home")},
        password=CANARY,
    ) as running:
        yield running


def ask(proxied: LoggedProxy, host: str, port: int, path: str, *, login: bool = True) -> None:
    """Send the canary everywhere to one path."""
    target = (
        f"http://{host}:{port}{path}/{JWT}/ghp_{CANARY}/http://u:{CANARY}@inner.invalid/"
        f"?token={CANARY}&a=b&X-Amz-Signature={CANARY}&{CANARY}"
    )
    headers = [
        f"Host: {host}:{port}",
        f"Authorization: Bearer {CANARY}",
        f"Cookie: session={CANARY}",
        f"Referer: http://r.invalid/?{CANARY}",
        f"X-Api-Key: {CANARY}",
    ]
    if login:
        headers.append(f"Proxy-Authorization: Basic {BASIC}")
    with proxied.client() as client:
        client.request("POST", target, *headers, body=CANARY.encode())
        client.read_response("POST")


def ask_in_tunnel(proxied: LoggedProxy, port: int, path: str) -> None:
    with proxied.client() as client:
        open_database = client.connect("localhost", port, f"Proxy-Authorization: Basic {BASIC}")
        assert open_database
        if open_database.status != 200:
            return
        client.start_tls("localhost", proxied.proxy.ca_path)
        client.request(
            "POST",
            f"{path}?token={CANARY}",
            f"Host: localhost:{port}",
            f"Authorization: Basic {BASIC}",
            body=CANARY.encode(),
        )
        client.read_response("POST")


def test_no_secret_is_kept_anywhere(
    proxied: LoggedProxy, postgres: Postgres, tmp_path: Path
) -> None:
    with Leaky() as leaky, RawUpstream(certificate(tmp_path)) as https:
        asked = 0
        for path in WAYS:
            ask(proxied, "127.0.0.1", leaky.address[1], f"/{path}")
            asked += 1
        ask(proxied, "127.0.0.1", leaky.address[1], "/whole", login=False)
        ask(proxied, "127.0.0.1", free_port(), "/refused")
        ask(proxied, "nothing.invalid", 80, "/unknown")
        ask_in_tunnel(proxied, https.port, "/redirect")
        ask_in_tunnel(proxied, free_port(), "/refused")
        for head in (
            f"{CANARY} {CANARY}\r\n{CANARY}\r\n\r\n",  # these two mitmproxy shows to no addon
            f"GET http://user:{CANARY}@127.0.0.1:{leaky.address[1]}/ HTTP/1.1\r\n\r\n",
        ):
            with proxied.client() as client:
                client.send(head.encode())
                client.read_all()
        rows = proxied.wait_rows(asked + 5, "true")
    assert {row["proxy_user"] for row in rows} == {"build-42", None}
    assert sum("REDACTED" in (row["path"] or "") for row in rows) >= asked
    dump = subprocess.run(
        [programs() / "pg_dump", "--dbname", postgres.dsn(), "--inserts"],
        capture_output=True,
        check=True,
        text=True,
    ).stdout
    assert "build-42" in dump
    _clean("the database", dump)
    proxied.proxy.terminate()
    ours = [line for line in proxied.proxy.output().splitlines() if OURS.search(line)]
    assert any("rows written, none lost" in line for line in ours)
    _clean("our output", "\n".join(ours))
    files = [file for file in proxied.proxy.folder.rglob("*") if file.is_file()]
    for file in files:
        if file.name != "mitmdump.log":
            _clean(str(file), file.read_text("latin-1"))


def test_the_password_of_a_database_that_is_away(tmp_path: Path) -> None:
    dsn = f"postgresql://writer:{CANARY}@127.0.0.1:{free_port()}/log?connect_timeout=1"
    env = {"ARTIFACTAPI_DSN": dsn, "ARTIFACTAPI_HOME": str(tmp_path / "home")}
    with Mitm(tmp_path / "proxied", scripts=[SCRIPT], env=env) as proxy:
        eventually(lambda: "PostgreSQL unavailable" in proxy.output())
        proxy.terminate()
        _clean("the output", proxy.output())


def _clean(where: str, text: str) -> None:
    for form in ENCODED:
        found = text.find(form)
        assert found < 0, f"{where}: {text[max(0, found - 200) : found + 100]}"
