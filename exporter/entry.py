"""The row, and how the raw facts of an exchange become it: decode, bound, redact; no I/O here."""

from __future__ import annotations

import hashlib
import ipaddress
import re
import uuid
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from .cache_status import CacheStatus, read_cache_status
from .identity import UNKNOWN, Identity, Remotes, RemotesError
from .redaction import PathPatterns, redact_error, redact_path, redact_query, redact_text
from .redirects import REDIRECTS, Redirects
from .settings import SettingsError

if TYPE_CHECKING:
    from .exchange import Exchange
    from .settings import Settings

# Text longer than this ends in the mark; capture has cut it to a little more already.
MAX_PATH = 2048
MAX_QUERY = 2048
MAX_USER_AGENT = 512
MAX_ERROR = 500
MAX_TEXT = 255
CUT = "...[cut]"

# What a client repeats is decoded and redacted once; bounded, so that no client can fill the memory.
_CACHE_ENTRIES = 8192

_UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_EARLIEST = -62_135_596_800.0  # 0001-01-01, the first day Python can write
_LATEST = 253_402_300_799.0  # 9999-12-31, the last
_LONGEST_SECONDS = 1e12  # more is no time but an accident, and no real
_MAX_SMALLINT = 32_767
_MAX_PORT = 65_535


class AccessLogEntry(NamedTuple):
    """One row of access_log, in its column order, but for `logged_at`, which Postgres fills in.

    Every text is valid UTF-8 without NUL, and not empty. Unknown is None: never -1, 0, "-" or a guess.
    """

    started_at: str  # ISO 8601 with offset, microseconds
    flow_id: str
    node: str
    client_ip: str | None
    client_port: int | None
    proxy_user: str | None
    user_agent: str | None
    method: str | None
    scheme: str | None
    host: str | None
    port: int | None
    path: str | None
    query: str | None
    http_version: str | None
    status_code: int | None
    error_type: str | None
    error: str | None
    content_type: str | None
    request_bytes: int | None
    response_bytes: int | None
    duration_ms: float | None
    ttfb_ms: float | None
    connect_ms: float | None
    server_ip: str | None
    tls_version: str | None
    response_source: str | None
    cache_status: str | None = None
    cache_source: str | None = None
    cache_age_s: int | None = None
    remote: str | None = None
    artifact_kind: str | None = None
    ecosystem: str | None = None
    package: str | None = None
    version: str | None = None
    filename: str | None = None
    purl: str | None = None
    sha256: str | None = None  # as bytea's hex format: \\x and 64 digits


class EntryBuilder:
    """Makes entries by one set of settings. Not shared between threads."""

    def __init__(self, settings: Settings) -> None:
        """Raises SettingsError if the user's table of remotes is wrong."""
        self._remotes = load_remotes(settings)
        self._redirects = Redirects(lambda host, target: self._split(host, target)[0])
        self._node = clean(settings.node_name, MAX_TEXT)
        policy = settings.redact.query
        self._path_patterns = PathPatterns(settings.redact.paths)
        self._split_target = lru_cache(_CACHE_ENTRIES)(lambda target: split_target(target, policy))

    def build(self, exchange: Exchange) -> AccessLogEntry:
        """One exchange as a row. Takes any values an exchange can hold; never raises for them."""
        x = exchange
        host = clean(x.host, MAX_TEXT).lower() or None
        path, query = self._split(host or "", x.target)
        cache = _cache_status(x)
        identity = self._identify(x, host, path)
        # By position: by name takes ten times as long.
        return AccessLogEntry._make(
            (
                timestamp(x.started_at),
                x.flow_id if _UUID.fullmatch(x.flow_id) else _uuid_of(x.flow_id),
                self._node,
                address(x.client),
                _client_port(x.client),
                clean(x.proxy_user, MAX_TEXT) if x.proxy_user else None,
                _redacted_text(x.user_agent, MAX_USER_AGENT),
                _text(x.method, MAX_TEXT),
                _text(x.scheme, MAX_TEXT),
                host,
                x.port if 0 < x.port <= _MAX_PORT else None,
                path,
                query,
                _text(x.http_version, MAX_TEXT),
                _status(x.status_code),
                x.error_type,
                clean(redact_error(x.error), MAX_ERROR) if x.error else None,
                _text(_field(x, b"content-type"), MAX_TEXT),
                x.request_bytes,
                x.response_bytes,
                _milliseconds(x.started_at, x.ended_at),
                _milliseconds(x.started_at, x.head_at),
                _milliseconds(0.0, x.connect_seconds),
                address(x.server),
                x.tls_version or None,
                x.response_source,
                cache.status,
                cache.source,
                cache.age_s,
                identity.remote,
                identity.artifact_kind,
                identity.ecosystem,
                identity.package,
                identity.version,
                identity.filename,
                identity.purl,
                _sha256(x) if identity.artifact_kind == "artifact" else None,
            )
        )

    def _split(self, host: str, target: bytes) -> tuple[str | None, str | None]:
        """Path and query as a row has them."""
        path, query = self._split_target(target)
        if self._path_patterns and path is not None:
            path = self._path_patterns.redact(host, path)
        return path, query

    def _identify(self, x: Exchange, host: str | None, path: str | None) -> Identity:
        """By host and redacted path; else by the redirect that led here."""
        if host is None or path is None:
            return UNKNOWN
        digest = _field(x, b"docker-content-digest") if "/manifests/" in path else None
        identity = self._remotes.identify(host, path, digest=_text(digest, MAX_TEXT))
        if identity.purl is None and self._redirects and not _is_page(x):
            identity = self._redirects.find(host, path) or identity
        if x.status_code in REDIRECTS and identity.artifact_kind is not None:
            location = _field(x, b"location")
            if location:
                url = f"{x.scheme.decode('ascii', 'replace')}://{host}{path}"
                self._redirects.remember(url, location, identity)
        return identity


def load_remotes(settings: Settings) -> Remotes:
    """The table of remotes that these settings name.

    Raises:
        SettingsError: it can't be read or is wrong; a sentence for each place, with its line.
    """
    file = settings.remotes.file
    try:
        return _load_remotes(Path(file).expanduser() if file else None)
    except RemotesError as e:
        raise SettingsError(str(e)) from e


@lru_cache(4)
def _load_remotes(file: Path | None) -> Remotes:
    return Remotes.load(file)


def _cache_status(x: Exchange) -> CacheStatus:
    """Our side first: what was replayed came from our own store, what an addon made from no cache."""
    if x.response_source == "replay":
        return CacheStatus("HIT", "local", None)
    if x.response_source == "addon":
        return CacheStatus(None, None, None)
    return read_cache_status(x.response_fields, x.status_code)


def clean(text: str, limit: int) -> str:
    r"""Text that Postgres accepts: no NUL, no lone surrogates, at most `limit` characters and the mark.

    A byte that is no UTF-8 (mitmproxy hands it out as a lone surrogate) becomes `\xff`.
    """
    if len(text) > limit:
        text = text[:limit] + CUT
    if "\x00" in text:
        text = text.replace("\x00", "\\x00")
    if text.isascii():
        return text
    try:
        raw = text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # a lone surrogate that stands for no byte (PEP 383)
        return text.encode("utf-8", "backslashreplace").decode("utf-8")
    return raw.decode("utf-8", "backslashreplace")


def split_target(target: bytes, policy: str) -> tuple[str | None, str | None]:
    """Path and query of a request target, redacted and bounded (RFC 9112 3.2: all four forms).

    The path of an absolute-form target is what follows its authority; an authority-form or
    asterisk-form target is kept as it is. Empty gives (None, None).
    """
    if not target:
        return None, None
    text = target.decode("utf-8", "surrogateescape")
    path, mark, query = text.partition("?")
    path = path.partition("#")[0]
    kept = redact_query(query, policy) if mark and query else None  # type: ignore[arg-type]
    return (
        clean(redact_path(path), MAX_PATH) or "/",  # RFC 9110 4.2.3: the same
        clean(kept, MAX_QUERY) if kept else None,
    )


@lru_cache(_CACHE_ENTRIES)
def address(peer: tuple[str, int] | tuple[str, ...] | None) -> str | None:
    """A socket's address as Postgres' inet wants it; None where there is none (Unix sockets).

    IPv4-mapped addresses are unmapped (RFC 4291 2.5.5.2), zone ids cut (RFC 4007 11).
    """
    if not peer:
        return None
    try:
        ip = ipaddress.ip_address(str(peer[0]).partition("%")[0])
    except ValueError:
        return None
    mapped = ip.ipv4_mapped if ip.version == 6 else None  # noqa: PLR2004
    return str(mapped or ip)


def timestamp(seconds: float) -> str:
    """Seconds since the epoch as ISO 8601 in UTC; what no calendar holds is moved to its edge."""
    if not _EARLIEST <= seconds <= _LATEST:  # also false for NaN
        seconds = _LATEST if seconds > _LATEST else 0.0 if seconds != seconds else _EARLIEST  # noqa: PLR0124
    whole, micro = divmod(round(seconds * 1_000_000), 1_000_000)
    return f"{_second(whole)}.{micro:06d}+00"


@lru_cache(_CACHE_ENTRIES)
def _second(whole: int) -> str:
    return datetime.fromtimestamp(whole, UTC).strftime("%Y-%m-%d %H:%M:%S").zfill(19)


@lru_cache(_CACHE_ENTRIES)
def _text(value: bytes | None, limit: int) -> str | None:
    if not value:
        return None
    return clean(value.decode("utf-8", "surrogateescape"), limit)


def _is_page(x: Exchange) -> bool:
    """A redirect to a login page leads to no artifact."""
    return (_field(x, b"content-type") or b"").lower().startswith(b"text/html")


def _sha256(x: Exchange) -> str | None:
    digest = hashlib.sha256(x.body).digest() if x.body is not None else x.sha256
    return f"\\x{digest.hex()}" if digest is not None else None


@lru_cache(_CACHE_ENTRIES)
def _redacted_text(value: bytes | None, limit: int) -> str | None:
    if not value:
        return None
    return clean(redact_text(value.decode("utf-8", "surrogateescape")), limit)


def _field(exchange: Exchange, name: bytes) -> bytes | None:
    for key, value in exchange.response_fields:
        if key == name:
            return value
    return None


def _client_port(peer: tuple[str, int] | tuple[str, ...] | None) -> int | None:
    port = peer[1] if peer and len(peer) > 1 else None
    return port if isinstance(port, int) and 0 < port <= _MAX_PORT else None


def _status(status: int | None) -> int | None:
    return status if status is not None and 0 < status <= _MAX_SMALLINT else None


def _milliseconds(start: float, end: float | None) -> float | None:
    """None rather than a negative span: the wall clock stepped, so the span is not known."""
    if end is None or not 0 <= end - start <= _LONGEST_SECONDS:
        return None
    return round((end - start) * 1_000_000) / 1000  # round(x, 3) takes five times as long


def _uuid_of(flow_id: str) -> str:
    """Flows of foreign files may carry any id: the same id gives the same uuid."""
    return str(uuid.uuid5(uuid.NAMESPACE_OID, clean(flow_id, MAX_PATH)))
