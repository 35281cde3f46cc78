"""Raw values as text and numbers that PostgreSQL accepts: decoded, redacted, bounded. Pure functions."""

from __future__ import annotations

import ipaddress
from datetime import UTC, datetime
from functools import lru_cache
from typing import TYPE_CHECKING

from .redaction import REDACTED, QueryPolicy, redact, redact_error, redact_path, redact_query

if TYPE_CHECKING:
    from ..exchange import SocketAddress

# Longer text is cut and ends in CUT. addon/flow/capture.py has cut it to a little more already.
MAX_PATH = 2048
MAX_QUERY = 2048
MAX_USER_AGENT = 512
MAX_ERROR = 500
MAX_TEXT = 255
CUT = "...[cut]"

CACHED_VALUES = 8192  # per cache; clients repeat most values, but none may fill the memory

_MIN_TIMESTAMP = -62_135_596_800.0  # 0001-01-01, the first day that datetime can write
_MAX_TIMESTAMP = 253_402_300_799.0  # 9999-12-31, the last
_MAX_SPAN_SECONDS = 1e12  # more is an accident, and does not fit into a `real`


def clean(text: str, limit: int) -> str:
    r"""Text that PostgreSQL accepts: no NUL, no lone surrogates, at most `limit` characters plus CUT.

    A byte that is not UTF-8 (mitmproxy passes it on as a lone surrogate) becomes `\xff`.
    """
    if len(text) > limit:
        text = text[:limit] + CUT
    if "\x00" in text:
        text = text.replace("\x00", "\\x00")
    if text.isascii():
        return text
    try:
        raw = text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # a lone surrogate that does not stand for a byte (PEP 383)
        return text.encode("utf-8", "backslashreplace").decode("utf-8")
    return raw.decode("utf-8", "backslashreplace")


def decoded(value: bytes) -> str:
    """Bytes as text; bytes that are not UTF-8 become lone surrogates, which `clean` replaces."""
    return value.decode("utf-8", "surrogateescape")


def column_text(value: bytes | str | None, limit: int) -> str | None:
    """A value as text for a column: without secrets, valid and bounded. None if it is empty.

    Every text column that has no function of its own below gets its value from here.
    """
    if not value:
        return None
    return clean(redact(decoded(value) if isinstance(value, bytes) else value), limit)


@lru_cache(CACHED_VALUES)
def host_text(host: str) -> str | None:
    """A host in lower case; None if it is empty."""
    text = column_text(host, MAX_TEXT)
    return text and REDACTED.join(part.lower() for part in text.split(REDACTED))


def path_text(raw_path: bytes, host: str | None = None) -> str | None:
    """Path of a request target without its query (RFC 9112 3.2: all four forms).

    For an absolute-form target, the path after the authority. An authority-form or asterisk-form
    target stays as it is. None if the target is empty.
    """
    if not raw_path:
        return None
    path = decoded(raw_path).partition("#")[0]
    # RFC 9110 4.2.3: an empty path means "/"
    return clean(redact_path(path, host or ""), MAX_PATH) or "/"


def query_text(raw_query: bytes, policy: QueryPolicy) -> str | None:
    """Query of a request target, redacted by `policy`; None if nothing of it is kept."""
    kept = redact_query(decoded(raw_query), policy)
    return clean(kept, MAX_QUERY) if kept else None


def error_text(message: str | None) -> str | None:
    """An error message without secrets and without what it quotes; None if there is none."""
    return clean(redact_error(message), MAX_ERROR) if message else None


@lru_cache(CACHED_VALUES)
def ip_text(address: SocketAddress) -> str | None:
    """The IP address of a socket for an `inet` column; None if there is none (Unix sockets).

    IPv4-mapped addresses are unmapped (RFC 4291 2.5.5.2), zone ids removed (RFC 4007 11).
    """
    if not address:
        return None
    try:
        ip = ipaddress.ip_address(str(address[0]).partition("%")[0])
    except ValueError:
        return None
    mapped = ip.ipv4_mapped if ip.version == 6 else None  # noqa: PLR2004
    return str(mapped or ip)


def timestamp(seconds: float) -> str:
    """Seconds since the epoch as ISO 8601 in UTC, with microseconds.

    Times outside the calendar move to its edge; NaN becomes the epoch.
    """
    if not _MIN_TIMESTAMP <= seconds <= _MAX_TIMESTAMP:  # also true for NaN
        seconds = max(_MIN_TIMESTAMP, min(_MAX_TIMESTAMP, seconds if seconds == seconds else 0.0))  # noqa: PLR0124
    whole, micro = divmod(round(seconds * 1_000_000), 1_000_000)
    return f"{_second(whole)}.{micro:06d}+00"


@lru_cache(CACHED_VALUES)
def _second(whole: int) -> str:
    return datetime.fromtimestamp(whole, UTC).strftime("%Y-%m-%d %H:%M:%S").zfill(19)


def milliseconds(start: float, end: float | None) -> float | None:
    """From `start` to `end` (both in seconds) in ms; None if unknown.

    Also None for a negative span: the wall clock was set back, so the span is unknown.
    """
    if end is None or not 0 <= end - start <= _MAX_SPAN_SECONDS:
        return None
    return round((end - start) * 1_000_000) / 1000
