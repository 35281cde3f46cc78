"""Read go.sum and go.work.sum."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .documents import text_of
from .locked import Digest, LockedFile, LockedPackage, MalformedError, make_purl

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .locked import Entry

_FIELDS = 3  # module, version, digest


def read_go(data: bytes) -> Iterator[Entry]:
    """Read go.sum. Its digest is of the files within an archive, and it names no proxy.

    A line for VERSION/go.mod is about that file alone (Go modules reference, "go.sum files").
    """
    for number, line in enumerate(text_of(data).splitlines(), start=1):
        fields = line.split()
        if not fields:
            continue
        if len(fields) != _FIELDS or ":" not in fields[2]:
            raise MalformedError(f"has an unexpected line {number}")
        module, version, digest = fields
        if version.endswith("/go.mod"):
            continue
        # In a purl, namespace and name are in lower case (purl-spec, golang).
        namespace, _, name = module.lower().rpartition("/")
        algorithm, _, value = digest.partition(":")
        yield LockedPackage(
            make_purl("golang", namespace, name, version),
            (LockedFile(digests=(Digest(algorithm, value),)),),
        )
