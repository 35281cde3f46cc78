"""Test the entry builder: PostgreSQL accepts the row of any exchange, whatever bytes it contains."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from msgspec import convert
from msgspec.structs import replace

from exporter import Settings
from exporter.rows.entry_builder import EntryBuilder
from exporter.rows.text import CUT, clean, ip_text, timestamp
from exporter.settings import RemotesSettings
from exporter.write.database import Database
from tests.support.samples import make_exchange

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from exporter import Exchange

    Query = Callable[..., list[tuple[object, ...]]]

builder = EntryBuilder(Settings(node="test"))


def test_typical_exchange() -> None:
    entry = builder.build(make_exchange())
    assert entry.started_at == "2023-11-14 22:13:20.000000+00"
    assert (entry.path, entry.query) == ("/simple/demo/", "token=REDACTED")
    assert (entry.duration_ms, entry.ttfb_ms, entry.connect_ms) == (250.0, 125.0, 10.0)
    assert (entry.client_ip, entry.client_port, entry.server_ip) == (
        "192.0.2.7",
        50_000,
        "198.51.100.9",
    )
    assert entry.content_type == "text/html"


@pytest.mark.parametrize(
    ("peer", "expected"),
    [
        (("192.0.2.1", 1), "192.0.2.1"),
        (("2001:DB8::1", 1, 0, 0), "2001:db8::1"),
        (("::ffff:192.0.2.1", 1, 0, 0), "192.0.2.1"),
        (("fe80::1%eth0", 1, 0, 2), "fe80::1"),
        (("/run/x.sock",), None),
        ("", None),
        (("", 0), None),
        (None, None),
    ],
)
def test_ip_addresses(peer: tuple[str, int] | None, expected: str | None) -> None:
    assert ip_text(peer) == expected


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0.0, "1970-01-01 00:00:00.000000+00"),
        (7_258_118_400.5, "2200-01-01 00:00:00.500000+00"),
        (-1.5, "1969-12-31 23:59:58.500000+00"),
        (1_700_000_000.9999999, "2023-11-14 22:13:21.000000+00"),
        (math.inf, "9999-12-31 23:59:59.000000+00"),
        (-math.inf, "0001-01-01 00:00:00.000000+00"),
        (math.nan, "1970-01-01 00:00:00.000000+00"),
    ],
)
def test_timestamps(seconds: float, expected: str) -> None:
    assert timestamp(seconds) == expected


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (b"/a?b=c#d", ("/a", "b=REDACTED")),
        (b"?b=c", ("/", "b=REDACTED")),
        (b"/a#b?c=d", ("/a", "c=REDACTED")),
        (b"#", ("/", None)),
        (b"/a", ("/a", None)),
        (b"/a?", ("/a", None)),
        (b"*", ("*", None)),
        (b"host.example:443", ("host.example:443", None)),
        (b"", (None, None)),
        (b"/caf\xc3\xa9/\xff\x00", ("/café/\\xff\\x00", None)),
    ],
)
def test_request_targets(target: bytes, expected: tuple[str | None, str | None]) -> None:
    entry = builder.build(make_exchange(target=target))
    assert (entry.path, entry.query) == expected


def test_long_text_is_cut_and_marked() -> None:
    entry = builder.build(
        make_exchange(target=b"/" + b"a" * 1_000_000, user_agent=b"u" * 1_000_000)
    )
    assert entry.path == "/" + "a" * 2047 + CUT
    assert entry.user_agent == "u" * 512 + CUT


def test_unknown_values_are_none() -> None:
    entry = builder.build(
        make_exchange(
            status_code=0,
            ended_at=None,
            head_at=1.0,  # before the start: the wall clock was set back
            connect_seconds=-1.0,
            client=None,
            user_agent=None,
            port=0,
            host="",
        )
    )
    numbers = (entry.status_code, entry.duration_ms, entry.ttfb_ms, entry.connect_ms, entry.port)
    texts = (entry.client_ip, entry.client_port, entry.user_agent, entry.host)
    assert set(numbers) == set(texts) == {None}


def test_invalid_flow_id_maps_to_a_stable_uuid() -> None:
    first, second = (builder.build(make_exchange(flow_id="flow 1")).flow_id for _ in range(2))
    assert first == second != builder.build(make_exchange(flow_id="flow 2")).flow_id


def test_query_policy_follows_the_setting() -> None:
    for policy, expected in (
        ("drop", None),
        ("full", "token=s3cret"),
        ("signed", "token=REDACTED"),
    ):
        settings = convert({"redact": {"query": policy}}, Settings)
        assert EntryBuilder(settings).build(make_exchange()).query == expected


@given(st.text(st.characters()) | st.binary().map(lambda b: b.decode("utf-8", "surrogateescape")))
def test_clean_text_is_valid_utf8_without_nul(text: str) -> None:
    assert "\x00" not in clean(text, 100).encode().decode()


_bytes = st.binary(max_size=200)
_texts = st.text(st.characters(), max_size=100) | _bytes.map(
    lambda b: b.decode("utf-8", "surrogateescape")
)
_times = st.floats() | st.floats(-1e9, 1e10)
_sizes = st.none() | st.integers(0, 2**62)
_peers = (
    st.none()
    | st.tuples(_texts, st.integers(-1, 2**17))
    | st.tuples(st.ip_addresses().map(str), st.integers(0, 2**16))
)
_exchanges = st.builds(
    make_exchange,
    flow_id=st.uuids().map(str) | _texts,
    started_at=st.sampled_from(
        [0.0, 1.7e9, 1.7e9 + 1e-6, 7e9, -1e9, math.inf, -math.inf, math.nan]
    ),
    ended_at=st.none() | _times,
    head_at=st.none() | _times,
    connect_seconds=st.none() | _times,
    client=_peers,
    server=_peers,
    proxy_user=st.none() | _texts,
    method=_bytes,
    scheme=_bytes,
    host=_texts,
    port=st.integers(-(2**40), 2**40),
    target=_bytes,
    http_version=_bytes,
    user_agent=st.none() | _bytes,
    request_bytes=_sizes,
    status_code=st.none() | st.integers(-1, 2**40),
    error=st.none() | _texts,
    response_fields=st.lists(st.tuples(st.just(b"content-type"), _bytes), max_size=2).map(tuple),
    response_bytes=_sizes,
)


@hypothesis_settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(_exchanges, min_size=1, max_size=20))
def test_postgres_accepts_one_row_for_any_exchange(
    dsn: str, query: Query, exchanges: list[Exchange]
) -> None:
    entries = [
        builder.build(replace(x, flow_id=f"{n:08x}-0000-4000-8000-{len(exchanges):012x}"))
        for n, x in enumerate(exchanges)
    ]
    database = Database(Settings().with_dsn(dsn).database)
    try:
        assert database.write(entries) == []
        assert query("SELECT count(*) FROM access_log") == [(len(entries),)]
    finally:
        database.close()
        query("DELETE FROM access_log")


def test_cache_of_request_targets_is_used_and_bounded() -> None:
    builder = EntryBuilder(Settings(node="test"))
    wheel = make_exchange(host="pypi.example", target=b"/packages/demo-1.0-py3-none-any.whl?a=1")
    first = builder.build(wheel)
    assert builder.build(replace(wheel, target=wheel.target + b"&b=2"))._replace(query="") == (
        first._replace(query="")
    )
    assert builder._cached_target.cache_info()[:2] == (1, 1)
    for number in range(9_000):
        builder.build(replace(wheel, target=b"/%d" % number))
        builder.build(replace(wheel, target=b"/%d" % number + b"x" * 800, size=2048))
    assert builder._cached_target.cache_info().currsize == 8192
    assert builder.build(wheel) == first


def test_credentials_in_the_host_field_are_removed() -> None:
    assert builder.build(make_exchange(host="user:hunter2@h.example")).host == "h.example"


def test_edited_remotes_file_is_reloaded(tmp_path: Path) -> None:
    file = tmp_path / "remotes.yaml"
    settings = Settings(node="test", remotes=RemotesSettings(file=str(file)))
    for changed_at, name in enumerate(("first", "second"), 1):
        file.write_text(f"remotes:\n  - {{name: {name}, host: mirror.example}}\n")
        os.utime(file, (changed_at, changed_at))
        row = EntryBuilder(settings).build(make_exchange(host="mirror.example"))
        assert row.remote == name


@pytest.mark.parametrize(
    ("host", "remote"),
    [("pypi.example", "pypi"), ("PyPI.example", "pypi"), ("odd.example", None), ("", None)],
)
def test_known_host_sets_the_remote_without_a_request(host: str, remote: str | None) -> None:
    refused = make_exchange(
        host=host, target=b"", method=b"", status_code=None, error_type="tls_client"
    )
    entry = EntryBuilder(Settings(node="test")).build(refused)
    assert (entry.remote, entry.artifact_kind, entry.purl) == (remote, None, None)
