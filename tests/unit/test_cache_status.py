"""Parsing of the cache headers that CDNs and caches document."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporter.exchange import RESPONSE_FIELDS
from exporter.rows.cache_status import CacheStatus, read_cache_status

STATUSES = {"HIT", "MISS", "BYPASS", "EXPIRED", "STALE", "UPDATING", "REVALIDATED", None}
SOURCES = {name.decode() for name in RESPONSE_FIELDS} | {"304", None}

# From the documentation of each sender: header field, status, source.
SAMPLES = [
    # RFC 9211: the examples of section 2 and its subsections, and lists of several caches
    ("cache-status: OriginCache; hit; ttl=1100", "HIT", "cache-status"),
    (
        'cache-status: OriginCache; hit; ttl=1100, "CDN Company Here"; hit; ttl=545',
        "HIT",
        "cache-status",
    ),
    ("cache-status: ExampleCache; hit; ttl=376", "HIT", "cache-status"),
    ("cache-status: ExampleCache; hit; ttl=-412", "STALE", "cache-status"),
    ("cache-status: ExampleCache; fwd=uri-miss; stored", "MISS", "cache-status"),
    ("cache-status: ExampleCache; fwd=stale; fwd-status=304", "REVALIDATED", "cache-status"),
    ("cache-status: ExampleCache; fwd=stale; fwd-status=200; stored", "EXPIRED", "cache-status"),
    ("cache-status: ExampleCache; fwd=vary-miss", "MISS", "cache-status"),
    ("cache-status: ExampleCache; fwd=miss; collapsed", "MISS", "cache-status"),
    ("cache-status: ExampleCache; fwd=partial; fwd-status=206", "MISS", "cache-status"),
    ("cache-status: ExampleCache; fwd=bypass", "BYPASS", "cache-status"),
    ("cache-status: ExampleCache; fwd=method", "BYPASS", "cache-status"),
    ("cache-status: ExampleCache; fwd=request", "BYPASS", "cache-status"),
    ("cache-status: BrowserCache; fwd=uri-miss, ProxyCache; hit", "HIT", "cache-status"),
    ("cache-status: ProxyCache; hit, CDN; fwd=uri-miss", "HIT", "cache-status"),
    ("cache-status: A; fwd=bypass, B; fwd=uri-miss", "MISS", "cache-status"),
    ('cache-status: "weird, name; hit"; fwd=miss', "MISS", "cache-status"),
    # fields with a status
    ("cf-cache-status: HIT", "HIT", "cf-cache-status"),
    ("cf-cache-status: MISS", "MISS", "cf-cache-status"),
    ("cf-cache-status: EXPIRED", "EXPIRED", "cf-cache-status"),
    ("cf-cache-status: STALE", "STALE", "cf-cache-status"),
    ("cf-cache-status: BYPASS", "BYPASS", "cf-cache-status"),
    ("cf-cache-status: REVALIDATED", "REVALIDATED", "cf-cache-status"),
    ("cf-cache-status: UPDATING", "UPDATING", "cf-cache-status"),
    ("cf-cache-status: DYNAMIC", "BYPASS", "cf-cache-status"),
    ("cf-cache-status: NONE", None, None),
    ("cf-cache-status: UNKNOWN", None, None),
    ("x-cache-status: EXPIRED", "EXPIRED", "x-cache-status"),
    ("x-proxy-cache: HIT", "HIT", "x-proxy-cache"),
    ("x-nginx-cache: UPDATING", "UPDATING", "x-nginx-cache"),
    ("x-pulp-cache: MISS", "MISS", "x-pulp-cache"),
    ("x-vercel-cache: STALE", "STALE", "x-vercel-cache"),
    ("x-77-cache: HIT", "HIT", "x-77-cache"),
    ("akamai-cache-status: Hit from child", "HIT", "akamai-cache-status"),
    ("akamai-cache-status: Miss from child, Hit from parent", "HIT", "akamai-cache-status"),
    (
        "akamai-cache-status: Miss from child, RefreshHit from parent",
        "REVALIDATED",
        "akamai-cache-status",
    ),
    (
        "akamai-cache-status: NotCacheable from child, Miss from parent",
        "BYPASS",
        "akamai-cache-status",
    ),
    ("akamai-cache-status: HitStale from child", "STALE", "akamai-cache-status"),
    ("akamai-cache-status: Constructed from child", None, None),
    # variants of X-Cache
    ("x-cache: HIT", "HIT", "x-cache"),
    ("x-cache: HIT, HIT", "HIT", "x-cache"),
    ("x-cache: MISS, HIT", "HIT", "x-cache"),
    ("x-cache: HIT, MISS", "HIT", "x-cache"),
    ("x-cache: MISS, MISS", "MISS", "x-cache"),
    ("x-cache: Hit from cdn", "HIT", "x-cache"),
    ("x-cache: Miss from cdn", "MISS", "x-cache"),
    ("x-cache: RefreshHit from cdn", "REVALIDATED", "x-cache"),
    ("x-cache: Error from cdn", None, None),
    ("x-cache: FunctionGeneratedResponse from cdn", None, None),
    ("x-cache: LambdaGeneratedResponse from cdn", None, None),
    ("x-cache: TCP_HIT", "HIT", "x-cache"),
    ("x-cache: TCP_REMOTE_HIT", "HIT", "x-cache"),
    ("x-cache: TCP_MEM_HIT from a1-2 (-)", "HIT", "x-cache"),
    ("x-cache: TCP_IMS_HIT", "HIT", "x-cache"),
    ("x-cache: TCP_MISS", "MISS", "x-cache"),
    ("x-cache: TCP_REFRESH_HIT", "REVALIDATED", "x-cache"),
    ("x-cache: TCP_REFRESH_UNMODIFIED", "REVALIDATED", "x-cache"),
    ("x-cache: TCP_REFRESH_MODIFIED", "EXPIRED", "x-cache"),
    ("x-cache: TCP_REFRESH_FAIL_OLD", "STALE", "x-cache"),
    ("x-cache: TCP_CLIENT_REFRESH_MISS", "BYPASS", "x-cache"),
    ("x-cache: PRIVATE_NOSTORE", "BYPASS", "x-cache"),
    ("x-cache: CONFIG_NOCACHE", "BYPASS", "x-cache"),
    ("x-cache: N/A", None, None),
    ("x-cache: PASS", "BYPASS", "x-cache"),
    ("x-cache: UNCACHEABLE", "BYPASS", "x-cache"),
    ("x-cache: CACHEABLE", None, None),
    ("x-cache: MISS from squid.corp.example, HIT from edge.corp.example:3128", "HIT", "x-cache"),
    ("x-cache-hits: 1, 7", "HIT", "x-cache-hits"),
    ("x-cache-hits: 0, 0", "MISS", "x-cache-hits"),
    ("x-cache-hits: 0, 3", "HIT", "x-cache-hits"),
    ("x-varnish: 32770 3", "HIT", "x-varnish"),
    ("x-varnish: 32770", "MISS", "x-varnish"),
    ("age: 75", "HIT", "age"),
    ("age: 0", None, None),
]


def fields(*lines: str) -> tuple[tuple[bytes, bytes], ...]:
    pairs = [line.partition(": ") for line in lines]
    return tuple((name.encode(), value.encode("latin-1")) for name, _, value in pairs)


@pytest.mark.parametrize(("line", "status", "source"), SAMPLES)
def test_documented_samples_give_the_documented_status(
    line: str, status: str | None, source: str | None
) -> None:
    assert read_cache_status(fields(line), 200)[:2] == (status, source)


@pytest.mark.parametrize(("line", "status", "source"), SAMPLES)
def test_status_words_are_case_insensitive(
    line: str, status: str | None, source: str | None
) -> None:
    name, _, value = line.partition(": ")
    if name != "cache-status":  # RFC 9651 3.3.4: tokens keep their case
        assert read_cache_status(fields(f"{name}: {value.lower()}"), 200)[:2] == (status, source)


def test_more_precise_fields_take_precedence() -> None:
    order = [
        "cache-status: a; fwd=bypass",
        "cf-cache-status: EXPIRED",
        "x-cache: TCP_REFRESH_HIT",
        "x-cache-hits: 0",
        "x-varnish: 1 2",
        "age: 5",
    ]
    sources = []
    while order:
        sources.append(read_cache_status(fields(*reversed(order)), 304).source)
        del order[0]
    sources.append(read_cache_status((), 304).source)

    assert sources == [
        "cache-status",
        "cf-cache-status",
        "x-cache",
        "x-cache-hits",
        "x-varnish",
        "age",
        "304",
    ]


@pytest.mark.parametrize(
    "line",
    [
        "cache-status: ",
        "cache-status: ;hit",
        "cache-status: a; hit; ttl=\xff",
        'cache-status: "open; hit',
        "cache-status: a; fwd=because",
        "cache-status: (a b); hit",
        "cache-status: a; hit=?0",
        "cache-status: a; hit" + " " * 5000,
        "cf-cache-status: \x00",
        "x-cache: ,,,",
        "x-cache-hits: many",
        "x-cache-hits: -1",
        "x-cache-hits: ",
        "x-varnish: ",
        "x-varnish: 1 2 3",
        "x-varnish: a",
    ],
)
def test_malformed_fields_are_ignored(line: str) -> None:
    assert read_cache_status(fields(line), 200) == CacheStatus(None, None, None)
    assert read_cache_status(fields(line, "age: 9"), 200) == CacheStatus("HIT", "age", 9)


@pytest.mark.parametrize(
    ("value", "age"),
    [
        ("0", 0),
        ("75", 75),
        (" 75 ", 75),
        ("75, 3", 75),
        ("2147483648", 2**31 - 1),
        ("9" * 5000, 2**31 - 1),
        ("0" * 5000 + "7", 7),
        ("-1", None),
        ("1.5", None),
        ("", None),
        ("x", None),
        ("\xb2", None),
    ],
)
def test_age_fits_the_column(value: str, age: int | None) -> None:
    assert read_cache_status(fields(f"age: {value}"), 200).age_s == age


def test_age_is_returned_with_any_status() -> None:
    assert read_cache_status(fields("x-cache: MISS", "age: 0"), 200) == ("MISS", "x-cache", 0)


def test_first_of_two_ages_counts() -> None:
    assert read_cache_status(fields("age: 3", "age: 900"), 200).age_s == 3


def test_repeated_fields_form_one_list() -> None:
    assert read_cache_status(fields("x-cache: HIT", "x-cache: MISS"), 200).status == "HIT"


def test_304_without_cache_fields_is_revalidated() -> None:
    assert read_cache_status(fields("content-type: a/b"), 304) == ("REVALIDATED", "304", None)


def test_no_cache_fields_give_no_status() -> None:
    assert read_cache_status(fields("content-type: a/b"), 200) == (None, None, None)
    assert read_cache_status((), None) == (None, None, None)


NAMES = st.sampled_from(sorted(RESPONSE_FIELDS))
PIECES = b'a ; hit hit=?0 fwd= stale = " , HIT MISS 1 ttl=-1 fwd-status=304 ( ) TCP_ :e: % @1 x'
VALUES = st.one_of(
    st.binary(max_size=60),
    st.lists(st.sampled_from(PIECES.split()), max_size=12).map(b"".join),
)


@given(
    st.lists(st.tuples(NAMES, VALUES), max_size=6),
    st.none() | st.integers(min_value=0, max_value=32767),
)
def test_any_input_gives_a_known_status_and_source(
    received: list[tuple[bytes, bytes]], status_code: int | None
) -> None:
    status, source, age = read_cache_status(tuple(received), status_code)

    assert status in STATUSES
    assert source in SOURCES
    assert (status is None) == (source is None)
    assert age is None or 0 <= age < 2**31
