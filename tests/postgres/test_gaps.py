"""`artifactapi gaps`: every gap, as text and as JSON, and exit codes that a script can use."""

from __future__ import annotations

import json
import uuid
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import psycopg
import pytest

from exporter import Settings
from exporter.postgres.schema import ensure_schema
from exporter.write.database import Database
from exporter.write.gaps import Gap
from tests.support.command import call, write
from tests.support.proxy import free_port

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.slow

NOW = datetime.now(UTC).replace(microsecond=0)


@pytest.fixture
def write_gap(dsn: str) -> Callable[[str, float, int], None]:
    """A function that writes a gap of one hour: node, hours since its start, number of entries."""

    def write(node: str, hours_ago: float, entries: int) -> None:
        start = NOW - timedelta(hours=hours_ago)
        end = start + timedelta(hours=1)
        database = Database(Settings().with_dsn(dsn).database)
        times = (start.isoformat(), end.isoformat())
        database.write_gaps([Gap(str(uuid.uuid4()), node, *times, "buffer_full", entries)])
        database.close()

    return write


def test_without_gaps_the_exit_code_is_0(dsn: str) -> None:
    write(dsn)
    done = call("--dsn", dsn, "gaps")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("No gaps")
    done = call("--dsn", dsn, "gaps", "--json")
    assert (done.returncode, done.stdout) == (0, "")


def test_gaps_as_text_with_exit_code_1(
    dsn: str, write_gap: Callable[[str, float, int], None]
) -> None:
    write_gap("new", 2, 1200)
    write_gap("old\x1b[31m", 400, 34)
    done = call("--dsn", dsn, "gaps")
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert [line.split()[-3:] for line in lines[1:3]] == [
        ["34", "buffer_full", r"old\x1b[31m"],
        ["1,200", "buffer_full", "new"],
    ]
    assert lines[3] == "1,234 requests are missing in total."


def test_one_missing_entry_is_singular(
    dsn: str, write_gap: Callable[[str, float, int], None]
) -> None:
    write_gap("new", 2, 1)
    assert call("--dsn", dsn, "gaps").stdout.endswith("\n1 request is missing in total.\n")


def test_gaps_as_json(dsn: str, write_gap: Callable[[str, float, int], None]) -> None:
    write_gap("a\u202e", 2, 7)
    write_gap("b", 1, 8)
    with psycopg.connect(dsn, autocommit=True) as connection:
        role = connection.execute("SELECT current_user::text").fetchone()
        assert role
    done = call(
        "--dsn",
        f"{dsn} options='-csearch_path={_schema(dsn)} -ctimezone=Asia/Tokyo'",
        "gaps",
        "--json",
    )
    assert done.returncode == 1
    assert all(line.isprintable() for line in done.stdout.splitlines())
    first, second = map(json.loads, done.stdout.splitlines())
    start = NOW - timedelta(hours=2)
    assert first == {
        "node": "a\u202e",
        "reason": "buffer_full",
        "entries": 7,
        "from_at": f"{start:%Y-%m-%dT%H:%M:%SZ}",
        "to_at": f"{start + timedelta(hours=1):%Y-%m-%dT%H:%M:%SZ}",
    }
    assert second["node"] == "b"


@pytest.mark.slow
def test_gaps_of_a_node_and_a_time(dsn: str, write_gap: Callable[[str, float, int], None]) -> None:
    write_gap("gate-1", 30, 1)
    write_gap("gate-2", 3, 2)
    write_gap("other", 3, 4)

    def found(*options: str) -> list[int]:
        done = call("--dsn", dsn, "gaps", "--json", *options)
        entries = [json.loads(line)["entries"] for line in done.stdout.splitlines()]
        assert done.returncode == bool(entries)
        return entries

    assert found("--since", "24h", "--node", "gate-*") == [2]
    assert sorted(found("--since", "150m")) == [2, 4]
    assert found("--since", "1h") == []
    assert found("--until", "24h") == [1]
    assert found("--node", "gate-1") == [1]


@pytest.mark.parametrize("options", [(), ("--since", "soon"), ("--since", "1h", "--until", "2h")])
def test_exit_code_2_if_the_log_could_not_be_read(options: tuple[str, ...], tmp_path: Path) -> None:
    unreachable = ("--dsn", f"host=127.0.0.1 port={free_port()}")
    assert call(*unreachable, "gaps", *options).returncode == 2
    assert call("--config", str(tmp_path / "none.yaml"), "gaps", *options).returncode == 2


def test_exit_code_2_if_the_role_cannot_read_the_gaps(dsn: str) -> None:
    with psycopg.connect(dsn, autocommit=True) as connection:
        ensure_schema(connection)
        connection.execute("CREATE ROLE no_gaps LOGIN")
        try:
            schema = _schema(dsn)
            connection.execute(f"GRANT USAGE ON SCHEMA {schema} TO no_gaps".encode())
            connection.execute("GRANT SELECT ON access_log_schema TO no_gaps")
            done = call("--dsn", dsn.replace("user=postgres", "user=no_gaps"), "gaps")
        finally:
            connection.execute("DROP OWNED BY no_gaps; DROP ROLE no_gaps")
    assert done.returncode == 2
    assert "This database role cannot read the log" in done.stderr


def _schema(dsn: str) -> str:
    return dsn.partition("search_path=")[2]
