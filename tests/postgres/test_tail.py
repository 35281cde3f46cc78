"""`artifactapi tail`: the newest rows and new ones, on a terminal, in a pipe, and while the database is down."""

from __future__ import annotations

import json
import re
import signal
import statistics
import time
from typing import TYPE_CHECKING

import psycopg
import pytest
from click.testing import CliRunner
from rich.cells import cell_len

from addon.cli.main import main
from exporter import Settings
from exporter.read.selection import Selection
from exporter.read.session import open_database
from exporter.read.tail import Follower
from exporter.write.database import COLUMNS, Database, insert_access_log_batch
from tests.support.command import call, started, write
from tests.support.relay import Relay
from tests.support.samples import make_entry
from tests.support.terminal import on_terminal
from tests.support.wait import eventually

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.postgres import Postgres

pytestmark = pytest.mark.slow

LONG = "/packages/" + "deep/" * 30 + "demo-1.2.3.tar.gz"
_GXX = "deb g++-12 12.2.0-14+deb12u1"
_ESCAPE = re.compile(r"\x1b\[[0-9;]*m")


def test_newest_rows_without_colors_in_a_pipe(dsn: str) -> None:
    write(dsn, *range(5))
    lines = call("tail", "-n", "3", ARTIFACTAPI_DSN=dsn).stdout.splitlines()
    assert lines[0].split()[:3] == ["time", "status", "method"]
    assert len(lines) == 4
    assert all("https://registry.example/simple/demo/" in line for line in lines[1:])
    assert all("\x1b" not in line for line in lines)


def test_text_from_clients_is_made_printable(dsn: str) -> None:
    write(dsn, 1, path="/\x1b]0;owned\x07\x1b[2J\r\n\u202e[red]x", proxy_user="a\x1b[31m")
    shown = call("tail", ARTIFACTAPI_DSN=dsn).stdout
    assert r"/\x1b]0;owned\x07\x1b[2J\r\n\u202e[red]x" in shown
    assert len(shown.splitlines()) == 2
    assert "\x1b" not in shown


def test_follow_shows_new_rows(dsn: str, tmp_path: Path) -> None:
    write(dsn, 1, path="/before")
    output = tmp_path / "tail"
    with started(output, "tail", "-f", ARTIFACTAPI_DSN=dsn) as process:
        eventually(lambda: "/before" in output.read_text())
        write(dsn, 2, path="/after")
        eventually(lambda: "/after" in output.read_text())
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 0
    assert "Traceback" not in output.read_text()
    assert output.read_text().count("/before") == 1


def test_follow_outlasts_the_call_limit_and_shows_only_new_rows(dsn: str, tmp_path: Path) -> None:
    database = Database(Settings().with_dsn(dsn).database)
    database.write([make_entry(n, path=f"/old-{n}") for n in range(3)])
    config, output = tmp_path / "short.yaml", tmp_path / "output"
    config.write_text("database: {call_seconds: 0.5}\n")
    with started(output, "--dsn", dsn, "--config", str(config), "tail", "-n", "1", "-f"):
        eventually(lambda: "/old-2" in output.read_text(), 20)
        for number in range(10, 14):
            database.write([make_entry(number, path=f"/new-{number}")])
            eventually(lambda number=number: f"/new-{number}" in output.read_text())  # type: ignore[misc]
    database.close()
    shown = [line.split("/")[-1].strip() for line in output.read_text().splitlines()[1:]]
    assert shown == ["old-2", "new-10", "new-11", "new-12", "new-13"]


def test_rows_match_all_filters(dsn: str) -> None:
    write(dsn, 1, status_code=404, path="/a", package="left-pad")
    write(dsn, 2, status_code=404, path="/b", error_type="dns")
    write(dsn, 3, status_code=200, path="/c", duration_ms=2500.0)
    write(dsn, 4, status_code=502, path="/d", host="failed.example")

    def shown(*options: str) -> str:
        done = CliRunner().invoke(main, ["--dsn", dsn, "tail", *options], catch_exceptions=False)
        lines = done.stdout.splitlines()[1:]
        return "".join(re.findall(r"example/(\w)", "".join(lines)))

    assert shown("--status", "4xx") == "ab"
    assert shown("--status", "4xx", "--error") == "b"
    assert shown("--failed") == "d"
    assert shown("--error", "dns", "--host", "registry.*") == "b"
    assert shown("--error", "none", "--package", "left-pad") == "a"
    assert shown("--slower", "2s") == "c"
    assert shown("--since", "2023-11-14", "--user", "build-42") == "abcd"
    assert shown("--since", "10m") == ""
    assert shown("--text", "/B") == "b"


@pytest.mark.parametrize("options", [("--text", "DEMO"), ("--status", "200", "--json")])
def test_search_without_a_start_time_ends_soon_and_reports_how_far_it_got(
    dsn: str, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]
) -> None:
    """Rows are two hours apart, and the time budget is used up after one stretch."""
    for number in range(1, 10):
        write(dsn, 90_000_000 - 7_200_000 * number, path=f"/simple/demo/row-{number}/")
    with psycopg.connect(dsn) as connection:
        connection.execute("UPDATE access_log SET logged_at = started_at")
    monkeypatch.setattr("exporter.read.time_search.SEARCH_SECONDS", 0.0)
    done = CliRunner().invoke(main, ["--dsn", dsn, "tail", *options])
    assert re.findall(r"/row-\d+/", done.stdout) == ["/row-1/"]
    assert re.match(
        r"Searched back to rows logged at \S+; set a start time with --since", done.stderr
    )
    everything = CliRunner().invoke(main, ["--dsn", dsn, "tail", *options, "--since", "2023-01-01"])
    assert len(re.findall(r"/row-\d+/", everything.stdout)) == 9
    assert everything.stderr == ""


def test_invalid_filter_gives_one_sentence_without_a_database() -> None:
    done = call("--dsn", "host=/nowhere", "tail", "--slower", "fast")
    assert done.returncode == 2
    assert done.stderr.count("slower 'fast' is not valid") == 1
    assert "Traceback" not in done.stderr


def test_json_has_all_columns_and_the_values_of_the_row(dsn: str) -> None:
    digest = bytes(range(32))
    write(dsn, 1, path="/\x9b\u202e\U000e0001x", sha256=f"\\x{digest.hex()}", error="a\tb\n")
    (text,) = call("tail", "--json", ARTIFACTAPI_DSN=dsn).stdout.splitlines()
    assert text.isprintable()
    row = json.loads(text)
    assert set(row) == {*COLUMNS, "logged_at"}
    assert row["path"] == "/\x9b\u202e\U000e0001x"
    assert row["error"] == "a\tb\n"
    assert row["sha256"] == digest.hex()
    assert row["started_at"].endswith("+00:00")
    assert row["response_bytes"] == 1234


@pytest.mark.parametrize("width", [50, 80, 130])
def test_lines_fit_the_terminal(dsn: str, width: int) -> None:
    write(dsn, 1, path=LONG, cache_status="HIT", response_bytes=12_345_678)
    write(dsn, 2, path="/\uff21" * 40, error_type="connect", status_code=502, proxy_user="u" * 60)
    text = on_terminal(width, "tail", ARTIFACTAPI_DSN=dsn)
    assert "\x1b[" in text, "a terminal gets colors"
    lines = _ESCAPE.sub("", text).split("\r\n")
    assert len(lines) == 4, "no line wraps"
    assert all(cell_len(line) <= width for line in lines)
    assert lines[1].rstrip().endswith("demo-1.2.3.tar.gz"), "the middle is cut out"
    assert lines[2].rstrip().endswith("connect")
    assert ("12.3 MB" in lines[1]) == (width >= 60)
    assert ("HIT" in lines[1]) == (width >= 110)


@pytest.mark.parametrize(
    ("width", "purl", "shown"),
    [
        (80, "pkg:deb/debian/g%2B%2B-12@12.2.0-14%2Bdeb12u1?arch=amd64", _GXX),
        (60, "pkg:deb/debian/g%2B%2B-12@12.2.0-14%2Bdeb12u1?arch=amd64", _GXX),
        (80, f"pkg:deb/debian/{'x' * 30}@12.2.0", f"{'x' * 30} 12.2.0"),
        (80, "pkg:npm/%40babel/core@7.23.0", "npm @babel/core 7.23.0"),
        (80, f"pkg:npm/{'long-' * 20}name@1.2.3", f"{'long-' * 7}lon\u2026"),
        (200, f"pkg:npm/{'long-' * 20}name@1.2.3", f"npm {'long-' * 20}name 1.2.3"),
    ],
)
def test_package_is_decoded_and_not_cut_in_its_middle(
    dsn: str, width: int, purl: str, shown: str
) -> None:
    write(dsn, 1, purl=purl)
    text = on_terminal(width, "tail", ARTIFACTAPI_DSN=dsn)
    (line,) = _ESCAPE.sub("", text).split("\r\n")[1:-1]
    assert line.endswith(f"  {shown}")
    assert cell_len(line) <= width


def test_package_is_complete_in_a_pipe_and_next_to_an_error(dsn: str) -> None:
    write(dsn, 1, purl="pkg:deb/debian/g%2B%2B-12@12.2.0-14%2Bdeb12u1", error_type="connect")
    assert call("tail", ARTIFACTAPI_DSN=dsn).stdout.rstrip().endswith(f"  {_GXX}  connect")
    text = _ESCAPE.sub("", on_terminal(80, "tail", ARTIFACTAPI_DSN=dsn))
    assert f"  {_GXX}  connect\r\n" in text


def test_follow_shows_new_rows_within_a_second(dsn: str, tmp_path: Path) -> None:
    database = Database(Settings().with_dsn(dsn).database)
    database.write([make_entry(0, path="/first")])
    output, waits = tmp_path / "output", []
    with started(output, "tail", "-f", "--host", "*.example", ARTIFACTAPI_DSN=dsn):
        eventually(lambda: "/first" in output.read_text(), 20)
        for number in range(1, 6):
            database.write([make_entry(number, path=f"/new-{number}")])
            written = time.monotonic()
            eventually(lambda number=number: f"/new-{number}" in output.read_text())  # type: ignore[misc]
            waits.append(time.monotonic() - written)
    database.close()
    assert statistics.median(waits) < 1


def test_follow_shows_each_row_once_even_if_its_transaction_commits_late(dsn: str) -> None:
    settings = Settings().with_dsn(dsn)
    write(dsn, 0)
    with (
        open_database(settings) as connection,
        psycopg.connect(dsn) as slow,
        psycopg.connect(dsn, autocommit=True) as fast,
    ):
        follower = Follower(connection, Selection(host="registry.example"))
        assert list(follower.poll(connection)) == []
        insert_access_log_batch(
            slow, [make_entry(1), make_entry(2)]
        )  # logged_at is now, the start of the transaction
        insert_access_log_batch(fast, [make_entry(3), make_entry(4, host="other.example")])
        keys = [row.key for row in follower.poll(connection)]
        assert len(keys) == 1
        slow.commit()
        keys += [row.key for row in follower.poll(connection)]
        assert len(set(keys)) == len(keys) == 3
        poll = follower.poll(connection)
        insert_access_log_batch(fast, [make_entry(n) for n in range(5, 10)])
        keys.append(next(poll).key)
        poll.close()  # as if the connection broke halfway
        keys += [row.key for row in follower.poll(connection)]
        assert len(set(keys)) == len(keys) == 8


def test_follow_waits_for_a_lost_database_and_shows_each_row_once(
    dsn: str, postgres: Postgres, tmp_path: Path
) -> None:
    output = tmp_path / "output"
    database = Database(Settings().with_dsn(dsn).database)
    database.write([make_entry(n, path=f"/row-{n}/") for n in range(3)])

    def shown(number: int) -> bool:
        return f"/row-{number}/" in output.read_text()

    def printed(sentence: str, times: int) -> bool:
        return output.read_text().count(sentence) == times

    with Relay(("127.0.0.1", postgres.port)) as relay:
        through = dsn.replace(f"port={postgres.port}", f"port={relay.address[1]}")
        with started(output, "tail", "-f", ARTIFACTAPI_DSN=through) as process:
            eventually(lambda: shown(2), 20)
            database.write([make_entry(3, path="/row-3/")])
            eventually(lambda: shown(3))
            for number in (4, 6):
                relay.cut()
                eventually(lambda: printed("The database is unavailable", number // 2 - 1))  # noqa: B023
                database.write([make_entry(number, path=f"/row-{number}/")])
                relay.mend()
                eventually(lambda: shown(number), 20)  # noqa: B023
                database.write([make_entry(number + 1, path=f"/row-{number + 1}/")])
                eventually(lambda: shown(number + 1))  # noqa: B023
            process.send_signal(signal.SIGINT)
            assert process.wait(20) == 0
    database.close()
    assert re.findall(r"/row-(\d)/", output.read_text()) == list("01234567")
    assert printed("The database is unavailable", 2)
    assert printed("The database is available again.", 2)
    assert printed("Traceback", 0)
