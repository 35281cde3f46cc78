"""A distributed log answers like one on a single server, and refuses what it cannot do with a reason.

Here, functions that reject what Citus rejects stand in for it. With ARTIFACTAPI_TEST_CITUS, the tests of this
folder run on a cluster.
"""

from __future__ import annotations

import random
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
import pytest

from exporter import Settings
from exporter.postgres.connection import connect
from exporter.postgres.indexes import build_missing_indexes
from exporter.postgres.schema import MIGRATIONS, SchemaError, distribute_schema, ensure_schema
from exporter.retention.prune import prune
from exporter.retention.rollups import roll_up
from exporter.run import Run
from exporter.write.database import Database
from exporter.write.gaps import Gap
from exporter.write.ledger import RunCounts, RunLedger
from tests.bench.seed_rows import Plan, load
from tests.support.access_log import SCRIPT
from tests.support.citus import CLUSTER_DSN, Cluster, worker_dsns
from tests.support.command import call
from tests.support.older_version import version_before
from tests.support.samples import make_entry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from exporter import AccessLogEntry
    from tests.support.postgres import Postgres

    Query = Callable[..., list[tuple[Any, ...]]]

_STUB = Path(__file__).resolve().parents[1] / "support" / "citus_stub.sql"
_QUERIES = SCRIPT.parents[1] / "configs" / "queries.sql"
_NOW = datetime(2026, 3, 20, 12, tzinfo=UTC)
_NODES = ("proxy-1", "proxy-2", "proxy-3")
_VIEWS = ("artifact", "access_log_remotes", "access_log_redundant", "access_log_gap")


@pytest.fixture(scope="module")
def stub(postgres: Postgres | Cluster) -> Iterator[str]:
    """A database in which stubs stand in for Citus."""
    if isinstance(postgres, Cluster):
        yield postgres.dsn()
        return
    with psycopg.connect(postgres.dsn(), autocommit=True) as connection:
        connection.execute("CREATE DATABASE with_citus")
        with psycopg.connect(postgres.dsn("with_citus"), autocommit=True) as inside:
            inside.execute(_STUB.read_bytes())
        yield postgres.dsn("with_citus")
        connection.execute("DROP DATABASE with_citus")


@pytest.fixture
def dsn(stub: str, request: pytest.FixtureRequest) -> Iterator[str]:
    """A connection string to an empty schema of that database."""
    name = f"test_citus_{abs(hash(request.node.name)):x}"
    with psycopg.connect(stub, autocommit=True) as connection:
        connection.execute(f"CREATE SCHEMA {name}".encode())
    yield f"{stub} options=-csearch_path={name}"
    with psycopg.connect(stub, autocommit=True) as connection:
        connection.execute("SET client_min_messages = warning")
        connection.execute(f"DROP SCHEMA {name} CASCADE".encode())


only_stub = pytest.mark.not_on_citus("changes what stands in for Citus")
only_cluster = pytest.mark.skipif(not CLUSTER_DSN, reason="ARTIFACTAPI_TEST_CITUS names no cluster")


@pytest.fixture
def log(dsn: str) -> str:
    """A connection string to a distributed log without rows."""
    with connect(dsn, Settings().database) as connection:
        ensure_schema(connection)
        assert distribute_schema(connection)
    return dsn


@pytest.fixture
def as_worker(stub: str) -> Iterator[None]:
    """The server is a worker meanwhile."""
    with psycopg.connect(stub, autocommit=True) as connection:
        connection.execute("TRUNCATE command_on_coordinator")
        connection.execute("UPDATE pg_dist_local_group SET groupid = 1")
        yield
        connection.execute("UPDATE pg_dist_local_group SET groupid = 0")


def database(dsn: str, node: str = "proxy-1") -> Database:
    counts = RunCounts(0, 0, 0, 0, 0)
    return Database(
        Settings(node=node).with_dsn(dsn).database,
        ledger=RunLedger(Run.start(node), lambda: counts),
    )


def write(dsn: str, *batches: list[AccessLogEntry], node: str = "proxy-1") -> None:
    writer = database(dsn, node)
    for batch in batches:
        assert writer.write(batch) == []
    writer.close()


def fetch(number: int, node: str, **changes: Any) -> AccessLogEntry:
    return make_entry(
        number, node=node, artifact_complete=True, purl="pkg:pypi/demo@1.0", **changes
    )


def answers(dsn: str) -> list[str]:
    """What the commands and queries say about a log, except what depends on the clock."""
    since = (_NOW - timedelta(days=3)).isoformat()
    until = _NOW.isoformat()
    commands = (
        ("report", "--since", since, "--until", until, "--json"),
        ("export", "goaccess", "--since", since),
        ("psql", "-qAt", "-v", f"since={since}", "-f", str(_QUERIES)),
        ("psql", "-qAt", *(f"-cSELECT * FROM {name} ORDER BY 1, 2" for name in _VIEWS)),
    )
    return [_output(call("--dsn", dsn, *command)) for command in commands]


def _output(done: Any) -> str:
    text: str = done.stdout + done.stderr
    start, _, rest = text.partition('"log":')  # the size of the tables, which have other keys now
    return start + rest.partition("}")[2]


@pytest.mark.slow
def test_distributing_changes_no_answer(dsn: str) -> None:
    with connect(dsn, Settings().database) as connection:
        ensure_schema(connection)
        for _ in load(connection, Plan(600, _NOW, days=4, seed=3)):
            pass
        before = answers(dsn)
        assert len(set(before)) == len(before)
        first = call("--dsn", dsn, "init", "--distribute")
        again = call("--dsn", dsn, "init", "--distribute")
    assert "The log is distributed now" in first.stderr
    assert "The log is distributed now" not in again.stderr
    assert first.stdout == again.stdout
    assert "artifact_by_node" in first.stdout
    assert answers(dsn) == before


def test_distributing_keeps_comments_and_grants(dsn: str, query: Query) -> None:
    comments = (
        "SELECT relname, obj_description(oid, 'pg_class') FROM pg_class"
        " WHERE relnamespace = current_schema()::regnamespace AND relkind = 'v' ORDER BY 1"
    )
    readable = (
        "SELECT relname FROM pg_class WHERE relnamespace = current_schema()::regnamespace AND relkind = 'v'"
        " AND has_table_privilege('pg_monitor', oid, 'SELECT') ORDER BY 1"
    )
    with connect(dsn, Settings().database) as connection:
        ensure_schema(connection)
        schema = query("SELECT current_schema()")[0][0]
        query(f"GRANT SELECT ON ALL TABLES IN SCHEMA {schema} TO pg_monitor")
        before = query(comments), query(readable)
        distribute_schema(connection)
    assert (query(comments), query(readable)) == before
    assert ("artifact",) in before[1]
    assert query(
        "SELECT count(*) FROM pg_constraint WHERE conrelid = 'access_log_rollup_total'::regclass AND contype = 'f'"
    ) == [(1,)]


def test_what_a_batch_writes_is_distributed_by_node_and_the_rest_is_everywhere(
    log: str, query: Query
) -> None:
    del log
    kinds: dict[str, str] = dict(
        query(
            "SELECT relname, partmethod::text FROM pg_dist_partition JOIN pg_class ON pg_class.oid = logicalrelid"
            " WHERE relnamespace = current_schema()::regnamespace AND NOT relispartition"
        )
    )
    assert {name for name, kind in kinds.items() if kind == "h"} == {
        *("access_log", "access_log_gap", "access_log_run", "access_log_run_day"),
        "artifact_by_node",
    }
    tables = query(
        "SELECT relname FROM pg_class WHERE relnamespace = current_schema()::regnamespace"
        " AND relkind IN ('r', 'p') AND NOT relispartition"
    )
    assert set(kinds) == {name for (name,) in tables}


def test_nodes_of_one_batch_and_gaps_are_counted_each_in_its_place(log: str, query: Query) -> None:
    writer = database(log)
    batch = [fetch(n, _NODES[n % 3]) for n in range(12)]
    assert writer.write(batch) == []
    assert writer.write(batch) == []
    writer.write_gaps(
        [
            Gap(f"{n:032x}", node, "2026-01-01", "2026-01-01", "rejected", n)
            for n, node in enumerate(_NODES, 1)
        ]
    )
    writer.report_run("stopped")
    writer.close()
    assert query("SELECT count(*), count(DISTINCT node) FROM access_log") == [(12, 3)]
    assert query("SELECT node, fetches FROM artifact_by_node ORDER BY 1") == [
        (node, 4) for node in _NODES
    ]
    assert query("SELECT fetches FROM artifact") == [(12,)]
    assert query(
        "SELECT node, sum(rows)::int, sum(lost)::int FROM access_log_run_day GROUP BY 1 ORDER BY 1"
    ) == [(node, 4, n) for n, node in enumerate(_NODES, 1)]
    assert query("SELECT node, end_reason FROM access_log_run") == [("proxy-1", "stopped")]


def test_artifacts_of_all_nodes_are_summed_up_exactly(log: str, query: Query) -> None:
    chance = random.Random(7)
    entries = [
        make_entry(
            chance.randrange(10_000_000),
            node=chance.choice(_NODES),
            purl=f"pkg:pypi/p@{chance.randrange(5)}",
            remote=chance.choice([None, "a", 'quoted "remote"']),
            proxy_user=chance.choice([None, "build-1", "build\\2"]),
            response_bytes=chance.choice([None, chance.randrange(2**40)]),
            artifact_complete=True,
        )
        for _ in range(200)
    ]
    for n in range(0, 200, 20):
        write(log, entries[n : n + 20])
    expected = []
    for purl in sorted({str(entry.purl) for entry in entries}):
        fetches = sorted(
            (entry for entry in entries if entry.purl == purl), key=lambda e: e.started_at
        )
        size = sum(entry.response_bytes or 0 for entry in fetches)
        expected.append((purl, fetches[0].remote, fetches[0].proxy_user, len(fetches), size))
    assert (
        query("SELECT purl, remote, first_user, fetches, bytes FROM artifact ORDER BY 1")
        == expected
    )
    assert query(
        "SELECT bool_and(first_seen = (SELECT min(started_at) FROM access_log WHERE access_log.purl = artifact.purl)"
        " AND last_seen = (SELECT max(started_at) FROM access_log WHERE access_log.purl = artifact.purl)) FROM artifact"
        if not CLUSTER_DSN
        else "SELECT true"  # Citus has no such subqueries
    ) == [(True,)]


@pytest.mark.parametrize("year", [1, 1969, 9999, 20_000])
def test_first_fetch_is_the_earliest_in_any_year(log: str, query: Query, year: int) -> None:
    for node, user, at in (("a", "first", year), ("b", "second", year + 1)):
        query(
            "SELECT artifact_add(%s, '{p}', '{r}', ARRAY[%s], ARRAY[%s::timestamptz], ARRAY[%s::timestamptz],"
            " '{1}', '{1}')",
            *(node, user, f"{at:04}-01-01", f"{at:04}-01-01"),
        )
    assert query("SELECT first_user, fetches FROM artifact") == [("first", 2)]
    del log


@pytest.mark.slow
def test_days_are_rolled_up_and_pruned(log: str, query: Query, tmp_path: Path) -> None:
    day = timedelta(days=1)
    at = make_entry(1)
    write(log, [fetch(n, _NODES[n % 3]) for n in range(30)])
    with connect(log, Settings().database) as connection:
        assert len(list(roll_up(connection))) > 0
        before = datetime.fromisoformat(at.started_at) + 2 * day
        before = before.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
        (pruned,) = prune(connection, before, tmp_path / "archive")
    assert (pruned.rows, pruned.bytes > 0) == (30, True)
    assert query("SELECT count(*) FROM access_log") == [(0,)]
    assert query("SELECT sum(requests)::int FROM access_log_pruned") == [(30,)]
    assert query("SELECT fetches FROM artifact") == [(30,)]
    restored = call(
        *("--dsn", log, "restore", "--archive", str(tmp_path / "archive")),
        *("--day", at.started_at[:10]),
    )
    assert restored.returncode == 0, restored.stderr
    assert query("SELECT count(*) FROM access_log") == [(30,)]


def test_partitions_that_someone_else_named_are_used(log: str, query: Query) -> None:
    """`create_time_partitions` of Citus calls them access_log_p2023_11_14."""
    query(
        "CREATE TABLE access_log_p2023_11_14 PARTITION OF access_log"
        " FOR VALUES FROM ('2023-11-14 00:00+00') TO ('2023-11-15 00:00+00')"
    )
    write(log, [fetch(1, "proxy-1")])
    assert query("SELECT name FROM access_log_partitions WHERE from_at < '2024-01-01'") == [
        ("access_log_p2023_11_14",)
    ]
    assert query("SELECT count(*) FROM access_log_p2023_11_14") == [(1,)]


def test_proxies_of_earlier_versions_are_refused(log: str, tmp_path: Path) -> None:
    for migration in sorted(MIGRATIONS.glob("00*.sql")):
        (tmp_path / migration.name).write_bytes(migration.read_bytes())
    with (
        connect(log, Settings().database) as connection,
        pytest.raises(SchemaError, match="upgrade artifactapi"),
    ):
        ensure_schema(connection, tmp_path)


@pytest.mark.slow
def test_log_that_an_earlier_version_distributed_is_upgraded(
    dsn: str, query: Query, tmp_path: Path
) -> None:
    """The version before each node had rows of its own in `artifact_by_node` on every server."""
    older = version_before("011_artifact_by_node.sql", tmp_path)
    older.distribute(dsn)
    definition = "SELECT pg_get_viewdef('artifact'::regclass)"
    before = query(definition)
    with connect(dsn, Settings().database) as connection:
        write(dsn, [fetch(1, "proxy-1"), fetch(2, "proxy-2")])  # upgrades it
        assert list(build_missing_indexes(connection)) == []
    write(dsn, [fetch(3, "proxy-1"), fetch(4, "proxy-3")])
    assert query(definition) == before
    assert query("SELECT node, fetches FROM artifact_by_node ORDER BY 1") == [
        ("proxy-1", 2),
        ("proxy-2", 1),
        ("proxy-3", 1),
    ]
    assert query("SELECT first_user, fetches FROM access_log_first_seen") == [("build-42", 4)]
    assert query("SELECT max(number) FROM access_log_migration") == [
        (len(list(MIGRATIONS.glob("*.sql"))) + 1,)
    ]


def test_tables_of_later_migrations_are_on_every_node(
    log: str, query: Query, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for migration in MIGRATIONS.glob("*.sql"):
        (tmp_path / migration.name).write_bytes(migration.read_bytes())
    number = len(list(MIGRATIONS.glob("*.sql"))) + 2
    (tmp_path / f"{number:03}_more.sql").write_text("CREATE TABLE more (id integer PRIMARY KEY)")
    monkeypatch.setattr("exporter.postgres.schema._READER_RELATIONS", ("access_log", "more"))
    with connect(log, Settings().database) as connection:
        ensure_schema(connection, tmp_path)
    assert query(
        "SELECT partmethod::text, repmodel::text FROM pg_dist_partition WHERE logicalrelid = 'more'::regclass"
    ) == [("n", "t")]


@only_stub
def test_parsed_functions_cannot_be_distributed(dsn: str, query: Query) -> None:
    """That is why migration 10 replaces them."""
    with connect(dsn, Settings().database) as connection:
        ensure_schema(connection)
        query(
            "CREATE FUNCTION mine() RETURNS bigint LANGUAGE sql BEGIN ATOMIC SELECT count(*) FROM access_log; END"
        )
        query("CREATE VIEW my_view AS SELECT mine(), path FROM access_log")
        with pytest.raises(psycopg.errors.FeatureNotSupported, match="circular"):
            distribute_schema(connection)


def test_failure_leaves_the_log_as_it_was(dsn: str, query: Query) -> None:
    with connect(dsn, Settings().database) as connection:
        ensure_schema(connection)
    write(dsn, [fetch(1, "proxy-1")])
    query("CREATE FUNCTION mine() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NEW; END $$")
    query("CREATE TRIGGER mine AFTER INSERT ON access_log FOR EACH ROW EXECUTE FUNCTION mine()")
    done = call("--dsn", dsn, "init", "--distribute")
    assert done.returncode == 1
    assert "triggers" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    write(dsn, [fetch(1, "proxy-1"), fetch(2, "proxy-2")])
    assert query("SELECT fetches FROM artifact") == [(2,)]
    assert query(
        "SELECT count(*) FROM pg_dist_partition JOIN pg_class ON pg_class.oid = logicalrelid"
        " WHERE relnamespace = current_schema()::regnamespace"
    ) == [(0,)]
    assert query("SELECT pg_get_viewdef('artifact'::regclass) LIKE '%%json%%'") == [(False,)]


@only_stub
@pytest.mark.usefixtures("as_worker")
def test_new_days_of_a_worker_are_created_on_the_coordinator(
    stub: str, request: pytest.FixtureRequest
) -> None:
    with psycopg.connect(stub, autocommit=True) as connection:
        connection.execute("UPDATE pg_dist_local_group SET groupid = 0")
        log = request.getfixturevalue("log")
        connection.execute("UPDATE pg_dist_local_group SET groupid = 1")
        write(log, [fetch(1, "proxy-1")], [fetch(2, "proxy-1")])
        commands = connection.execute("SELECT command FROM command_on_coordinator").fetchall()
    assert len(commands) == 1
    assert "access_log_ensure_partition('2023-11-14')" in commands[0][0]


@only_stub
@pytest.mark.usefixtures("as_worker")
def test_a_worker_is_told_from_the_coordinator(dsn: str) -> None:
    with (
        connect(dsn, Settings().database) as connection,
        pytest.raises(SchemaError, match="on the coordinator as the owner of its tables"),
    ):
        ensure_schema(connection)


@pytest.mark.slow
@only_stub
def test_what_is_missing_is_said(
    postgres: Postgres, stub: str, dsn: str, request: pytest.FixtureRequest
) -> None:
    del request
    done = call("--dsn", postgres.dsn(), "init", "--distribute")
    assert "has no extension citus" in done.stderr
    with psycopg.connect(stub, autocommit=True) as connection:
        assert call("--dsn", dsn, "init").returncode == 0
        connection.execute("UPDATE pg_dist_node SET groupid = 2 WHERE groupid = 0")
        done = call("--dsn", dsn, "init", "--distribute")
        connection.execute("UPDATE pg_dist_node SET groupid = 0 WHERE groupid = 2")
        assert "citus_set_coordinator_host" in done.stderr
        connection.execute("UPDATE pg_dist_local_group SET groupid = 1")
        done = call("--dsn", dsn, "init", "--distribute")
        connection.execute("UPDATE pg_dist_local_group SET groupid = 0")
        assert "connect to its coordinator" in done.stderr


@only_cluster
def test_proxies_write_through_any_node(log: str, query: Query) -> None:
    dsns = [log, *worker_dsns(log)]
    assert len(dsns) > 1
    for number, dsn in enumerate(dsns):
        node = f"proxy-{number}"
        batch = [fetch(1000 * number + n, node) for n in range(40)]
        other_day = [fetch(86_400_000 * (number + 1), node)]
        write(dsn, batch, batch, batch[20:] + other_day, node=node)
    expected = 41 * len(dsns)
    assert query("SELECT count(*), count(DISTINCT flow_id) FROM access_log") == [
        (expected, expected)
    ]
    assert query("SELECT fetches FROM artifact") == [(expected,)]
    assert query("SELECT sum(rows)::int FROM access_log_run_day") == [(expected,)]
    for dsn in dsns:
        done = call("--dsn", dsn, "audit")
        assert "Complete" in done.stdout, done.stdout + done.stderr


@only_cluster
def test_a_proxy_that_is_connected_to_its_shard_needs_no_other_node(log: str) -> None:
    """Through any other node, Citus commits in two phases."""
    nodes = [log, *worker_dsns(log)]
    alone = []
    for number, dsn in enumerate(nodes):
        writer = database(dsn)
        batches = [[fetch(1000 * number + n, "proxy-1")] for n in range(3)]
        assert writer.write(batches[0]) == []
        before = two_phase_commits(nodes)
        for batch in batches[1:]:
            assert writer.write(batch) == []
        writer.close()
        if two_phase_commits(nodes) <= before:
            alone.append(dsn)
    assert len(alone) == 1


def two_phase_commits(nodes: list[str]) -> set[Any]:
    """Each leaves a row for its recovery on the node that began it, for some time."""
    found = set()
    for node in nodes:
        with psycopg.connect(node, autocommit=True) as connection:
            found |= set(connection.execute("SELECT gid FROM pg_dist_transaction").fetchall())
    return found
