"""Read composer.lock."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from msgspec import Struct, field

from .documents import json_as
from .locked import (
    LockedPackage,
    MalformedError,
    Unchecked,
    hex_digest,
    hosts_of,
    is_web,
    make_purl,
    url_file,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .locked import Entry

# Archives of a commit, in GitHub's API and on the host to which it redirects.
_GITHUB = re.compile(
    r"/(?:repos/)?(?P<owner>[\w.-]+)/(?P<name>[\w.-]+)/(?:(?:zip|tar)ball|legacy\.(?:zip|tar\.gz))/"
    r"(?P<commit>[0-9a-f]{40})"
)


class _Place(Struct):
    type: str = ""
    url: str = ""
    reference: str | None = None
    shasum: str | None = None


class _Package(Struct):
    name: str
    version: str
    dist: _Place | None = None


class _ComposerLock(Struct):
    packages: list[_Package]
    development: list[_Package] | None = field(default=None, name="packages-dev")


def read_composer(data: bytes) -> Iterator[Entry]:
    """Read composer.lock. Most packages come as an archive of a commit on GitHub.

    A mirror has the package by name and version, or by name and commit (Composer, `dist-url`).
    """
    lock = json_as(data, _ComposerLock)
    for packages, reason in (
        (lock.packages, None),
        (lock.development or [], "only for development"),
    ):
        for package in packages:
            yield _package(package, reason)


def _package(package: _Package, reason: str | None) -> Entry:
    dist = package.dist
    if dist is None or not is_web(dist.url):
        return Unchecked(package.name, "from git" if dist is None else "from a folder")
    vendor, slash, name = package.name.partition("/")
    if not slash:
        raise MalformedError(f"has the package {package.name[:100]!r}, expected vendor/name")
    aliases = [make_purl("composer", vendor, name, None)]
    if found := _GITHUB.search(dist.url):
        aliases.append(make_purl("github", found["owner"], found["name"], found["commit"]))
    digests = (hex_digest("sha1", dist.shasum),) if dist.shasum else ()
    names: list[str | None] = [None]
    if dist.reference:  # the file of a mirror
        names = [f"{dist.reference}.zip", f"{dist.reference}.tar"]
        names.append(f"{vendor}-{name}-{package.version}.zip")
    return LockedPackage(
        make_purl("composer", vendor, name, package.version),
        tuple(url_file(dist.url, digests)._replace(name=file_name) for file_name in names),
        hosts_of(dist.url),
        tuple(aliases),
        reason,
    )
