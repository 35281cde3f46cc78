"""Selections find the right rows in a real table, and invalid filters give one sentence."""

from __future__ import annotations

import re
import time
from datetime import UTC, datetime, timedelta, timezone
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from psycopg import sql

from addon.flow import outcome
from exporter import Settings
from exporter.postgres.schema import SCHEMA
from exporter.read.selection import (
    ERROR_TYPES,
    Selection,
    SelectionError,
    parse_duration,
    parse_time,
)
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
    "busy": {
        "status_code": 429,
        "proxy_user": "Build-7",
        "started_at": at(30),
        "purl": "pkg:a/b",
        "client_ip": "2001:db8::7",
        "method": "post",
    },
    "away": {
        "status_code": None,
        "error_type": "dns",
        "duration_ms": None,
        "host": "fil_s.example",
    },
    "cut": {
        "client_ip": "192.0.2.9",
        "status_code": 502,
        "error_type": "connect",
        "duration_ms": 500.5,
        "proxy_user": None,
    },
    "named": {"proxy_user": "192.0.2.9", "client_ip": None, "method": None, "node": "gate-2"},
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


def test_condition_without_filters_is_no_constant(table: str) -> None:
    """With a constant, Citus 12.1 finds no row in the view of the log and of rows from the archive."""
    with psycopg.connect(table) as connection:
        assert Selection().where()[0].as_string(connection) == "started_at IS NOT NULL"


ALL = set(ROWS)


def found(dsn: str, selection: Selection) -> set[str]:
    where, values = selection.where()
    query = sql.SQL("SELECT user_agent FROM access_log WHERE {}").format(where)
    with psycopg.connect(dsn) as connection:
        return {name for (name,) in connection.execute(query, values)}


@pytest.mark.parametrize(
    ("texts", "names"),
    [
        ({}, ALL),
        ({"remote": "pypi"}, {"ok"}),
        ({"remote": "*pypi"}, {"ok", "gone"}),
        ({"host": "FILES.example"}, {"ok"}),
        ({"host": "fil_s.*"}, {"away"}),
        ({"host": "*.example"}, ALL),
        ({"package": "left_pad"}, {"gone"}),
        ({"package": "left_*"}, {"gone"}),
        ({"user": "Build-7"}, {"busy"}),
        ({"user": "*uild-*"}, {"ok", "gone", "busy", "away"}),
        ({"who": "Build-7"}, {"busy"}),
        ({"who": "*uild-*"}, {"ok", "gone", "busy", "away"}),
        ({"who": "192.0.2.9"}, {"cut", "named"}),
        ({"who": "::ffff:192.0.2.9"}, {"cut", "named"}),
        ({"who": "192.0.*"}, {"cut", "named"}),
        ({"who": "192.0.2.7"}, set()),
        ({"who": "2001:db8::7"}, set()),
        ({"user": "192.0.2.9"}, {"named"}),
        ({"client": "192.0.2.9"}, {"cut"}),
        ({"client": "192.0.2.0/24"}, {"ok", "gone", "away", "cut"}),
        ({"client": "192.0.2.99/24"}, {"ok", "gone", "away", "cut"}),
        ({"client": "2001:DB8:0::7"}, {"busy"}),
        ({"client": "2001:db8::/32"}, {"busy"}),
        ({"client": "::/0"}, {"busy"}),
        ({"client": "::ffff:192.0.2.9"}, {"cut"}),
        ({"client": "::ffff:192.0.2.0/120"}, {"ok", "gone", "away", "cut"}),
        ({"client": "fe80::1%eth0"}, set()),
        ({"method": "POST"}, {"busy"}),
        ({"method": "get"}, {"ok", "gone", "away", "cut"}),
        ({"node": "gate-2"}, {"named"}),
        ({"node": "gate-*"}, {"named"}),
        ({"node": "test"}, ALL - {"named"}),
        ({"status": "404"}, {"gone"}),
        ({"status": "4xx"}, {"gone", "busy"}),
        ({"status": "999"}, set()),  # mitmproxy passes it on, and some servers send it
        ({"status": "4XX", "remote": "*"}, {"gone"}),
        ({"status": "none"}, {"away"}),
        ({"failed": "yes"}, {"away", "cut"}),
        ({"failed": "no"}, ALL - {"away", "cut"}),
        ({"failed": ""}, ALL),
        ({"error": ""}, {"away", "cut"}),
        ({"error": "any"}, {"away", "cut"}),
        ({"error": "none"}, {"ok", "gone", "busy", "named"}),
        ({"error": "DNS"}, {"away"}),
        ({"slower": "500ms"}, {"cut"}),
        ({"slower": "0.25s"}, {"cut"}),
        ({"slower": "0.249s"}, ALL - {"away"}),
        ({"since": "90m"}, {"ok"}),
        ({"until": at(24)}, {"busy"}),
        ({"since": at(2), "until": at(1)}, {"gone", "away", "cut", "named"}),
        ({"since": "yesterday", "until": "today"}, {"busy"}),
        ({"since": "Today", "until": "now"}, ALL - {"busy"}),
        ({"text": "50%_\\X"}, {"gone"}),
        ({"text": "LEFT-"}, {"ok"}),
        ({"text": "pkg:a"}, {"busy"}),
        ({"text": "*"}, set()),
        ({"text": "%"}, {"gone"}),
        ({"text": "build-7", "status": "429"}, {"busy"}),
        ({"package": "' OR true --", "text": "%(x)s"}, set()),
        ({"remote": None, "host": ""}, ALL),
    ],
)
def test_selection_finds_rows(table: str, texts: dict[str, str | None], names: set[str]) -> None:
    assert found(table, Selection.parse(texts, NOW, UTC)) == names


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
        ({"status": "4x"}, "status '4x' is not valid; expected 100 to 999, 4xx or none"),
        ({"status": "99"}, "status '99'"),
        ({"status": "0xx"}, "status '0xx'"),
        ({"status": "\u0664\u0660\u0664"}, "status"),
        ({"failed": "maybe"}, "expected yes or no"),
        ({"slower": "500"}, "slower '500'"),
        ({"slower": "-1s"}, "slower"),
        ({"since": "soon"}, "since 'soon'"),
        ({"since": "funday"}, "a day such as today, yesterday or monday"),
        ({"since": "999999999d"}, "since"),
        ({"until": "2026-13-01"}, "until"),
        ({"since": "7d", "until": "8d"}, "since must be earlier than until"),
        ({"since": "today", "until": "today"}, "since must be earlier than until"),
        ({"error": "a b"}, "error 'a b'"),
        ({"error": "dn"}, "error 'dn' is not valid; expected any, none, dns, connect, "),
        ({"error": "1"}, "proxy_auth, shutdown or _OTHER."),
        ({"method": "GE T"}, "method 'GE T' is not valid; expected one word such as GET or POST"),
        ({"client": "192.0.2"}, "client '192.0.2' is not valid; expected an address"),
        ({"client": "192.0.2.0/33"}, "or a network such as 192.0.2.0/24"),
        ({"client": "build-42"}, "client 'build-42'"),
        ({"client": "192.0.2.*"}, "client '192.0.2.*'"),
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
    for values in (
        {"since": NOW.replace(tzinfo=None)},
        {"slower_ms": float("nan")},
        {"error": "dn"},
        {"client": "x"},
        {"method": ""},
    ):
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
    assert parse_time("2026-03-05T13:00", zone=timezone(timedelta(hours=1))) == NOW


@pytest.mark.parametrize(
    ("text", "day"),
    [
        ("today", 5),
        ("yesterday", 4),
        ("thursday", 5),  # today is one
        ("Wednesday", 4),
        ("TUE", 3),
        ("monday", 2),
        ("sunday", 1),
        ("fri", -1),  # 27 February
    ],
)
def test_day_is_its_last_midnight(text: str, day: int) -> None:
    zone = timezone(timedelta(hours=9))
    for hour in (0, 23):
        now = datetime(2026, 3, 5, hour, 30, tzinfo=zone)
        expected = datetime(2026, 3, 1, tzinfo=zone) + timedelta(days=day - 1)
        assert parse_time(text, now=now, zone=zone) == expected


@pytest.mark.parametrize(
    ("now", "midnight"),
    [
        ("2026-03-29T10:00+02:00", "2026-03-29T00:00+01:00"),  # summer time starts at 2:00
        ("2026-10-25T10:00+01:00", "2026-10-25T00:00+02:00"),
    ],
)
def test_days_start_at_local_midnight_also_when_clocks_change(
    monkeypatch: pytest.MonkeyPatch, now: str, midnight: str
) -> None:
    monkeypatch.setenv("TZ", "Europe/Berlin")
    time.tzset()
    try:
        at = parse_time("today", now=datetime.fromisoformat(now))
    finally:
        monkeypatch.undo()
        time.tzset()
    assert at == datetime.fromisoformat(midnight)


def test_error_types_are_those_of_the_schema_and_of_the_proxy() -> None:
    schema = SCHEMA.read_text(encoding="utf-8")
    (comment,) = re.findall(r"access_log.error_type IS 'NULL = no error; else (.*)'", schema)
    assert set(re.split(", | or ", comment)) == set(ERROR_TYPES)
    of_messages = {kind for _, kind in (*outcome._MESSAGES, *outcome._QUIC_MESSAGES)}
    assert of_messages <= set(ERROR_TYPES)
