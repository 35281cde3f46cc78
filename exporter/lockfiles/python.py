"""Read pylock.toml, uv.lock, poetry.lock, pdm.lock and Pipfile.lock."""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec import Struct, field
from packaging.pylock import Pylock, PylockUnsupportedVersionError, PylockValidationError

from .documents import convert, json_as, toml, toml_as
from .locked import (
    Digest,
    LockedFile,
    LockedPackage,
    MalformedError,
    Unchecked,
    file_name_of,
    hex_digests,
    host_of,
    hosts_of,
    make_purl,
    parse_digest,
    url_file,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from packaging.pylock import Package, PackageArchive, PackageSdist, PackageWheel

    from .locked import Entry

_OTHER_PLATFORM = "only for some platforms"


def read_pylock(data: bytes) -> Iterator[Entry]:
    """Read the format of PEP 751, which has the URL and the digests of each file."""
    try:
        lock = Pylock.from_dict(toml(data))
    except (PylockValidationError, PylockUnsupportedVersionError) as e:
        raise MalformedError(f"is not a valid pylock file ({e})") from None
    for package in lock.packages:
        yield _pylock_package(package)


def _pylock_package(package: Package) -> Entry:
    if package.vcs is not None:
        return Unchecked(package.name, f"from {package.vcs.type}")
    if package.directory is not None:
        return Unchecked(package.name, "from a folder")
    if package.version is None:
        return Unchecked(package.name, "from an archive without a version")
    parts: list[PackageWheel | PackageSdist | PackageArchive] = [*(package.wheels or ())]
    parts += [part for part in (package.sdist, package.archive) if part is not None]
    files = [_pylock_file(part) for part in parts]
    if files and all(file.host is None for file in files) and any(part.path for part in parts):
        return Unchecked(package.name, "from a folder")
    return LockedPackage(
        make_purl("pypi", None, package.name, str(package.version)),
        tuple(files),
        hosts_of(package.index or ""),
        optional=_OTHER_PLATFORM if package.marker is not None else None,
    )


def _pylock_file(part: PackageWheel | PackageSdist | PackageArchive) -> LockedFile:
    # Tools write a wheel's name normalized; a row has the one of the URL.
    name = getattr(part, "name", None) or file_name_of(part.path or "")
    return url_file(part.url or "", hex_digests(part.hashes), name)


class _UvFile(Struct):
    url: str = ""
    filename: str = ""
    path: str = ""
    hash: str | None = None


class _UvPackage(Struct):
    name: str
    version: str = ""
    source: dict[str, object] = {}
    sdist: _UvFile | None = None
    wheels: list[_UvFile] = []
    resolution_markers: list[str] = field(default_factory=list, name="resolution-markers")


class _UvLock(Struct):
    version: int
    package: list[_UvPackage] = []


def read_uv(data: bytes) -> Iterator[Entry]:
    """Read uv.lock. Of a package from a registry it has the files with their URLs."""
    for package in toml_as(data, _UvLock).package:
        source = next(iter(package.source), "registry")
        if source in {"editable", "virtual", "directory", "path"}:
            yield Unchecked(package.name, "from a folder")
        elif source == "git":
            yield Unchecked(package.name, "from git")
        elif not package.version:
            yield Unchecked(package.name, "from a URL, without a version")
        else:
            yield _uv_package(package, str(package.source.get(source, "")))


def _uv_package(package: _UvPackage, origin: str) -> Entry:
    parts = [*package.wheels, *([package.sdist] if package.sdist else ())]
    registry = host_of(origin)
    # The registry can be a folder; then files have a path.
    if registry is None and all(host_of(part.url) is None for part in parts):
        return Unchecked(package.name, "from a folder")
    return LockedPackage(
        make_purl("pypi", None, package.name, package.version),
        tuple(_uv_file(part, origin) for part in parts),
        (registry,) if registry else (),
        optional=_OTHER_PLATFORM if package.resolution_markers else None,
    )


def _uv_file(part: _UvFile, origin: str) -> LockedFile:
    digests = (parse_digest(part.hash),) if part.hash else ()
    file = url_file(part.url, digests, file_name_of(part.path))
    return file._replace(name=part.filename or file.name, host=file.host or host_of(origin))


class _PoetryFile(Struct):
    file: str
    hash: str = ""
    url: str = ""  # in pdm.lock


class _PoetrySource(Struct):
    type: str = ""
    url: str = ""


class _PoetryPackage(Struct):
    name: str
    version: str = ""
    optional: bool = False
    files: list[_PoetryFile] = []
    source: _PoetrySource | None = None
    markers: object = None
    marker: object = None  # in pdm.lock
    git: str | None = None  # in pdm.lock, like the next two
    path: str | None = None
    url: str | None = None


class _PoetryMetadata(Struct):
    files: dict[str, list[_PoetryFile]] = {}  # until Poetry 1.2


class _PoetryLock(Struct):
    package: list[_PoetryPackage] = []
    metadata: _PoetryMetadata = field(default_factory=_PoetryMetadata)


def read_poetry(data: bytes) -> Iterator[Entry]:
    """Read poetry.lock and pdm.lock. A package without a source is from the default registry."""
    lock = toml_as(data, _PoetryLock)
    for package in lock.package:
        source = package.source or _PoetrySource()
        if source.type == "git" or package.git is not None:
            yield Unchecked(package.name, "from git")
            continue
        if source.type in {"directory", "file"} or package.path is not None:
            yield Unchecked(package.name, "from a folder")
            continue
        direct = source.url if source.type == "url" else package.url or ""
        files = package.files or lock.metadata.files.get(package.name, [])
        yield LockedPackage(
            make_purl("pypi", None, package.name, package.version),
            tuple(_poetry_file(file, direct) for file in files),
            hosts_of(direct or source.url),
            optional=_poetry_reason(package),
        )


def _poetry_file(file: _PoetryFile, direct: str) -> LockedFile:
    locked = url_file(file.url or direct, (parse_digest(file.hash),) if file.hash else ())
    return locked._replace(name=file_name_of(file.file))


def _poetry_reason(package: _PoetryPackage) -> str | None:
    if package.optional:
        return "optional"
    return _OTHER_PLATFORM if package.markers or package.marker else None


class _PipfileSource(Struct):
    name: str = ""
    url: str = ""


class _PipfileMeta(Struct):
    sources: list[_PipfileSource] = []


class _PipfilePackage(Struct):
    version: str = ""
    hashes: list[str] = []
    index: str = ""
    markers: str = ""
    git: str | None = None
    path: str | None = None
    file: str | None = None
    editable: bool = False


class _PipfileLock(Struct):
    meta: _PipfileMeta = field(name="_meta")


def read_pipfile(data: bytes) -> Iterator[Entry]:
    """Read Pipfile.lock: a mapping for each category, such as default and develop."""
    sources = json_as(data, _PipfileLock).meta.sources
    hosts = {source.name: hosts_of(source.url) for source in sources}
    # Without an index, a package may come from any of the sources.
    hosts[""] = tuple(host for found in hosts.values() for host in found)
    categories = json_as(data, dict[str, dict[str, object]])
    for category, packages in categories.items():
        if category != "_meta":
            yield from _pipfile_category(category, packages, hosts)


def _pipfile_category(
    category: str,
    packages: Mapping[str, object],
    hosts: Mapping[str, tuple[str, ...]],
) -> Iterator[Entry]:
    for name, raw in packages.items():
        package = convert(raw, _PipfilePackage)
        if package.git is not None:
            yield Unchecked(name, "from git")
        elif package.path is not None or package.editable:
            yield Unchecked(name, "from a folder")
        elif package.file is not None or not package.version:
            yield Unchecked(name, "from a URL, without a version")
        elif not package.version.startswith("=="):
            yield Unchecked(name, "without one version")
        else:
            yield LockedPackage(
                make_purl("pypi", None, name, package.version.removeprefix("==")),
                _unnamed_files(map(parse_digest, package.hashes)),
                hosts.get(package.index, hosts[""]),
                optional=_pipfile_reason(category, package),
            )


def _pipfile_reason(category: str, package: _PipfilePackage) -> str | None:
    if package.markers:
        return _OTHER_PLATFORM
    return None if category == "default" else f"only in {category}"


def _unnamed_files(digests: Iterable[Digest]) -> tuple[LockedFile, ...]:
    """Return one file for each digest, of which the lock file does not give the names."""
    return tuple(LockedFile(digests=(digest,)) for digest in digests)
