"""180 compromised npm versions hidden in a log among near misses: `affected` finds exactly the fetched ones."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from click.testing import CliRunner

from addon.cli.main import main
from exporter.postgres.schema import ensure_schema
from tests.support.access_log import temporary_schema
from tests.support.compromise import advisories, compromised, generate

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.support.postgres import Postgres

pytestmark = pytest.mark.slow

_ROWS, _PACKAGES, _DAYS = 60_000, 2000, 3  # tests/bench/affected.py does the same with 10 million
_ATTACK = compromised(180)


@pytest.fixture(scope="module")
def dsn(postgres: Postgres) -> Iterator[str]:
    with temporary_schema(postgres) as dsn, psycopg.connect(dsn, autocommit=True) as connection:
        ensure_schema(connection)
        assert list(generate(connection, _ROWS, _PACKAGES, _DAYS, _ATTACK))[-1] == _ROWS
        yield dsn


def answer(dsn: str, *arguments: str | Path) -> dict[str, Any]:
    command = ["affected", *map(str, arguments), "--json"]
    done = CliRunner(env={"ARTIFACTAPI_DSN": dsn}).invoke(main, command)
    assert done.exit_code in {0, 1}, done.output
    return dict(json.loads(done.stdout))


def test_the_attack_has_the_shape_that_it_should() -> None:
    assert len({each.purl for each in _ATTACK}) == 180
    assert sum(not each.users for each in _ATTACK) == 60
    assert sum(each.name.startswith("@acme/") for each in _ATTACK) == 90


def test_exactly_the_fetched_compromised_versions_are_found(dsn: str, tmp_path: Path) -> None:
    bad = tmp_path / "bad.txt"
    bad.write_text("".join(f"{each.name}@{each.version}\n" for each in _ATTACK))
    found = answer(dsn, bad, "--type", "npm")
    assert {hit["purl"]: hit["fetches"]["users"] for hit in found["hits"]} == {
        each.purl: each.users for each in _ATTACK if each.users
    }
    assert len(found["hits"]) == 120
    assert {hit["verdict"] for hit in found["hits"]} == {"affected"}
    looks = {
        (look["looks"]["purl"], look["looks"]["how"], *look["looks"]["users"])
        for look in found["looked_at"]
        if look["version"] is not None
    }
    assert looks == {
        (each.purl, how, f"miss-{each.number}")
        for each in _ATTACK
        for how in ("HEAD", "not found", "partial download")
    }


def test_many_advisories_give_the_same_result_as_a_query(dsn: str, tmp_path: Path) -> None:
    path = tmp_path / "osv.jsonl"
    documents = list(advisories(4000, _PACKAGES, 0.1))
    path.write_text("\n".join(documents))
    found = answer(dsn, path)
    assert (found["advisories"], found["packages"]) == (4000, 4000)
    assert found["checked"] > _PACKAGES * 4
    with psycopg.connect(dsn) as connection:
        rows = connection.execute(
            "SELECT purl, count(*) FROM access_log_fetches WHERE started_at >= '2026-03-01' GROUP BY purl"
        ).fetchall()
    fetches: dict[str, int] = dict(rows)
    expected = {}
    for document in map(json.loads, documents[:400]):
        (each,) = document["affected"]
        purl_type = {"npm": "npm", "PyPI": "pypi", "Maven": "maven"}[each["package"]["ecosystem"]]
        name = each["package"]["name"].replace(":", "/")
        end = int(each["ranges"][0]["events"][1]["fixed"].split(".")[1])
        for minor in range(1, end):
            purl = f"pkg:{purl_type}/{name}@1.{minor}.0"
            if purl in fetches:
                expected[document["id"], purl] = fetches[purl]
    assert {
        (hit["advisory"]["id"], hit["purl"]): hit["fetches"]["requests"] for hit in found["hits"]
    } == expected
    assert len(expected) > 300
