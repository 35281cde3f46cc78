"""What lock files say: packages, the files that may be fetched for them, and their digests. No I/O."""

from __future__ import annotations

import base64
import binascii
import re
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import unquote, urlsplit

from packageurl import PackageURL
from packaging.utils import canonicalize_name

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

SHA256 = "sha256"
_HEX_LENGTHS = {"md5": 32, "sha1": 40, SHA256: 64, "sha384": 96, "sha512": 128}


class MalformedError(ValueError):
    """A lock file is not valid. The message is the end of a sentence that starts with the file."""


class Digest(NamedTuple):
    """A digest of one file, as the lock file has it."""

    algorithm: str  # sha256 and such: of the downloaded file; others are named like their tools do
    value: str  # in hexadecimal for algorithms of hashlib


class LockedFile(NamedTuple):
    """A file that may be fetched for a package. None: the lock file does not say."""

    name: str | None = None
    host: str | None = None  # lower case
    digests: tuple[Digest, ...] = ()  # each of them is acceptable
    path: str | None = None  # of its URL, percent-encoded as in the lock file


class LockedPackage(NamedTuple):
    """A package from a registry, or from a URL.

    Its purl, and that of a row that fetched it, are equal after `exporter.read.verify` has
    normalized both.
    """

    purl: str
    files: tuple[LockedFile, ...] = ()
    registries: tuple[str, ...] = ()  # hosts, in lower case; none: not in the lock file
    aliases: tuple[str, ...] = ()  # purls under which a registry may serve it instead
    optional: str | None = None  # why a build may not need it, such as "optional"


class Unchecked(NamedTuple):
    """A dependency that does not come from a registry."""

    name: str
    reason: str  # such as "from git"


type Entry = LockedPackage | Unchecked


def make_purl(
    kind: str,
    namespace: str | None,
    name: str,
    version: str | None,
    qualifiers: Mapping[str, str] | None = None,
) -> str:
    """Return a canonical Package URL. Without a version it is for all of them.

    Raises:
        MalformedError: the lock file has no valid name or version here.
    """
    if version == "":
        raise MalformedError(f"has no version for {name!r}")
    if kind == "pypi":  # purl-spec leaves dots in names, PEP 503 and our rows do not
        name = canonicalize_name(name)
    try:
        return PackageURL(
            kind, namespace or None, name, version, dict(qualifiers or {})
        ).to_string()
    except ValueError as e:
        raise MalformedError(f"has the package {name!r}, which has no valid name ({e})") from None


def host_of(url: str) -> str | None:
    """Return the host of a URL in lower case, without login and port. None if it has none."""
    try:
        host = urlsplit(url).hostname
    except ValueError:  # an invalid IPv6 address
        return None
    return host.rstrip(".") if host else None


def hosts_of(*urls: str) -> tuple[str, ...]:
    """Return the hosts of these URLs, without those that have none."""
    return tuple(host for url in urls if (host := host_of(url)))


def path_of(url: str) -> str | None:
    """Return the path of a URL, percent-encoded; None if it is empty or the URL is not valid."""
    try:
        return urlsplit(url).path or None
    except ValueError:
        return None


def file_name_of(url: str) -> str | None:
    """Return the decoded last segment of a URL's path; None if it is empty or the URL is not valid."""
    return unquote(path_of(url) or "").rpartition("/")[2] or None


def is_web(url: str) -> bool:
    """Return whether a URL can be fetched through a proxy as one file."""
    return url.startswith(("https://", "http://"))


def parse_digest(text: str) -> Digest:
    """Parse `sha256:HEX` or `sha256=HEX`.

    Raises:
        MalformedError: it is neither.
    """
    found = re.fullmatch(r"([A-Za-z0-9_]+)[:=]([0-9A-Fa-f]+)", text)
    if found is None:
        raise MalformedError(
            f"has the digest {text[:80]!r}, expected a form such as sha256:0123..."
        )
    return hex_digest(found[1], found[2])


def hex_digest(algorithm: str, value: str) -> Digest:
    """Return a digest from its hexadecimal form.

    Raises:
        MalformedError: the value does not fit the algorithm.
    """
    name = algorithm.lower()
    length = _HEX_LENGTHS.get(name)
    if length is not None and not (len(value) == length and re.fullmatch(r"[0-9A-Fa-f]+", value)):
        raise MalformedError(f"has the {name} digest {value[:80]!r}, expected {length} hex digits")
    return Digest(name, value.lower())


def hex_digests(values: Mapping[str, str]) -> tuple[Digest, ...]:
    """Return digests from their hexadecimal forms by algorithm. Raises MalformedError."""
    return tuple(hex_digest(name, value) for name, value in values.items())


def subresource_digests(text: str | None) -> tuple[Digest, ...]:
    """Parse the form of W3C Subresource Integrity: algorithm, -, base64; several by space.

    Raises:
        MalformedError: a digest has another form.
    """
    return tuple(_subresource_digest(part) for part in (text or "").split())


def _subresource_digest(text: str) -> Digest:
    algorithm, _, value = text.partition("?")[0].partition("-")
    try:
        return hex_digest(algorithm, base64.b64decode(value, validate=True).hex())
    except (binascii.Error, ValueError) as e:
        if isinstance(e, MalformedError):
            raise
        raise MalformedError(
            f"has the digest {text[:80]!r}, expected a form such as sha512-BASE64"
        ) from None


def url_file(url: str, digests: Iterable[Digest] = (), name: str | None = None) -> LockedFile:
    """Return the file behind a URL. Its name is in the URL, or else `name`."""
    path = path_of(url) if is_web(url) else None
    return LockedFile(file_name_of(url) or name, host_of(url), tuple(digests), path)


def scoped(full_name: str) -> tuple[str | None, str]:
    """Split a name such as @scope/name into namespace and name."""
    namespace, _, name = full_name.rpartition("/")
    return namespace or None, name
