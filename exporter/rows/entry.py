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

from ..settings import SettingsError
from .cache_status import CacheStatus, read_cache_status
from .packages.identity import UNKNOWN, Identity, Remotes, RemotesError
from .redaction import (
    PathPatterns,
    QueryPolicy,
    redact_error,
    redact_path,
    redact_query,
    redact_text,
)
from .redirects import REDIRECTS, Redirects

if TYPE_CHECKING:
    from ..exchange import Exchange
    from ..settings import Settings

# Text longer than this ends in the mark; capture has cut it to a little more already.
MAX_PATH = 2048
MAX_QUERY = 2048
MAX_USER_AGENT = 512
MAX_ERROR = 500
MAX_TEXT = 255
CUT = "...[cut]"

# What clients repeat is decoded, redacted and identified once; bounded, so that none can fill the memory.
_CACHE_ENTRIES = 8192
_SHORT_BYTES = 1280  # of a whole exchange; most take no more
_MAX_FIELDS_REMEMBERED = 8  # an exchange's size leaves out what others share

_is_uuid = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}").fullmatch
_MANIFESTS = "/manifests/"  # OCI distribution spec: where a tag stands for a digest
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


class _Place(NamedTuple):
    """Where a request went, as its row has it."""

    host: str | None
    path: str | None
    identity: Identity


class EntryBuilder:
    """Makes entries by one set of settings. Not shared between threads."""

    def __init__(self, settings: Settings) -> None:
        """Raises SettingsError if the user's table of remotes is wrong."""
        self._remotes = load_remotes(settings)
        self._redirects = Redirects()
        self._node = clean(settings.node_name, MAX_TEXT)
        self._policy = settings.redact.query
        self._path_patterns = PathPatterns(settings.redact.paths)
        self._remembered = lru_cache(_CACHE_ENTRIES)(self._find)

    def build(self, exchange: Exchange) -> AccessLogEntry:
        """One exchange as a row. Takes any values an exchange can hold; never raises for them."""
        x = exchange
        # What repeats is read once; what is long is not remembered, and seldom repeats.
        is_short = x.bare_size <= _SHORT_BYTES
        raw_path, mark, raw_query = x.target.partition(b"?")
        if mark and not raw_path:
            raw_path = b"/"
        find = self._remembered if is_short else self._find
        place = find(x.host, raw_path)
        host, path, identity = place
        if path is not None and (
            self._redirects or x.status_code in REDIRECTS or _MANIFESTS in path
        ):
            identity = self._identify_answer(x, place)
        client_ip, client_port = _client(x.client)
        read_request = _request_texts if is_short else _request_texts.__wrapped__
        proxy_user, user_agent, method, scheme, http_version = read_request(
            x.proxy_user, x.user_agent, x.method, x.scheme, x.http_version
        )
        is_short = is_short and len(x.response_fields) <= _MAX_FIELDS_REMEMBERED
        read_answer = _answer if is_short else _answer.__wrapped__
        content_type, cache = read_answer(x.response_fields, x.status_code, x.response_source)
        started_at, status_code, port = x.started_at, x.status_code, x.port
        # By position: by name takes ten times as long.
        return AccessLogEntry._make(
            (
                timestamp(started_at),
                x.flow_id if _is_uuid(x.flow_id) else _uuid_of(x.flow_id),
                self._node,
                client_ip,
                client_port,
                proxy_user,
                user_agent,
                method,
                scheme,
                host,
                port if 0 < port <= _MAX_PORT else None,
                path,
                query_text(raw_query, self._policy) if raw_query else None,
                http_version,
                status_code if status_code and 0 < status_code <= _MAX_SMALLINT else None,
                x.error_type,
                clean(redact_error(x.error), MAX_ERROR) if x.error else None,
                content_type,
                x.request_bytes,
                x.response_bytes,
                _milliseconds(started_at, x.ended_at),
                _milliseconds(started_at, x.head_at),
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

    def _find(self, host: str, raw_path: bytes) -> _Place:
        # A Host field may bear a login, which RFC 9110 7.2 does not allow.
        name = clean(host.rpartition("@")[2], MAX_TEXT).lower() or None
        path = self._path(name or "", raw_path)
        if name is None or path is None:
            return _Place(name, path, UNKNOWN)
        return _Place(name, path, self._remotes.identify(name, path))

    def _path(self, host: str, raw_path: bytes) -> str | None:
        """As a row has it."""
        path = path_text(raw_path)
        if self._path_patterns and path is not None:
            path = self._path_patterns.redact(host, path)
        return path

    def _identify_answer(self, x: Exchange, place: _Place) -> Identity:
        """What answers add to what the URL says: a tag's digest, and where a redirect leads."""
        host, path, identity = place
        if host is None or path is None:
            return identity
        digest = _field(x.response_fields, b"docker-content-digest") if _MANIFESTS in path else None
        if digest is not None:
            identity = self._remotes.identify(host, path, digest=_text(digest, MAX_TEXT))
        if identity.purl is None and self._redirects and not _is_page(x):
            identity = self._redirects.find(host, x.port, x.target) or identity
        if x.status_code in REDIRECTS and identity.artifact_kind is not None:
            location = _field(x.response_fields, b"location")
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
        path = Path(file).expanduser() if file else None
        return _load_remotes(path, path.stat().st_mtime_ns if path and path.exists() else 0)
    except RemotesError as e:
        raise SettingsError(str(e)) from e


@lru_cache(4)
def _load_remotes(file: Path | None, _changed_at: int) -> Remotes:
    return Remotes.load(file)


@lru_cache(_CACHE_ENTRIES)
def _request_texts(
    proxy_user: str | None, user_agent: bytes | None, *others: bytes
) -> tuple[str | None, ...]:
    """These as a row has them; the others are method, scheme and version of HTTP."""
    return (
        clean(proxy_user, MAX_TEXT) if proxy_user else None,
        clean(redact_text(_decoded(user_agent)), MAX_USER_AGENT) if user_agent else None,
        *(_text(other, MAX_TEXT) for other in others),
    )


@lru_cache(_CACHE_ENTRIES)
def _answer(
    fields: tuple[tuple[bytes, bytes], ...], status_code: int | None, source: str | None
) -> tuple[str | None, CacheStatus]:
    """Content type and cache status of a response.

    Our side first: what was replayed came from our own store, what an addon made from no cache.
    """
    content_type = _text(_field(fields, b"content-type"), MAX_TEXT)
    if source == "replay":
        return content_type, CacheStatus("HIT", "local", None)
    if source == "addon":
        return content_type, CacheStatus(None, None, None)
    return content_type, read_cache_status(fields, status_code)


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


def path_text(raw_path: bytes) -> str | None:
    """Path of a request target without its query, redacted and bounded (RFC 9112 3.2: all four forms).

    Of an absolute-form target it is what follows its authority; an authority-form or asterisk-form
    target is kept as it is. None if the target is empty.
    """
    if not raw_path:
        return None
    path = _decoded(raw_path).partition("#")[0]
    return clean(redact_path(path), MAX_PATH) or "/"  # RFC 9110 4.2.3: the same


def query_text(raw_query: bytes, policy: QueryPolicy) -> str | None:
    """Query of a request target, redacted and bounded; None if nothing is kept of it."""
    kept = redact_query(_decoded(raw_query), policy)
    return clean(kept, MAX_QUERY) if kept else None


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


def _text(value: bytes | None, limit: int) -> str | None:
    return clean(_decoded(value), limit) if value else None


def _decoded(value: bytes) -> str:
    return value.decode("utf-8", "surrogateescape")


def _is_page(x: Exchange) -> bool:
    """A redirect to a login page leads to no artifact."""
    content_type = _field(x.response_fields, b"content-type") or b""
    return content_type.lower().startswith(b"text/html")


def _sha256(x: Exchange) -> str | None:
    digest = hashlib.sha256(x.body).digest() if x.body is not None else x.sha256
    return f"\\x{digest.hex()}" if digest is not None else None


def _field(fields: tuple[tuple[bytes, bytes], ...], name: bytes) -> bytes | None:
    for key, value in fields:
        if key == name:
            return value
    return None


@lru_cache(_CACHE_ENTRIES)
def _client(peer: tuple[str, int] | tuple[str, ...] | None) -> tuple[str | None, int | None]:
    """Address and port of a socket."""
    port = peer[1] if peer and len(peer) > 1 else None
    return address(peer), port if isinstance(port, int) and 0 < port <= _MAX_PORT else None


def _milliseconds(start: float, end: float | None) -> float | None:
    """None rather than a negative span: the wall clock stepped, so the span is not known."""
    if end is None or not 0 <= end - start <= _LONGEST_SECONDS:
        return None
    return round((end - start) * 1_000_000) / 1000  # round(x, 3) takes five times as long


def _uuid_of(flow_id: str) -> str:
    """Flows of foreign files may carry any id: the same id gives the same uuid."""
    return str(uuid.uuid5(uuid.NAMESPACE_OID, clean(flow_id, MAX_PATH)))
