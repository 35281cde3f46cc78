"""A URL that is written in another way gives the same package, or none."""

from __future__ import annotations

import random
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import pytest

from exporter.rows.packages.identity import Remotes

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.slow

DATA = Path(__file__).parents[1] / "data"
REMOTES = Remotes.load()
URLS = [
    line.split("\t")[0]
    for name in ("urls.tsv", "edges.tsv", "registries.tsv")
    for line in (DATA / name).read_text(encoding="utf-8").splitlines()
    if not line.startswith("#")
]


def insert_dot_segments(path: str, rng: random.Random) -> str:
    segments = path.split("/")
    dots = [["."], [".", "."], ["x", ".."], [".."], ["%2e"], ["x", "%2E%2e"], ["..", ".."]]
    index = rng.randrange(1, len(segments) + 1)
    return "/".join([*segments[:index], *rng.choice(dots), *segments[index:]])


def repeat_slash(path: str, rng: random.Random) -> str:
    index = rng.choice([i for i, character in enumerate(path) if character == "/"])
    return path[:index] + "/" * rng.randint(1, 3) + path[index:]


def percent_encode(path: str, rng: random.Random) -> str:
    """Encode some characters, with digits in either case; a percent sign is encoded twice."""
    return "".join(
        rng.choice([f"%{ord(c):02x}", f"%{ord(c):02X}"]) if c != "/" and rng.random() < 0.1 else c
        for c in path
    )


def encode_slash(path: str, rng: random.Random) -> str:
    index = rng.choice([i for i, character in enumerate(path) if character == "/"])
    return f"{path[:index]}{rng.choice(['%2f', '%2F', '/%2f'])}{path[index + 1 :]}"


def change_case(path: str, rng: random.Random) -> str:
    segments = path.split("/")
    index = rng.randrange(len(segments))
    segments[index] = segments[index].upper()
    letter = rng.randrange(len(path))
    one = path[:letter] + path[letter].swapcase() + path[letter + 1 :]
    return rng.choice([path.upper(), path.swapcase(), "/".join(segments), one])


MUTATIONS = [insert_dot_segments, repeat_slash, percent_encode, encode_slash, change_case]


@pytest.mark.parametrize("mutate", MUTATIONS)
def test_mutated_urls_have_no_other_package(mutate: Callable[[str, random.Random], str]) -> None:
    """The package may lack its version. Case is compared by the registry, not here."""
    rng = random.Random(mutate.__name__)
    different, same = [], 0
    for _ in range(1000):
        url = urlsplit(rng.choice([url for url in URLS if urlsplit(url).path.strip("/")]))
        path = mutate(url.path, rng)
        before, after = (
            REMOTES.identify(url.hostname or "", each, scheme=url.scheme, port=url.port).purl
            for each in (url.path, path)
        )
        if after is not None and not (before or "").lower().startswith(after.lower()):
            different.append((url.hostname, path, before, after))
        same += after is not None

    assert different == []
    assert same > 50


def test_a_snapshot_in_another_case_is_no_artifact() -> None:
    """Not in the table, because upper case would make it a version again."""
    identity = REMOTES.identify("repo1.maven.example", "/maven2/g/a/1-Snapshot/maven-metadata.xml")

    assert (identity.artifact_kind, identity.purl) == ("index", None)
