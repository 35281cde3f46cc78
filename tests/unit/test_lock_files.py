"""Identify the files that lock files list. Nothing is downloaded.

`tests/support/lockfiles.py` derives the paths and the expected Package URLs from lock files and the
documentation of each registry, independently of our rules.
"""

from __future__ import annotations

import time
from functools import cache
from pathlib import Path
from urllib.parse import quote

import pytest

from exporter.rows.packages.identity import Identity, Remotes
from tests.support.lockfiles import REGISTRIES, Locked

pytestmark = pytest.mark.slow

DATA = Path(__file__).parents[1] / "data" / "locks"
REMOTES = Remotes.load()

MIRRORS = {
    "nexus": "nexus.corp.example/repository/{}-proxy",
    "jfrog": "corp.jfrog.example/artifactory/{}-remote",
    "artifactapi": "artifacts.corp.example/api/v1/remote/{}",
}
UNNAMED = [
    "nexus.corp.example/repository/unnamed",
    "corp.jfrog.example/artifactory/unnamed",
    "artifacts.corp.example/api/v1/remote/unnamed",
]
# In a repository of unknown kind these give no package, because other registries have paths of the
# same form, or because the path does not contain the distribution.
UNCERTAIN = {"apk", "composer-dist", "deb", "helm", "rpm", "terraform-release"}
UNCERTAIN_TYPES = (".exe", ".gz", ".xml", ".zip")  # Maven artifacts can have any type

each_registry = pytest.mark.parametrize("name", sorted(REGISTRIES))


@cache
def locked(name: str, base: str) -> list[Locked]:
    registry = REGISTRIES[name]
    return list(registry.read((DATA / registry.file).read_text(encoding="utf-8"), base))


def identify(base: str, path: str) -> Identity:
    host, slash, folder = base.partition("/")
    return REMOTES.identify(host, slash + folder + path)


def mismatches(name: str, base: str) -> list[tuple[Locked, Identity]]:
    """Return the files whose identity differs from the lock file."""
    identities = [(each, identify(base, each.path)) for each in locked(name, base)]
    return [
        (each, identity)
        for each, identity in identities
        if (identity.artifact_kind, identity.purl) != ("artifact", each.purl)
    ]


@each_registry
def test_url_gives_the_package_of_the_lock_file(name: str) -> None:
    base = REGISTRIES[name].base

    assert len(locked(name, base)) >= 15
    assert mismatches(name, base) == []


def test_each_ecosystem_has_at_least_40_files() -> None:
    """The two with fewer have more in `packages.tsv`."""
    few = {name for name, each in REGISTRIES.items() if len(locked(name, each.base)) < 40}

    assert few <= {"deb", "stack"}


@each_registry
@pytest.mark.parametrize("mirror", sorted(MIRRORS))
def test_mirror_of_known_kind_gives_the_same_package(name: str, mirror: str) -> None:
    assert mismatches(name, MIRRORS[mirror].format(REGISTRIES[name].mirror)) == []


@each_registry
@pytest.mark.parametrize("base", UNNAMED)
def test_mirror_of_unknown_kind_gives_the_same_package_or_none(name: str, base: str) -> None:
    different = mismatches(name, base)

    assert [identity.purl for _, identity in different if identity.purl] == []
    if name not in UNCERTAIN:
        paths = [each.path for each, _ in different]
        assert [path for path in paths if not path.endswith(UNCERTAIN_TYPES)] == []


@each_registry
def test_percent_encoding_does_not_matter(name: str) -> None:
    base = REGISTRIES[name].base
    for each in locked(name, base):
        assert identify(base, quote(each.path, safe="/%")) == identify(base, each.path)


def test_mirror_of_unknown_kind_is_not_much_slower() -> None:
    """With too little memory for the rules of all formats it would take five times as long."""

    def seconds(urls: list[tuple[str, str]]) -> float:
        """Return the time of the fastest of five rounds."""
        best = float("inf")
        for _ in range(5):
            started = time.thread_time()
            for host, path in urls:
                REMOTES.identify(host, path)
            best = min(best, time.thread_time() - started)
        return best

    direct, unnamed = [], []
    for name, registry in REGISTRIES.items():
        host, slash, folder = registry.base.partition("/")
        paths = [each.path for each in locked(name, registry.base)]
        direct += [(host, slash + folder + path) for path in paths]
        unnamed += [("nexus.example", f"/repository/unnamed{path}") for path in paths]

    assert seconds(unnamed) < 3 * seconds(direct)
