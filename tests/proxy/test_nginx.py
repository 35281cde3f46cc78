"""The cache status of rows against a real nginx cache, whose origin counts what reached it."""

from __future__ import annotations

import random
import shutil
import subprocess
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Self, override

import psycopg
import pytest

from tests.support.access_log import SCRIPT, AccessLog, Row, temporary_schema
from tests.support.http1_client import RawClient, fetch
from tests.support.proxy import Mitm, free_port
from tests.support.wait import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.postgres import Postgres

FORWARDED = ("MISS", "EXPIRED", "REVALIDATED", "BYPASS")
BODY = b"x" * 5000
ETAG = '"the-same"'

# One folder for each field a cache may say it in: the same cache in three dialects.
_CONFIGURATION = """
daemon off;
master_process off;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
events {{ worker_connections 256; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/temp;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    proxy_cache_path {folder}/cache keys_zone=all:1m;
    proxy_cache all;
    proxy_cache_revalidate on;
    proxy_cache_use_stale http_500;
    proxy_cache_bypass $http_x_bypass;
    map $upstream_cache_status $rfc9211 {{
        HIT "nginx; hit";
        STALE "nginx; hit; ttl=-1";
        MISS "nginx; fwd=uri-miss; stored";
        BYPASS "nginx; fwd=bypass";
        EXPIRED "nginx; fwd=stale; fwd-status=200";
        REVALIDATED "nginx; fwd=stale; fwd-status=304";
    }}
    server {{
        listen 127.0.0.1:{port};
        location /word/ {{
            add_header X-Cache-Status $upstream_cache_status always;
            add_header X-Truth $upstream_cache_status always;
            proxy_pass http://127.0.0.1:{origin};
        }}
        location /x-cache/ {{
            add_header X-Cache "$upstream_cache_status from nginx" always;
            add_header X-Truth $upstream_cache_status always;
            proxy_pass http://127.0.0.1:{origin};
        }}
        location /rfc9211/ {{
            add_header Cache-Status $rfc9211 always;
            add_header X-Truth $upstream_cache_status always;
            proxy_pass http://127.0.0.1:{origin};
        }}
    }}
}}
"""


class Origin:
    """Notes the user agent of each request that reaches it; the path says how long to keep it."""

    def __init__(self) -> None:
        self.seen: Counter[str] = Counter()
        self.broken = False
        outer = self

        class Handler(_Handler):
            origin = outer

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    origin: Origin

    @override
    def log_message(self, *_: object) -> None:
        """The proxy's log is the one that counts."""

    def do_GET(self) -> None:
        self.origin.seen[self.headers["User-Agent"]] += 1
        name = self.path.rpartition("/")[2]
        if self.origin.broken:
            self.send_error(500)
        elif name.startswith("checked") and self.headers.get("If-None-Match") == ETAG:
            self.send_response(304)
            self.send_header("Cache-Control", "max-age=1")
            self.end_headers()
        else:
            self.send_response(200)
            self.send_header("Content-Length", str(len(BODY)))
            if name.startswith("checked"):
                self.send_header("ETag", ETAG)
            kept = {"kept": "max-age=3600", "never": "no-store"}
            self.send_header("Cache-Control", kept.get(name.partition("-")[0], "max-age=1"))
            self.end_headers()
            self.wfile.write(BODY)


class World:
    """client -> proxy -> nginx -> origin."""

    def __init__(self, log: AccessLog, proxy: Mitm, origin: Origin, port: int) -> None:
        self.log = log
        self.origin = origin
        self._proxy = proxy
        self._url = f"http://127.0.0.1:{port}"
        self.words: dict[str, str] = {}  # what nginx itself says, in a field that we do not know

    def get(self, path: str, *headers: str) -> str:
        """Ask once; the user agent it was asked with, which no other request has."""
        agent = f"client-{len(self.words) + 1}"
        url = self._url + path
        response = fetch(self._proxy.address, url, *headers, f"User-Agent: {agent}")
        assert response
        self.words[agent] = response.header("x-truth")
        return agent

    def rows(self) -> dict[str, Row]:
        """The rows of all that was asked, by user agent, once they are there."""
        rows = {row["user_agent"]: row for row in self.log.wait_rows(len(self.words))}
        assert rows.keys() == self.words.keys()
        return rows


@pytest.fixture(scope="module")
def world(postgres: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    program = shutil.which("nginx", path="/usr/sbin:/usr/local/sbin:/usr/local/bin:/usr/bin")
    if program is None:
        pytest.skip("nginx is missing: install nginx-light")
    folder = tmp_path_factory.mktemp("nginx")
    settings, port = folder / "settings.yaml", free_port()
    settings.write_text("batch: {max_seconds: 0.1}\n")
    with (
        temporary_schema(postgres) as dsn,
        Origin() as origin,
        Mitm(
            folder / "mitm",
            *("--set", f"artifactapi_config={settings}"),
            scripts=[SCRIPT],
            env={"ARTIFACTAPI_DSN": dsn, "ARTIFACTAPI_HOME": str(folder / "home")},
        ) as proxy,
    ):
        configuration = folder / "nginx.conf"
        configuration.write_text(
            _CONFIGURATION.format(folder=folder, port=port, origin=origin.port)
        )
        error_log = str(folder / "error.log")
        nginx = subprocess.Popen(
            [program, "-p", str(folder), "-c", str(configuration), "-e", error_log]
        )
        try:
            eventually(lambda: nginx.poll() is not None or _listens(port))
            assert nginx.poll() is None, (folder / "error.log").read_text()
            yield World(AccessLog(dsn), proxy, origin, port)
        finally:
            nginx.terminate()
            nginx.wait(10)


def _listens(port: int) -> bool:
    try:
        RawClient(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True


def test_a_hit_is_what_the_origin_never_saw_and_all_else_it_did(world: World) -> None:
    chance = random.Random(7)
    names = ["kept", "kept-2", "never", "brief", "checked", "checked-2"]
    dialects = ("word", "x-cache", "rfc9211")
    asked: dict[str, str] = {}

    def ask() -> set[tuple[str, str]]:
        dialect = chance.choice(dialects)
        headers = chance.choice(((), (), (), ("X-Bypass: 1",), (f"If-None-Match: {ETAG}",)))
        asked[world.get(f"/{dialect}/{chance.choice(names)}", *headers)] = dialect
        return {(dialect, world.words[agent]) for agent, dialect in asked.items()}

    for _ in range(200):
        ask()
    # What is kept for a second grows old on_wait: each dialect has to have said each word.
    wanted = {(dialect, word) for dialect in dialects for word in ("HIT", *FORWARDED)}
    eventually(lambda: wanted <= ask(), timeout=30)

    rows = world.rows()
    for agent in asked:
        assert rows[agent]["cache_status"] == world.words[agent]
        reached = 0 if rows[agent]["cache_status"] == "HIT" else 1
        assert world.origin.seen[agent] == reached, rows[agent]
    sources = {"word": "x-cache-status", "x-cache": "x-cache", "rfc9211": "cache-status"}
    assert all(rows[agent]["cache_source"] == sources[asked[agent]] for agent in asked)
    # nginx answers a client's own condition from its cache: still a hit, with nothing to send
    unchanged = [rows[agent] for agent in asked if rows[agent]["status_code"] == 304]
    assert {row["response_bytes"] for row in unchanged} == {0}
    assert {row["cache_source"] for row in unchanged} <= set(sources.values())


def test_what_a_cache_hands_out_while_its_origin_fails_is_stale(world: World) -> None:
    world.get("/word/brief-stale")
    world.origin.broken = True
    try:

        def stale() -> str | None:
            agent = world.get("/word/brief-stale")
            return agent if world.words[agent] == "STALE" else None

        agent = eventually(stale)
    finally:
        world.origin.broken = False
    assert agent
    row = world.rows()[agent]
    assert (row["cache_status"], row["status_code"]) == ("STALE", 200)
    assert row["response_bytes"] == len(BODY)
    assert world.origin.seen[agent] == 1  # it was asked, and its answer not used


def test_the_view_of_caches_counts_as_nginx_does(world: World) -> None:
    for _ in range(5):
        world.get("/word/kept-for-the-view")
    world.rows()
    words = Counter(world.words.values())
    sql = "SELECT sum(requests)::int, sum(hits)::int FROM access_log_cache"
    with psycopg.connect(world.log.dsn) as connection:
        row = connection.execute(sql).fetchone()
    hits = words["HIT"] + words["STALE"] + words["REVALIDATED"]
    assert row == (words.total(), hits)
    assert words["HIT"] >= 4
