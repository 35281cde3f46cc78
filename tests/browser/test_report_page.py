"""The page that `artifactapi report --html` writes, in a real browser: on a phone, in the dark, accessible."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
from axe_playwright_python.sync_playwright import Axe

from tests.support.browser import chromium
from tests.support.command import call
from tests.support.seeded_log import Plan, seeded_log

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from playwright.sync_api import Browser

    from tests.support.postgres import Postgres

NOW = datetime(2026, 3, 5, 12, 10, tzinfo=UTC)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as running:
        yield running


@pytest.fixture(scope="module")
def dsn(postgres: Postgres) -> Iterator[str]:
    with seeded_log(postgres, Plan(3000, NOW, days=30, seed=3)) as log:
        yield log.dsn


@pytest.mark.parametrize(("days", "scheme"), [(1, "light"), (30, "dark"), (400, "light")])
def test_page_fits_every_screen_and_is_accessible(
    dsn: str, browser: Browser, tmp_path: Path, scheme: Any, days: int
) -> None:
    path = tmp_path / "report.html"
    since = NOW - timedelta(days=days)
    span = ("--since", since.isoformat(), "--until", NOW.isoformat())
    assert call("--dsn", dsn, "report", *span, "--html", str(path)).returncode == 0
    with browser.new_context(color_scheme=scheme) as context:
        page = context.new_page()
        page.goto(path.as_uri())
        for width in (320, 390, 800, 1200):
            page.set_viewport_size({"width": width, "height": 800})
            assert page.evaluate("document.scrollingElement.scrollWidth") <= width
            violations = Axe().run(page).response["violations"]
            assert [(each["id"], each["nodes"][0]["html"]) for each in violations] == []
