"""Read conda-lock.yml and pixi.lock."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from msgspec import Struct, field

from .documents import yaml_as
from .locked import (
    Digest,
    LockedPackage,
    MalformedError,
    Unchecked,
    hex_digest,
    hex_digests,
    hosts_of,
    is_web,
    make_purl,
    url_file,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from .locked import Entry

_FORMATS = ("conda", "tar.bz2")


class _CondaPackage(Struct):
    name: str
    version: str
    manager: str
    platform: str
    url: str
    hash: dict[str, str] = {}


class _CondaLock(Struct):
    package: list[_CondaPackage]


def read_conda_lock(data: bytes) -> Iterator[Entry]:
    """Read conda-lock.yml, which has the packages of all platforms with URLs and digests."""
    packages = yaml_as(data, _CondaLock).package
    several = len({package.platform for package in packages}) > 1
    for package in packages:
        optional = f"for {package.platform}" if several else None
        digests = hex_digests(package.hash)
        yield _from_url(package.url, package.name, package.version, digests, optional)


def _from_url(
    url: str, name: str, version: str, digests: Iterable[Digest], optional: str | None
) -> Entry:
    if not is_web(url):
        return Unchecked(name, "from a folder or from git")
    try:
        path = unquote(urlsplit(url).path)
    except ValueError:
        raise MalformedError(f"has no valid URL for {name[:100]!r}") from None
    is_conda = path.endswith(tuple(f".{kind}" for kind in _FORMATS))
    purl = _conda_purl(path) if is_conda else make_purl("pypi", None, name, version)
    return LockedPackage(purl, (url_file(url, digests),), hosts_of(url), optional=optional)


def _conda_purl(path: str) -> str:
    """Return the purl of CHANNEL[/label/LABEL]/SUBDIR/NAME-VERSION-BUILD.TYPE."""
    folder, _, file = path.rpartition("/")
    channel, _, subdir = folder.rpartition("/")
    kind = next(kind for kind in _FORMATS if file.endswith(f".{kind}"))
    parts = file.removesuffix(f".{kind}").rsplit("-", 2)
    if len(parts) != 3:  # noqa: PLR2004
        raise MalformedError(f"has the file {file[:100]!r}, expected NAME-VERSION-BUILD")
    name, version, build = parts
    qualifiers = {
        "build": build,
        "channel": channel.partition("/label/")[0].rpartition("/")[2],
        "subdir": subdir,
        "type": kind,
    }
    return make_purl("conda", None, name, version, qualifiers)


class _PixiPackage(Struct):
    conda: str = ""  # URL, in version 6
    pypi: str = ""
    url: str = ""  # in versions 4 and 5
    name: str = ""
    version: str = ""
    sha256: str | None = None
    md5: str | None = None


class _PixiEnvironment(Struct):
    packages: dict[str, list[dict[str, str]]] = {}  # by platform


class _PixiLock(Struct):
    lock_version: str = field(name="version")
    environments: dict[str, _PixiEnvironment] = {}
    packages: list[_PixiPackage] = []


def read_pixi(data: bytes) -> Iterator[Entry]:
    """Read pixi.lock, which has the packages of all environments and platforms with their URLs."""
    lock = yaml_as(data, _PixiLock)
    uses = [
        {each.get("conda") or each.get("pypi") for each in packages}
        for environment in lock.environments.values()
        for packages in environment.packages.values()
    ]
    for package in lock.packages:
        url = package.conda or package.pypi or package.url
        is_everywhere = all(url in used for used in uses)
        digests = [
            hex_digest(name, value)
            for name, value in (("sha256", package.sha256), ("md5", package.md5))
            if value
        ]
        optional = None if is_everywhere else "only for some platforms or environments"
        yield _from_url(url, package.name or url[:100], package.version, digests, optional)
