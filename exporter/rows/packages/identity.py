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
from .remotes import RemotesError, read_remotes
from .rules import PatternSet, TooLargeError

if TYPE_CHECKING:
    from .rules import Remote, RemoteMatch, Rule

__all__ = ["Identity", "Remotes", "RemotesError"]

SHIPPED = Path(__file__).resolve().parents[3] / "configs" / "remotes.yaml"

PATH_MAX = 2048  # characters; no package is identified in longer paths
_HOST_MAX = 255  # RFC 1035 2.3.4
# Characters. Real purls are shorter, and PostgreSQL rejects a row with a longer indexed value: a
# B-tree entry holds at most 2704 bytes (PostgreSQL docs, "B-Tree Indexes").
_PURL_MAX = 1024
_MAX_CACHED_HOSTS = 1024

_REDACTED = REDACTED.encode()

# OCI image spec, descriptor.md, "Registered Algorithms".
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}|sha384:[0-9a-f]{96}|sha512:[0-9a-f]{128}")


class Identity(NamedTuple):
    """The artifact that a URL stands for. None: unknown."""

    remote: str | None = None
    artifact_kind: str | None = None  # artifact, index, sidecar, blob, api
    ecosystem: str | None = None  # the purl's type
    package: str | None = None  # namespace/name, normalized as in the purl
    version: str | None = None  # as in the purl; without parts that the file name omits (epoch)
    filename: str | None = None  # decoded; for a sidecar, the name of the sidecar
    purl: str | None = None
    rule: str | None = None  # format#number of the rule that matched, counted from 1


UNKNOWN = Identity()


class Remotes:
    """The known remotes. Identifies URLs. Thread-safe; caches the remotes of each host."""

    def __init__(self, remotes: tuple[Remote, ...]) -> None:
        self._remotes = remotes
        self._hosts = PatternSet(remote.host for remote in remotes)
        self._remotes_of_host = lru_cache(maxsize=_MAX_CACHED_HOSTS)(self._find_remotes)

    @classmethod
    def load(cls, extra: Path | None = None) -> Remotes:
        """Load the shipped remotes and, before them, those in the user's file `extra`.

        Raises:
            RemotesError: a file can't be read or is not valid; the message lists every error with
                its file and line.
        """
        paths = [SHIPPED] if extra is None else [SHIPPED, extra]
        try:
            return cls(read_remotes(paths))
        except TooLargeError as e:
            raise RemotesError(
                f"{paths[-1]}, line 1: the patterns together are too large, expected fewer or "
                f"simpler ones ({e})."
            ) from e

    def identify(
        self, host: str, path: str, *, upstream: str | None = None, digest: str | None = None
    ) -> Identity:
        """Identify what was requested. Never raises.

        Args:
            host: name or address, without port.
            path: as received, percent-encoded, without query.
            upstream: the host that a reverse proxy forwards to. It is used if `host` is not a
                known remote.
            digest: `Docker-Content-Digest` of the response, which is the version of a tag.
        """
        text = _decoded(path)
        for name in (host, upstream):
            if name is None or len(name) > _HOST_MAX:
                continue
            name = name.rpartition("@")[2].rstrip(".").lower()  # noqa: PLW2901
            for remote in self._remotes_of_host(name):
                match = remote.match("" if text is None else text)
                if match is not None and _leaves_folders(match.path):
                    return Identity(match.name)
                if match is not None:
                    return _identify_match(name, match, digest)
        return UNKNOWN

    def _find_remotes(self, host: str) -> tuple[Remote, ...]:
        try:
            encoded = host.encode()
        except UnicodeEncodeError:  # a lone surrogate: not a valid host
            return ()
        return tuple(self._remotes[index] for index in self._hosts.matching(encoded))


def _leaves_folders(path: str) -> bool:
    """Whether the path has a `..` segment: servers read another path (RFC 3986 5.2.4), with other names."""
    return "/.." in path and ".." in path.split("/")


def _identify_match(host: str, match: RemoteMatch, digest: str | None) -> Identity:
    if match.rules is None:
        return Identity(match.name)
    context = {
        "host": host,
        "base": host + match.prefix,
        "vendor": match.vendor,
        "digest": digest if digest and _DIGEST.fullmatch(digest) else None,
    }
    path = match.path.encode()
    for rule in match.rules.candidates(path):
        if any(context[name] is None for name in rule.required_context):
            continue
        identity = _apply_rule(match.name, rule, path, context)
        if identity is not None:
            return identity
    return Identity(match.name)


def _apply_rule(
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


def _decoded(path: str) -> str | None:
    """Percent-decode a path (RFC 3986 2.1); None if it is too long or not printable UTF-8.

    Registries use only printable UTF-8 in file names, so other paths are not artifacts.
    """
    if len(path) > PATH_MAX:
        return None
    try:
        text = unquote_to_bytes(path).decode() if "%" in path else path
    except UnicodeError:
        return None
    return text if text.isprintable() else None
