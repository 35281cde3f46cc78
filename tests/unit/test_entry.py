"""Test the entry builder: PostgreSQL accepts the row of any exchange, whatever bytes it contains."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING
from urllib.parse import unquote

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from msgspec import convert
from msgspec.structs import replace

from exporter import RESPONSE_FIELDS, Settings
from exporter.rows.entry_builder import EntryBuilder
from exporter.rows.text import CUT, clean, ip_text, timestamp
from exporter.settings import RemotesSettings
from exporter.write.database import Database
from tests.support.samples import make_exchange
from tests.support.secrets import SECRET_URLS, TOKENS, SecretUrl

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from exporter import AccessLogEntry, Exchange

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
    requested_url=st.none() | st.tuples(_bytes, _texts, st.integers(-(2**40), 2**40), _bytes),
)


@pytest.mark.slow
@hypothesis_settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
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


@pytest.mark.slow
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
        builder.build(replace(wheel, target=b"/%d?x" % number), cacheable=False)
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


_NOT_STORED = {"body", "sha256"}
# The names in these paths become columns of their own.
_SECRET_TARGETS = [
    ("registry.example", "/{}"),
    ("registry.example", "/a?{}=1&b={}&{}#{}"),
    ("registry.example", "http://me:{}@{}/{}"),
    ("registry.example", "/fetch/http://me:{}@registry.example/"),
    ("pypi.example", "/simple/{}/"),
    ("files.pythonhosted.example", "/packages/source/d/demo/demo-1.0-{}.tar.gz"),
    ("registry.npmjs.example", "/@{}/demo/-/demo-1.0.0.tgz"),
    ("registry.npmjs.example", "/demo/-/demo-1.0.0-{}.tgz"),
    ("proxy.golang.example", "/github.com/{}/demo/@v/v1.0.0.zip"),
    ("repo1.maven.example", "/maven2/org/demo/{}/1.0/{}-1.0.jar"),
    ("registry-1.docker.example", "/v2/library/{}/manifests/{}"),
    ("conda.anaconda.example", "/{}/linux-64/demo-1.0-0.conda"),
    ("nexus.corp.example", "/repository/{}/demo"),
    ("deb.debian.example", "/debian/pool/main/d/demo/demo_1.0-{}_amd64.deb"),
]


def _with_secret_everywhere(secret: str, host: str, target: str) -> Exchange:
    """An exchange with the secret as every text, except for the host and the target."""
    sample = make_exchange(error="failed", error_type="protocol")
    texts = {
        name: type(value)(secret.encode()) if isinstance(value, bytes) else secret
        for name in sample.__struct_fields__
        if isinstance(value := getattr(sample, name), (bytes, str)) and name not in _NOT_STORED
    }
    assert {"proxy_user", "user_agent", "method", "error", "http_version"} <= texts.keys()
    fields = tuple((name, secret.encode()) for name in sorted(RESPONSE_FIELDS))
    requested_url = b"https", host, 8443, target.encode()
    urls = {"host": host, "target": target.encode(), "requested_url": requested_url}
    return replace(sample, **(texts | urls | {"response_fields": fields}))


def _assert_not_in_any_column(secret: str, entry: AccessLogEntry) -> None:
    for column, value in entry._asdict().items():
        text = unquote(str(value))
        assert secret.casefold() not in text.casefold(), (column, value)


@pytest.mark.slow
@given(token=TOKENS, request_line=st.sampled_from(_SECRET_TARGETS))
def test_token_in_any_field_is_in_no_column(token: str, request_line: tuple[str, str]) -> None:
    host, target = request_line
    for each_host in (host, f"{token}.example", f"{token}@{host}"):
        exchange = _with_secret_everywhere(token, each_host, target.replace("{}", token))
        _assert_not_in_any_column(token, builder.build(exchange))


@pytest.mark.parametrize("url", SECRET_URLS, ids=lambda url: url.host)
def test_secret_url_in_any_field_is_in_no_column(url: SecretUrl) -> None:
    exchange = _with_secret_everywhere(f"http://{url.host}{url.path} x", url.host, url.path)
    entry = builder.build(exchange)
    assert entry.path == url.redacted_path
    assert entry.user_agent == f"http://{url.host}{url.redacted_path} x"
    _assert_not_in_any_column(url.secret, entry)


# --- another URL than the client asked for


@pytest.mark.parametrize(
    ("requested", "expected"),
    [
        ((b"https", "PyPI.example", 443, b"/a?token=x"), "https://pypi.example/a?token=REDACTED"),
        ((b"http", "pypi.example", 8080, b"/a#b"), "http://pypi.example:8080/a"),
        ((b"http", "2001:db8::1", 80, b"?x=1"), "http://[2001:db8::1]/?x=REDACTED"),
        ((b"http", "", 80, b"/a"), None),
    ],
)
def test_requested_url(requested: tuple[bytes, str, int, bytes], expected: str | None) -> None:
    assert builder.build(make_exchange(requested_url=requested)).requested_url == expected


def test_requested_url_is_bounded() -> None:
    requested = b"h" * 9000, "h" * 9000, 1, b"/" + b"p" * 9000 + b"?" + b"q=1&" * 9000
    url = builder.build(make_exchange(requested_url=requested)).requested_url
    assert url is not None
    assert len(url) < 5000


@pytest.mark.parametrize(
    ("host", "target", "purl"),
    [
        ("10.0.0.5", b"/simple/demo/", "pkg:pypi/demo"),
        ("10.0.0.5", b"/mirror/simple/demo/", "pkg:pypi/demo"),
        ("10.0.0.5", b"/blocked.html", None),  # perhaps not what the client asked for
        ("registry.npmjs.example", b"/simple/demo/", None),  # what was fetched is known
    ],
)
def test_requested_url_identifies_the_same_path_of_an_unknown_host(
    host: str, target: bytes, purl: str | None
) -> None:
    requested = b"https", "pypi.example", 443, b"/simple/demo/"
    exchange = make_exchange(host=host, target=target, requested_url=requested)
    assert builder.build(exchange).purl == purl


@pytest.mark.parametrize(
    ("login", "expected"),
    [
        ("build-42", "build-42"),
        ("ci@example.com", "ci@example.com"),
        ("3f2504e0-4f89-41d3-9a0c-0305e82c3301", "3f2504e0-4f89-41d3-9a0c-0305e82c3301"),
        ("ghp_0123456789abcdefghijABCDEFGHIJ012345", "REDACTED"),
        ("build-42/glpat-0123456789abcdefABCD", "build-42/REDACTED"),
    ],
)
def test_proxy_login_is_kept_unless_it_is_a_token(login: str, expected: str) -> None:
    assert builder.build(make_exchange(proxy_user=login)).proxy_user == expected


_CONDA_TOKEN = "ab-01234567-89ab-cdef-0123-456789abcdef"
_CONDA_PURL = "pkg:conda/foo@1.0?build=0&channel=chan&subdir=linux-64&type=conda"


@pytest.mark.parametrize(
    ("host", "target", "purl"),
    [
        ("conda.anaconda.example", "/t/{}/chan/linux-64/foo-1.0-0.conda", _CONDA_PURL),
        (
            "nexus.corp.example",
            "/repository/conda-proxy/t/{}/chan/linux-64/foo-1.0-0.conda",
            _CONDA_PURL,
        ),
        ("conda.anaconda.example", "/t/{}/linux-64/foo-1.0-0.conda", None),  # without a channel
        ("pypi.fury.example", "/{}/owner/simple/demo/", "pkg:pypi/demo"),
        ("pypi.fury.example", "/{}/", None),
        ("feeds.example", "/priv/{}/owner/repo/simple/demo/", "pkg:pypi/demo"),
    ],
)
def test_folder_that_is_a_secret_does_not_hide_the_package(
    tmp_path: Path, host: str, target: str, purl: str | None
) -> None:
    file = tmp_path / "remotes.yaml"
    file.write_text(
        "remotes:\n"
        "  - {name: fury, host: 'pypi.fury.*', path: /owner, format: pypi}\n"
        "  - {name: feeds, host: feeds.example, path: [/owner/repo, /], format: pypi}\n"
    )
    builder = EntryBuilder(Settings(node="test", remotes=RemotesSettings(file=str(file))))
    entry = builder.build(make_exchange(host=host, target=target.format(_CONDA_TOKEN).encode()))
    assert (entry.path, entry.purl) == (target.format("REDACTED"), purl)


def test_redirect_relative_to_a_path_with_a_secret_keeps_the_package() -> None:
    builder = EntryBuilder(Settings(node="test"))
    file = make_exchange(
        host="conda.anaconda.example",
        target=f"/t/{_CONDA_TOKEN}/chan/linux-64/foo-1.0-0.conda".encode(),
        status_code=302,
        response_fields=((b"location", b"blob/1"),),
    )
    assert builder.build(file).purl == _CONDA_PURL
    blob = replace(
        file, target=f"/t/{_CONDA_TOKEN}/chan/linux-64/blob/1".encode(), response_fields=()
    )
    assert builder.build(blob).purl == _CONDA_PURL


@pytest.mark.parametrize(
    ("location", "target"),
    [
        ("http://cdn.example:8080/ünï".encode(), b"/%C3%BCn%C3%AF"),
        ("http://cdn.example:8080/ünï".encode(), b"/%c3%bcn%c3%af"),
        ("http://cdn.example:8080/ünï".encode(), b"/%C3%83%C2%BCn%C3%83%C2%AF"),  # Node.js
        ("http://cdn.example:8080/ünï".encode("latin-1"), b"/%C3%BCn%C3%AF"),
        (b"http://cdn.example:8080/cdn/a/../b", b"/cdn/a/../b"),
        (b"http://cdn.example:8080/cdn/a/../b", b"/cdn/b"),
        (b"http://cdn.example:8080/cdn/%2e/b?x=/../y", b"/cdn/b?x=/../y"),
        (b"//cdn.example:8080/b", b"/b"),
    ],
)
def test_redirect_keeps_the_package_however_its_location_is_written(
    location: bytes, target: bytes
) -> None:
    builder = EntryBuilder(Settings(node="test"))
    file = make_exchange(
        scheme=b"http",
        host="pypi.example",
        target=b"/packages/demo-1.0-py3-none-any.whl",
        status_code=302,
        response_fields=((b"location", location),),
    )
    builder.build(file)
    blob = replace(file, host="cdn.example", port=8080, target=target, response_fields=())
    assert builder.build(blob).purl == "pkg:pypi/demo@1.0"


def test_relative_redirect_stays_on_its_port() -> None:
    builder = EntryBuilder(Settings(node="test"))
    file = make_exchange(
        scheme=b"http",
        host="pypi.example",
        port=8080,
        target=b"/packages/demo-1.0-py3-none-any.whl",
        status_code=302,
        response_fields=((b"location", b"/blob"),),
    )
    builder.build(file)
    blob = replace(file, target=b"/blob", response_fields=())
    assert builder.build(blob).purl == "pkg:pypi/demo@1.0"
    assert builder.build(replace(blob, port=8081)).purl is None
