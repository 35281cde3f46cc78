"""Read Gemfile.lock."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from .documents import text_of
from .locked import (
    Digest,
    LockedFile,
    LockedPackage,
    MalformedError,
    Unchecked,
    hosts_of,
    make_purl,
    parse_digest,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from .locked import Entry

_SECTION = re.compile(r"[A-Z][A-Z ]*")
_REMOTE = re.compile(r"  remote: (\S.*)")
_SPEC = re.compile(r" {4}(\S+) \(([^()\s]+)\)")
_CHECKSUM = re.compile(r"  (\S+) \(([^()\s]+)\)(?: (\S+))?")
_SOURCES = {"GIT": "from git", "PATH": "from a folder", "PLUGIN SOURCE": "from a plugin"}


def read_bundler(data: bytes) -> Iterator[Entry]:
    """Read Gemfile.lock: sections with a source and its gems; newer versions also have checksums."""
    lines = text_of(data).splitlines()
    if not any(line in {"GEM", "GIT", "PATH", "DEPENDENCIES"} for line in lines):
        raise MalformedError("has no section such as GEM")
    checksums = _checksums(lines)
    section, remotes = "", list[str]()
    for line in lines:
        if _SECTION.fullmatch(line):
            section, remotes = line, []
        elif found := _REMOTE.fullmatch(line):
            remotes.append(found[1])
        elif found := _SPEC.fullmatch(line):
            if section == "GEM":
                yield _gem(found[1], found[2], remotes, checksums)
            elif section in _SOURCES:
                yield Unchecked(found[1], _SOURCES[section])


def _gem(
    name: str, full_version: str, remotes: list[str], checksums: Mapping[str, tuple[Digest, ...]]
) -> Entry:
    # The part of a version after the first - is the platform.
    version, _, platform = full_version.partition("-")
    return LockedPackage(
        make_purl("gem", None, name, version, {"platform": platform} if platform else {}),
        (
            LockedFile(
                f"{name}-{full_version}.gem", None, checksums.get(f"{name} {full_version}", ())
            ),
        ),
        hosts_of(*remotes),
        optional="only for some platforms" if platform else None,
    )


def _checksums(lines: list[str]) -> dict[str, tuple[Digest, ...]]:
    """Return the digests in the section CHECKSUMS, by name and version."""
    found: dict[str, tuple[Digest, ...]] = {}
    section = ""
    for line in lines:
        if _SECTION.fullmatch(line):
            section = line
        elif section == "CHECKSUMS" and (entry := _CHECKSUM.fullmatch(line)) and entry[3]:
            digests = tuple(map(parse_digest, entry[3].split(",")))
            found[f"{entry[1]} {entry[2]}"] = digests
    return found
