"""The ledger of runs: its counts equal the rows of the table, whatever happens on the way."""

from __future__ import annotations

import uuid
from collections import Counter
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings, strategies
from msgspec.structs import replace

from exporter import Exporter, Settings
from exporter.postgres.connection import connect
from exporter.postgres.schema import ensure_schema, grants, schema_name
from exporter.run import Run
from exporter.settings import BatchSettings, BufferSettings, DatabaseSettings, ShutdownSettings
from exporter.write import ledger as ledger_module
from exporter.write.database import Database, DatabaseUnavailable
from exporter.write.gaps import Gap
from exporter.write.ledger import UNKNOWN_RUN, RunCounts, RunEnd, RunLedger
from tests.support.access_log import temporary_schema
from tests.support.citus import CLUSTER_DSN, NEEDS_TRIGGERS
from tests.support.postgres import free_port
from tests.support.relay import Relay
from tests.support.samples import make_entry, make_exchange
from tests.support.wait import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from exporter import AccessLogEntry
    from tests.support.postgres import Postgres

pytestmark = pytest.mark.slow

Query = Any

_IN_TABLE = """
    SELECT coalesce(node, ''), (started_at AT TIME ZONE 'UTC')::date::text, count(*) FROM access_log
    GROUP BY 1, 2 ORDER BY 1, 2
"""
_IN_LEDGER = """
    SELECT node, day::text, sum(rows)::bigint FROM access_log_run_day GROUP BY 1, 2 HAVING sum(rows) > 0
    ORDER BY 1, 2
"""
_GAPS = """
    SELECT coalesce(run_id, %s), node, (from_at AT TIME ZONE 'UTC')::date::text, sum(entries)::bigint
    FROM access_log_gap GROUP BY 1, 2, 3 ORDER BY 1, 2, 3
"""
_GAPS_IN_LEDGER = """
    SELECT origin_run_id, node, day::text, sum(lost)::bigint FROM access_log_run_day GROUP BY 1, 2, 3
    HAVING sum(lost) > 0 ORDER BY 1, 2, 3
"""
_RUNS = """
    SELECT node, end_reason, seen, written, dropped, rejected, waiting, spooled FROM access_log_run
    ORDER BY started_at, node
"""
_DAY = 86_400_000  # of `make_entry` numbers


class Counts:
    """Counters of a process that a test sets."""

    def __init__(self) -> None:
        self.now = RunCounts(0, 0, 0, 0, 0)

    def __call__(self) -> RunCounts:
        """Return what the test has set."""
        return self.now


def database_with_ledger(dsn: str, node: str = "test") -> tuple[Database, RunLedger, Counts]:
    counts = Counts()
    ledger = RunLedger(Run.start(node), counts)
    return Database(DatabaseSettings(dsn=dsn), ledger=ledger), ledger, counts


def assert_ledger_equals_table(query: Query) -> None:
    assert query(_IN_LEDGER) == query(_IN_TABLE)
    assert query(_GAPS_IN_LEDGER) == query(_GAPS, UNKNOWN_RUN)


# --- the counting


_ENTRIES = strategies.builds(
    lambda number, day, node, bad: make_entry(
        number + day * _DAY, node=node, **({"port": 2**40} if bad else {})
    ),
    number=strategies.integers(0, 30),
    day=strategies.integers(0, 2),
    # On a cluster, the node is part of the key.
    node=strategies.sampled_from(["a", "b'\\", "c" if CLUSTER_DSN else None]),
    bad=strategies.sampled_from([False] * 9 + [True]),
)
_GAP_IDS = [f"00000000-0000-4000-8000-00000000000{n}" for n in range(5)]
_ORIGINS = [None, "00000000-0000-4000-8000-0000000000aa", UNKNOWN_RUN]
_SOME_GAPS = strategies.builds(
    lambda gap_id, day, origin: Gap(
        gap_id, "a", f"2024-01-0{day}", f"2024-01-0{day}", "rejected", 3, origin
    ),
    gap_id=strategies.sampled_from(_GAP_IDS),
    day=strategies.integers(1, 3),
    origin=strategies.sampled_from(_ORIGINS),
)
_OPERATIONS = strategies.lists(
    strategies.one_of(
        strategies.tuples(
            strategies.just("write"),
            strategies.lists(_ENTRIES, min_size=1, max_size=40),
            strategies.sampled_from(_ORIGINS),
        ),
        strategies.tuples(
            strategies.just("gaps"), strategies.lists(_SOME_GAPS, min_size=1), strategies.none()
        ),
        strategies.tuples(strategies.just("report"), strategies.just([]), strategies.none()),
        strategies.tuples(strategies.just("reconnect"), strategies.just([]), strategies.none()),
    ),
    max_size=6,
)


@pytest.fixture(scope="module")
def module_log(postgres: Postgres) -> Iterator[tuple[Database, psycopg.Connection[Any]]]:
    """One log for all examples of a property, because creating it takes longer than an example."""
    with temporary_schema(postgres) as dsn:
        database, _, _ = database_with_ledger(dsn)
        database.open()
        with psycopg.connect(dsn, autocommit=True) as connection:
            yield database, connection
        database.close()


@pytest.mark.slow
@settings(
    max_examples=4 if CLUSTER_DSN else 40,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(operations=_OPERATIONS)
def test_counts_equal_the_rows_after_any_writes(
    module_log: tuple[Database, psycopg.Connection[Any]],
    operations: list[tuple[str, list[Any], str | None]],
) -> None:
    """Rows that were there before, bad rows, several days and nodes, and gaps sent twice."""
    database, connection = module_log
    connection.execute("TRUNCATE access_log, access_log_gap, access_log_run_day")

    def query(sql: str, *values: object) -> list[tuple[Any, ...]]:
        return connection.execute(sql.encode(), values or None).fetchall()

    for kind, items, origin in operations:
        if kind == "write":
            _write(database, items, origin)
        elif kind == "gaps":
            database.write_gaps(items)
        elif kind == "report":
            database.report_run()
        else:
            database.disconnect()
        assert_ledger_equals_table(query)


def _write(database: Database, entries: Sequence[AccessLogEntry], origin: str | None) -> None:
    try:
        rejections = database.write(entries, origin)
    except DatabaseUnavailable as e:
        assert e.refused  # noqa: PT017 - every row of the batch was bad, so the server is to blame
        return
    assert all(rejection.entry.port == 2**40 for rejection in rejections)


@pytest.mark.parametrize("direction", ["to_server", "to_client"])
def test_batch_whose_answer_was_lost_counts_once(
    dsn: str, query: Query, postgres: Postgres, direction: str
) -> None:
    """Break the connection at each message of a write, then send the same batch again."""
    with Relay(("127.0.0.1", postgres.port), postgres=True) as relay:
        relayed = dsn.replace(f"port={postgres.port}", f"port={relay.address[1]}")
        database, _, _ = database_with_ledger(relayed)
        database.open()
        for message in range(12):
            batch = [make_entry(message * 100 + n) for n in range(10)]
            relay.cut_at_message(direction, message)  # type: ignore[arg-type]
            for _ in range(5):
                try:
                    assert database.write(batch) == []
                    break
                except DatabaseUnavailable:
                    relay.mend()
            relay.mend()
            assert_ledger_equals_table(query)
        database.close()
    assert query(_IN_TABLE)[0][2] == 120


@NEEDS_TRIGGERS
def test_rows_that_a_trigger_discards_are_not_counted(dsn: str, query: Query) -> None:
    database, _, _ = database_with_ledger(dsn)
    database.open()
    query(
        "CREATE FUNCTION discard() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN RETURN CASE WHEN NEW.port = 1 THEN NULL ELSE NEW END; END $$;"
        " CREATE TRIGGER discard BEFORE INSERT ON access_log FOR EACH ROW EXECUTE FUNCTION discard()"
    )
    database.disconnect()
    batch = [make_entry(n, port=1 if n == 5 else 443) for n in range(20)]
    assert [it.entry for it in database.write(batch)] == [batch[5]]
    assert_ledger_equals_table(query)
    database.close()


# --- the run


def test_run_is_recorded_from_its_start_to_its_stop(dsn: str, query: Query) -> None:
    exporter = Exporter(
        replace(Settings(node="gate-1").with_dsn(dsn), batch=BatchSettings(max_seconds=0.1))
    )
    eventually(lambda: _runs(query) == [("gate-1", None, 0, 0, 0, 0, 0, 0)])
    for number in range(300):
        exporter.log_access(make_exchange(number))
    eventually(lambda: exporter.status()["written"] == 300)
    assert exporter.stop()
    assert query(_RUNS) == [("gate-1", "stopped", 300, 300, 0, 0, 0, 0)]
    assert_ledger_equals_table(query)
    assert query(
        "SELECT version IS NOT NULL, started_at <= last_seen_at, ended_at = last_seen_at,"
        " ended_at > now() - interval '1 minute' FROM access_log_run"
    ) == [(True, True, True, True)]


def test_lost_requests_are_counted_with_their_gaps(dsn: str, query: Query) -> None:
    bounds = {"buffer": BufferSettings(max_entries=10), "batch": BatchSettings(max_seconds=3600)}
    exporter = Exporter(replace(Settings(node="test").with_dsn(dsn), **bounds))
    eventually(lambda: _runs(query))
    for number in range(25):
        exporter.log_access(make_exchange(number))
    exporter.stop()
    assert query(_RUNS) == [("test", "stopped", 25, 10, 15, 0, 0, 0)]
    assert_ledger_equals_table(query)


def test_idle_proxy_keeps_reporting(
    dsn: str, query: Query, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger_module, "_IDLE_SECONDS", 0.05)
    exporter = Exporter(
        replace(Settings(node="test").with_dsn(dsn), batch=BatchSettings(max_seconds=0.05))
    )
    seen_at: set[object] = set()

    def has_reported_often() -> bool:
        seen_at.update(_values(query, "last_seen_at"))
        return len(seen_at) > 3

    eventually(has_reported_often)
    assert exporter.stop()


def test_long_wait_for_a_batch_neither_delays_reports_nor_is_cut_short_by_them(
    dsn: str, query: Query, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger_module, "_IDLE_SECONDS", 0.05)
    exporter = Exporter(
        replace(Settings(node="test").with_dsn(dsn), batch=BatchSettings(max_seconds=1.5))
    )
    eventually(lambda: _values(query, "last_seen_at"))
    exporter.log_access(make_exchange(1))
    waited_at: set[object] = set()

    def is_written() -> bool:
        written, waiting, seen_at = query(
            "SELECT written, waiting, last_seen_at FROM access_log_run"
        )[0]
        if waiting:
            waited_at.add(seen_at)
        return bool(written)

    eventually(is_written, timeout=15)
    assert len(waited_at) > 3
    assert exporter.stop()


def test_busy_proxy_reports_its_rate(
    dsn: str, query: Query, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger_module, "_RATE_SECONDS", 0.1)
    monkeypatch.setattr(ledger_module, "_IDLE_SECONDS", 0.05)
    exporter = Exporter(
        replace(Settings(node="test").with_dsn(dsn), batch=BatchSettings(max_seconds=0.05))
    )
    numbers = iter(range(1_000_000))

    def has_rate() -> bool:
        exporter.log_access(make_exchange(next(numbers)))
        return any(rate and 0 < rate < 100_000 for rate in _values(query, "rows_per_s"))

    eventually(has_rate)
    assert exporter.stop()


def test_stop_without_a_database_is_reported_by_the_next_run(
    dsn: str, query: Query, postgres: Postgres
) -> None:
    """Its rows wait on disk, and count for the run that saw them."""
    with Relay(("127.0.0.1", postgres.port), postgres=True) as relay:
        relayed = dsn.replace(f"port={postgres.port}", f"port={relay.address[1]}")
        quick = replace(
            Settings(node="first").with_dsn(relayed), shutdown=ShutdownSettings(drain_seconds=0.4)
        )
        exporter = Exporter(quick)
        eventually(lambda: _runs(query))
        relay.blackhole()
        for number in range(7):
            exporter.log_access(make_exchange(number))
        exporter.stop()
        assert exporter.status()["spooled"] == 7
        assert query(_RUNS) == [("first", None, 0, 0, 0, 0, 0, 0)]
        relay.mend()
        (first,) = _values(query, "run_id")
        exporter = Exporter(replace(quick, node="second"))
        eventually(lambda: exporter.status()["recovered"] == 7)
        assert exporter.stop()
    assert query(_RUNS) == [
        ("first", "stopped", 7, 0, 0, 0, 0, 7),
        ("second", "stopped", 0, 0, 0, 0, 0, 0),
    ]
    assert query("SELECT run_id <> origin_run_id, origin_run_id, rows FROM access_log_run_day") == [
        (True, first, 7)
    ]
    assert_ledger_equals_table(query)


def test_another_database_gets_a_run_of_its_own(dsn: str, query: Query, postgres: Postgres) -> None:
    fast = BatchSettings(max_seconds=0.05)
    with temporary_schema(postgres) as other:
        exporter = Exporter(replace(Settings(node="test").with_dsn(dsn), batch=fast))
        exporter.log_access(make_exchange(1))
        eventually(lambda: exporter.status()["written"] == 1)
        exporter.reconfigure(replace(Settings(node="test").with_dsn(other), batch=fast))
        eventually(lambda: _has_ended(query))
        exporter.log_access(make_exchange(2))
        exporter.log_access(make_exchange(3))
        eventually(lambda: exporter.status()["written"] == 3)
        assert exporter.stop()
        with psycopg.connect(other) as connection:
            runs = connection.execute(_RUNS).fetchall()
    assert query(_RUNS) == [("test", "stopped", 1, 1, 0, 0, 0, 0)]
    assert runs == [("test", "stopped", 2, 2, 0, 0, 0, 0)]


def test_renamed_proxy_begins_another_run(dsn: str, query: Query) -> None:
    fast = BatchSettings(max_seconds=0.05)
    exporter = Exporter(replace(Settings(node="old").with_dsn(dsn), batch=fast))
    exporter.log_access(make_exchange(1))
    eventually(lambda: exporter.status()["written"] == 1)
    exporter.reconfigure(replace(Settings(node="new").with_dsn(dsn), batch=fast))
    eventually(lambda: "stopped" in _values(query, "end_reason"))
    exporter.log_access(make_exchange(2))
    exporter.log_access(make_exchange(3))
    assert exporter.stop()
    assert sorted(query(_RUNS)) == [
        ("new", "stopped", 2, 2, 0, 0, 0, 0),
        ("old", "stopped", 1, 1, 0, 0, 0, 0),
    ]
    assert query(_IN_LEDGER) == [("new", "2023-11-14", 2), ("old", "2023-11-14", 1)]


def test_end_of_a_killed_run_is_reported_with_what_its_journal_says(dsn: str, query: Query) -> None:
    killed = Run.start("killed")
    database, _, _ = database_with_ledger(dsn, "recovers")
    end = RunEnd(killed, RunCounts(5, 2, 0, 0, 0), "killed", killed.started_at + 60)
    database.report_end(end)
    database.report_end(end)
    database.close()
    assert ("killed", "killed", 7, 5, 2, 0, 0, 0) in query(_RUNS)


def test_rows_wait_while_their_run_cannot_be_counted(dsn: str, query: Query) -> None:
    database, _, _ = database_with_ledger(dsn)
    assert database.write([make_entry(1)]) == []
    with psycopg.connect(dsn, autocommit=True) as connection:
        (function,) = connection.execute(
            "SELECT pg_get_functiondef('access_log_run_record'::regproc)"
        ).fetchone() or ("",)
        broken = function.replace(
            "\nBEGIN\n", "\nBEGIN\nIF origins[1] <> run THEN RAISE EXCEPTION 'broken'; END IF;\n", 1
        )
        connection.execute(broken.encode())
        with pytest.raises(DatabaseUnavailable, match="broken"):
            database.write([make_entry(2), make_entry(3)], origin=UNKNOWN_RUN)
        assert database.write([make_entry(4)]) == []
        connection.execute(function.encode())
    assert database.write([make_entry(2), make_entry(3)], origin=UNKNOWN_RUN) == []
    database.close()
    assert query("SELECT count(*) FROM access_log") == [(4,)]
    assert_ledger_equals_table(query)


# --- who may record what


@pytest.fixture
def roles(dsn: str) -> Iterator[tuple[str, str]]:
    """Two proxies with roles of their own, each with the rights that `artifactapi init` prints."""
    with connect(dsn, Settings().database) as connection:
        ensure_schema(connection)
        schema = schema_name(connection)
        names = f"{schema}_one", f"{schema}_two"
        for name in names:
            connection.execute(f"CREATE ROLE {name} LOGIN".encode())
            connection.execute(
                grants(schema, name, name, is_distributed=bool(CLUSTER_DSN)).encode()
            )
            connection.execute(
                f"REVOKE SELECT ON ALL TABLES IN SCHEMA {schema} FROM {name}".encode()
            )
            connection.execute(f"GRANT SELECT ON access_log_schema TO {name}".encode())
        try:
            one, two = (dsn.replace("user=postgres", f"user={name}") for name in names)
            yield one, two
        finally:
            for name in names:
                connection.execute(f"DROP OWNED BY {name}; DROP ROLE {name}".encode())


def test_role_that_may_only_insert_keeps_its_run_and_no_other(
    roles: tuple[str, str], query: Query
) -> None:
    one, two = roles
    database, ledger, counts = database_with_ledger(one)
    counts.now = RunCounts(0, 0, 0, 3, 0)
    assert database.write([make_entry(n) for n in range(3)]) == []
    counts.now = RunCounts(3, 0, 0, 0, 0)
    assert query(_RUNS) == [("test", None, 3, 3, 0, 0, 0, 0)]
    with psycopg.connect(two, autocommit=True) as connection:
        assert connection.execute(ledger.report("stopped")).fetchone() == (False,)
        for statement in (
            "SELECT * FROM access_log_run",
            "UPDATE access_log_run SET seen = 0",
            "DELETE FROM access_log_run",
            "UPDATE access_log_run_day SET rows = 0",
            "INSERT INTO access_log_run_day SELECT gen_random_uuid(), gen_random_uuid(), 'x', now(), 1, 0",
        ):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                connection.execute(statement.encode())
    assert query(_RUNS) == [("test", None, 3, 3, 0, 0, 0, 0)]
    database.close()
    assert_ledger_equals_table(query)


@pytest.mark.not_on_citus("a node does not see the runs of the others; see docs/citus.md")
def test_role_cannot_add_rows_of_another_node_to_a_run_of_another_role(
    roles: tuple[str, str], query: Query
) -> None:
    one, two = roles
    database, ledger, _ = database_with_ledger(one)
    assert database.write([make_entry(1)]) == []
    with psycopg.connect(two, autocommit=True) as connection:
        for call in ledger.record_rows({("elsewhere", "2023-11-14"): 5}).split(b"; "):
            assert connection.execute(call).fetchone() == (False,)
    database.close()
    assert_ledger_equals_table(query)


def test_counts_never_decrease(roles: tuple[str, str], query: Query) -> None:
    database, ledger, counts = database_with_ledger(roles[0])
    counts.now = RunCounts(0, 0, 0, 3, 0)
    assert database.write([make_entry(n) for n in range(3)]) == []
    counts.now = RunCounts(0, 0, 0, 0, 0)
    with psycopg.connect(roles[0], autocommit=True) as connection:
        connection.execute(ledger.record_rows({("test", "2023-11-14"): -3}))
    database.close()
    assert query("SELECT seen, written FROM access_log_run") == [(3, 3)]
    assert_ledger_equals_table(query)


def test_process_that_continues_as_another_role_continues_as_another_run(
    roles: tuple[str, str], query: Query
) -> None:
    database, ledger, counts = database_with_ledger(roles[0])
    database.open()
    run = ledger.run
    counts.now = RunCounts(0, 0, 0, 1, 0)
    database.reconfigure(DatabaseSettings(dsn=roles[1]))
    assert database.write([make_entry(1)]) == []
    database.close()
    assert ledger.run.run_id != run.run_id
    assert sorted(query("SELECT owner::text, written FROM access_log_run")) == [
        (roles[0].partition("user=")[2].split()[0], 0),
        (roles[1].partition("user=")[2].split()[0], 1),
    ]
    assert_ledger_equals_table(query)


def test_role_without_the_grant_writes_rows_and_warns_once(
    roles: tuple[str, str], query: Query, caplog: pytest.LogCaptureFixture
) -> None:
    role = roles[0].partition("user=")[2].split()[0]
    query(f"REVOKE EXECUTE ON FUNCTION access_log_run_record FROM {role}")
    database, _, _ = database_with_ledger(roles[0])
    assert database.write([make_entry(1)]) == []
    database.disconnect()
    assert database.write([make_entry(2)]) == []
    database.write_gaps([Gap(str(uuid.uuid4()), "n", "2026-01-01", "2026-01-01", "rejected", 1)])
    database.close()
    assert query("SELECT count(*) FROM access_log") == [(2,)]
    assert query("SELECT count(*) FROM access_log_run") == [(0,)]
    assert Counter("not recorded in access_log_run" in m for m in caplog.messages)[True] == 1


@pytest.mark.not_on_citus("the log on the cluster is there already, and distributed")
def test_upgrade_gives_the_existing_roles_the_new_rights(
    dsn: str, query: Query, tmp_path: Any
) -> None:
    with connect(dsn, Settings().database) as connection:
        ensure_schema(connection, tmp_path)  # version 1
        schema = schema_name(connection)
        proxy, reader = f"{schema}_proxy", f"{schema}_Reader-1"
        connection.execute(f'CREATE ROLE {proxy}; CREATE ROLE "{reader}"'.encode())
        try:
            connection.execute(
                f"GRANT EXECUTE ON FUNCTION artifact_record TO {proxy};"
                f' GRANT SELECT ON access_log_gap TO "{reader}"'.encode()
            )
            ensure_schema(connection)
            assert query(
                "SELECT has_function_privilege(%s, 'access_log_run_record'::regproc, 'EXECUTE'),"
                " has_function_privilege(%s, 'access_log_run_record'::regproc, 'EXECUTE'),"
                " has_table_privilege(%s, 'access_log_nodes', 'SELECT'),"
                " has_table_privilege(%s, 'access_log_run', 'SELECT')",
                *(proxy, reader, reader, proxy),
            ) == [(True, False, True, False)]
        finally:
            connection.execute(
                f'DROP OWNED BY {proxy}, "{reader}"; DROP ROLE {proxy}, "{reader}"'.encode()
            )


def test_unreachable_database_is_no_error(query: Query) -> None:
    del query
    database, _, _ = database_with_ledger(f"host=127.0.0.1 port={free_port()}")
    with pytest.raises(DatabaseUnavailable):
        database.report_run("stopped")
    database.close()


def _runs(query: Query) -> list[tuple[Any, ...]]:
    try:
        found: list[tuple[Any, ...]] = query(_RUNS)
    except psycopg.errors.UndefinedTable:
        return []
    return found


def _has_ended(query: Query) -> bool:
    return _values(query, "end_reason") == ["stopped"]


def _values(query: Query, column: str) -> list[Any]:
    try:
        return [value for (value,) in query(f"SELECT {column} FROM access_log_run")]
    except psycopg.errors.UndefinedTable:
        return []
