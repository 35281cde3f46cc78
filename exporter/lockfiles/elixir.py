"""Read mix.lock."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from .documents import text_of
from .locked import LockedFile, LockedPackage, MalformedError, Unchecked, hex_digest, make_purl

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .locked import Entry

_ENTRY = re.compile(r'\s*"(?P<app>[^"]+)": \{:(?P<source>\w+), (?P<rest>.*)\},?\s*')
_HEX = re.compile(r':"?(?P<name>[\w.-]+)"?, "(?P<version>[^"]+)", "[0-9a-fA-F]*"')
_HEX_END = re.compile(
    r', "(?P<repository>[\w.-]+)(?::(?P<organization>[\w.-]+))?"(?:, "(?P<outer>[0-9a-fA-F]{64})")?'
)


def read_mix(data: bytes) -> Iterator[Entry]:
    """Read mix.lock, an Elixir map with one entry per line.

    {:hex, name, version, inner checksum, managers, dependencies, repository, outer checksum}: the
    outer checksum is the SHA-256 of the archive (Hex specifications, "Package tarball").
    """
    for number, line in enumerate(text_of(data).splitlines(), start=1):
        if line.strip() in {"", "%{", "}", "%{}"}:
            continue
        found = _ENTRY.fullmatch(line)
        if found is None:
            raise MalformedError(f"has an unexpected line {number}")
        if found["source"] != "hex":
            yield Unchecked(found["app"], f"from {found['source']}")
            continue
        yield _hex_package(found["rest"], number)


def _hex_package(rest: str, number: int) -> Entry:
    found = _HEX.match(rest)
    if found is None:
        raise MalformedError(f"has an unexpected line {number}")
    # The end of the line, because lists of dependencies are before it.
    place = rest.rfind("]")
    end = _HEX_END.fullmatch(rest[place + 1 :]) if place >= 0 else None
    owner = None
    if end is not None:
        repository = end["repository"]
        owner = end["organization"] or (None if repository == "hexpm" else repository)
    digests = (hex_digest("sha256", end["outer"]),) if end is not None and end["outer"] else ()
    name, version = found["name"], found["version"]
    file = LockedFile(f"{name}-{version}.tar", None, digests)
    return LockedPackage(make_purl("hex", owner, name, version), (file,))
