"""The page /access-log and the content view, in a real mitmweb: over HTTP, and in a real browser."""

from __future__ import annotations

import html
import json
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
from playwright.sync_api import expect

from exporter import Settings
from exporter.read.selection import FILTER_NAMES
from exporter.rows.entry import AccessLogEntry
from exporter.rows.text import timestamp
from exporter.write.database import Database
from exporter.write.gaps import Gap
from tests.support.accesslog import SCRIPT, AccessLog, own_schema
from tests.support.browser import chromium
from tests.support.clients import fetch
from tests.support.mitmweb import WebInterface
from tests.support.proxy import Mitm
from tests.support.samples import make_entry
from tests.support.upstream import RawUpstream
from tests.support.wait import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

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
_TEXTS = [  # the columns that hold text; tags get into those a client can't reach too
    name
    for name, kind in AccessLogEntry.__annotations__.items()
    if "str" in str(kind)
    and name not in {"started_at", "flow_id", "client_ip", "server_ip", "sha256"}
]
_QUERY_SECONDS = 0.6


@dataclass
class Web:
    """One mitmweb and what is around it."""

    log: AccessLog
    proxy: Mitm
    page: WebInterface
    upstream: RawUpstream

    def ask(self, agent: str, path: str = "/ok") -> dict[str, Any]:
        """Send one request through the proxy; its row."""
        assert fetch(self.proxy.address, f"{self.upstream.url}{path}", f"User-Agent: {agent}")
        return self.log.of(agent)

    def write(self, *entries: AccessLogEntry) -> None:
        """Put rows into the table as another proxy would."""
        database = Database(Settings().with_dsn(self.log.dsn).database)
        try:
            assert database.write(entries) == []
        finally:
            database.close()

    @property
    def address(self) -> str:
        """Of mitmweb, without the token."""
        return self.proxy.web_url.partition("?")[0].rstrip("/")


@pytest.fixture(scope="module")
def web(postgres: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Web]:
    folder = tmp_path_factory.mktemp("log_page")
    settings = folder / "settings.yaml"
    settings.write_text(
        f"batch: {{max_seconds: 0.2}}\npage: {{query_seconds: {_QUERY_SECONDS}}}\n",
        encoding="utf-8",
    )
    with own_schema(postgres) as dsn, RawUpstream() as upstream:
        env = {"ARTIFACTAPI_DSN": dsn, "ARTIFACTAPI_HOME": str(folder / "home")}
        options = ("--set", f"artifactapi_config={settings}")
        with Mitm(folder, *options, scripts=[SCRIPT], env=env, program="mitmweb") as proxy:
            yield Web(AccessLog(dsn), proxy, WebInterface(proxy.web_url), upstream)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def login(browser: Browser, web: Web) -> StorageState:
    """The cookies of whoever came by the address that mitmweb has printed."""
    with browser.new_context() as context:
        context.new_page().goto(web.proxy.web_url)
        return context.storage_state()


@pytest.fixture
def context(browser: Browser, login: StorageState) -> Iterator[BrowserContext]:
    """A browser that is logged in; nothing may go wrong in it."""
    context = browser.new_context(storage_state=login, viewport={"width": 1200, "height": 800})
    context.set_default_timeout(15_000)
    complaints: list[str] = []
    context.on("console", lambda it: complaints.append(it.text) if _is_wrong(it) else None)
    context.on("weberror", lambda it: complaints.append(str(it.error)))
    yield context
    context.close()
    assert complaints == []


def _is_wrong(message: ConsoleMessage) -> bool:
    """A search that can't be understood is answered with 400, which the browser notes too.

    What mitmweb's own page asks for in vain, such as a source of its style sheet, is not ours.
    """
    is_not_ours = "Failed to load resource" in message.text and PAGE not in message.location["url"]
    return message.type == "error" and "status of 400" not in message.text and not is_not_ours


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


def test_the_start_says_where_the_page_is_without_the_token(web: Web) -> None:
    said = f"artifactapi: access log page at {web.address}{PAGE}\n"
    assert eventually(lambda: said in web.proxy.output())


@pytest.mark.parametrize("path", ["", "/row?at=2026-01-01&id=x", "/style.css", "/script.js"])
def test_nobody_gets_in_without_the_token(web: Web, path: str) -> None:
    code, text = web.page.get(PAGE + path, authorized=False)
    assert code == 403
    assert "It is part" not in text
    assert "seen" not in text
    assert web.page.get(f"{PAGE}?token=guessed", authorized=False)[0] == 403


def test_a_form_of_another_site_logs_nobody_in(web: Web) -> None:
    assert web.page.post_without_token(PAGE) == 403


def test_looking_makes_no_rows(web: Web) -> None:
    row = web.ask("before looking")
    before = len(web.log.rows())
    for path in ("", "?part=live", "/style.css", "/script.js", "?text=%25"):
        assert web.page.get(PAGE + path)[0] == 200
    assert web.page.get(
        f"{PAGE}/row?at={row['started_at']:%Y-%m-%dT%H:%M:%S.%f}&id={row['flow_id']}"
    )
    web.ask("after looking")
    assert len(web.log.rows()) == before + 1


def test_yesterday_s_rows_are_found_and_paged(web: Web) -> None:
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
        older = [it for it in text.split('"') if it.startswith("access-log?") and "at=" in it]
        address = f"/{html.unescape(older[-1])}" if older else ""
    assert found == rows, "each once, newest first"


def test_a_row_that_mitmweb_has_not_got_has_no_link_to_a_flow(web: Web) -> None:
    row = _sample(1, _hours_ago(30))
    web.write(row)
    code, text = web.page.get(_address(row))
    assert code == 200
    assert "mitmweb no longer has this flow" in text
    for name in (*AccessLogEntry._fields, "logged_at"):
        assert f"<code>{name}</code>" in text
    assert web.page.get(_address(row._replace(flow_id=str(uuid.uuid4()))))[0] == 404


@pytest.mark.parametrize("value", HOSTILE)
def test_what_a_client_sent_stays_text_in_every_column(web: Web, value: str) -> None:
    row = _sample(1, _hours_ago(0), **dict.fromkeys(_TEXTS, value))
    web.write(row)
    for path in (f"{PAGE}?until=2100-01-01", _address(row)):
        code, text = web.page.get(path)
        assert code == 200
        assert "<script>" not in text
        assert "<img" not in text
        assert "\x1b" not in text
        assert "\u202e" not in text
    shown = text.count(html.escape(value.replace("\u202e", "\\u202e").replace("\x1b", "\\x1b")))
    assert shown >= len(_TEXTS) or "'" in value
    with psycopg.connect(web.log.dsn) as connection:
        connection.execute("DELETE FROM access_log WHERE flow_id = %s", (row.flow_id,))


def test_whoever_comes_by_the_address_of_a_row_logs_in_there(web: Web, browser: Browser) -> None:
    row = web.ask("by its address")
    place = urllib.parse.urlencode({"at": row["started_at"], "id": row["flow_id"]})
    token = urllib.parse.parse_qs(urllib.parse.urlsplit(web.proxy.web_url).query)["token"][0]
    with browser.new_context() as context:
        page = context.new_page()
        page.goto(f"{web.address}{PAGE}/row?{place}")
        page.locator("input[type=password]").fill(token)
        page.keyboard.press("Enter")
        expect(page.locator("table.columns")).to_contain_text(str(row["flow_id"]))


def test_a_page_that_updates_itself_says_that_the_database_does_not_answer(
    web: Web, page: Page
) -> None:
    page.goto(f"{web.address}{PAGE}")
    expect(page.locator("table.rows tbody a").first).to_be_visible()
    with psycopg.connect(web.log.dsn) as connection:
        connection.execute("LOCK TABLE access_log IN ACCESS EXCLUSIVE MODE")
        expect(page.locator("#sentence")).to_contain_text("took too long", timeout=30_000)
    expect(page.locator("#sentence")).to_be_empty(timeout=30_000)


@pytest.mark.parametrize("value", HOSTILE)
def test_what_is_asked_for_stays_text(web: Web, value: str) -> None:
    for name in (*FILTER_NAMES, "at", "id"):
        code, text = web.page.get(f"{PAGE}?{urllib.parse.urlencode({name: value})}")
        assert code in {200, 400}
        assert "<script>" not in text
        assert "<img" not in text


@pytest.mark.parametrize(
    ("query", "sentence"),
    [
        ("status=teapot", "status 'teapot' can't be understood"),
        ("since=yesteryear", "since 'yesteryear' can't be understood"),
        ("slower=fast", "slower 'fast' can't be understood"),
        (
            "since=9999-12-31T23:59:59-14:00",
            "since '9999-12-31T23:59:59-14:00' can't be understood",
        ),
        ("error=1", "error '1' can't be understood"),
        ("at=now&id=7", "The address names no place in the log"),
    ],
)
def test_what_can_t_be_understood_is_said_in_a_sentence(
    web: Web, query: str, sentence: str
) -> None:
    code, text = web.page.get(f"{PAGE}?{query}")
    assert code == 400
    assert sentence in html.unescape(text)
    assert "Traceback" not in text


@pytest.mark.parametrize("path", ["/row", "/row?at=x&id=y", "/row?at=2026-01-01", "/nothing"])
def test_a_wrong_address_is_no_fault_of_the_server(web: Web, path: str) -> None:
    assert web.page.get(PAGE + path)[0] in {400, 404}


def test_a_slow_search_slows_no_request_and_ends_with_a_sentence(web: Web) -> None:
    """The table is locked away from readers: every question waits for its time limit."""
    answers: list[tuple[int, str]] = []
    with psycopg.connect(web.log.dsn) as connection:
        connection.execute("LOCK TABLE access_log IN ACCESS EXCLUSIVE MODE")
        askers = [
            threading.Thread(target=lambda: answers.append(web.page.get(f"{PAGE}?part=live")))
            for _ in range(14)
        ]
        for asker in askers:
            asker.start()
        took = []
        for number in range(20):
            began = time.monotonic()
            assert fetch(web.proxy.address, f"{web.upstream.url}/ok", f"User-Agent: amid-{number}")
            took.append(time.monotonic() - began)
        eventually(lambda: len(answers) == len(askers), timeout=20)
        for asker in askers:
            asker.join()
    assert sorted(took)[len(took) // 2] < 0.2
    texts = [text for code, text in answers if code == 200]
    assert len(texts) == len(askers)
    assert any("took too long and was ended" in text for text in texts)
    assert any("Too many questions wait" in text for text in texts)
    assert all("Logging" in text or "Waiting" in text for text in texts), "the counters are there"
    web.log.wait(20, "user_agent LIKE 'amid-%%'")


def test_a_search_that_takes_long_says_how_far_it_came_and_goes_on_from_there(web: Web) -> None:
    """Each row takes some milliseconds to look through."""
    old = _sample(1, _hours_ago(80), path="/needle", host="slow.example")
    web.write(old, _sample(2, _hours_ago(50), host="slow.example"))
    with psycopg.connect(web.log.dsn, autocommit=True) as connection:
        connection.execute(
            "INSERT INTO access_log (started_at, flow_id, host, path)"
            " SELECT started_at + n * interval '1 minute', gen_random_uuid(), host, repeat('x', 2000000)"
            " FROM access_log, generate_series(1, 300) AS n WHERE host = 'slow.example' AND path <> '/needle'"
        )
        address, pages = f"{PAGE}?text=needle", 0
        while address:
            code, text = web.page.get(address)
            assert code == 200
            assert "took too long" not in text
            pages += 1
            address = ""
            if "Searched back to " in text:
                assert "No row that matches so far." in text
                (link,) = [
                    it for it in text.split('"') if it.startswith("access-log?") and "at=" in it
                ]
                address = f"/{html.unescape(link)}"
        connection.execute("DELETE FROM access_log WHERE host = 'slow.example'")
    assert 1 < pages < 100
    assert old.flow_id in text


def test_gaps_are_shown(web: Web) -> None:
    now = timestamp(time.time())
    database = Database(Settings().with_dsn(web.log.dsn).database)
    database.write_gaps([Gap(str(uuid.uuid4()), SCRIPT_TAG, now, now, "rejected", 1234)])
    database.close()
    text = web.page.get(PAGE)[1]
    assert "1,234" in text
    assert html.escape(SCRIPT_TAG) in text
    assert "<script>" not in text


def _view(web: Web, flow_id: object, part: str = "request", view: str = "access%20log") -> Any:
    code, text = web.page.get(f"/flows/{flow_id}/{part}/content/{view}.json")
    assert code == 200
    return json.loads(text)


def test_the_content_view_shows_the_row(web: Web) -> None:
    paths = ("/ok?token=s3cret", "/status/404", "/chunked", "/close-before-head")
    for number, path in enumerate(paths):
        row = web.ask(f"viewed {number}", path)
        found = _view(web, row["flow_id"])
        assert found["view_name"] == "access log"
        shown = yaml.safe_load(found["text"])
        assert "s3cret" not in found["text"]
        assert datetime.fromisoformat(shown.pop("started_at")) == row.pop("started_at")
        for name, value in shown.items():
            wanted = row[name]
            if isinstance(value, float):
                assert wanted == pytest.approx(value, rel=1e-5), name
            else:
                assert value == (wanted if isinstance(wanted, int | None) else str(wanted)), name


def test_the_content_view_is_never_chosen_by_itself(web: Web) -> None:
    row = web.ask("not chosen")
    for part in ("request", "response"):
        assert _view(web, row["flow_id"], part, "Auto")["view_name"] != "access log"


def test_the_content_view_leads_to_the_row(web: Web) -> None:
    row = web.ask("leads on")
    text = _view(web, row["flow_id"])["text"]
    (address,) = [word for word in text.split() if word.startswith(f"{PAGE}/row?")]
    code, found = web.page.get(address)
    assert code == 200
    assert str(row["flow_id"]) in found


# --- in a browser


def test_a_stranger_logs_in_on_the_page_itself(browser: Browser, web: Web) -> None:
    context = browser.new_context()
    page = context.new_page()
    page.goto(f"{web.address}{PAGE}?text=demo")
    page.get_by_label("Password or token").fill("wrong")
    page.get_by_role("button", name="Log in").click()
    expect(page.get_by_text("That was not the password.")).to_be_visible()
    page.get_by_label("Password or token").fill(web.proxy.web_url.partition("token=")[2])
    page.get_by_role("button", name="Log in").click()
    expect(page.get_by_role("status")).to_contain_text("Logging")
    assert page.get_by_role("searchbox").input_value() == "demo", "where they wanted to go"
    context.close()


def test_rows_arrive_by_themselves_and_wait_when_told_to(web: Web, page: Page) -> None:
    web.ask("there before")
    page.goto(f"{web.address}{PAGE}")
    for number in range(3):
        fetch(web.proxy.address, f"{web.upstream.url}/status/207?n={number}")
    arrived = page.locator("table.rows tr", has_text="/status/207")
    expect(arrived).to_have_count(3, timeout=10_000)
    first = page.locator("table.rows tbody a").first
    first.focus()
    name = first.get_attribute("id")
    web.ask("one more")
    expect(page.locator("table.rows tbody a").nth(1)).to_have_id(name or "", timeout=10_000)
    expect(page.locator(f"[id='{name}']")).to_be_focused()
    page.get_by_role("button", name="Pause updates").click()
    web.ask("not yet", "/status/208")
    expect(page.get_by_role("button", name="Go on updating")).to_be_visible()
    with pytest.raises(AssertionError):
        expect(page.locator("table.rows")).to_contain_text("/status/208", timeout=3_000)
    page.get_by_role("button", name="Go on updating").press("Enter")
    expect(page.locator("table.rows")).to_contain_text("/status/208", timeout=10_000)


def test_a_search_a_row_its_flow_and_back_by_keyboard_alone(web: Web, page: Page) -> None:
    row = web.ask("sought", "/status/226")
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


def test_a_click_anywhere_on_a_row_opens_it(web: Web, page: Page) -> None:
    web.ask("clicked")
    page.goto(f"{web.address}{PAGE}")
    page.locator("table.rows tbody tr").first.locator(".what").click()
    page.wait_for_url("**/row?*")


def test_a_search_that_finds_nothing_or_is_none_says_so(web: Web, page: Page) -> None:
    page.goto(f"{web.address}{PAGE}")
    page.get_by_role("searchbox").fill("no such thing anywhere")
    page.get_by_role("button", name="Search").click()
    expect(page.locator("table.rows")).to_contain_text("No row matches.")
    page.get_by_role("link", name="Everything").click()
    expect(page.locator("table.rows tbody a").first).to_be_visible()


def test_rows_cleared_in_mitmweb_are_still_there(web: Web, page: Page) -> None:
    web.ask("cleared", "/status/299")
    assert web.page.post("/clear") == 200
    page.goto(f"{web.address}{PAGE}?text=/status/299")
    page.locator("table.rows tbody a").first.click()
    expect(page.get_by_text("mitmweb no longer has this flow")).to_be_visible()


@pytest.mark.parametrize("value", HOSTILE[:3])
def test_a_hostile_row_runs_nothing(web: Web, page: Page, value: str) -> None:
    row = _sample(1, _hours_ago(0), **dict.fromkeys(_TEXTS, value))
    web.write(row)
    for path in (f"{PAGE}?host={urllib.parse.quote(value.lower())}", PAGE, _address(row)):
        page.goto(f"{web.address}{path}")
        expect(page.locator(".rows, .columns").get_by_text(value).first).to_be_visible()
        assert page.evaluate("window.hit") is None
        assert page.locator("img").count() == 0
    with psycopg.connect(web.log.dsn) as connection:
        connection.execute("DELETE FROM access_log WHERE flow_id = %s", (row.flow_id,))


@pytest.mark.parametrize(("scheme", "width"), [("light", 1200), ("dark", 390)])
def test_everybody_can_use_it(web: Web, page: Page, scheme: Any, width: int) -> None:
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
    with_errors = f"{PAGE}?status=teapot"
    for path in (PAGE, f"{PAGE}?host=registry.example&slower=1ms", with_errors):
        page.goto(f"{web.address}{path}")
        if path != with_errors:
            _check(page)
            page.locator("table.rows tbody a").first.click()
            page.wait_for_url("**/row?*")
        _check(page)


def _check(page: Page) -> None:
    found = Axe().run(page).response["violations"]
    assert [(it["id"], it["nodes"][0]["html"]) for it in found] == []
    sideways = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert page.evaluate(sideways) <= 0, "nothing sticks out at the right"
