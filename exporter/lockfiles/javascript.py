"""Read package-lock.json and npm-shrinkwrap.json (versions 1 to 3), and pnpm-lock.yaml (5 to 9)."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from msgspec import Struct, field

from .documents import all_yaml_as, convert, json_as
from .locked import (
    LockedPackage,
    MalformedError,
    Unchecked,
    host_of,
    hosts_of,
    is_web,
    make_purl,
    scoped,
    subresource_digests,
    url_file,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from .locked import Entry

_SPECIAL_PLACES = (
    "git+",
    "git:",
    "git@",
    "github:",
    "gitlab:",
    "bitbucket:",
    "ssh:",
    "file:",
    "link:",
)


class _NpmPackage(Struct):
    """An entry of `packages` (versions 2 and 3) or `dependencies` (version 1)."""

    version: str | bool | None = None
    name: str | None = None  # if it differs from the folder: an alias
    resolved: str | bool | None = None
    integrity: str | bool | None = None
    link: bool = False
    bundled: bool = False
    in_bundle: bool = field(default=False, name="inBundle")
    optional: bool = False
    dev_optional: bool = field(default=False, name="devOptional")
    dev: bool = False
    peer: bool = False
    dependencies: object = None


class _NpmLock(Struct):
    version: int = field(name="lockfileVersion")
    packages: dict[str, _NpmPackage] | None = None
    dependencies: dict[str, _NpmPackage] = {}


def read_npm(data: bytes) -> Iterator[Entry]:
    """Read npm's lock file, which has the URL and the digest of each file (`npm help package-lock.json`)."""
    lock = json_as(data, _NpmLock)
    if lock.packages is not None:
        for folder, package in lock.packages.items():
            found = re.search(r"(?:^|/)node_modules/((?:@[^/]+/)?[^/]+)$", folder)
            if found is not None:
                yield from _npm_package(package.name or found[1], package)
        return
    waiting = [lock.dependencies]
    while waiting:
        for name, package in waiting.pop().items():
            yield from _npm_package(name, package)
            if isinstance(package.dependencies, dict):
                waiting.append(_nested(package.dependencies))


def _nested(dependencies: Mapping[str, object]) -> dict[str, _NpmPackage]:
    return convert(dependencies, dict[str, _NpmPackage])


def _npm_package(name: str, package: _NpmPackage) -> Iterator[Entry]:
    if package.bundled or package.in_bundle:
        return  # within the file of another package
    version = package.version if isinstance(package.version, str) else ""
    resolved = package.resolved if isinstance(package.resolved, str) else ""
    if package.link or any(text.startswith(_SPECIAL_PLACES) for text in (version, resolved)):
        yield Unchecked(name, "from a folder or from git")
        return
    if version.startswith("npm:"):  # an alias in version 1
        name, _, version = version.removeprefix("npm:").rpartition("@")
    if is_web(version):  # a URL in version 1
        yield Unchecked(name, "from a URL, without a version")
        return
    integrity = package.integrity if isinstance(package.integrity, str) else None
    yield npm_package(name, version, resolved, integrity, _npm_reason(package))


def npm_package(
    name: str, version: str, url: str, integrity: str | None, optional: str | None = None
) -> LockedPackage:
    """Return a package of an npm registry. Without a URL, its file has the usual name."""
    namespace, short_name = scoped(name)
    usual_name = f"{short_name}-{version}.tgz"
    return LockedPackage(
        make_purl("npm", namespace, short_name, version),
        (url_file(url, subresource_digests(integrity), usual_name),),
        hosts_of(url),
        optional=optional,
    )


def _npm_reason(package: _NpmPackage) -> str | None:
    if package.optional or package.dev_optional:
        return "optional"
    if package.peer:
        return "only as a peer"
    return "only for development" if package.dev else None


class _PnpmResolution(Struct):
    integrity: str | None = None
    tarball: str = ""
    type: str = ""
    directory: str | None = None
    registry: str = ""


class _PnpmPackage(Struct):
    resolution: _PnpmResolution = field(default_factory=_PnpmResolution)
    name: str = ""
    version: str = ""
    optional: str = ""  # all scalars of YAML are text
    dev: str = ""
    os: object = None
    cpu: object = None
    libc: object = None


class _PnpmLock(Struct):
    version: str = field(name="lockfileVersion")
    packages: dict[str, _PnpmPackage] | None = None


def read_pnpm(data: bytes) -> Iterator[Entry]:
    """Read pnpm's lock file. It has digests, and URLs only of files in unusual places.

    Since version 11, another document can come first, with pnpm itself and its plugins, which pnpm
    fetches as well (pnpm docs, "Reading pnpm-lock.yaml").
    """
    locks = all_yaml_as(data, _PnpmLock)
    if not locks:
        raise MalformedError("is empty")
    for key, package in ((k, p) for lock in locks for k, p in (lock.packages or {}).items()):
        resolution = package.resolution
        if resolution.type in {"git", "directory"} or resolution.directory is not None:
            yield Unchecked(key, "from git" if resolution.type == "git" else "from a folder")
            continue
        if resolution.tarball.startswith("file:") or key.startswith(("file:", "link:")):
            yield Unchecked(key, "from a folder")
            continue
        name, version = _pnpm_name(key, package)
        if name is None or version is None:
            yield Unchecked(
                host_of(resolution.tarball) or key[:100], "from a URL, without a version"
            )
            continue
        url = resolution.tarball or resolution.registry
        locked = npm_package(
            name, version, resolution.tarball, resolution.integrity, _pnpm_reason(package)
        )
        yield locked._replace(registries=hosts_of(url))


def _pnpm_name(key: str, package: _PnpmPackage) -> tuple[str | None, str | None]:
    """Return name and version of a key.

    /name/1.0.0_peer@2.0.0 (version 5), /name@1.0.0(peer@2.0.0) (6), or the same without / (9).
    """
    if package.name and package.version:
        return package.name, package.version
    text = key.partition("(")[0]
    found = re.fullmatch(r"(?:[^/@]*/)?((?:@[^/@]+/)?[^/@]+)@([^/@:]+)", text)
    if found is None:
        found = re.fullmatch(r"[^/@]*/((?:@[^/@]+/)?[^/@]+)/(\d[^/_]*)(?:_.*)?", text)
    return (found[1], found[2]) if found else (None, None)


def _pnpm_reason(package: _PnpmPackage) -> str | None:
    if package.os or package.cpu or package.libc:
        return "only for some platforms"
    if package.optional == "true":
        return "optional"
    return "only for development" if package.dev == "true" else None
