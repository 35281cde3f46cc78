"""Compare versions as each ecosystem does. Parses versions into keys that can be ordered.

Where a library gives the order of the real tool, it is used: packaging for PEP 440, semver for
Semantic Versioning, univers for RubyGems and RPM, python-debian for Debian. univers is wrong for
Semantic Versioning (build metadata counts), Maven, Debian (00 is not 0), Alpine (unknown suffixes)
and Composer (patch sorts before the release); those have other libraries, or modules beside this one.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, NamedTuple

from debian.debian_support import NativeVersion
from packaging.version import Version as PythonVersion
from semver import Version as SemanticVersion
from univers.gem import GemVersion
from univers.rpm import RpmVersion, from_evr

from .alpine_version import alpine_key
from .composer_version import composer_key
from .maven_version import MavenVersion

if TYPE_CHECKING:
    from collections.abc import Callable

# Longer versions exist only in attacks: parsing some of them takes quadratic time.
MAX_LENGTH = 128
_SHORT_CORE = re.compile(r"v?(\d+)(\.\d+)?(\.\d+)?((?:-|\+).*)?", re.ASCII)
# NuGet docs, "Package versioning": a fourth number, upper and lower case mean the same.
_NUGET = re.compile(
    r"(\d+)(?:\.(\d+))?(?:\.(\d+))?(?:\.(\d+))?(?:-([0-9a-z.-]+))?(?:\+[0-9a-z.-]*)?",
    re.ASCII | re.IGNORECASE,
)
_NUMBERS = re.compile(r"\d+(?:[.-]\d+)*", re.ASCII)
# Debian policy 5.6.12. python-debian also accepts versions that dpkg rejects.
_DEBIAN = re.compile(r"(?:\d+:)?\d[A-Za-z0-9.+~:-]*", re.ASCII)
# rpm's own documentation, "Version comparison"; without a digit or letter there is nothing to compare.
_RPM = re.compile(r"(?:\d+:)?[A-Za-z0-9._+~^]+(?:-[A-Za-z0-9._+~^]+)?", re.ASCII)


class UncomparableError(ValueError):
    """A version does not follow the rules of its ecosystem, or the ecosystem has no known rules."""


class Scheme(NamedTuple):
    """How an ecosystem orders its versions."""

    name: str
    parse: Callable[[str], Any]  # raises ValueError
    has_epoch: bool = False  # versions may start with "1:", which file names omit
    has_rules: bool = True

    def key(self, version: str) -> Any:
        """Return a key that can be compared with other keys of this scheme.

        Raises:
            UncomparableError: the version is not valid, or longer than MAX_LENGTH.
        """
        if len(version) > MAX_LENGTH:
            raise UncomparableError(version)
        try:
            return self.parse(version)
        except ValueError as e:
            raise UncomparableError(version) from e


def scheme_of(purl_type: str) -> Scheme:
    """Return the scheme of a Package URL type. The unknown scheme compares no versions."""
    return _SCHEMES.get(purl_type, _UNKNOWN)


def _semantic(text: str) -> Any:
    """Semantic Versioning 2.0.0, 11. Advisories also write v1.2.3 and leave out zeros: 1.2."""
    found = _SHORT_CORE.fullmatch(text)
    if found is None:
        raise UncomparableError(text)
    major, minor, patch, rest = found.groups(default="")
    version = SemanticVersion.parse(f"{major}{minor or '.0'}{patch or '.0'}{rest}")
    return version.major, version.minor, version.patch, _prerelease(version.prerelease)


def _nuget(text: str) -> Any:
    found = _NUGET.fullmatch(text)
    if found is None:
        raise UncomparableError(text)
    *numbers, prerelease = found.groups()
    core = tuple(int(number or 0) for number in numbers)
    return *core, _prerelease(prerelease.lower() if prerelease else None)


def _prerelease(text: str | None) -> Any:
    """Semantic Versioning 11.3 and 11.4: a release is the highest; numbers come before words."""
    if text is None:
        return (1,)
    parts = ((0, int(part), "") if part.isdigit() else (1, 0, part) for part in text.split("."))
    return 0, tuple(parts)


def _debian(text: str) -> Any:
    if not _DEBIAN.fullmatch(text):
        raise UncomparableError(text)
    return NativeVersion(text)


def _rpm(text: str) -> Any:
    if not _RPM.fullmatch(text):
        raise UncomparableError(text)
    return RpmVersion(*from_evr(text))


def _numbers(text: str) -> Any:
    """CRAN and Hackage: lists of numbers; the longer of two lists with the same start is higher."""
    if not _NUMBERS.fullmatch(text):
        raise UncomparableError(text)
    return tuple(int(number) for number in re.split("[.-]", text))


def _no_rules(text: str) -> Any:
    raise UncomparableError(text)


SEMVER = Scheme("semver", _semantic)
_UNKNOWN = Scheme("unknown", _no_rules, has_rules=False)
_SCHEMES = {
    "apk": Scheme("apk", alpine_key),
    "bioconductor": Scheme("bioconductor", _numbers),
    "bitnami": SEMVER,
    "cargo": SEMVER,
    "composer": Scheme("composer", composer_key),
    "cran": Scheme("cran", _numbers),
    "deb": Scheme("deb", _debian, has_epoch=True),
    "gem": Scheme("gem", GemVersion),
    "github": SEMVER,
    "golang": SEMVER,
    "hackage": Scheme("hackage", _numbers),
    "helm": SEMVER,
    "hex": SEMVER,
    "julia": SEMVER,
    "maven": Scheme("maven", MavenVersion),
    "npm": SEMVER,
    "nuget": Scheme("nuget", _nuget),
    "opam": Scheme("opam", _debian),
    "pub": SEMVER,
    "pypi": Scheme("pypi", PythonVersion),
    "rpm": Scheme("rpm", _rpm, has_epoch=True),
    "swift": SEMVER,
    "terraform": SEMVER,
}
