"""Say which remote and which package a URL belongs to; asks the network nothing and stores nothing.

A host and a folder of it name the remote (`configs/remotes.yaml`), the remote's format reads the
rest of the path. Better no identity than a wrong one: a path no rule knows is its remote's and
nothing more.

Only the path is read, never a query, a fragment or the name and password before a host, so that
nothing of these can get into a Package URL.
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

PATH_MAX = 2048  # characters; a longer path has a remote, but no package
_HOST_MAX = 255  # RFC 1035 2.3.4
# Characters of a Package URL. No registry has such names, and a B-tree takes no more than 2704 bytes
# (PostgreSQL docs, "B-Tree Indexes"): the row would be refused.
_PURL_MAX = 1024
_REMEMBERED_HOSTS = 1024

_REDACTED = REDACTED.encode()

# OCI image spec, descriptor.md, "Registered Algorithms".
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}|sha384:[0-9a-f]{96}|sha512:[0-9a-f]{128}")


class Identity(NamedTuple):
    """Which artifact a URL is. None: not known."""

    remote: str | None = None
    artifact_kind: str | None = None  # artifact, index, sidecar, blob, api
    ecosystem: str | None = None  # the purl's type
    package: str | None = None  # namespace/name, as normalised in the purl
    version: str | None = None  # as in the purl; what a file name leaves out, like an epoch, lacks
    filename: str | None = None  # as asked for, decoded; a sidecar's is its own
    purl: str | None = None
    rule: str | None = None  # format#number of the rule that matched, counted from 1


UNKNOWN = Identity()


class Remotes:
    """The table of remotes, and what it says of URLs. Safe in any thread; remembers nothing but hosts."""

    def __init__(self, remotes: tuple[Remote, ...]) -> None:
        self._remotes = remotes
        self._hosts = PatternSet(remote.host for remote in remotes)
        self._remotes_of = lru_cache(maxsize=_REMEMBERED_HOSTS)(self._find_remotes)

    @classmethod
    def load(cls, extra: Path | None = None) -> Remotes:
        """The shipped table, and on top of it a user's own.

        Raises:
            RemotesError: a file can't be read or is wrong; the text names each file and line.
        """
        paths = [SHIPPED] if extra is None else [SHIPPED, extra]
        try:
            return cls(read_remotes(paths))
        except TooLargeError as e:
            raise RemotesError(
                f"{paths[-1]}, line 1: its patterns are too large together, expected fewer or "
                f"simpler ones ({e})."
            ) from e

    def identify(
        self, host: str, path: str, *, upstream: str | None = None, digest: str | None = None
    ) -> Identity:
        """What a request was for. Never raises.

        Args:
            host: name or address, without port.
            path: as on the wire, percent-encoded, without query.
            upstream: host a reverse proxy passes requests on to; it names the remote if `host`
                is none.
            digest: `Docker-Content-Digest` of the response: what a tag stood for.
        """
        text = _decoded(path)
        for name in (host, upstream):
            if name is None or len(name) > _HOST_MAX:
                continue
            name = name.rpartition("@")[2].rstrip(".").lower()  # noqa: PLW2901
            for remote in self._remotes_of(name):
                match = remote.match("" if text is None else text)
                if match is not None:
                    return _of_match(name, match, digest)
        return UNKNOWN

    def _find_remotes(self, host: str) -> tuple[Remote, ...]:
        try:
            encoded = host.encode()
        except UnicodeEncodeError:  # no host of the table holds a lone surrogate
            return ()
        return tuple(self._remotes[place] for place in self._hosts.matching(encoded))


def _of_match(host: str, match: RemoteMatch, digest: str | None) -> Identity:
    if match.rules is None:
        return Identity(match.name)
    given = {
        "host": host,
        "base": host + match.prefix,
        "vendor": match.vendor,
        "digest": digest if digest and _DIGEST.fullmatch(digest) else None,
    }
    path = match.path.encode()
    for rule in match.rules.candidates(path):
        if rule.wants and any(given[name] is None for name in rule.wants):
            continue
        identity = _of_rule(match.name, rule, path, given)
        if identity is not None:
            return identity
    return Identity(match.name)


def _of_rule(remote: str, rule: Rule, path: bytes, given: dict[str, str | None]) -> Identity | None:
    """None if the rule doesn't apply, or lacks a value for its purl: then the next is tried."""
    values = rule.match(path)
    if values is None:
        return None
    kind = "sidecar" if values.get("sidecar") else rule.kind
    filename = values.get("file")
    if rule.purl is None:
        return Identity(remote, kind, filename=filename, rule=rule.label)
    if _REDACTED in path and any(REDACTED in (values.get(name) or "") for name in rule.purl.names):
        return Identity(remote, kind, rule=rule.label)  # what is left of a name is another's
    package = rule.purl.fill(given | values)
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
    """The path without percent-encoding (RFC 3986 2.1); None if that is too long or no plain text.

    Registries name files in printable UTF-8. What holds anything else is no artifact of theirs.
    """
    if len(path) > PATH_MAX:
        return None
    try:
        text = unquote_to_bytes(path).decode() if "%" in path else path
    except UnicodeError:
        return None
    return text if text.isprintable() else None
