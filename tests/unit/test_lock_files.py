"""What lock files say a file is, against what its URL is taken for; nothing is fetched.

The truth is the lock file's: `tests/support/lockfiles.py` makes paths and Package URLs of it by the
documentation of each registry, and knows nothing of our rules.
"""

from __future__ import annotations

import time
from functools import cache
from pathlib import Path
from urllib.parse import quote

import pytest

from exporter.rows.packages.identity import Identity, Remotes
from tests.support.lockfiles import REGISTRIES, Locked

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
# Of these a repository of unknown kind gives no package: paths of that shape are others' as well,
# or don't say whose distribution it is.
UNCERTAIN = {"apk", "composer-dist", "deb", "helm", "rpm", "terraform-release"}
UNCERTAIN_TYPES = (".exe", ".gz", ".xml", ".zip")  # Maven has artifacts of any type

both = pytest.mark.parametrize("name", sorted(REGISTRIES))


@cache
def locked(name: str, base: str) -> list[Locked]:
    registry = REGISTRIES[name]
    return list(registry.read((DATA / registry.file).read_text(encoding="utf-8"), base))


def identify(base: str, path: str) -> Identity:
    host, slash, folder = base.partition("/")
    return REMOTES.identify(host, slash + folder + path)


def wrong(name: str, base: str) -> list[tuple[Locked, Identity]]:
    """What isn't exactly what the lock file says."""
    found = [(each, identify(base, each.path)) for each in locked(name, base)]
    return [
        (each, identity)
        for each, identity in found
        if (identity.artifact_kind, identity.purl) != ("artifact", each.purl)
    ]


@both
def test_what_a_lock_file_names_is_what_its_url_is_taken_for(name: str) -> None:
    base = REGISTRIES[name].base

    assert len(locked(name, base)) >= 15
    assert wrong(name, base) == []


def test_each_ecosystem_has_forty() -> None:
    """Those with fewer here have the rest in `packages.tsv`."""
    few = {name for name, each in REGISTRIES.items() if len(locked(name, each.base)) < 40}

    assert few <= {"deb", "stack"}


@both
@pytest.mark.parametrize("mirror", sorted(MIRRORS))
def test_a_mirror_that_names_the_kind_says_the_same(name: str, mirror: str) -> None:
    assert wrong(name, MIRRORS[mirror].format(REGISTRIES[name].mirror)) == []


@both
@pytest.mark.parametrize("base", UNNAMED)
def test_a_mirror_of_unknown_kind_says_the_same_or_nothing(name: str, base: str) -> None:
    others = wrong(name, base)

    assert [identity.purl for _, identity in others if identity.purl] == []
    if name not in UNCERTAIN:
        paths = [each.path for each, _ in others]
        assert [path for path in paths if not path.endswith(UNCERTAIN_TYPES)] == []


@both
def test_percent_encoding_says_the_same(name: str) -> None:
    base = REGISTRIES[name].base
    for each in locked(name, base):
        assert identify(base, quote(each.path, safe="/%")) == identify(base, each.path)


def test_a_mirror_of_unknown_kind_is_not_much_slower() -> None:
    """With too little memory for the rules of all formats it takes five times as long."""

    def seconds(questions: list[tuple[str, str]]) -> float:
        """Of the best of some rounds."""
        best = float("inf")
        for _ in range(5):
            started = time.thread_time()
            for host, path in questions:
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
