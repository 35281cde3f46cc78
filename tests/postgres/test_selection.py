"""Selections find the right rows in a real table, and invalid filters give one sentence."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from psycopg import sql

from exporter import Settings
from exporter.read.selection import Selection, SelectionError, parse_duration, parse_time
from exporter.write.database import Database
from tests.support.access_log import temporary_schema
from tests.support.samples import make_entry

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.postgres import Postgres

NOW = datetime(2026, 3, 5, 12, tzinfo=UTC)


def at(hours_ago: float) -> str:
    return (NOW - timedelta(hours=hours_ago)).isoformat()


ROWS: dict[str, dict[str, Any]] = {
    "ok": {"host": "files.example", "remote": "pypi", "package": "left-pad", "started_at": at(1)},
    "gone": {"status_code": 404, "remote": "nexus:pypi", "package": "left_pad", "path": "/50%_\\x"},
    "busy": {"status_code": 429, "proxy_user": "Build-7", "started_at": at(30), "purl": "pkg:a/b"},
    "away": {
        "status_code": None,
        "error_type": "dns",
        "duration_ms": None,
        "host": "fil_s.example",
    },
    "cut": {"status_code": 502, "error_type": "connect", "duration_ms": 500.5, "proxy_user": None},
}


@pytest.fixture(scope="module")
def table(postgres: Postgres) -> Iterator[str]:
    with temporary_schema(postgres) as dsn:
        database = Database(Settings().with_dsn(dsn).database)
        blank: dict[str, Any] = {"started_at": at(2), "remote": None, "package": None, "purl": None}
        database.write(
            [
                make_entry(n, **{**blank, "host": "other.example", "user_agent": name, **row})
                for n, (name, row) in enumerate(ROWS.items())
            ]
        )
        database.close()
        yield dsn


def found(dsn: str, selection: Selection) -> set[str]:
    where, values = selection.where()
    query = sql.SQL("SELECT user_agent FROM access_log WHERE {}").format(where)
    with psycopg.connect(dsn) as connection:
        return {name for (name,) in connection.execute(query, values)}


@pytest.mark.parametrize(
    ("texts", "names"),
    [
        ({}, {"ok", "gone", "busy", "away", "cut"}),
        ({"remote": "pypi"}, {"ok"}),
        ({"remote": "*pypi"}, {"ok", "gone"}),
        ({"host": "FILES.example"}, {"ok"}),
        ({"host": "fil_s.*"}, {"away"}),
        ({"host": "*.example"}, {"ok", "gone", "busy", "away", "cut"}),
        ({"package": "left_pad"}, {"gone"}),
        ({"package": "left_*"}, {"gone"}),
        ({"user": "Build-7"}, {"busy"}),
        ({"user": "*uild-*"}, {"ok", "gone", "busy", "away"}),
        ({"status": "404"}, {"gone"}),
        ({"status": "4xx"}, {"gone", "busy"}),
        ({"status": "4XX", "remote": "*"}, {"gone"}),
        ({"status": "none"}, {"away"}),
        ({"error": ""}, {"away", "cut"}),
        ({"error": "any"}, {"away", "cut"}),
        ({"error": "none"}, {"ok", "gone", "busy"}),
        ({"error": "dns"}, {"away"}),
        ({"slower": "500ms"}, {"cut"}),
        ({"slower": "0.25s"}, {"cut"}),
        ({"slower": "0.249s"}, {"ok", "gone", "busy", "cut"}),
        ({"since": "90m"}, {"ok"}),
        ({"until": at(24)}, {"busy"}),
        ({"since": at(2), "until": at(1)}, {"gone", "away", "cut"}),
        ({"text": "50%_\\X"}, {"gone"}),
        ({"text": "LEFT-"}, {"ok"}),
        ({"text": "pkg:a"}, {"busy"}),
        ({"text": "*"}, set()),
        ({"text": "%"}, {"gone"}),
        ({"text": "build-7", "status": "429"}, {"busy"}),
        ({"package": "' OR true --", "text": "%(x)s"}, set()),
        ({"remote": None, "host": ""}, {"ok", "gone", "busy", "away", "cut"}),
    ],
)
def test_selection_finds_rows(table: str, texts: dict[str, str | None], names: set[str]) -> None:
    assert found(table, Selection.parse(texts, NOW)) == names


def test_time_span_prunes_partitions(table: str) -> None:
    where, values = Selection.parse({"since": "90m"}, NOW).where()
    query = sql.SQL("EXPLAIN SELECT count(*) FROM access_log WHERE {}").format(where)
    with psycopg.connect(table) as connection:
        plan = "\n".join(line for (line,) in connection.execute(query, values))
    assert "access_log_20260305" in plan
    assert "access_log_20260304" not in plan


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        ({"status": "4x"}, "status '4x'"),
        ({"status": "\u0664\u0660\u0664"}, "status"),
        ({"slower": "500"}, "slower '500'"),
        ({"slower": "-1s"}, "slower"),
        ({"since": "soon"}, "since 'soon'"),
        ({"since": "999999999d"}, "since"),
        ({"until": "2026-13-01"}, "until"),
        ({"error": "a b"}, "error 'a b'"),
        ({"text": "a\x00b"}, "text holds"),
        ({"host": "\udcff"}, "host holds"),
        ({"hots": "x"}, "no filter 'hots'"),
        ({"slower_ms": "1"}, "no filter 'slower_ms'"),
    ],
)
def test_invalid_filter_gives_one_sentence(texts: dict[str, str], words: str) -> None:
    with pytest.raises(SelectionError) as caught:
        Selection.parse(texts)
    text = str(caught.value)
    assert words in text
    assert text.endswith(".")
    assert "\n" not in text


def test_invalid_values_are_rejected() -> None:
    for values in ({"since": NOW.replace(tzinfo=None)}, {"slower_ms": float("nan")}):
        with pytest.raises(SelectionError):
            Selection(**values)


def test_durations_and_times() -> None:
    texts = ["500ms", "2s", "10m", "24h", "7d", "2w", "1.5h"]
    seconds = [0.5, 2, 600, 86_400, 604_800, 1_209_600, 5400]
    assert [parse_duration(text).total_seconds() for text in texts] == seconds
    assert parse_time("10m", now=NOW) == NOW - timedelta(minutes=10)
    assert parse_time("2026-03-05T13:00+01:00") == NOW
    assert parse_time("2026-03-05T12:00Z") == NOW
    assert parse_time("2026-03-05").tzinfo is not None
