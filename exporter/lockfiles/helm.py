"""Read Helm's Chart.lock and requirements.lock."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from msgspec import Struct

from .documents import yaml_as
from .locked import (
    LockedFile,
    LockedPackage,
    MalformedError,
    Unchecked,
    hosts_of,
    is_web,
    make_purl,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .locked import Entry


class _Chart(Struct):
    name: str
    version: str
    repository: str = ""


class _ChartLock(Struct):
    dependencies: list[_Chart] = []


def read_helm(data: bytes) -> Iterator[Entry]:
    """Read Chart.lock. It has the repository of each chart, or its alias, and no digests."""
    for chart in yaml_as(data, _ChartLock).dependencies:
        repository = chart.repository
        if repository.startswith("oci:"):
            yield Unchecked(chart.name, "from an OCI registry")
            continue
        if not repository or repository.startswith("file:"):
            yield Unchecked(chart.name, "from a folder")
            continue
        qualifiers = {"repository_url": _place(repository)} if is_web(repository) else {}
        yield LockedPackage(
            make_purl("helm", None, chart.name, chart.version, qualifiers),
            (LockedFile(f"{chart.name}-{chart.version}.tgz"),),
            hosts_of(repository) if is_web(repository) else (),
        )


def _place(repository: str) -> str:
    """Return host, port and path of a repository's URL."""
    try:
        parts = urlsplit(repository)
    except ValueError:
        raise MalformedError("has a repository that is not a valid URL") from None
    return parts.netloc.rpartition("@")[2].lower() + parts.path.rstrip("/")
