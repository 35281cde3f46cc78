"""Read from response headers whether a cache answered; sends nothing and knows no cache of its own.

Caches say it in a dozen dialects. They are asked in a fixed order, the most exact first, and the
first that yields a word decides. `cache_source` names the evidence, so that a reader can tell the
HIT of a CDN from the HIT of a cache next door.

The words are nginx's (`$upstream_cache_status`): HIT, STALE, UPDATING and REVALIDATED came from a
cache; MISS, EXPIRED and BYPASS went on to the origin.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import NamedTuple

import http_sf

AGE_MAX = 2**31 - 1  # RFC 9111 1.2.2 names this bound; it is also the largest int4

FROM_CACHE = frozenset({"HIT", "STALE", "UPDATING", "REVALIDATED"})

# Fields of one word each, in the order they are asked.
_WORD_FIELDS = (
    b"cf-cache-status",
    b"x-cache-status",
    b"x-proxy-cache",
    b"x-nginx-cache",
    b"x-pulp-cache",
    b"x-vercel-cache",
    b"akamai-cache-status",
    b"x-77-cache",
)
_EVIDENCE = frozenset(
    {b"age", b"cache-status", b"x-cache", b"x-cache-hits", b"x-varnish", *_WORD_FIELDS}
)
_VALUE_MAX = 4096  # bytes; a longer field is no statement about a cache, and is not parsed
_REMEMBERED_MAX = 512  # bytes of all fields together

# What X-Cache and its kin say, tried in this order: TCP_REFRESH_HIT is no plain HIT, and HitStale
# no fresh one. Each is matched against the first word of a list member, case-blind.
_WORDS = tuple(
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
_FIRST_WORD = re.compile(rb"[\w-]+", re.ASCII)


class CacheStatus(NamedTuple):
    """What the response says of caches on its way. None where it says nothing."""

    status: str | None  # HIT MISS BYPASS EXPIRED STALE UPDATING REVALIDATED
    source: str | None  # name of the field that said so, or "304"
    age_s: int | None  # seconds since the origin made or checked it; 0 .. 2**31 - 1


Fields = tuple[tuple[bytes, bytes], ...]
_Answer = tuple[str, str] | None


def read_cache_status(fields: Fields, status_code: int | None) -> CacheStatus:
    """The cache status of one response.

    Takes the response's header fields, names in lower case, values as received, and its status.
    A malformed field says nothing, and the next is asked. Never raises; safe in any thread.

    The order: Cache-Status (RFC 9211); fields of one word; X-Cache; X-Cache-Hits; X-Varnish; an
    Age above 0 (RFC 9111 5.1: a response with Age was not made by the origin for this request;
    0 proves nothing, many caches send it on a miss); a lone 304 (RFC 9110 15.4.5), where the
    client's own copy was found good.
    """
    evidence = tuple([field for field in fields if field[0] in _EVIDENCE])
    ages = [value for name, value in evidence if name == b"age"]
    age = _age(ages[0]) if ages else None
    # Age differs from one second to the next, the rest repeats: so that is remembered, if it is short.
    lasting = tuple([field for field in evidence if field[0] != b"age"])
    is_short = sum([len(value) for _, value in lasting]) <= _REMEMBERED_MAX
    status, source = _declared(lasting) if is_short else _declared.__wrapped__(lasting)
    if status is None and age:
        status, source = "HIT", "age"
    elif status is None and status_code == 304:  # noqa: PLR2004 - RFC 9110 15.4.5
        status, source = "REVALIDATED", "304"
    return CacheStatus(status, source, age)


def _age(value: bytes) -> int | None:
    """RFC 9111 5.1: of a list the first member counts; what is no integer is ignored."""
    if not value.isdigit():
        value = value.partition(b",")[0].strip(b" \t")
        if not value.isdigit():
            return None
    if len(value) > 10:  # noqa: PLR2004 - int() of a long number is slow
        value = value.lstrip(b"0")[:11] or b"0"
    return min(int(value), AGE_MAX)


@lru_cache(maxsize=1024)
def _declared(evidence: Fields) -> tuple[str | None, str | None]:
    values: dict[bytes, bytes] = {}
    for name, value in evidence:  # RFC 9110 5.3: several lines of a field are one list
        values[name] = values[name] + b", " + value if name in values else value
    values = {name: value for name, value in values.items() if len(value) <= _VALUE_MAX}
    return (
        _from_cache_status(values.get(b"cache-status"))
        or _from_words(values)
        or _from_x_cache(values.get(b"x-cache"))
        or _from_hits(values.get(b"x-cache-hits"))
        or _from_varnish(values.get(b"x-varnish"))
        or (None, None)
    )


def _from_cache_status(value: bytes | None) -> _Answer:
    """RFC 9211 2: a list of caches, the one nearest the origin first, nearest the user last."""
    if value is None:
        return None
    try:
        members = http_sf.parse(value, tltype="list")
    except ValueError:  # what http_sf raises on all that is no structured field (RFC 9651 4.2)
        return None
    assert isinstance(members, list)  # noqa: S101 - tltype asks for one; for the type checker
    words = []
    for member in members:
        if isinstance(member, tuple) and not isinstance(member[0], list):
            word = _of_parameters(member[1])
            if word is not None:
                words.append(word)
    return _nearest(words, "cache-status")


def _of_parameters(parameters: object) -> str | None:
    """RFC 9211 2.1 to 2.4: `hit`, or why it was forwarded (`fwd`) and what came back."""
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


def _from_words(values: dict[bytes, bytes]) -> _Answer:
    for name in _WORD_FIELDS:
        if name in values:
            words = _words(values[name])
            if name == b"akamai-cache-status":
                words.reverse()  # "Hit from child, Miss from parent": the child is nearer the user
            answer = _nearest(words, name.decode("ascii"))
            if answer is not None:
                return answer
    return None


def _from_x_cache(value: bytes | None) -> _Answer:
    return None if value is None else _nearest(_words(value), "x-cache")


def _words(value: bytes) -> list[str]:
    """The statuses a comma-separated list states, in its order; unknown words are left out."""
    found = []
    for member in value.split(b","):
        first = _FIRST_WORD.search(member)
        if first is not None:
            word = first[0]
            status = next((s for pattern, s in _WORDS if pattern.fullmatch(word)), None)
            if status is not None:
                found.append(status)
    return found


def _nearest(words: list[str], source: str) -> _Answer:
    """Of caches in the order origin to user: the last that answered itself, else the last."""
    for word in reversed(words):
        if word in FROM_CACHE:
            return word, source
    return (words[-1], source) if words else None


def _from_hits(value: bytes | None) -> _Answer:
    """X-Cache-Hits: how often each cache had used its copy; all 0 means none had one."""
    if value is None:
        return None
    counts = [count.strip(b" \t") for count in value.split(b",")]
    if not all(count.isdigit() for count in counts):
        return None
    return "HIT" if any(count.strip(b"0") for count in counts) else "MISS", "x-cache-hits"


def _from_varnish(value: bytes | None) -> _Answer:
    """X-Varnish: the id of this request and, on a hit, of the request that filled the cache."""
    if value is None:
        return None
    members = [member.split() for member in value.split(b",")]
    if not all(number.isdigit() for ids in members for number in ids):
        return None
    counts = {len(ids) for ids in members}
    if not counts <= {1, 2}:
        return None
    return "HIT" if 2 in counts else "MISS", "x-varnish"  # noqa: PLR2004
