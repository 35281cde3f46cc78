"""Read Gradle's verification-metadata.xml."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from .documents import each_xml_element
from .locked import (
    Digest,
    LockedFile,
    LockedPackage,
    MalformedError,
    Unchecked,
    hex_digest,
    make_purl,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from .locked import Entry

_ROOT = "verification-metadata"
_COMPONENT = (_ROOT, "components", "component")
_TRUST = (_ROOT, "configuration", "trusted-artifacts", "trust")
_ALGORITHMS = ("md5", "sha1", "sha256", "sha512")
_FILE_END = re.compile(r"(?:-(?P<classifier>.+?))?\.(?P<type>(?:tar\.)?[A-Za-z]\w*)")


class _Artifact:
    """A file of a component, while its digests are read."""

    def __init__(self, component: Mapping[str, str], name: str) -> None:
        self.component = component
        self.name = name
        self.digests: list[Digest] = []

    def locked(self) -> LockedPackage:
        """Return it with the purl that its file name gives."""
        group, name, version = (self.component.get(key, "") for key in ("group", "name", "version"))
        found = _FILE_END.fullmatch(self.name.removeprefix(f"{name}-{version}"))
        qualifiers: dict[str, str] = {}
        if found is not None:
            kind = "" if found["type"] == "jar" else found["type"]
            qualifiers = {"classifier": found["classifier"] or "", "type": kind}
        purl = make_purl("maven", group, name, version, qualifiers)
        return LockedPackage(purl, (LockedFile(self.name, None, tuple(self.digests)),))


def read_gradle(data: bytes) -> Iterator[Entry]:
    """Read the digests of each file of each component. It names no host.

    Artifacts that are trusted without verification are listed as unchecked.
    """
    artifacts: list[_Artifact] = []
    trusted: list[Entry] = []
    component: Mapping[str, str] = {}

    def on_start(path: tuple[str, ...], attributes: Mapping[str, str]) -> None:
        nonlocal component
        if path[0] != _ROOT:
            raise MalformedError(f"has the root element {path[0][:80]!r}, expected {_ROOT!r}")
        if path == _COMPONENT:
            component = attributes
        elif path == (*_COMPONENT, "artifact"):
            artifacts.append(_Artifact(component, attributes.get("name", "")))
        elif path == _TRUST:
            name = ":".join(attributes.get(key, "*") for key in ("group", "name", "version"))
            trusted.append(Unchecked(name, "trusted without verification"))
        elif digest := _digest(path, attributes):
            artifacts[-1].digests.append(digest)

    each_xml_element(data, on_start)
    yield from trusted
    for artifact in artifacts:
        yield artifact.locked()


def _digest(path: tuple[str, ...], attributes: Mapping[str, str]) -> Digest | None:
    """Return the digest of an element of an artifact, or of an `also-trust` within one."""
    start = len(_COMPONENT) + 1
    if path[:start] != (*_COMPONENT, "artifact") or len(path) == start:
        return None
    algorithm, inner = path[start], path[start + 1 :]
    if algorithm not in _ALGORITHMS or inner not in {(), ("also-trust",)}:
        return None
    return hex_digest(algorithm, attributes.get("value", ""))
