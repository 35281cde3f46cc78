"""The page /access-log and the content view in a real mitmweb, over HTTP and in a real browser."""

from __future__ import annotations

import html
import json
import statistics
import threading
import time
import urllib.parse
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
import yaml
from axe_playwright_python.sync_playwright import Axe
from click.testing import CliRunner
from playwright.sync_api import expect

from addon.cli.main import main
from exporter import Settings
from exporter.postgres.schema import ensure_schema, grants, schema_name
from exporter.read.selection import ERROR_TYPES, FILTER_NAMES
from exporter.rows.entry import AccessLogEntry
from exporter.rows.text import timestamp
from exporter.write.database import Database
from exporter.write.gaps import Gap
from tests.support.access_log import SCRIPT, AccessLog, temporary_schema
from tests.support.browser import chromium
from tests.support.http1_client import fetch
from tests.support.mitmweb import WebInterface
from tests.support.proxy import Mitm
from tests.support.samples import make_entry
from tests.support.upstream import RawUpstream
from tests.support.wait import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page, StorageState

    from tests.support.postgres import Postgres

PAGE = "/access-log"
SCRIPT_TAG = "<script>window.hit = 1</script>"
HOSTILE = (
    SCRIPT_TAG,
    "'\"><img src=x onerror='window.hit=1'>",
    "</td></table><script>window.hit=1</script>{{ 7*7 }}{% raw page %}",
    "javascript:window.hit=1",
    "\u202egnp.exe \x1b[31m \u0000".replace("\u0000", ""),
)
# All text columns, including those whose text no client can choose.
_TEXT_COLUMNS = [
    name
    for name, kind in AccessLogEntry.__annotations__.items()
    if "str" in str(kind)
    and name not in {"started_at", "flow_id", "client_ip", "server_ip", "sha256"}
]
_QUERY_SECONDS = 0.6


@dataclass
class Web:
    """A running mitmweb with its log and an upstream server."""

    log: AccessLog
    proxy: Mitm
    page: WebInterface
    upstream: RawUpstream

    def send(self, agent: str, path: str = "/ok") -> dict[str, Any]:
        """Send one request through the proxy and return its row."""
        assert fetch(self.proxy.address, f"{self.upstream.url}{path}", f"User-Agent: {agent}")
        return self.log.row_for_agent(agent)

    def write(self, *entries: AccessLogEntry) -> None:
        """Write rows to the table, as another proxy would."""
        database = Database(Settings().with_dsn(self.log.dsn).database)
        try:
            assert database.write(entries) == []
        finally:
            database.close()

    @property
    def address(self) -> str:
        """The base URL of mitmweb, without the token."""
        return self.proxy.web_url.partition("?")[0].rstrip("/")


@pytest.fixture(scope="module")
def web(postgres: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Web]:
    folder = tmp_path_factory.mktemp("log_page")
    settings = folder / "settings.yaml"
    settings.write_text(
        f"batch: {{max_seconds: 0.2}}\npage: {{query_seconds: {_QUERY_SECONDS}}}\n",
        encoding="utf-8",
    )
    with temporary_schema(postgres) as dsn, RawUpstream() as upstream:
        # The page shows times in UTC, whatever the zone of the proxy.
        env = {"ARTIFACTAPI_DSN": dsn, "ARTIFACTAPI_HOME": str(folder / "home"), "TZ": "Asia/Tokyo"}
        options = ("--set", f"artifactapi_config={settings}")
        with Mitm(folder, *options, scripts=[SCRIPT], env=env, program="mitmweb") as proxy:
            yield Web(AccessLog(dsn), proxy, WebInterface(proxy.web_url), upstream)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as running:
        yield running


@pytest.fixture(scope="module")
def login(browser: Browser, web: Web) -> StorageState:
    """The cookies of a user who opened the address that mitmweb printed."""
    with browser.new_context() as context:
        context.new_page().goto(web.proxy.web_url)
        return context.storage_state()


@pytest.fixture
def context(browser: Browser, login: StorageState) -> Iterator[BrowserContext]:
    """A logged-in browser. Any script or console error in it fails the test."""
    context = browser.new_context(storage_state=login, viewport={"width": 1200, "height": 800})
    context.set_default_timeout(15_000)
    errors: list[str] = []
    context.on(
        "console",
        lambda message: errors.append(message.text) if _is_unexpected(message) else None,
    )
    context.on("weberror", lambda error: errors.append(str(error.error)))
    yield context
    context.close()
    assert errors == []


def _is_unexpected(message: ConsoleMessage) -> bool:
    """Ignore two kinds of errors that the browser logs.

    An invalid search gets status 400. And mitmweb's own page requests files that do not exist, such
    as the source of its style sheet.
    """
    is_mitmwebs = "Failed to load resource" in message.text and PAGE not in message.location["url"]
    return message.type == "error" and "status of 400" not in message.text and not is_mitmwebs


@pytest.fixture
def page(context: BrowserContext) -> Page:
    return context.new_page()


def _sample(number: int, at: datetime, **changes: Any) -> AccessLogEntry:
    return make_entry(
        number, started_at=timestamp(at.timestamp()), flow_id=str(uuid.uuid4()), **changes
    )


def _hours_ago(hours: float) -> datetime:
    return datetime.now(UTC) - timedelta(hours=hours)


def _address(row: AccessLogEntry) -> str:
    query = {"at": datetime.fromisoformat(row.started_at).isoformat(), "id": row.flow_id}
    return f"{PAGE}/row?{urllib.parse.urlencode(query)}"


# --- over HTTP


def test_startup_logs_page_url_with_token_as_mitmweb_does(web: Web, browser: Browser) -> None:
    token = web.proxy.web_url.partition("?token=")[2]
    assert len(token) == 32
    url = f"{web.address}{PAGE}?token={token}"
    assert eventually(lambda: f"artifactapi: access log page at {url}\n" in web.proxy.output())
    with browser.new_context() as context:
        page = context.new_page()
        page.goto(f"{url}&text=demo")
        expect(page.get_by_role("status")).to_contain_text("Logging")
        assert page.url == f"{web.address}{PAGE}?text=demo", "users can copy the address"
        page.goto(f"{web.address}{PAGE}")
        expect(page.get_by_role("status")).to_contain_text("Logging")


def test_password_of_mitmweb_is_not_logged(tmp_path: Path) -> None:
    env = {"ARTIFACTAPI_DSN": "host=127.0.0.1 port=1"}
    options = ("--set", "web_password=hunter2")
    with Mitm(tmp_path, *options, scripts=[SCRIPT], env=env, program="mitmweb") as proxy:
        assert eventually(lambda: "/access-log\n" in proxy.output())
        assert "hunter2" not in proxy.output()
        assert proxy.web_url.endswith("/")


def test_mitmweb_links_to_page_only_after_login(web: Web) -> None:
    code, text = web.page.get("/")
    assert code == 200
    assert '<div id="mitmproxy"></div>' in text
    assert text.count('href="access-log"') == 1
    code, text = web.page.get("/", authorized=False)
    assert code == 403
    assert "access-log" not in text


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("app.IndexHandler", "artifactapi: no link to the access log page in this mitmweb: "),
        (
            "app.RequestHandler",
            "artifactapi: no access log page in this mitmweb; logging continues: ",
        ),
    ],
)
def test_other_mitmweb_gets_a_warning_and_logging_continues(
    dsn: str, tmp_path: Path, missing: str, message: str
) -> None:
    change = tmp_path / "change.py"
    change.write_text(f"from mitmproxy.tools.web import app\ndel {missing}\n")
    env = {"ARTIFACTAPI_DSN": dsn}
    with (
        RawUpstream() as upstream,
        Mitm(tmp_path, scripts=[change, SCRIPT], env=env, program="mitmweb") as proxy,
    ):
        assert eventually(lambda: message in proxy.output())
        assert fetch(proxy.address, f"{upstream.url}/ok", "User-Agent: still logged")
        AccessLog(dsn).row_for_agent("still logged")
        code, text = WebInterface(proxy.web_url).get("/")
        assert (code, "access-log" in text) == (200, False)
    assert "Traceback" not in proxy.output()


@pytest.mark.parametrize("path", ["", "/row?at=2026-01-01&id=x", "/style.css", "/script.js"])
def test_page_is_refused_without_token(web: Web, path: str) -> None:
    code, text = web.page.get(PAGE + path, authorized=False)
    assert code == 403
    assert "Search host" not in text
    assert "seen" not in text
    assert web.page.get(f"{PAGE}?token=guessed", authorized=False)[0] == 403


def test_form_of_another_site_cannot_log_in(web: Web) -> None:
    assert web.page.post_without_token(PAGE) == 403


def test_viewing_page_writes_no_rows(web: Web) -> None:
    row = web.send("before viewing")
    before = len(web.log.rows())
    for path in ("", "?part=live", "/style.css", "/script.js", "?text=%25"):
        assert web.page.get(PAGE + path)[0] == 200
    assert web.page.get(
        f"{PAGE}/row?at={row['started_at']:%Y-%m-%dT%H:%M:%S.%f}&id={row['flow_id']}"
    )
    web.send("after viewing")
    assert len(web.log.rows()) == before + 1


def test_rows_of_yesterday_are_found_on_several_pages(web: Web) -> None:
    rows = [
        _sample(n, _hours_ago(24 + n / 100), host="yesterday.example", status_code=418)
        for n in range(120)
    ]
    web.write(*rows)
    address, found = f"{PAGE}?host=yesterday.example&status=4xx", []
    while address:
        code, text = web.page.get(address)
        assert code == 200
        found += [row for row in rows if row.flow_id in text]
        older = _links_to_older_rows(text)
        address = older[-1] if older else ""
    assert found == rows, "each row once, newest first"


def test_form_has_a_field_for_each_filter_and_keeps_its_value(web: Web) -> None:
    values = {"status": "404", "error": "dns", "slower": "1ms", "since": "7d", "until": "1d"}
    values |= {"client": "192.0.2.0/24", "failed": "yes"}
    for name in FILTER_NAMES:
        value = values.get(name, "abc")
        code, text = web.page.get(f"{PAGE}?{urllib.parse.urlencode({name: value})}")
        assert code == 200
        assert f'name="{name}" value="{value}"' in " ".join(text.split())


@pytest.mark.parametrize(
    ("query", "paths"),
    [
        ("who=build-9", ["/a"]),
        ("who=192.0.2.77", ["/b"]),
        ("user=build-*", ["/a"]),
        ("client=192.0.2.77", ["/a", "/b"]),
        ("client=192.0.2.64/26&method=put", ["/b"]),
        ("node=far-away", ["/b"]),
        ("since=today", ["/b"]),
        ("since=yesterday&until=today", ["/a"]),
        ("until=now", ["/a", "/b"]),
        ("failed=yes", []),
        ("failed=no", ["/a", "/b"]),
    ],
)
def test_search_by_who_client_method_node_and_day(web: Web, query: str, paths: list[str]) -> None:
    midnight = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    host = f"{uuid.uuid4()}.example"
    both = {"host": host, "client_ip": "192.0.2.77", "scheme": "https", "port": 443}
    before = midnight - timedelta(seconds=1)
    web.write(
        _sample(1, before, **both, path="/a", proxy_user="build-9"),
        _sample(2, midnight, **both, path="/b", proxy_user=None, method="PUT", node="far-away"),
    )
    code, text = web.page.get(f"{PAGE}?host={host}&{query}")
    assert code == 200
    assert [path for path in ("/a", "/b") if f"https://{host}{path}<" in text] == paths


def test_page_reads_with_read_dsn(dsn: str, tmp_path: Path) -> None:
    """The role of the proxy can only write."""
    roles = ("page_proxy", "page_reader")
    writer, reader = (dsn.replace("user=postgres", f"user={role}") for role in roles)
    settings = tmp_path / "settings.yaml"
    settings.write_text(f"batch: {{max_seconds: 0.2}}\nread: {{dsn: '{reader}'}}\n")
    options = ("--set", f"artifactapi_config={settings}", "--set", f"artifactapi_dsn={writer}")
    with psycopg.connect(dsn, autocommit=True) as connection:
        ensure_schema(connection)
        for role in roles:
            connection.execute(f"CREATE ROLE {role} LOGIN".encode())
        try:
            connection.execute(grants(schema_name(connection), *roles).encode())
            with (
                RawUpstream() as upstream,
                Mitm(tmp_path, *options, scripts=[SCRIPT], program="mitmweb") as proxy,
            ):
                assert fetch(proxy.address, f"{upstream.url}/ok", "User-Agent: two roles")
                AccessLog(dsn).row_for_agent("two roles")
                code, text = WebInterface(proxy.web_url).get(PAGE)
        finally:
            connection.execute("DROP OWNED BY page_proxy, page_reader")
            connection.execute("DROP ROLE page_proxy, page_reader")
    assert code == 200
    assert f"{upstream.url}/ok" in text


def _links_to_older_rows(page: str) -> list[str]:
    return [
        f"/{html.unescape(word)}"
        for word in page.split('"')
        if word.startswith("access-log?") and "at=" in word
    ]


def test_row_without_flow_in_mitmweb_has_no_link_to_flow(web: Web) -> None:
    row = _sample(1, _hours_ago(30))
    web.write(row)
    code, text = web.page.get(_address(row))
    assert code == 200
    assert "mitmweb no longer has this flow" in text
    for name in (*AccessLogEntry._fields, "logged_at"):
        assert f"<code>{name}</code>" in text
    assert web.page.get(_address(row._replace(flow_id=str(uuid.uuid4()))))[0] == 404


@pytest.mark.parametrize("value", HOSTILE)
def test_text_from_clients_is_escaped_in_every_column(web: Web, value: str) -> None:
    row = _sample(1, _hours_ago(0), **dict.fromkeys(_TEXT_COLUMNS, value))
    web.write(row)
    for path in (f"{PAGE}?until=2100-01-01", _address(row)):
        code, text = web.page.get(path)
        assert code == 200
        assert "<script>" not in text
        assert "<img" not in text
        assert "\x1b" not in text
        assert "\u202e" not in text
    shown = text.count(html.escape(value.replace("\u202e", "\\u202e").replace("\x1b", "\\x1b")))
    assert shown >= len(_TEXT_COLUMNS) or "'" in value
    with psycopg.connect(web.log.dsn) as connection:
        connection.execute("DELETE FROM access_log WHERE flow_id = %s", (row.flow_id,))


def test_login_at_row_url_leads_to_row(web: Web, browser: Browser) -> None:
    row = web.send("by its URL")
    query = urllib.parse.urlencode({"at": row["started_at"], "id": row["flow_id"]})
    token = urllib.parse.parse_qs(urllib.parse.urlsplit(web.proxy.web_url).query)["token"][0]
    with browser.new_context() as context:
        page = context.new_page()
        page.goto(f"{web.address}{PAGE}/row?{query}")
        page.locator("input[type=password]").fill(token)
        page.keyboard.press("Enter")
        expect(page.locator("table.columns")).to_contain_text(str(row["flow_id"]))


def test_live_update_shows_and_clears_database_timeout(web: Web, page: Page) -> None:
    page.goto(f"{web.address}{PAGE}")
    expect(page.locator("table.rows tbody a").first).to_be_visible()
    with psycopg.connect(web.log.dsn) as connection:
        connection.execute("LOCK TABLE access_log IN ACCESS EXCLUSIVE MODE")
        expect(page.locator("#alert")).to_contain_text("took too long", timeout=30_000)
    expect(page.locator("#alert")).to_be_empty(timeout=30_000)


@pytest.mark.parametrize("value", HOSTILE)
def test_text_in_url_is_escaped(web: Web, value: str) -> None:
    for name in (*FILTER_NAMES, "at", "id"):
        code, text = web.page.get(f"{PAGE}?{urllib.parse.urlencode({name: value})}")
        assert code in {200, 400}
        assert "<script>" not in text
        assert "<img" not in text


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("status=teapot", "status 'teapot' is not valid"),
        ("since=yesteryear", "since 'yesteryear' is not valid"),
        ("slower=fast", "slower 'fast' is not valid"),
        (
            "since=9999-12-31T23:59:59-14:00",
            "since '9999-12-31T23:59:59-14:00' is not valid",
        ),
        ("error=1", "error '1' is not valid; expected any, none, dns, connect"),
        ("method=GE%20T", "method 'GE T' is not valid"),
        ("client=192.0.2", "client '192.0.2' is not valid; expected an address"),
        ("since=1h&until=2h", "since must be earlier than until."),
        ("at=now&id=7", "The address has no valid position in the log"),
    ],
)
def test_invalid_search_gets_status_400_and_message(web: Web, query: str, message: str) -> None:
    code, text = web.page.get(f"{PAGE}?{query}")
    assert code == 400
    assert message in html.unescape(text)
    assert "Traceback" not in text


@pytest.mark.parametrize("path", ["/row", "/row?at=x&id=y", "/row?at=2026-01-01", "/nothing"])
def test_invalid_url_is_a_client_error(web: Web, path: str) -> None:
    assert web.page.get(PAGE + path)[0] in {400, 404}


def test_slow_queries_do_not_delay_proxy_and_end_with_message(web: Web) -> None:
    """The table is locked, so every query runs into its time limit."""
    answers: list[tuple[int, str]] = []
    with psycopg.connect(web.log.dsn) as connection:
        connection.execute("LOCK TABLE access_log IN ACCESS EXCLUSIVE MODE")
        viewers = [
            threading.Thread(target=lambda: answers.append(web.page.get(f"{PAGE}?part=live")))
            for _ in range(14)
        ]
        for viewer in viewers:
            viewer.start()
        durations_s = []
        for number in range(20):
            started_at = time.monotonic()
            assert fetch(
                web.proxy.address, f"{web.upstream.url}/ok", f"User-Agent: meanwhile-{number}"
            )
            durations_s.append(time.monotonic() - started_at)
        eventually(lambda: len(answers) == len(viewers), timeout=20)
        for viewer in viewers:
            viewer.join()
    assert statistics.median(durations_s) < 0.2
    texts = [text for code, text in answers if code == 200]
    assert len(texts) == len(viewers)
    assert any("took too long and was canceled" in text for text in texts)
    assert any("Too many queries are waiting" in text for text in texts)
    assert all("Logging" in text or "Waiting" in text for text in texts), "the counters are shown"
    web.log.wait_rows(20, "user_agent LIKE 'meanwhile-%%'")


def test_long_search_reports_how_far_it_got_and_continues_from_there(web: Web) -> None:
    """Each row is so large that searching it takes some milliseconds."""
    old = _sample(1, _hours_ago(80), path="/needle", host="slow.example")
    web.write(old, _sample(2, _hours_ago(50), host="slow.example"))
    with psycopg.connect(web.log.dsn, autocommit=True) as connection:
        # The rows of five hours may reach into the next day.
        connection.execute(
            "SELECT access_log_ensure_partition((started_at + interval '5 hours')::date)"
            " FROM access_log WHERE host = 'slow.example'"
        )
        connection.execute(
            "INSERT INTO access_log (started_at, flow_id, host, path)"
            " SELECT started_at + n * interval '1 minute', gen_random_uuid(), host, repeat('x', 2000000)"
            " FROM access_log, generate_series(1, 300) AS n WHERE host = 'slow.example' AND path <> '/needle'"
        )
        address, text, pages = f"{PAGE}?text=needle", "", 0
        try:
            # A page may stop right behind the match: what it found is then shown, and older rows are left.
            while address and pages < 100:
                code, text = web.page.get(address)
                assert code == 200
                assert "took too long" not in text
                pages += 1
                address = ""
                if old.flow_id not in text:
                    assert "Searched back to " in text
                    assert "No matching rows so far." in text
                    (address,) = _links_to_older_rows(text)
        finally:
            connection.execute("DELETE FROM access_log WHERE host = 'slow.example'")
    assert 1 < pages < 100
    assert old.flow_id in text


def test_reason_why_the_database_is_unavailable_is_stated_once(tmp_path: Path) -> None:
    env = {"ARTIFACTAPI_DSN": "host=127.0.0.1 port=1 user=me dbname=log"}
    with Mitm(tmp_path, scripts=[SCRIPT], env=env, program="mitmweb") as proxy:
        page = WebInterface(proxy.web_url)
        eventually(lambda: "PostgreSQL unavailable" in proxy.output())
        text = html.unescape(page.get(PAGE)[1])
        log = proxy.output()
    reason = 'connection to server at "127.0.0.1", port 1 failed: Connection refused'
    assert text.count("failed: Connection refused") == 1
    assert f"PostgreSQL is unavailable ({reason}): 0 requests waiting, none lost." in text
    assert "No rows can be shown until PostgreSQL is available again." in text
    assert f"artifactapi: PostgreSQL unavailable; buffering rows: {reason}\n" in log


def test_gaps_are_listed(web: Web) -> None:
    now = timestamp(time.time())
    database = Database(Settings().with_dsn(web.log.dsn).database)
    database.write_gaps([Gap(str(uuid.uuid4()), SCRIPT_TAG, now, now, "rejected", 1234)])
    database.close()
    text = web.page.get(PAGE)[1]
    assert "1,234" in text
    assert html.escape(SCRIPT_TAG) in text
    assert "<script>" not in text


def test_packages_that_kept_advisories_are_about_are_marked(web: Web, tmp_path: Path) -> None:
    now = datetime.now(UTC)
    for number, version in enumerate(("1.3.0", "1.2.0")):
        web.write(
            _sample(
                700 + number,
                now,
                purl=f"pkg:npm/left-pad@{version}",
                package="left-pad",
                artifact_kind="artifact",
                host="marks.example",
                artifact_complete=True,
            )
        )
    assert "compared with advisories" not in web.page.get(f"{PAGE}?host=marks.example")[1]
    bad = tmp_path / "<b>bad.txt"
    bad.write_text("pkg:npm/left-pad@1.3.0\n")
    command = ["affected", "--keep", str(bad)]
    done = CliRunner(env={"ARTIFACTAPI_DSN": web.log.dsn}).invoke(main, command)
    assert done.exit_code in {1, 2}, done.output  # other tests leave gaps
    try:
        code, text = web.page.get(f"{PAGE}?host=marks.example")
        assert code == 200
        assert "; compared with advisories 20" in text
        assert text.count('class="advisory affected"') == 1
        assert "affected: <bdi>&lt;b&gt;bad.txt</bdi>" in text
    finally:
        with psycopg.connect(web.log.dsn, autocommit=True) as connection:
            connection.execute("TRUNCATE advisory, advisory_match, advisory_state")


def test_proxies_are_summed_up(web: Web) -> None:
    text = eventually(
        lambda: text if "proxy running" in (text := web.page.get(PAGE)[1]) else "", timeout=15
    )
    assert '<p id="proxies" class="green">' in text or '<p id="proxies" class="red">' in text
    with psycopg.connect(web.log.dsn, autocommit=True) as connection:
        connection.execute("DELETE FROM access_log_gap")
        connection.execute(
            "INSERT INTO access_log_run (run_id, node, started_at, last_seen_at, seen, written, dropped, rejected,"
            " spooled, owner) SELECT gen_random_uuid(), 'gone', now() - interval '2 hours',"
            " now() - interval '1 hour', 0, 0, 0, 0, 0, session_user"
        )
        try:
            text = web.page.get(PAGE)[1]
        finally:
            connection.execute("DELETE FROM access_log_run WHERE node = 'gone'")
    assert '<p id="proxies" class="amber">' in text
    assert "1 proxy running, 1 silent since 20" in text


def _content_view(
    web: Web, flow_id: object, part: str = "request", view: str = "access%20log"
) -> Any:
    code, text = web.page.get(f"/flows/{flow_id}/{part}/content/{view}.json")
    assert code == 200
    return json.loads(text)


def test_content_view_shows_row(web: Web) -> None:
    paths = ("/ok?token=s3cret", "/status/404", "/chunked", "/close-before-head")
    for number, path in enumerate(paths):
        row = web.send(f"viewed {number}", path)
        content = _content_view(web, row["flow_id"])
        assert content["view_name"] == "access log"
        shown = yaml.safe_load(content["text"])
        assert "s3cret" not in content["text"]
        assert datetime.fromisoformat(shown.pop("started_at")) == row.pop("started_at")
        for name, value in shown.items():
            stored = row[name]
            if isinstance(value, float):
                assert stored == pytest.approx(value, rel=1e-5), name
            else:
                assert value == (stored if isinstance(stored, int | None) else str(stored)), name


def test_content_view_is_never_selected_automatically(web: Web) -> None:
    row = web.send("not selected")
    for part in ("request", "response"):
        assert _content_view(web, row["flow_id"], part, "Auto")["view_name"] != "access log"


def test_content_view_has_url_of_row(web: Web) -> None:
    row = web.send("has URL")
    text = _content_view(web, row["flow_id"])["text"]
    (address,) = [word for word in text.split() if word.startswith(f"{PAGE}/row?")]
    code, page = web.page.get(address)
    assert code == 200
    assert str(row["flow_id"]) in page


# --- in a browser


def test_user_can_log_in_on_page(browser: Browser, web: Web) -> None:
    context = browser.new_context()
    page = context.new_page()
    page.goto(f"{web.address}{PAGE}?text=demo")
    page.get_by_label("Password or token").fill("wrong")
    page.get_by_role("button", name="Log in").click()
    expect(page.get_by_text("Wrong password.")).to_be_visible()
    page.get_by_label("Password or token").fill(web.proxy.web_url.partition("token=")[2])
    page.get_by_role("button", name="Log in").click()
    expect(page.get_by_role("status")).to_contain_text("Logging")
    assert page.get_by_role("searchbox").input_value() == "demo", "the search is kept"
    context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_link_in_mitmweb_leads_to_page_and_back(web: Web, page: Page, scheme: Any) -> None:
    web.send(f"linked {scheme}")
    page.emulate_media(color_scheme=scheme)
    page.goto(f"{web.address}/")
    expect(page.get_by_text("Flow List")).to_be_visible()
    link = page.get_by_role("link", name="Access log")
    expect(link).to_be_in_viewport()
    link.click()  # mitmweb itself handles all keys, even Tab and Enter
    page.wait_for_url(f"**{PAGE}")
    page.get_by_role("link", name="Flows in mitmweb").click()
    expect(page.get_by_text("Flow List")).to_be_visible()


def test_rows_update_until_paused_and_keep_focus(web: Web, page: Page) -> None:
    web.send("already there")
    page.goto(f"{web.address}{PAGE}")
    for number in range(3):
        fetch(web.proxy.address, f"{web.upstream.url}/status/207?n={number}")
    new_rows = page.locator("table.rows tr", has_text="/status/207")
    expect(new_rows).to_have_count(3, timeout=10_000)
    first = page.locator("table.rows tbody a").first
    first.focus()
    row_id = first.get_attribute("id")
    web.send("one more")
    expect(page.locator("table.rows tbody a").nth(1)).to_have_id(row_id or "", timeout=10_000)
    expect(page.locator(f"[id='{row_id}']")).to_be_focused()
    page.get_by_role("button", name="Pause updates").click()
    web.send("during the pause", "/status/208")
    expect(page.get_by_role("button", name="Resume updates")).to_be_visible()
    with pytest.raises(AssertionError):
        expect(page.locator("table.rows")).to_contain_text("/status/208", timeout=3_000)
    page.get_by_role("button", name="Resume updates").press("Enter")
    expect(page.locator("table.rows")).to_contain_text("/status/208", timeout=10_000)


def test_search_row_flow_and_back_work_by_keyboard(web: Web, page: Page) -> None:
    row = web.send("searched", "/status/226")
    page.goto(f"{web.address}{PAGE}")
    page.keyboard.press("/")
    page.keyboard.type("/status/226")
    page.keyboard.press("Enter")
    page.wait_for_url("**text=*")
    expect(page.locator("table.rows tbody tr")).to_have_count(1)
    page.locator("table.rows tbody a").focus()
    page.keyboard.press("Enter")
    page.wait_for_url("**/row?*")
    expect(page.locator("table.columns tbody tr")).to_have_count(len(AccessLogEntry._fields) + 1)
    expect(page.locator("table.columns")).to_contain_text(str(row["flow_id"]))
    page.get_by_role("link", name="Open the flow in mitmweb").press("Enter")
    page.wait_for_url(f"**/#/flows/{row['flow_id']}/request*")
    expect(page.locator(".flow-detail, .flow-table .selected").first).to_be_visible()
    page.go_back()
    page.get_by_role("link", name="Back to the log").press("Enter")
    page.wait_for_url("**text=*")
    expect(page.get_by_role("searchbox")).to_have_value("/status/226")


def test_click_anywhere_on_row_opens_it(web: Web, page: Page) -> None:
    web.send("clicked")
    page.goto(f"{web.address}{PAGE}")
    page.locator("table.rows tbody tr").first.locator(".url").click()
    page.wait_for_url("**/row?*")


def test_search_without_match_says_so_and_can_be_cleared(web: Web, page: Page) -> None:
    page.goto(f"{web.address}{PAGE}")
    page.get_by_role("searchbox").fill("no such thing anywhere")
    page.get_by_role("button", name="Search").click()
    expect(page.locator("table.rows")).to_contain_text("No rows match.")
    page.get_by_role("link", name="Show all").click()
    expect(page.locator("table.rows tbody a").first).to_be_visible()


def test_user_finds_the_requests_of_one_client(web: Web, page: Page) -> None:
    host = f"{uuid.uuid4()}.example"
    anonymous = {"host": host, "proxy_user": None}
    web.write(
        _sample(1, _hours_ago(0), **anonymous, client_ip="2001:db8::1", path="/one"),
        _sample(2, _hours_ago(0), **anonymous, client_ip="2001:db8::2", path="/two"),
    )
    page.goto(f"{web.address}{PAGE}")
    page.get_by_text("More filters").click()
    page.get_by_label("Host", exact=True).fill(host)
    page.get_by_label("Who", exact=True).fill("2001:db8::2")
    page.get_by_role("button", name="Search").click()
    expect(page.locator("table.rows tbody tr")).to_have_count(1)
    expect(page.locator("table.rows tbody")).to_contain_text("/two")
    expect(page.locator("table.rows tbody")).to_contain_text("2001:db8::2")
    expect(page.get_by_label("Who", exact=True)).to_be_visible()


def test_rows_stay_when_flows_are_cleared_in_mitmweb(web: Web, page: Page) -> None:
    web.send("cleared", "/status/299")
    assert web.page.post("/clear") == 200
    page.goto(f"{web.address}{PAGE}?text=/status/299")
    page.locator("table.rows tbody a").first.click()
    expect(page.get_by_text("mitmweb no longer has this flow")).to_be_visible()


@pytest.mark.parametrize("value", HOSTILE[:3])
def test_hostile_row_runs_no_script(web: Web, page: Page, value: str) -> None:
    row = _sample(1, _hours_ago(0), **dict.fromkeys(_TEXT_COLUMNS, value))
    web.write(row)
    for path in (f"{PAGE}?host={urllib.parse.quote(value.lower())}", PAGE, _address(row)):
        page.goto(f"{web.address}{path}")
        expect(page.locator(".rows, .columns").get_by_text(value).first).to_be_visible()
        assert page.evaluate("window.hit") is None
        assert page.locator("img").count() == 0
    with psycopg.connect(web.log.dsn) as connection:
        connection.execute("DELETE FROM access_log WHERE flow_id = %s", (row.flow_id,))


def test_chart_has_round_bars_an_axis_a_maximum_and_a_legend(web: Web, page: Page) -> None:
    host = f"{uuid.uuid4()}.example"
    noon = datetime(2026, 3, 5, 12, tzinfo=UTC)
    statuses = (200, 302, 404, 500, None)
    minutes = (0, 5, 59, 60, 65)
    web.write(
        *(
            _sample(n, noon + timedelta(minutes=minute), host=host, status_code=status)
            for n, (minute, status) in enumerate(zip(minutes, statuses, strict=True))
        )
    )
    span = "since=2026-03-05T01:30&until=2026-03-06T01:30"
    page.goto(f"{web.address}{PAGE}?host={host}&{span}")
    chart = page.locator("#traffic")
    expect(chart).to_contain_text("Requests per hour, at most 3 ")
    expect(chart).to_contain_text("2026-03-05 01:30 to 2026-03-06 01:30 UTC")
    expect(chart.locator(".legend li")).to_have_text(
        ["5 requests, 6.2 kB", "ok 2", "refused (4xx) 1", "failed 2 (40.0 %)"]
    )
    times = ["03:00", "06:00", "09:00", "12:00", "15:00", "18:00", "21:00", "03-06"]
    expect(chart.locator(".times span")).to_have_text(times)
    expect(chart.locator(".values span")).to_have_text(["0", "1", "2", "3"])
    titles = chart.locator("title").all_text_contents()
    assert len(titles) == 25
    assert "2026-03-05 12:00 UTC: 3 requests, 1 refused (4xx), 0 failed, 3.7 kB" in titles
    assert "2026-03-05 13:00 UTC: 2 requests, 0 refused (4xx), 2 failed, 2.5 kB" in titles
    top = chart.locator("svg").bounding_box()
    label = chart.locator(".values span").last.bounding_box()
    bar = chart.locator("g", has_text="12:00 UTC").locator("rect.ok").bounding_box()
    assert top
    assert label
    assert bar
    assert bar["y"] == pytest.approx(top["y"], abs=2), "the highest bar reaches the label 3"
    assert label["y"] == pytest.approx(top["y"], abs=2)


def test_one_request_is_singular(web: Web, page: Page) -> None:
    host = f"{uuid.uuid4()}.example"
    web.write(_sample(1, _hours_ago(1), host=host, response_bytes=7))
    page.goto(f"{web.address}{PAGE}?host={host}")
    expect(page.locator("#traffic .legend li").first).to_have_text("1 request, 7 B")
    assert any(": 1 request, " in title for title in page.locator("title").all_text_contents())


def test_rows_name_the_package_decoded(web: Web, page: Page) -> None:
    host = f"{uuid.uuid4()}.example"
    purl = "pkg:deb/debian/g%2B%2B-12@12.2.0-14%2Bdeb12u1?arch=amd64"
    web.write(_sample(1, _hours_ago(1), host=host, purl=purl))
    page.goto(f"{web.address}{PAGE}?host={host}")
    package = page.locator("table.rows .purl")
    expect(package).to_have_text("deb g++-12 12.2.0-14+deb12u1")
    expect(package).to_have_attribute("title", purl)


@pytest.mark.parametrize("width", [390, 800, 1200])
def test_error_types_break_only_between_words(web: Web, page: Page, width: int) -> None:
    host = f"{uuid.uuid4()}.example"
    web.write(
        *(
            _sample(n, _hours_ago(1), host=host, error_type=name, path=f"/{'long-path/' * 40}")
            for n, name in enumerate(ERROR_TYPES)
        )
    )
    page.set_viewport_size({"width": width, "height": 800})
    page.goto(f"{web.address}{PAGE}?host={host}")
    expect(page.locator("table.rows .error")).to_have_count(len(ERROR_TYPES))
    broken = page.evaluate("""() => {
      const broken = [];
      for (const error of document.querySelectorAll("table.rows .error")) {
        for (const node of error.childNodes) {
          const range = document.createRange();
          range.selectNodeContents(node);
          if (range.getClientRects().length > 1) broken.push(node.textContent);
        }
      }
      return broken;
    }""")
    assert broken == []
    _check_no_overflow(page)


@pytest.mark.parametrize(("scheme", "width"), [("light", 1200), ("dark", 390)])
def test_page_is_accessible_in_light_dark_and_on_phone(
    web: Web, page: Page, scheme: Any, width: int
) -> None:
    web.write(
        *(
            _sample(
                n, _hours_ago(n * 3), status_code=status, error_type=error, purl="pkg:pypi/demo@1"
            )
            for n, (status, error) in enumerate(
                [(200, None), (302, None), (404, None), (500, None), (None, "dns")]
            )
        )
    )
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 800})
    invalid_search = f"{PAGE}?status=teapot"
    for path in (PAGE, f"{PAGE}?host=registry.example&slower=1ms", invalid_search):
        page.goto(f"{web.address}{path}")
        if path != invalid_search:
            _check_accessibility(page)
            page.locator("table.rows tbody a").first.click()
            page.wait_for_url("**/row?*")
        _check_accessibility(page)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1200])
def test_login_looks_like_the_rest_of_the_page_and_is_accessible(
    web: Web, browser: Browser, page: Page, scheme: Any, width: int
) -> None:
    def look(shown: Page) -> Any:
        shown.emulate_media(color_scheme=scheme)
        shown.set_viewport_size({"width": width, "height": 800})
        return shown.evaluate("""() => ["body", "h1", "button"].map((name) => {
          const style = getComputedStyle(document.querySelector(name));
          return [style.color, style.backgroundColor, style.font, style.padding, style.borderRadius];
        })""")

    page.goto(f"{web.address}{PAGE}")
    with browser.new_context() as stranger:
        login = stranger.new_page()
        login.goto(f"{web.address}{PAGE}")
        assert look(login) == look(page)
        _check_accessibility(login)
        login.get_by_label("Password or token").fill("wrong")
        login.keyboard.press("Enter")
        expect(login.get_by_role("alert")).to_have_text("Wrong password.")
        _check_accessibility(login)


def _check_accessibility(page: Page) -> None:
    violations = Axe().run(page).response["violations"]
    assert [(it["id"], it["nodes"][0]["html"]) for it in violations] == []
    _check_no_overflow(page)


def _check_no_overflow(page: Page) -> None:
    """The page does not scroll sideways."""
    scroll_width = page.evaluate("document.scrollingElement.scrollWidth")
    assert scroll_width <= page.viewport_size["width"]  # type: ignore[index]
