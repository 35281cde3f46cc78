"""Identify the remote and the package that a URL belongs to. No network access, no storage.

The host and the start of the path determine the remote (`configs/remotes.yaml`). The rules of its
format determine the package from the rest of the path. No identity is better than a wrong one: if
no rule matches, only the remote is known.

Queries, fragments and user names or passwords in URLs are never used, so they can't get into a
Package URL.
"""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import unquote_to_bytes

from ..redaction import REDACTED
from ..url_path import leaves_folder, resolve_path
from .remotes import RemotesError, read_remotes
from .rules import LARGE_SET_BYTES, PatternSet, RemoteMatch, TooLargeError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from .rules import Remote, Rule

__all__ = ["Identity", "Remotes", "RemotesError"]

SHIPPED = Path(__file__).resolve().parents[3] / "configs" / "remotes.yaml"

PATH_MAX = 2048  # characters; no package is identified in longer paths
_HOST_MAX = 255  # RFC 1035 2.3.4
# Characters. Real purls are shorter, and PostgreSQL rejects a row with a longer indexed value: a
# B-tree entry holds at most 2704 bytes (PostgreSQL docs, "B-Tree Indexes").
_PURL_MAX = 1024
_MAX_CACHED_HOSTS = 1024

_REDACTED = REDACTED.encode()
_DEFAULT_PORTS = {"http": 80, "https": 443}
_SLASHES = re.compile(r"/{2,}")
_PERCENT_ENCODED = re.compile(r"%[0-9A-Fa-f]{2}")

# OCI image spec, descriptor.md, "Registered Algorithms".
_OCI_TYPE = re.compile(
    r"application/vnd\.(?:oci\.(?:image|artifact)|docker\.(?:distribution|container|image))\.",
    re.IGNORECASE,
)
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}|sha384:[0-9a-f]{96}|sha512:[0-9a-f]{128}")


class Identity(NamedTuple):
    """The artifact that a URL stands for. None: unknown."""

    remote: str | None = None
    artifact_kind: str | None = None  # artifact, index, sidecar, blob, api
    ecosystem: str | None = None  # the purl's type
    package: str | None = None  # namespace/name, normalized as in the purl
    version: str | None = None  # as in the purl; without an epoch, unless the file name has it
    filename: str | None = None  # decoded; for a sidecar, the name of the sidecar
    purl: str | None = None
    rule: str | None = None  # format#number of the rule that matched, counted from 1


UNKNOWN = Identity()


class Remotes:
    """The known remotes. Identifies URLs. Thread-safe; caches the remotes of each host."""

    def __init__(self, remotes: tuple[Remote, ...], warnings: tuple[str, ...] = ()) -> None:
        self.warnings = warnings  # sentences about the user's file, each with its line
        self._by_host = [remote for remote in remotes if remote.host is not None]
        self._hosts = PatternSet(remote.host or "" for remote in self._by_host)
        self._by_path = [remote for remote in remotes if remote.host is None]
        self._paths = PatternSet((each.path_pattern for each in self._by_path), LARGE_SET_BYTES)
        self._host = lru_cache(maxsize=_MAX_CACHED_HOSTS)(self._find_host)

    @classmethod
    def load(cls, extra: Path | None = None) -> Remotes:
        """Load the shipped remotes and, before them, those in the user's file `extra`.

        Raises:
            RemotesError: a file can't be read or is not valid; the message lists every error with
                its file and line.
        """
        paths = [SHIPPED] if extra is None else [SHIPPED, extra]
        try:
            return cls(*read_remotes(paths))
        except TooLargeError as e:
            raise RemotesError(
                f"{paths[-1]}, line 1: the patterns together are too large, expected fewer or "
                f"simpler ones ({e})."
            ) from e

    def identify(
        self,
        host: str,
        path: str,
        *,
        scheme: str = "",
        port: int | None = None,
        digest: str | None = None,
        content_type: str | None = None,
    ) -> Identity:
        """Identify what was requested. Never raises.

        Args:
            host: name or address, without port.
            path: as received, percent-encoded, without query.
            scheme: http or https; without a port it gives the port.
            port: the port of the URL. `repository_url` has it unless it is the scheme's default.
            digest: `Docker-Content-Digest` of the response, which is the version of a tag.
            content_type: of the response.
        """
        text = decoded_path(path)
        response = Response(digest, content_type) if digest or content_type else _NO_RESPONSE
        if not host or len(host) > _HOST_MAX:
            return UNKNOWN
        authority, remotes = self._host(host, scheme, port)
        identity = _identify(remotes, authority, text, response)
        if identity is None and text and authority:
            identity = _identify(self.remotes_of_path(text), authority, text, response)
        return identity or UNKNOWN

    def identify_elsewhere(self, host: str, path: str) -> Identity:
        """Identify what a path would name if the host were a mirror of unknown kind. Never raises.

        For hosts that no remote describes. The arguments are those of `identify`.
        """
        text = decoded_path(path)
        if text is None or len(host) > _HOST_MAX or not self._by_host:
            return UNKNOWN
        rules = self._by_host[0].rule_sets.any_at_root
        match = RemoteMatch("", rules, "", text, None, is_guess=True)
        return _identify_match(host, match, _NO_RESPONSE)

    def remotes_of_path(self, path: str) -> list[Remote]:
        """Return the remotes of any host that may have this path, in the order to try them."""
        return [self._by_path[index] for index in self._paths.matching(path.encode())]

    def remotes_of_host(self, host: str, scheme: str, port: int | None) -> tuple[Remote, ...]:
        """Return the remotes with this host, in the order to try them."""
        return self._host(host, scheme, port)[1]

    def _find_host(
        self, host: str, scheme: str, port: int | None
    ) -> tuple[str, tuple[Remote, ...]]:
        """Return the host with its port, and its remotes."""
        name = host.rpartition("@")[2].rstrip(".").lower()
        authority = authority_of(name, scheme, port)
        try:
            encoded = f"{name}:{port or _DEFAULT_PORTS.get(scheme, 0)}".encode()
        except UnicodeEncodeError:  # a lone surrogate: not a valid host
            return authority, ()
        return authority, tuple(self._by_host[index] for index in self._hosts.matching(encoded))


class Response(NamedTuple):
    """What a response says about the artifact."""

    digest: str | None
    content_type: str | None

    @property
    def valid_digest(self) -> str | None:
        return self.digest if self.digest and _DIGEST.fullmatch(self.digest) else None

    @property
    def is_oci(self) -> bool:
        """Whether it comes from an OCI registry (OCI distribution spec, "Pull"; image spec, "Media types")."""
        if self.valid_digest:
            return True
        return self.content_type is not None and _OCI_TYPE.match(self.content_type) is not None


_NO_RESPONSE = Response(None, None)


def _identify(
    remotes: Iterable[Remote], authority: str, path: str | None, response: Response
) -> Identity | None:
    """Return what the first of these remotes that matches identifies; None if none of them does."""
    for remote in remotes:
        if remote.needs_oci_response and not response.is_oci:
            continue
        match = remote.match(path or "", authority)
        if match is None:
            continue
        identity = _identify_match(authority, match, response)
        if identity.artifact_kind is not None or not match.is_guess:
            return identity
    return None


def authority_of(host: str, scheme: str, port: int | None) -> str:
    """Host and port as in a URL, without the scheme's default port (RFC 3986 6.2.3)."""
    text = f"[{host}]" if ":" in host else host
    defaults = {_DEFAULT_PORTS[scheme]} if scheme in _DEFAULT_PORTS else _DEFAULT_PORTS.values()
    return text if port is None or port in defaults else f"{text}:{port}"


def _identify_match(host: str, match: RemoteMatch, response: Response) -> Identity:
    if match.rules is None:
        return Identity(match.name)
    context = context_of(host, match, response)
    path = match.path.encode()
    for rule in match.rules.candidates(path):
        if rule.required_context and missing_context(context, match, rule):
            continue
        identity = apply_rule(match.name, rule, path, context)
        if identity is not None:
            return identity
    return Identity(match.name)


def context_of(host: str, match: RemoteMatch, response: Response) -> dict[str, str | None]:
    """Return the values of CONTEXT_NAMES. `host` may have a port."""
    return {
        "host": host,
        "base": host + match.prefix,
        "folder": match.prefix.rpartition("/")[2] or None if match.prefix else None,
        "vendor": match.vendor,
        "distribution": None,  # depends on the rule
        "digest": response.valid_digest,
    }


def missing_context(context: dict[str, str | None], match: RemoteMatch, rule: Rule) -> list[str]:
    """Set the distribution of the rule's packages; return the names of values that the rule lacks."""
    if rule.purl is not None and "distribution" in rule.required_context:
        context["distribution"] = match.distribution(rule.purl.type)
    return sorted(name for name in rule.required_context if context[name] is None)


def apply_rule(
    remote: str, rule: Rule, path: bytes, context: dict[str, str | None]
) -> Identity | None:
    """Return None if the rule does not match or a value for its purl is missing."""
    values = rule.match(path)
    if values is None:
        return None
    kind = "sidecar" if values.get("sidecar") else rule.kind
    filename = values.get("file")
    if rule.purl is None:
        return Identity(remote, kind, filename=filename, rule=rule.label)
    if _REDACTED in path and any(REDACTED in (values.get(name) or "") for name in rule.purl.names):
        # The rest of a partly redacted name could be the name of another package.
        return Identity(remote, kind, rule=rule.label)
    package = rule.purl.fill(context | values)
    if package is None:
        return None
    if len(package.purl) > _PURL_MAX:
        return Identity(remote, kind, rule=rule.label)
    return Identity(
        remote,
        kind,
        package.ecosystem,
        package.package,
        package.version,
        filename,
        package.purl,
        rule.label,
    )


def decoded_path(path: str) -> str | None:
    """Resolve and percent-decode a path; None if it can't be a registry's file or is ambiguous.

    Registries use only printable UTF-8 in file names. Repeated slashes are one, as most servers read
    them. What servers may read in different ways is ambiguous: a path that leaves a folder (clients
    resolve such paths before they send them), dot segments and empty ones that only decoding shows,
    and a doubly encoded path.
    """
    if len(path) > PATH_MAX or (("/.." in path or "%2" in path) and leaves_folder(path)):
        return None
    text = resolve_path(path) if "/." in path or "%2" in path else path
    if "//" in text:
        text = _SLASHES.sub("/", text)
    if "%" in text:
        try:
            text = unquote_to_bytes(text).decode()
        except UnicodeError:
            return None
        if "//" in text or resolve_path(text) != text:  # also true if it was doubly encoded dots
            return None
        if _PERCENT_ENCODED.search(text):
            return None
    return text if text.isprintable() else None
