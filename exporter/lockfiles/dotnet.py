"""Read NuGet's packages.lock.json."""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec import Struct, field

from .documents import json_as
from .locked import Digest, LockedFile, LockedPackage, Unchecked, make_purl

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .locked import Entry


class _Package(Struct):
    type: str = ""
    resolved: str = ""
    content_hash: str = field(default="", name="contentHash")


class _NugetLock(Struct):
    version: int
    dependencies: dict[str, dict[str, _Package]] = {}


def read_nuget(data: bytes) -> Iterator[Entry]:
    """Read packages.lock.json. Its hash is of a package without its signature; it names no host."""
    for packages in json_as(data, _NugetLock).dependencies.values():
        for name, package in packages.items():
            if package.type == "Project":
                yield Unchecked(name, "from a folder")
                continue
            digest = Digest("contentHash", package.content_hash)
            yield LockedPackage(
                make_purl("nuget", None, name, package.resolved),
                (LockedFile(digests=(digest,) if package.content_hash else ()),),
            )
