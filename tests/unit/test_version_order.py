"""Versions are ordered as each ecosystem's own tool orders them.

tests/data/version_order holds generated pairs that the real tools compared: npm's semver, Maven, RubyGems,
dpkg, rpm, Composer and apk-tools. Pairs for the others are written by hand, from the documents named here.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from exporter.advisories.versions import MAX_LENGTH, UncomparableError, scheme_of

pytestmark = pytest.mark.slow

_DATA = Path(__file__).resolve().parents[1] / "data" / "version_order"
_TYPES = {"semver": "npm"}
_FILES = sorted(_DATA.glob("*.txt"))


def pairs(path: Path) -> list[tuple[str, str, str]]:
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    return [(left, sign, right) for left, sign, right in map(str.split, lines)]


def sign(purl_type: str, left: str, right: str) -> str:
    """The sign between two versions. Also checks that the comparison is the same in reverse."""
    scheme = scheme_of(purl_type)
    first, second = scheme.key(left), scheme.key(right)
    assert (first < second) == (second > first)
    assert (first == second) == (second == first)
    return "<" if first < second else "=" if first == second else ">"


@pytest.mark.parametrize("path", _FILES, ids=lambda path: path.stem)
def test_order_is_that_of_the_real_tool(path: Path) -> None:
    expected = pairs(path)
    assert len(expected) > 300
    assert {each[1] for each in expected} == {"<", "=", ">"}
    purl_type = _TYPES.get(path.stem, path.stem)
    wrong = [
        (left, found, right, truth)
        for left, truth, right in expected
        if (found := sign(purl_type, left, right)) != truth
    ]
    assert not wrong


_ASCENDING = {
    # PEP 440, "Summary of permitted suffixes and relative ordering"
    "pypi": "1.dev0 1.0.dev456 1.0a1 1.0a2.dev456 1.0a12 1.0b2 1.0rc1 1.0 1.0+abc.5 1.0+abc.7 1.0+5 1.0.post456"
    " 1.1.dev1 1!0.1",
    # semver.org, 11
    "cargo": "1.0.0-alpha 1.0.0-alpha.1 1.0.0-alpha.beta 1.0.0-beta 1.0.0-beta.2 1.0.0-beta.11 1.0.0-rc.1 1.0.0",
    # Go modules reference, "Pseudo-versions"
    "golang": "v0.0.0-20180101000000-abcdefabcdef v0.0.0-20191109021931-daa7c04131f5 v1.2.3-pre"
    " v1.2.3-pre.0.20190101000000-abcdefabcdef v1.2.3 v1.2.4-0.20190101000000-abcdefabcdef v1.2.4"
    " v2.0.0+incompatible v10.0.0",
    # NuGet docs, "Package versioning": a fourth number; names of prereleases ignore case
    "nuget": "1.0.0-alpha.2 1.0.0-Alpha.10 1.0.0-beta 1.0 1.0.0.1-RC 1.0.0.1 1.0.1",
    # R manual, package_version
    "cran": "0.9 1.0 1.0-1 1.0-2 1.0.3 1.1 1.10",
    # Haskell Package Versioning Policy
    "hackage": "1 1.0 1.0.0 1.0.0.1 1.0.1 1.1",
}
_EQUAL = {
    "pypi": "1.0 1.0.0 v1.0 1",
    "golang": "v2.0.0+incompatible v2.0.0 2.0.0",
    "npm": "1.2.0 v1.2.0 1.2.0+build5 1.2",
    "nuget": "1 1.0 1.0.0 1.0.0.0 1.0.0+abc",
    "deb": "1.0 0:1.0 1.0-0 1.00",
    "composer": "1.0 v1.0.0.0 1.0.0+abc 1.0-stable",
}


@pytest.mark.parametrize("purl_type", _ASCENDING)
def test_versions_in_documents_ascend(purl_type: str) -> None:
    for left, right in itertools.combinations(_ASCENDING[purl_type].split(), 2):
        assert sign(purl_type, left, right) == "<", (left, right)


@pytest.mark.parametrize("purl_type", _EQUAL)
def test_versions_with_the_same_meaning_are_equal(purl_type: str) -> None:
    for left, right in itertools.combinations(_EQUAL[purl_type].split(), 2):
        assert sign(purl_type, left, right) == "=", (left, right)


@pytest.mark.parametrize(
    ("purl_type", "version"),
    [
        ("pypi", "2013-01-21T20:33:09+0100"),
        ("npm", "latest"),
        ("npm", "1.2.3.4"),
        ("golang", "master"),
        ("gem", "1.0_beta"),
        ("deb", "trunk"),
        ("rpm", "1-2-3"),
        ("apk", "1.0bc"),
        ("nuget", "1.2.3.4.5"),
        ("composer", "dev-main"),
        ("conan", "1.0"),
        ("npm", ""),
        ("composer", f"1alpha{'1' * 90}!"),  # in no time
        ("maven", "1" * (MAX_LENGTH + 1)),
        ("deb", "1\u0662"),
    ],
)
def test_a_version_without_a_place_in_the_order_is_rejected(purl_type: str, version: str) -> None:
    with pytest.raises(UncomparableError):
        scheme_of(purl_type).key(version)
