"""Turn the raw facts of an exchange into a row: decode, bound, redact, identify. No I/O but remotes.yaml."""

from __future__ import annotations

import hashlib
import re
import uuid
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ..settings import SettingsError
from .cache_status import CacheStatus, read_cache_status
from .downloads import Download, Downloads
from .entry import AccessLogEntry
from .epochs import is_package_index
from .images import Images
from .packages.identity import UNKNOWN, Identity, Remotes, RemotesError, authority_of
from .redaction import PathPatterns, redact
from .redirects import REDIRECTS, Redirects
from .references import References
from .secret_patterns import secret_patterns
from .text import (
    CACHED_VALUES,
    MAX_PATH,
    MAX_TEXT,
    MAX_USER_AGENT,
    clean,
    column_text,
    decoded,
    error_text,
    host_text,
    ip_text,
    milliseconds,
    path_text,
    query_text,
    timestamp,
)

if TYPE_CHECKING:
    from ..exchange import Exchange, SocketAddress
    from ..settings import Settings
    from .epochs import Epochs
    from .images import Client

_MAX_CACHED_FIELDS = 8

_is_uuid = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}").fullmatch
# OCI distribution spec, "Endpoints": only the response tells whether an unknown host is a registry,
# and which digest a tag has.
_OCI_PATH, _MANIFESTS, _BLOBS = "/v2/", "/manifests/", "/blobs/"
_MAX_SMALLINT = 32_767
_MAX_PORT = 65_535


class _Target(NamedTuple):
    """Host and path of a request as its row has them, and what they identify."""

    scheme: str
    host: str | None
    port: int
    path: str | None
    package_path: str | None  # the path without folders that are secrets
    identity: Identity


class EntryBuilder:
    """Builds rows by one set of settings. Use it in one thread only."""

    def __init__(self, settings: Settings, epochs: Epochs | None = None) -> None:
        """Without `epochs`, versions have only the epochs that their file names have.

        Raises SettingsError if the user's remotes file is wrong.
        """
        self._epochs = epochs
        self._remotes = load_remotes(settings)
        self._redirects = Redirects()
        self._images = Images()
        self._references = References()
        self._downloads = Downloads()
        self._node = column_text(settings.node_name, MAX_TEXT) or ""
        self._query_policy = settings.redact.query
        self._path_patterns = PathPatterns(settings.redact.paths)
        self._cached_target = lru_cache(CACHED_VALUES)(self._target)

    def build(self, exchange: Exchange, *, cacheable: bool = True) -> AccessLogEntry:
        """The row of one exchange. Accepts every value that an exchange can hold.

        `cacheable`: whether its values may be kept for the next rows. Not for large ones, which seldom repeat.
        """
        x = exchange
        raw_path, question_mark, raw_query = x.target.partition(b"?")
        if question_mark and not raw_path:
            raw_path = b"/"
        target = (self._cached_target if cacheable else self._target)(
            x.scheme, x.host, x.port, raw_path
        )
        requested_url = None
        if x.requested_url is not None:
            asked, asked_path, requested_url = self._requested_url(*x.requested_url)
            # The same file, if it has the same path: not a page that replaces it.
            if target.identity.remote is None and raw_path.endswith(asked_path):
                target = target._replace(identity=asked.identity)
        client_ip, client_port = _client(x.client)
        request_texts = _request_texts if cacheable else _request_texts.__wrapped__
        user_agent, proxy_user, method, scheme, http_version = request_texts(
            x.user_agent, x.proxy_user, x.method, x.scheme, x.http_version
        )
        identity = self._identity(x, target, (client_ip, proxy_user))
        cacheable = cacheable and len(x.response_fields) <= _MAX_CACHED_FIELDS
        response_facts = _response_facts if cacheable else _response_facts.__wrapped__
        content_type, cache = response_facts(x.response_fields, x.status_code, x.response_source)
        error_type, tls_version, response_source = _fixed_texts(
            x.error_type, x.tls_version, x.response_source
        )
        # In the order of the columns: Python takes 2.6 us longer if they are named.
        return AccessLogEntry(
            timestamp(x.started_at),
            x.flow_id if _is_uuid(x.flow_id) else _as_uuid(x.flow_id),
            self._node,
            client_ip,
            client_port,
            proxy_user,
            user_agent,
            method,
            scheme,
            target.host,
            x.port if 0 < x.port <= _MAX_PORT else None,
            target.path,
            query_text(raw_query, self._query_policy) if raw_query else None,
            http_version,
            _status_code(x.status_code),
            error_type,
            error_text(x.error),
            content_type,
            x.request_bytes,
            x.response_bytes,
            milliseconds(x.started_at, x.ended_at),
            milliseconds(x.started_at, x.head_at),
            milliseconds(0.0, x.connect_seconds),
            ip_text(x.server),
            tls_version,
            response_source,
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
            self._is_complete(x, identity, client_ip, proxy_user),
            _sha256(x) if identity.artifact_kind == "artifact" else None,
            requested_url,
        )

    def _requested_url(
        self, raw_scheme: bytes, host: str, port: int, raw_target: bytes
    ) -> tuple[_Target, bytes, str | None]:
        """What the client asked for, its path, and its URL for the row."""
        raw_path, _, raw_query = raw_target.partition(b"?")
        target = self._target(raw_scheme, host, port, raw_path or b"/")
        if target.host is None or target.path is None:
            return target, raw_path, None
        query = query_text(raw_query, self._query_policy) if raw_query else None
        authority = authority_of(target.host, target.scheme, port)
        scheme = column_text(target.scheme, MAX_TEXT)
        url = f"{scheme}://{authority}{target.path}{f'?{query}' if query else ''}"
        return target, raw_path, url

    def _target(self, raw_scheme: bytes, host: str, port: int, raw_path: bytes) -> _Target:
        # Some clients put a login into the Host header, which RFC 9110 7.2 does not allow.
        host = host.rpartition("@")[2]
        name = (host_text if len(host) <= MAX_TEXT else host_text.__wrapped__)(host)
        path = path_text(raw_path, name)
        if path is not None and self._path_patterns:
            path = self._path_patterns.redact(name or "", path)
        scheme = raw_scheme.decode("ascii", "replace").lower()
        if name is None:
            return _Target(scheme, name, port, path, path, UNKNOWN)
        if path is None:  # no request was made, but a known host is its remote
            found = self._remotes.identify(name, "/", scheme=scheme, port=port)
            return _Target(scheme, name, port, path, path, Identity(found.remote))
        package_path = secret_patterns().without_secret_folder(path)
        target = _Target(scheme, name, port, path, package_path, UNKNOWN)
        return target._replace(identity=self._identify(target))

    def _identify(
        self, target: _Target, digest: str | None = None, content_type: str | None = None
    ) -> Identity:
        """What the redacted path stands for. A name that has a secret once it is decoded is left out."""
        path = target.package_path or ""
        identity = self._remotes.identify(
            target.host or "",
            path,
            scheme=target.scheme,
            port=target.port,
            digest=digest,
            content_type=content_type,
        )
        if "%" in path or "!" in path:  # the Go module proxy protocol writes "!a" for "A"
            names = "\n".join(filter(None, (identity.remote, identity.filename, identity.purl)))
            if redact(names) != names:
                return Identity(column_text(identity.remote, MAX_TEXT), identity.artifact_kind)
        return identity

    def _identity(self, x: Exchange, target: _Target, client: Client) -> Identity:
        """What the URL identifies, plus what the response and earlier requests add.

        Those are a tag's digest, the image that a blob belongs to, and the target of a redirect.
        """
        host, path, identity = target.host, target.package_path, target.identity
        if host is None or path is None:
            return identity
        is_oci = _OCI_PATH in path and (_MANIFESTS in path or _BLOBS in path)
        if is_oci:
            digest = _field(x.response_fields, b"docker-content-digest")
            content_type = _field(x.response_fields, b"content-type")
            if digest or (content_type and identity.remote is None):
                identity = self._identify(
                    target, column_text(digest, MAX_TEXT), column_text(content_type, MAX_TEXT)
                )
        if is_oci:
            content_type = _field(x.response_fields, b"content-type")
            identity = self._images.link(
                client,
                f"{host}:{x.port}",
                path,
                identity,
                status_code=x.status_code,
                content_type=column_text(content_type, MAX_TEXT),
            )
        has_xet_hash = _field(x.response_fields, b"x-xet-hash") is not None
        if has_xet_hash or identity.rule is not None:
            identity = self._references.link(client, path, identity, has_xet_hash=has_xet_hash)
        if self._epochs is not None and (identity.ecosystem == "deb" or x.body is not None):
            identity = _with_epoch(self._epochs, x, f"{host}:{x.port}", identity)
        if identity.purl is None and self._redirects and not _is_page(x):
            identity = self._redirects.find(host, x.port, x.target) or identity
        if x.status_code in REDIRECTS and identity.artifact_kind is not None:
            location = _field(x.response_fields, b"location")
            if location:
                self._redirects.remember(_url(target.scheme, host, x), location, identity)
        return identity

    def _is_complete(
        self, x: Exchange, identity: Identity, client_ip: str | None, proxy_user: str | None
    ) -> bool | None:
        """Whether the client now has the whole artifact; None if this is no download of one."""
        if identity.artifact_kind != "artifact" or identity.purl is None or x.method != b"GET":
            return None
        return self._downloads.completes(
            Download(
                (client_ip, proxy_user),
                (identity.purl, identity.filename),
                x.status_code,
                x.error_type is not None,
                x.response_bytes,
                _field(x.response_fields, b"content-range"),
            )
        )


def _with_epoch(epochs: Epochs, x: Exchange, authority: str, identity: Identity) -> Identity:
    """The identity of a Debian package with its epoch, if an index gave one. Reads an index's body."""
    if x.body is not None and is_package_index(x.target):
        epochs.add(authority, x.target, x.body)
    version, purl = identity.version, identity.purl
    if identity.ecosystem != "deb" or version is None or purl is None or ":" in version:
        return identity
    epoch = epochs.find(authority, x.target)
    if epoch is None:
        return identity
    return identity._replace(version=f"{epoch}:{version}", purl=purl.replace("@", f"@{epoch}:", 1))


def load_remotes(settings: Settings) -> Remotes:
    """The table of remotes that these settings name. Cached until the user's file changes.

    Raises:
        SettingsError: the file is missing or wrong; one sentence per error, with its line.
    """
    file = settings.remotes.file
    try:
        path = Path(file).expanduser() if file else None
        return _load_remotes(path, path.stat().st_mtime_ns if path and path.exists() else 0)
    except RemotesError as e:
        raise SettingsError(str(e)) from e


@lru_cache(4)
def _load_remotes(file: Path | None, _changed_at_ns: int) -> Remotes:
    return Remotes.load(file)


@lru_cache(CACHED_VALUES)
def _request_texts(user_agent: bytes | None, *others: bytes | str | None) -> tuple[str | None, ...]:
    """These values as columns. The others are proxy user, method, scheme and HTTP version."""
    return (
        column_text(user_agent, MAX_USER_AGENT),
        *(column_text(other, MAX_TEXT) for other in others),
    )


@lru_cache(256)
def _fixed_texts(*values: str | None) -> tuple[str | None, ...]:
    """These values as columns. Each is one of a few words."""
    return tuple(column_text(value, MAX_TEXT) for value in values)


@lru_cache(CACHED_VALUES)
def _response_facts(
    fields: tuple[tuple[bytes, bytes], ...], status_code: int | None, source: str | None
) -> tuple[str | None, CacheStatus]:
    """Content type and cache status of a response.

    A replayed response came from our own store. A response by an addon came from no cache.
    """
    content_type = column_text(_field(fields, b"content-type"), MAX_TEXT)
    if source == "replay":
        return content_type, CacheStatus("HIT", "local", None)
    if source == "addon":
        return content_type, CacheStatus(None, None, None)
    return content_type, read_cache_status(fields, status_code)


@lru_cache(CACHED_VALUES)
def _client(address: SocketAddress) -> tuple[str | None, int | None]:
    """IP address and port of a client's socket."""
    port = address[1] if address and len(address) > 1 else None
    return ip_text(address), port if isinstance(port, int) and 0 < port <= _MAX_PORT else None


def _status_code(status_code: int | None) -> int | None:
    return status_code if status_code and 0 < status_code <= _MAX_SMALLINT else None


def _url(scheme: str, host: str, x: Exchange) -> str:
    """The URL of a request, to resolve a relative one against it."""
    authority = f"[{host}]" if ":" in host else host
    return f"{scheme}://{authority}:{x.port}{decoded(x.target)}"


def _is_page(x: Exchange) -> bool:
    """Whether the response is a web page: a redirect to a login page leads to no artifact."""
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


def _as_uuid(flow_id: str) -> str:
    """A UUID for the id of a foreign flow file, which may be any text. Equal ids give equal UUIDs."""
    return str(uuid.uuid5(uuid.NAMESPACE_OID, clean(flow_id, MAX_PATH)))
