"""`artifactapi status`: its figures, its words and its exit status, during an outage too."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from msgspec.structs import replace

from exporter import Exporter, Settings
from exporter.settings import BatchSettings, DatabaseSettings, SpoolSettings
from tests.support.command import call
from tests.support.proxy import free_port
from tests.support.samples import make_exchange
from tests.support.wait import eventually

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.slow


def settings(dsn: str) -> Settings:
    fast = replace(Settings(node="proxy-1\x1b[31m"), batch=BatchSettings(max_seconds=0.05))
    return replace(fast, database=DatabaseSettings(dsn=dsn, retry_max_seconds=0.2))


def wait_for_figures(**figures: object) -> str:
    """Wait until the command shows these figures in JSON; return its ordinary output."""

    def is_shown() -> bool:
        shown = [json.loads(line) for line in call("status", "--json").stdout.splitlines()]
        return any(figures.items() <= it["status"].items() for it in shown)

    eventually(is_shown, timeout=20)
    return call("status").stdout


def test_without_a_proxy() -> None:
    done = call("status")
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.startswith("Error: No proxy with this data folder runs here; ")
    assert call("status", "--bad").returncode == 3
    assert call("--config", "/missing.yaml", "status").returncode == 3


def test_figures_of_a_proxy_that_logs(dsn: str) -> None:
    exporter = Exporter(settings(dsn))
    for number in range(3):
        exporter.log_access(make_exchange(number))
    shown = wait_for_figures(written=3, away=False)
    lines = shown.splitlines()
    assert lines[0].startswith(r"proxy-1\x1b[31m, artifactapi 0.1.0, process ")
    assert lines[0].endswith(" ago")
    assert lines[1:3] == [
        "Logging: Every request is logged.",
        (
            "  requests        3 seen = 3 written, 0 dropped, 0 rejected, 0 waiting, 0 spooled; "
            f"{exporter.status()['in_flight']} in flight"
        ),
    ]
    assert "; last write 20" in lines[3]
    assert " on average; 95 % within " in lines[4]
    assert lines[5].startswith("  space           memory 0 B of 50.3 MB, disk 0 B of 268.4 MB, ")
    assert call("status").returncode == 0
    (line,) = call("status", "--json").stdout.splitlines()
    figures = json.loads(line)
    assert figures["state"] == "running"
    assert figures["age_seconds"] < 10
    assert figures["status"] == exporter.status()
    exporter.stop()
    assert call("status").returncode == 3


def test_figures_during_an_outage() -> None:
    exporter = Exporter(settings(f"host=127.0.0.1 port={free_port()} password=s3cret"))
    exporter.log_access(make_exchange())
    shown = wait_for_figures(spooled=1, away=True)
    assert "\nWaiting: PostgreSQL is unavailable (" in shown
    assert "1 seen = 0 written, 0 dropped, 0 rejected, 0 waiting, 1 spooled" in shown
    assert "nothing written yet" in shown
    assert "s3cret" not in shown + call("status", "--json").stdout
    assert call("status").returncode == 2
    exporter.stop()


def test_lost_requests_decide_the_exit_status(
    dsn: str, query: Callable[..., list[tuple[object, ...]]]
) -> None:
    exporter = Exporter(replace(settings(dsn), spool=SpoolSettings(max_bytes=0)))
    eventually(lambda: query("SELECT to_regclass('access_log') IS NOT NULL") == [(True,)])
    query("ALTER TABLE access_log ADD CONSTRAINT no_teapots CHECK (status_code <> 418)")
    for status_code in (418, 200):
        exporter.log_access(make_exchange(status_code, status_code=status_code))
    shown = wait_for_figures(rejected=1, written=1)
    assert "Logging, with gaps: " in shown
    assert "disk 0 B of 0 B" in shown
    assert call("status").returncode == 1
    exporter.stop()
