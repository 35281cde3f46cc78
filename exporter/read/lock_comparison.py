"""Compare what was fetched with what lock files say. Runs no queries and formats nothing."""

from __future__ import annotations

from collections import Counter, defaultdict
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import TYPE_CHECKING, Literal, NamedTuple

from msgspec import Struct, field
from packageurl import PackageURL
from packaging.utils import canonicalize_name, canonicalize_version

from ..lockfiles import SHA256

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from datetime import datetime

    from ..lockfiles import LockedFile, LockedPackage, LockFile

type Kind = Literal["not locked", "other host", "other digest", "other file"]

# Registries that serve files from another host than the one that lock files name. * stands for the
# same text in both.
_FILE_HOSTS = (
    ("pypi.*", "files.pythonhosted.*"),
    ("crates.*", "static.crates.*"),
    ("index.crates.*", "static.crates.*"),
    ("registry.yarnpkg.*", "registry.npmjs.*"),
    ("registry.npmjs.*", "registry.yarnpkg.*"),
    ("registry.terraform.*", "releases.hashicorp.*"),
)
_MAX_VERSIONS_SHOWN = 3


class Fetch(NamedTuple):
    """Equal fetches of one file, from access_log_fetches, or from a host that no remote describes."""

    purl: str
    filename: str | None
    host: str | None
    sha256: str | None  # in hexadecimal; None: the row has none
    fetches: int
    first_at: datetime
    last_at: datetime


class Sighting(NamedTuple):
    """Requests to one host for one Package URL that did not complete an artifact."""

    purl: str
    host: str | None
    is_partial: bool  # a part of the file was delivered
    is_failed: bool  # a download failed
    redirects: int  # how often the host redirected a download to another URL


class Finding(Struct, frozen=True):
    """One way in which fetches differ from the lock files."""

    kind: Kind
    purl: str
    detail: str  # a phrase that says what was expected
    host: str | None
    filename: str | None
    sha256: str | None
    fetches: int
    first_at: datetime
    last_at: datetime


class NotFetched(Struct, frozen=True):
    """A locked package that was not fetched: from a cache, or not needed."""

    purl: str
    lock_file: str
    reason: str


class DigestCounts(Struct):
    """How the digests of locked artifacts compare, in groups of equal fetches."""

    equal: int = 0
    different: int = 0
    not_recorded: int = 0  # the row has no sha256
    not_in_lock_file: int = 0
    not_comparable: dict[str, int] = {}  # by the algorithms of the lock file


class Comparison(Struct):
    """The result of comparing fetches with lock files."""

    findings: list[Finding] = []
    not_fetched: list[NotFetched] = []
    as_locked: int = 0  # artifacts (Package URLs) without a finding
    allowed: dict[str, int] = {}  # fetches of packages in --allow-package, by purl
    other_ecosystems: dict[str, int] = {}  # artifacts that no lock file covers, by purl type
    hosts_not_in_lock_file: int = 0  # artifacts whose host could not be compared
    digests: DigestCounts = field(default_factory=DigestCounts)


class Allowed(NamedTuple):
    """What the user expects besides the lock files. Globs, in which * stands for any text."""

    hosts: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    is_strict: bool = False  # artifacts of ecosystems that no lock file covers are findings

    def has_package(self, purl: str) -> bool:
        """Return whether a package is expected although it is not locked."""
        parts = _parsed(purl)
        name = f"{parts.namespace}/{parts.name}" if parts.namespace else parts.name
        return any(fnmatchcase(text, glob) for glob in self.packages for text in (name, purl))


def compare(
    fetches: Iterable[Fetch],
    sightings: Sequence[Sighting],
    lock_files: Sequence[LockFile],
    allowed: Allowed,
) -> Comparison:
    """Compare fetches with lock files.

    Args:
        fetches: Everything that was fetched, in the order of the findings.
        sightings: Other requests, which tell why a locked package was not fetched.
        lock_files: All of them together say what is locked.
        allowed: What is expected besides.
    """
    comparing = _Comparing(lock_files, sightings, allowed)
    for fetch in fetches:
        comparing.add(fetch)
    return comparing.result()


@lru_cache(maxsize=200_000)
def comparison_key(purl: str) -> str:
    """Return a text that is equal for a row's and a lock file's Package URL of the same package.

    Both normalize the names. Versions are equal as PEP 440 says (1.0 = 1.0.0); NuGet ignores case.
    A Helm chart's purl has its repository, which is compared as the host.
    """
    parts = _parsed(purl)
    if parts.type == "pypi":
        version = canonicalize_version(parts.version) if parts.version else None
        return f"pypi/{canonicalize_name(parts.name)}@{version}"
    if parts.type == "nuget":
        return purl.lower()
    if parts.type == "helm":
        return f"helm/{parts.name}@{parts.version}"
    return purl


def package_key(purl: str) -> str:
    """Return what is equal for all versions and files of a package."""
    parts = _parsed(purl.lower() if purl.startswith("pkg:nuget/") else purl)
    name = canonicalize_name(parts.name) if parts.type == "pypi" else parts.name
    return f"{parts.type}/{parts.namespace or ''}/{name}"


@lru_cache(maxsize=200_000)
def _parsed(purl: str) -> PackageURL:
    return PackageURL.from_string(purl)


class _Locked(NamedTuple):
    """A package in one lock file."""

    package: LockedPackage
    lock_file: str


class _Comparing:
    """What is known while fetches are compared one after the other."""

    def __init__(
        self, lock_files: Sequence[LockFile], sightings: Sequence[Sighting], allowed: Allowed
    ) -> None:
        self._allowed = allowed
        self._ecosystems = {name for each in lock_files for name in each.ecosystems}
        self._locked: defaultdict[str, list[_Locked]] = defaultdict(list)
        self._primary: dict[str, _Locked] = {}
        self._versions: defaultdict[str, set[str]] = defaultdict(set)
        for lock_file in lock_files:
            for package in lock_file.packages:
                self._add_package(_Locked(package, lock_file.path))
        self._sightings: defaultdict[str, list[Sighting]] = defaultdict(list)
        self._redirects_used: Counter[str] = Counter()  # by comparison key
        for sighting in sightings:
            self._sightings[package_key(sighting.purl)].append(sighting)
        self._result = Comparison()
        self._fetched_keys: set[str] = set()
        self._good: set[str] = set()
        self._bad: set[str] = set()

    def _add_package(self, locked: _Locked) -> None:
        purl = locked.package.purl
        self._primary.setdefault(comparison_key(purl), locked)
        self._versions[package_key(purl)].add(_parsed(purl).version or "")
        for each in (purl, *locked.package.aliases):
            self._locked[comparison_key(each)].append(locked)

    def add(self, fetch: Fetch) -> None:
        key = comparison_key(fetch.purl)
        packages = [locked.package for locked in self._locked.get(key, ())]
        if packages:
            self._fetched_keys.update(comparison_key(package.purl) for package in packages)
            findings = [*self._host(fetch, packages), *self._digest(fetch, packages)]
        else:
            findings = self._not_locked(fetch)
            if not findings:
                return
        self._result.findings += findings
        (self._bad if findings else self._good).add(key)

    def result(self) -> Comparison:
        self._result.as_locked = len(self._good - self._bad)
        for key, locked in self._primary.items():
            if key not in self._fetched_keys:
                reason = self._why_not_fetched(locked.package)
                entry = NotFetched(locked.package.purl, locked.lock_file, reason)
                self._result.not_fetched.append(entry)
        return self._result

    def _not_locked(self, fetch: Fetch) -> list[Finding]:
        ecosystem = _parsed(fetch.purl).type
        if self._allowed.has_package(fetch.purl):
            counts = self._result.allowed
            counts[fetch.purl] = counts.get(fetch.purl, 0) + fetch.fetches
            return []
        if not self._is_covered(fetch.purl) and not self._allowed.is_strict:
            counts = self._result.other_ecosystems
            counts[ecosystem] = counts.get(ecosystem, 0) + 1
            return []
        versions = sorted(self._versions.get(package_key(fetch.purl), ()))
        if not versions:
            return [_finding("not locked", fetch, "in no lock file")]
        shown = ", ".join(versions[:_MAX_VERSIONS_SHOWN])
        more = ", ..." if len(versions) > _MAX_VERSIONS_SHOWN else ""
        return [_finding("not locked", fetch, f"locked is {shown}{more}")]

    def _is_covered(self, purl: str) -> bool:
        """Return whether the lock files would list this package.

        Gradle lists POMs and module metadata only if it is to verify them.
        """
        parts = _parsed(purl)
        is_listed = not _is_metadata(purl) or any(map(_is_metadata, self._primary))
        return parts.type in self._ecosystems and is_listed

    def _host(self, fetch: Fetch, packages: Sequence[LockedPackage]) -> list[Finding]:
        expected = _expected_hosts(fetch, packages)
        if not expected and not self._allowed.hosts:
            self._result.hosts_not_in_lock_file += 1
            return []
        if self._is_expected(fetch.host, expected) or self._was_redirected(fetch, expected):
            return []
        named = ", ".join(sorted(expected) or self._allowed.hosts)
        return [_finding("other host", fetch, f"from {fetch.host}, expected {named}")]

    def _is_expected(self, host: str | None, expected: set[str]) -> bool:
        globs = self._allowed.hosts
        return host is not None and (
            host in expected or any(fnmatchcase(host, glob.lower()) for glob in globs)
        )

    def _was_redirected(self, fetch: Fetch, expected: set[str]) -> bool:
        """Return whether an expected host redirected each of these fetches to the other host.

        Each redirect counts once, so that it does not excuse a second fetch from elsewhere.
        """
        key = comparison_key(fetch.purl)
        redirects = sum(
            sighting.redirects
            for sighting in self._sightings.get(package_key(fetch.purl), ())
            if comparison_key(sighting.purl) == key and self._is_expected(sighting.host, expected)
        )
        self._redirects_used[key] += fetch.fetches
        return self._redirects_used[key] <= redirects

    def _digest(self, fetch: Fetch, packages: Sequence[LockedPackage]) -> list[Finding]:
        counts = self._result.digests
        all_files = [file for package in packages for file in package.files]
        files = [file for file in all_files if _is_same_file(fetch, file)]
        unnamed = [file for file in all_files if file.name is None]
        if fetch.sha256 is not None and fetch.sha256 in _sha256s(all_files):
            counts.equal += 1
            return []
        if all_files and not files and not unnamed:
            names = ", ".join(sorted({str(file.name) for file in all_files})[:_MAX_VERSIONS_SHOWN])
            return [_finding("other file", fetch, f"{fetch.filename}, locked is {names}")]
        candidates = [*files, *unnamed]
        algorithms = {digest.algorithm for file in candidates for digest in file.digests}
        if not algorithms:
            counts.not_in_lock_file += 1
        elif SHA256 not in algorithms:
            name = ", ".join(sorted(algorithms))
            counts.not_comparable[name] = counts.not_comparable.get(name, 0) + 1
        elif fetch.sha256 is None:
            counts.not_recorded += 1
        else:
            counts.different += 1
            locked = ", ".join(sorted(_sha256s(candidates))[:_MAX_VERSIONS_SHOWN])
            detail = f"SHA-256 is {fetch.sha256}, locked is {locked}"
            return [_finding("other digest", fetch, detail)]
        return []

    def _why_not_fetched(self, package: LockedPackage) -> str:
        key = comparison_key(package.purl)
        sightings = self._sightings.get(package_key(package.purl), ())
        of_version = [each for each in sightings if comparison_key(each.purl) == key]
        if any(each.is_failed for each in of_version):
            return "the download failed"
        if any(each.is_partial for each in of_version):
            return "only a part was read"
        if package.optional is not None:
            return package.optional
        return "only its metadata was requested" if sightings else "no request"


def _is_metadata(purl: str) -> bool:
    return purl.startswith("pkg:maven/") and purl.endswith(("type=pom", "type=module"))


def _is_same_file(fetch: Fetch, file: LockedFile) -> bool:
    """Return whether the names allow it. Tools write . and - in the names of wheels as _."""
    if fetch.filename is None or file.name is None:
        return fetch.filename is None
    if not fetch.purl.startswith("pkg:pypi/"):
        return fetch.filename == file.name
    return canonicalize_name(fetch.filename) == canonicalize_name(file.name)


def _sha256s(files: Iterable[LockedFile]) -> set[str]:
    return {d.value for file in files for d in file.digests if d.algorithm == SHA256}


def _expected_hosts(fetch: Fetch, packages: Sequence[LockedPackage]) -> set[str]:
    """Return the hosts that the lock files name for a file; none: they name no host for it."""
    files = [file for package in packages for file in package.files]
    same_name = [file for file in files if _is_same_file(fetch, file)]
    hosts = {file.host for file in same_name or files if file.host}
    hosts |= {host for package in packages for host in package.registries}
    return hosts | {other for host in hosts for other in _file_hosts(host)}


def _file_hosts(host: str) -> set[str]:
    found = set()
    for registry, files in _FILE_HOSTS:
        start = registry.removesuffix("*")
        if host.startswith(start) and "." not in host.removeprefix(start):
            found.add(files.replace("*", host.removeprefix(start)))
    return found


def _finding(kind: Kind, fetch: Fetch, detail: str) -> Finding:
    return Finding(
        kind,
        fetch.purl,
        detail,
        fetch.host,
        fetch.filename,
        fetch.sha256,
        fetch.fetches,
        fetch.first_at,
        fetch.last_at,
    )
