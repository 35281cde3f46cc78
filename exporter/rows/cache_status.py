"""Tell from response headers whether a cache answered. Does no I/O.

Caches report this in about a dozen header fields. The fields are checked in a fixed order, the most
precise first, and the first one with a known status wins. `source` names that field, so that
readers can tell a CDN's HIT from another cache's.

The statuses are nginx's (`$upstream_cache_status`). HIT, STALE, UPDATING and REVALIDATED were
served by a cache; MISS, EXPIRED and BYPASS were forwarded to the origin.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import NamedTuple

import http_sf

AGE_MAX = 2**31 - 1  # limit in RFC 9111 1.2.2, and the largest int4

FROM_CACHE = frozenset({"HIT", "STALE", "UPDATING", "REVALIDATED"})

# Fields whose value is one status or a list of them, in the order of precedence.
_STATUS_FIELDS = (
    b"cf-cache-status",
    b"x-cache-status",
    b"x-proxy-cache",
    b"x-nginx-cache",
    b"x-pulp-cache",
    b"x-vercel-cache",
    b"akamai-cache-status",
    b"x-77-cache",
)
_CACHE_FIELDS = frozenset(
    {b"age", b"cache-status", b"x-cache", b"x-cache-hits", b"x-varnish", *_STATUS_FIELDS}
)
_MAX_VALUE_BYTES = 4096  # longer fields are ignored
_MAX_CACHED_BYTES = 512  # of all fields of a response together; more is parsed each time

# Status words of X-Cache and similar fields. The order matters: TCP_REFRESH_HIT is not a plain HIT,
# and HitStale is not a fresh one. Each pattern must match the first word of a list member.
_PATTERNS = tuple(
    (re.compile(pattern, re.IGNORECASE), status)
    for pattern, status in (
        (rb"RefreshHit|TCP_REFRESH_HIT|TCP_REFRESH_UNMODIFIED|REVALIDATED", "REVALIDATED"),
        (rb"HitStale|STALE|TCP_REFRESH_FAIL(?:_OLD)?|TCP_STALE_HIT", "STALE"),
        (rb"UPDATING", "UPDATING"),
        (rb"EXPIRED|TCP_REFRESH_MODIFIED|TCP_REFRESH_MISS", "EXPIRED"),
        (
            rb"PASS|BYPASS|DYNAMIC|(?:UN|Not)CACHEABLE|\w+_NO(?:CACHE|STORE)|TCP_CLIENT_REFRESH\w*",
            "BYPASS",
        ),
        (rb"(?:TCP_|MEM_|REMOTE_|IMS_|INM_|NEGATIVE_|OFFLINE_)*HIT", "HIT"),
        (rb"\w*MISS", "MISS"),
    )
)
_WORD = re.compile(rb"[\w-]+", re.ASCII)


class CacheStatus(NamedTuple):
    """What a response says about the caches on its way. None: unknown."""

    status: str | None  # HIT MISS BYPASS EXPIRED STALE UPDATING REVALIDATED
    source: str | None  # name of the field with the status, or "304"
    age_s: int | None  # seconds since the origin sent or validated it; 0 to AGE_MAX


Fields = tuple[tuple[bytes, bytes], ...]
_Result = tuple[str, str] | None  # status, source


def read_cache_status(fields: Fields, status_code: int | None) -> CacheStatus:
    """Return the cache status of one response. Never raises; thread-safe.

    Args:
        fields: the response's header fields, names in lower case, values as received.
        status_code: the response's status.

    A malformed field is ignored. The order of precedence:

    1. Cache-Status (RFC 9211)
    2. the fields of `_STATUS_FIELDS`
    3. X-Cache, X-Cache-Hits, X-Varnish
    4. Age above 0: the origin did not generate the response for this request (RFC 9111 5.1). An
       Age of 0 proves nothing, because many caches send it on a miss.
    5. status 304: the client's own copy is still valid (RFC 9110 15.4.5)
    """
    cache_fields = tuple([field for field in fields if field[0] in _CACHE_FIELDS])
    ages = [value for name, value in cache_fields if name == b"age"]
    age = _age(ages[0]) if ages else None
    # Age changes every second. The other fields repeat, so short ones are cached.
    stable = tuple([field for field in cache_fields if field[0] != b"age"])
    is_short = sum([len(value) for _, value in stable]) <= _MAX_CACHED_BYTES
    status, source = _declared(stable) if is_short else _declared.__wrapped__(stable)
    if status is None and age:
        status, source = "HIT", "age"
    elif status is None and status_code == 304:  # noqa: PLR2004 - RFC 9110 15.4.5
        status, source = "REVALIDATED", "304"
    return CacheStatus(status, source, age)


def _age(value: bytes) -> int | None:
    """Parse Age. The first member of a list counts; a non-integer is ignored (RFC 9111 5.1)."""
    if not value.isdigit():
        value = value.partition(b",")[0].strip(b" \t")
        if not value.isdigit():
            return None
    if len(value) > 10:  # noqa: PLR2004 - int() of a long number is slow
        value = value.lstrip(b"0")[:11] or b"0"
    return min(int(value), AGE_MAX)


@lru_cache(maxsize=1024)
def _declared(fields: Fields) -> tuple[str | None, str | None]:
    """Return status and source from the fields other than Age."""
    values: dict[bytes, bytes] = {}
    for name, value in fields:  # RFC 9110 5.3: repeated fields form one list
        values[name] = values[name] + b", " + value if name in values else value
    values = {name: value for name, value in values.items() if len(value) <= _MAX_VALUE_BYTES}
    return (
        _from_cache_status(values.get(b"cache-status"))
        or _from_status_fields(values)
        or _from_x_cache(values.get(b"x-cache"))
        or _from_hits(values.get(b"x-cache-hits"))
        or _from_varnish(values.get(b"x-varnish"))
        or (None, None)
    )


def _from_cache_status(value: bytes | None) -> _Result:
    """Parse Cache-Status: a list of caches in the order from origin to user (RFC 9211 2)."""
    if value is None:
        return None
    try:
        members = http_sf.parse(value, tltype="list")
    except ValueError:  # raised for any invalid structured field (RFC 9651 4.2)
        return None
    assert isinstance(members, list)  # noqa: S101 - for the type checker; tltype is a list
    statuses = []
    for member in members:
        if isinstance(member, tuple) and not isinstance(member[0], list):  # not an inner list
            status = _status_of_parameters(member[1])
            if status is not None:
                statuses.append(status)
    return _select(statuses, "cache-status")


def _status_of_parameters(parameters: object) -> str | None:
    """Map `hit`, or why the request was forwarded (`fwd`), to a status (RFC 9211 2.1 to 2.4)."""
    assert isinstance(parameters, dict)  # noqa: S101 - as above
    if parameters.get("hit") is True:
        ttl = parameters.get("ttl")
        stale = isinstance(ttl, int) and ttl < 0
        return "STALE" if stale else "HIT"
    forwarded = str(parameters.get("fwd", ""))
    if forwarded == "stale":
        return "REVALIDATED" if parameters.get("fwd-status") == 304 else "EXPIRED"  # noqa: PLR2004
    if forwarded in {"bypass", "method", "request"}:
        return "BYPASS"
    if forwarded in {"miss", "uri-miss", "vary-miss", "partial"}:
        return "MISS"
    return None


def _from_status_fields(values: dict[bytes, bytes]) -> _Result:
    for name in _STATUS_FIELDS:
        if name in values:
            statuses = _statuses(values[name])
            if name == b"akamai-cache-status":
                # "Hit from child, Miss from parent" starts with the cache nearest to the user.
                statuses.reverse()
            result = _select(statuses, name.decode("ascii"))
            if result is not None:
                return result
    return None


def _from_x_cache(value: bytes | None) -> _Result:
    return None if value is None else _select(_statuses(value), "x-cache")


def _statuses(value: bytes) -> list[str]:
    """Return the statuses in a comma-separated list; unknown words are skipped."""
    statuses = []
    for member in value.split(b","):
        word = _WORD.search(member)
        if word is not None:
            status = next((s for pattern, s in _PATTERNS if pattern.fullmatch(word[0])), None)
            if status is not None:
                statuses.append(status)
    return statuses


def _select(statuses: list[str], source: str) -> _Result:
    """Choose one status of several caches, given in the order from origin to user.

    The cache nearest to the user that served the response counts, or else the nearest cache.
    """
    for status in reversed(statuses):
        if status in FROM_CACHE:
            return status, source
    return (statuses[-1], source) if statuses else None


def _from_hits(value: bytes | None) -> _Result:
    """Parse X-Cache-Hits: how often each cache has served its copy. All 0 means a miss."""
    if value is None:
        return None
    counts = [count.strip(b" \t") for count in value.split(b",")]
    if not all(count.isdigit() for count in counts):
        return None
    return "HIT" if any(count.strip(b"0") for count in counts) else "MISS", "x-cache-hits"


def _from_varnish(value: bytes | None) -> _Result:
    """Parse X-Varnish: the id of this request and, on a hit, of the request that filled the cache."""
    if value is None:
        return None
    members = [member.split() for member in value.split(b",")]
    if not all(number.isdigit() for ids in members for number in ids):
        return None
    counts = {len(ids) for ids in members}
    if not counts <= {1, 2}:
        return None
    return "HIT" if 2 in counts else "MISS", "x-varnish"  # noqa: PLR2004
