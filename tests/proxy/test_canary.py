"""Send a secret in every part of requests and responses, then check that no table, file or log line of ours has it."""

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

# Only letters and digits, so that URL encoding does not change it.
CANARY = "zq" + secrets.token_hex(16)
JWT = f"eyJhbGciOiJIUzI1NiJ9.eyJ{CANARY}.{CANARY}"
BASIC = base64.b64encode(f"build-42:{CANARY}".encode()).decode()
CANARY_FORMS = (
    CANARY,
    CANARY.upper(),
    BASIC,
    base64.b64encode(CANARY.encode()).decode().rstrip("="),
)

# Places in URLs where services expect a secret (configs/secrets.yaml).
SECRET_PATHS = [
    f"/t/{CANARY}/chan/linux-64",
    f"/repository/npm/-/user/token/NpmToken.{CANARY}",
    f"/priv/{CANARY}/owner/repo",
    f"/services/T00000000/B00000000/{CANARY}",
    f"/api/webhooks/123456789012345678/{CANARY}",
    f"/hooks/{CANARY}",
    f"/bot110201543:{CANARY}/sendMessage",
    f"/%74%2F{CANARY}%2Fchan%2Fnoarch",
    f"/HOOKS/{CANARY.upper()}",
    f"/packages/demo-1.0-npm%5F{CANARY}.tar.gz",
]

# Matches our own log lines. Those of mitmproxy itself contain URLs.
OUR_LOG_LINE = re.compile(r"(?i)access log|artifactapi|postgres")


class LeakyUpstream(SocketServer):
    """Answers each request with the response of `RESPONSES` that its path names, full of canaries."""

    async def _serve(self, client: socket.socket) -> None:
        head = b""
        while more := await self._loop.sock_recv(client, 100_000):
            head += more
            if head.endswith(CANARY.encode()):  # the request body is complete
                await self._loop.sock_sendall(client, self._answer(head.split(b" ", 2)[1]))
                break
        client.close()

    def _answer(self, target: bytes) -> bytes:
        fields = (
            f"Set-Cookie: session={CANARY}\r\nLocation: http://u:{CANARY}@elsewhere.invalid/?t={CANARY}\r\n"
            f"Authorization: Bearer {CANARY}\r\nX-Cache: {CANARY}\r\nETag: {CANARY}\r\n"
            f"Content-Type: multipart/mixed; boundary=ghp_{CANARY}\r\n"
        )
        name = target.split(b"/")[3 if target.startswith(b"http") else 1].decode()
        return RESPONSES[name].format(fields=fields).encode()


OK_LINE = "HTTP/1.1 200 OK\r\n"
RESPONSES = {
    "whole": f"HTTP/1.1 302 Found\r\nContent-Length: 34\r\n{{fields}}\r\n{CANARY}",
    "garbage": f"password={CANARY}\r\n{{fields}}\r\n\r\n",
    "half": f"{OK_LINE}{{fields}}",
    "bad-line": f"HTTP/1.1 {CANARY} OK\r\n{{fields}}\r\n",
    "bad-length": f"{OK_LINE}Content-Length: {CANARY}\r\n{{fields}}\r\n",
    "bad-coding": f"{OK_LINE}Transfer-Encoding: {CANARY}\r\n{{fields}}\r\n",
    "bad-field": f"{OK_LINE}{CANARY} {CANARY}\r\n{{fields}}\r\n",
    "bad-chunk": f"{OK_LINE}Transfer-Encoding: chunked\r\n{{fields}}\r\n{CANARY}\r\n",
    "cut": f"{OK_LINE}Content-Length: 5000\r\n{{fields}}\r\n{CANARY}",
    "smuggle": f"{OK_LINE}Content-Length: 5\r\nTransfer-Encoding: chunked, {CANARY}\r\n{{fields}}\r\n",
}


@pytest.fixture
def proxied(postgres: Postgres, tmp_path: Path) -> Iterator[LoggedProxy]:
    """Run a proxy that requires a login, with the canary as every password in its settings."""
    with logged_proxy(
        postgres,
        tmp_path / "proxied",
        *("--proxyauth", f"build-42:{CANARY}", "--ssl-insecure"),
        *("--set", "flow_detail=0"),
        env={"ARTIFACTAPI_HOME": str(tmp_path / "proxied" / "home")},
        password=CANARY,
    ) as running:
        yield running


def send_canary(
    proxied: LoggedProxy, host: str, port: int, path: str, *, login: bool = True
) -> None:
    """Send one request with the canary in its target, headers and body."""
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
        f"User-Agent: tool/1.0 glpat-{CANARY} (http://me:{CANARY}@inner.invalid/hooks/{CANARY})",
    ]
    if login:
        headers.append(f"Proxy-Authorization: Basic {BASIC}")
    with proxied.client() as client:
        client.request("POST", target, *headers, body=CANARY.encode())
        client.read_response("POST")


def send_canary_in_tunnel(proxied: LoggedProxy, port: int, path: str) -> None:
    """Send the canary through a TLS tunnel; return early if the tunnel fails."""
    with proxied.client() as client:
        tunnel = client.connect("localhost", port, f"Proxy-Authorization: Basic {BASIC}")
        assert tunnel
        if tunnel.status != 200:
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


def test_secrets_are_never_stored_or_logged(
    proxied: LoggedProxy, postgres: Postgres, tmp_path: Path
) -> None:
    with LeakyUpstream() as leaky, RawUpstream(certificate(tmp_path)) as https:
        for path in RESPONSES:
            send_canary(proxied, "127.0.0.1", leaky.address[1], f"/{path}")
        for path in SECRET_PATHS:
            send_canary(proxied, "127.0.0.1", leaky.address[1], f"/whole{path}")
        send_canary(proxied, "127.0.0.1", leaky.address[1], "/whole", login=False)
        send_canary(proxied, "127.0.0.1", free_port(), "/refused")
        send_canary(proxied, "nothing.invalid", 80, "/unknown")
        send_canary_in_tunnel(proxied, https.port, "/redirect")
        send_canary_in_tunnel(proxied, free_port(), "/refused")
        for head in (
            # mitmproxy rejects these two requests without calling an addon.
            f"{CANARY} {CANARY}\r\n{CANARY}\r\n\r\n",
            f"GET http://user:{CANARY}@127.0.0.1:{leaky.address[1]}/ HTTP/1.1\r\n\r\n",
        ):
            with proxied.client() as client:
                client.send(head.encode())
                client.read_all()
        rows = proxied.wait_rows(len(RESPONSES) + len(SECRET_PATHS) + 5, "true")
    assert {row["proxy_user"] for row in rows} == {"build-42", None}
    assert sum("REDACTED" in (row["path"] or "") for row in rows) >= len(RESPONSES)
    assert "build-42" in _dump(postgres)
    _assert_no_canary_is_kept(proxied, postgres)


def test_token_as_proxy_login_is_never_stored_or_logged(postgres: Postgres, tmp_path: Path) -> None:
    token = f"ghp_{CANARY}"
    login = base64.b64encode(f"{token}:".encode()).decode()
    with logged_proxy(
        postgres,
        tmp_path / "proxied",
        *("--proxyauth", f"{token}:", "--set", "flow_detail=0"),
        env={"ARTIFACTAPI_HOME": str(tmp_path / "proxied" / "home")},
    ) as proxied:
        for path in ("/", f"/simple/{token}/"):
            _, row = proxied.send_request(
                f"http://127.0.0.1:{free_port()}{path}", f"Proxy-Authorization: Basic {login}"
            )
            assert row["proxy_user"] == "REDACTED"
        _assert_no_canary_is_kept(proxied, postgres)


def test_password_of_unavailable_database_is_not_logged(tmp_path: Path) -> None:
    dsn = f"postgresql://writer:{CANARY}@127.0.0.1:{free_port()}/log?connect_timeout=1"
    env = {"ARTIFACTAPI_DSN": dsn, "ARTIFACTAPI_HOME": str(tmp_path / "home")}
    with Mitm(tmp_path / "proxied", scripts=[SCRIPT], env=env) as proxy:
        eventually(lambda: "PostgreSQL unavailable" in proxy.output())
        proxy.terminate()
        _assert_no_canary("the output", proxy.output())


def _dump(postgres: Postgres) -> str:
    return subprocess.run(
        [programs() / "pg_dump", "--dbname", postgres.dsn(), "--inserts"],
        capture_output=True,
        check=True,
        text=True,
    ).stdout


def _assert_no_canary_is_kept(proxied: LoggedProxy, postgres: Postgres) -> None:
    """Stop the proxy, and look for the canary in the database, our log lines and our files."""
    _assert_no_canary("the database", _dump(postgres))
    proxied.proxy.terminate()
    our_lines = [line for line in proxied.proxy.output().splitlines() if OUR_LOG_LINE.search(line)]
    assert any("rows written, none lost" in line for line in our_lines)
    _assert_no_canary("our log lines", "\n".join(our_lines))
    files = [file for file in proxied.proxy.folder.rglob("*") if file.is_file()]
    for file in files:
        if file.name != "mitmdump.log":
            _assert_no_canary(str(file), file.read_text("latin-1"))


def _assert_no_canary(where: str, text: str) -> None:
    for form in CANARY_FORMS:
        found = text.find(form)
        assert found < 0, f"{where}: {text[max(0, found - 200) : found + 100]}"
