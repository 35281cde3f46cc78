"""Compare the cache status of rows with a real nginx cache and with what reached its origin."""

from __future__ import annotations

import random
import shutil
import subprocess
from collections import Counter
from typing import TYPE_CHECKING

import psycopg
import pytest

from tests.support.access_log import SCRIPT, AccessLog, Row, temporary_schema
from tests.support.http1_client import RawClient, fetch
from tests.support.http_server import HttpServer, QuietHandler
from tests.support.proxy import Mitm, free_port
from tests.support.wait import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.postgres import Postgres

FORWARDED = ("MISS", "EXPIRED", "REVALIDATED", "BYPASS")
BODY = b"x" * 5000
ETAG = '"the-same"'

# One location for each response header that can carry a cache status: one cache, three formats.
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


class Origin(HttpServer):
    """Counts the requests that reach it by user agent; the path sets how long to cache a response.

    Attributes:
        seen: The number of requests of each user agent.
        broken: Makes every response a 500.
    """

    def __init__(self) -> None:
        self.seen: Counter[str] = Counter()
        self.broken = False
        outer = self

        class Handler(_OriginHandler):
            origin = outer

        super().__init__(Handler)


class _OriginHandler(QuietHandler):
    origin: Origin

    def do_GET(self) -> None:  # noqa: N802 - the base class requires this name
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


class CacheSetup:
    """The chain of client, proxy, nginx and origin.

    Attributes:
        nginx_statuses: The cache status in nginx's X-Truth header, which artifactapi ignores, by user agent.
    """

    def __init__(self, log: AccessLog, proxy: Mitm, origin: Origin, port: int) -> None:
        self.log = log
        self.origin = origin
        self._proxy = proxy
        self._url = f"http://127.0.0.1:{port}"
        self.nginx_statuses: dict[str, str] = {}

    def get(self, path: str, *headers: str) -> str:
        """Send one request; return its user agent, which no other request has."""
        agent = f"client-{len(self.nginx_statuses) + 1}"
        url = self._url + path
        response = fetch(self._proxy.address, url, *headers, f"User-Agent: {agent}")
        assert response
        self.nginx_statuses[agent] = response.header("x-truth")
        return agent

    def rows(self) -> dict[str, Row]:
        """Wait for the rows of all requests; return them by user agent."""
        rows = {row["user_agent"]: row for row in self.log.wait_rows(len(self.nginx_statuses))}
        assert rows.keys() == self.nginx_statuses.keys()
        return rows


@pytest.fixture(scope="module")
def setup(postgres: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[CacheSetup]:
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
            yield CacheSetup(AccessLog(dsn), proxy, origin, port)
        finally:
            nginx.terminate()
            nginx.wait(10)


def _listens(port: int) -> bool:
    try:
        RawClient(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True


def test_only_hits_do_not_reach_the_origin(setup: CacheSetup) -> None:
    rng = random.Random(7)
    names = ["kept", "kept-2", "never", "brief", "checked", "checked-2"]
    formats = ("word", "x-cache", "rfc9211")
    requests: dict[str, str] = {}  # the format of each request, by user agent

    def send_random_request() -> set[tuple[str, str]]:
        """Return every pair of format and cache status received so far."""
        chosen = rng.choice(formats)
        headers = rng.choice(((), (), (), ("X-Bypass: 1",), (f"If-None-Match: {ETAG}",)))
        requests[setup.get(f"/{chosen}/{rng.choice(names)}", *headers)] = chosen
        return {(name, setup.nginx_statuses[agent]) for agent, name in requests.items()}

    for _ in range(200):
        send_random_request()
    # Some responses expire after a second. Continue until every format has carried every status.
    wanted = {(name, status) for name in formats for status in ("HIT", *FORWARDED)}
    eventually(lambda: wanted <= send_random_request(), timeout=30)

    rows = setup.rows()
    for agent in requests:
        assert rows[agent]["cache_status"] == setup.nginx_statuses[agent]
        reached = 0 if rows[agent]["cache_status"] == "HIT" else 1
        assert setup.origin.seen[agent] == reached, rows[agent]
    sources = {"word": "x-cache-status", "x-cache": "x-cache", "rfc9211": "cache-status"}
    assert all(rows[agent]["cache_source"] == sources[requests[agent]] for agent in requests)
    # nginx answers a conditional request from its cache: this is a hit with an empty body.
    unchanged = [rows[agent] for agent in requests if rows[agent]["status_code"] == 304]
    assert {row["response_bytes"] for row in unchanged} == {0}
    assert {row["cache_source"] for row in unchanged} <= set(sources.values())


def test_response_served_while_origin_fails_is_stale(setup: CacheSetup) -> None:
    setup.get("/word/brief-stale")
    setup.origin.broken = True
    try:

        def get_stale_response() -> str | None:
            agent = setup.get("/word/brief-stale")
            return agent if setup.nginx_statuses[agent] == "STALE" else None

        agent = eventually(get_stale_response)
    finally:
        setup.origin.broken = False
    assert agent
    row = setup.rows()[agent]
    assert (row["cache_status"], row["status_code"]) == ("STALE", 200)
    assert row["response_bytes"] == len(BODY)
    assert setup.origin.seen[agent] == 1  # nginx asked the origin and discarded its response


def test_cache_view_has_the_same_counts_as_nginx(setup: CacheSetup) -> None:
    for _ in range(5):
        setup.get("/word/kept-for-the-view")
    setup.rows()
    counts = Counter(setup.nginx_statuses.values())
    sql = "SELECT sum(requests)::int, sum(hits)::int FROM access_log_cache"
    with psycopg.connect(setup.log.dsn) as connection:
        row = connection.execute(sql).fetchone()
    hits = counts["HIT"] + counts["STALE"] + counts["REVALIDATED"]
    assert row == (counts.total(), hits)
    assert counts["HIT"] >= 4
