"""Read Cargo.lock, versions 1 to 4."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from msgspec import Struct

from .documents import toml_as
from .locked import LockedFile, LockedPackage, Unchecked, hex_digest, host_of, make_purl

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .locked import Entry


class _Crate(Struct):
    name: str
    version: str
    source: str | None = None
    checksum: str | None = None


class _CargoLock(Struct):
    package: list[_Crate] = []
    metadata: dict[str, object] = {}  # version 1 has the checksums here


def read_cargo(data: bytes) -> Iterator[Entry]:
    """Read Cargo.lock. It has the SHA-256 of each crate, and the URL of its index."""
    lock = toml_as(data, _CargoLock)
    for crate in lock.package:
        source = crate.source or ""
        if not source.startswith(("registry+", "sparse+")):
            reason = "from git" if source.startswith("git+") else "from a folder"
            yield Unchecked(crate.name, reason)
            continue
        checksum = crate.checksum or lock.metadata.get(
            f"checksum {crate.name} {crate.version} ({source})"
        )
        has_checksum = isinstance(checksum, str) and checksum != "<none>"
        digests = (hex_digest("sha256", str(checksum)),) if has_checksum else ()
        yield LockedPackage(
            make_purl("cargo", None, crate.name, crate.version),
            (LockedFile(f"{crate.name}-{crate.version}.crate", None, digests),),
            _registries(source.partition("+")[2]),
        )


def _registries(index: str) -> tuple[str, ...]:
    """Return the registry of an index; a git repository NAME-index is the index of the host NAME."""
    found = re.search(r"/([\w-]+(?:\.[\w-]+)+)-index(?:\.git)?/?$", index)
    host = found[1] if found else host_of(index)
    return (host,) if host else ()
