"""Read .terraform.lock.hcl."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from .documents import text_of
from .locked import Digest, LockedFile, LockedPackage, MalformedError, hex_digest, make_purl

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .locked import Entry

_PROVIDER = re.compile(r'provider "([^"/]+)/([^"/]+)/([^"/]+)" \{')
_VERSION = re.compile(r'  version\s*= "([^"]+)"')
_HASH = re.compile(r'\s+"(h1|zh):([^"]+)",?')
_OTHER = re.compile(r'\s*(?:#.*|//.*|hashes\s*= \[|\]|constraints\s*= "[^"]*")?')


def read_terraform(data: bytes) -> Iterator[Entry]:
    """Read the file that `terraform init` writes, in the one form in which it writes it.

    zh is the SHA-256 of an archive, for each platform; h1 is of the files within one (Terraform,
    "Dependency Lock File").
    """
    provider: tuple[str, str, str] | None = None
    version, digests = "", list[Digest]()
    for number, line in enumerate(text_of(data).splitlines(), start=1):
        if found := _PROVIDER.fullmatch(line):
            provider, version, digests = (found[1], found[2], found[3]), "", []
        elif line == "}" and provider is not None:
            yield _package(provider, version, digests)
            provider = None
        elif provider is not None and (found := _VERSION.fullmatch(line)):
            version = found[1]
        elif provider is not None and (found := _HASH.fullmatch(line)):
            is_archive = found[1] == "zh"
            digests.append(hex_digest("sha256", found[2]) if is_archive else Digest("h1", found[2]))
        elif not _OTHER.fullmatch(line):
            raise MalformedError(f"has an unexpected line {number}")
    if provider is not None:
        raise MalformedError("ends within a provider")


def _package(provider: tuple[str, str, str], version: str, digests: list[Digest]) -> LockedPackage:
    host, namespace, name = provider
    return LockedPackage(
        make_purl("terraform", namespace, name, version),
        tuple(LockedFile(digests=(digest,)) for digest in digests),
        (host.lower(),),
    )
