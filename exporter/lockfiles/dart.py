"""Read pubspec.lock."""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec import Struct

from .documents import convert, yaml_as
from .locked import LockedFile, LockedPackage, Unchecked, hex_digest, hosts_of, make_purl

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .locked import Entry


class _Hosted(Struct):
    name: str
    url: str = ""
    sha256: str = ""


class _Package(Struct):
    source: str
    version: str = ""
    dependency: str = ""
    description: object = None  # of a package from an SDK it is text


class _PubLock(Struct):
    packages: dict[str, _Package] = {}


def read_pub(data: bytes) -> Iterator[Entry]:
    """Read pubspec.lock. A hosted package has its registry, and newer files its SHA-256."""
    for name, package in yaml_as(data, _PubLock).packages.items():
        if package.source != "hosted":
            yield Unchecked(name, f"from {package.source}")
            continue
        hosted = convert(package.description, _Hosted)
        digests = (hex_digest("sha256", hosted.sha256),) if hosted.sha256 else ()
        yield LockedPackage(
            make_purl("pub", None, hosted.name, package.version),
            (LockedFile(digests=digests),),
            hosts_of(hosted.url),
            optional="only for development" if package.dependency == "direct dev" else None,
        )
