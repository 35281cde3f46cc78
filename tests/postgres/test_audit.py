"""`artifactapi audit` and `artifactapi nodes`: what real proxies' writers leave, and what was done to it."""

from __future__ import annotations

import json
import threading
import uuid
from datetime import UTC, date, datetime, timedelta
from typing import TYPE_CHECKING, Any

import psycopg
import pytest
from msgspec.structs import replace

from exporter import Exporter, Settings, redirect_spool
from exporter.postgres.connection import connect
from exporter.postgres.schema import ensure_schema, grants, schema_name
from exporter.read.audit import Audit, audit
from exporter.read.ledger import Days, collect
from exporter.read.nodes import find_nodes, nodes_summary
from exporter.read.session import read_only
from exporter.retention.prune import prune
from exporter.retention.restore import restore_day
from exporter.retention.rollups import roll_up
from exporter.run import Run
from exporter.settings import BatchSettings, BufferSettings, DatabaseSettings, ShutdownSettings
from exporter.write.database import Database
from exporter.write.gaps import Gap
from exporter.write.ledger import RunCounts, RunEnd, RunLedger
from tests.support.access_log import temporary_schema
from tests.support.citus import CLUSTER_DSN
from tests.support.command import call, write
from tests.support.postgres import free_port
from tests.support.samples import make_entry, make_exchange
from tests.support.terminal import on_terminal
from tests.support.wait import eventually

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from tests.support.postgres import Postgres

pytestmark = pytest.mark.slow

Query = Any

_DAY_SECONDS = 86_400.0
_FAST = BatchSettings(max_seconds=0.05)


def log(dsn: str, numbers: Iterable[int], node: str = "gate-1", **changes: Any) -> None:
    """Run a proxy's log from its start to its stop."""
    exporter = Exporter(replace(Settings(node=node).with_dsn(dsn), batch=_FAST))
    for number in numbers:
        assert exporter.log_access(make_exchange(number, **changes))
    assert exporter.stop()


def audited(
    dsn: str,
    since: datetime | None = None,
    until: datetime | None = None,
    archive: Path | None = None,
) -> Audit:
    days = Days.covering(since, until)
    with connect(dsn, DatabaseSettings()) as connection:
        evidence = collect(connection, days, lambda _done, _total: None, archive)
    return audit(evidence, days, (since, until))


def counts(found: Audit) -> dict[str, int]:
    """The fields of all nodes that are not 0."""
    names = (
        "pruned",
        "seen",
        "rows",
        "missing_rows",
        "missing_gaps",
        "uncounted_rows",
        "undelivered",
        "waiting",
    )
    sums = dict.fromkeys(names, 0)
    for node in found.nodes:
        for name in names:
            value = getattr(node, name)
            sums[name] += value if isinstance(value, int) else sum(it.count for it in value)
    return {name: value for name, value in sums.items() if value}


# --- complete


def test_ordinary_log_is_complete(any_dsn: str) -> None:
    log(any_dsn, range(300))
    found = audited(any_dsn)
    assert (found.verdict, counts(found)) == ("complete", {"seen": 300, "rows": 300})
    done = call("--dsn", any_dsn, "audit")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "Complete: in the whole log, each of the 300 requests that the proxies saw has its row.",
        "gate-1: 300 requests seen; 300 rows found; no gaps",
    ]


def test_two_proxies_of_one_name_are_complete_together(dsn: str) -> None:
    exporters = [
        Exporter(replace(Settings(node="gate").with_dsn(dsn), batch=_FAST)) for _ in range(2)
    ]
    for number in range(100):
        exporters[number % 2].log_access(make_exchange(number))
    assert all(exporter.stop() for exporter in exporters)
    found = audited(dsn)
    assert (found.verdict, counts(found)) == ("complete", {"seen": 100, "rows": 100})
    assert [node.node for node in found.nodes] == ["gate"]


@pytest.mark.not_on_citus("its key includes the node, so the rows of another node are other rows")
def test_import_of_old_flows_twice_is_complete(dsn: str) -> None:
    log(dsn, range(50))
    log(dsn, range(70), node="gate-2")
    found = audited(dsn)
    assert (found.verdict, counts(found)) == ("complete", {"seen": 70, "rows": 70})


@pytest.mark.parametrize("step_days", [-400.0, 2.0])
def test_clock_that_jumps_is_no_hole(dsn: str, step_days: float) -> None:
    exporter = Exporter(replace(Settings(node="gate-1").with_dsn(dsn), batch=_FAST))
    now = datetime.now(UTC).timestamp()
    for number in range(20):
        step = step_days * _DAY_SECONDS if number % 2 else 0
        exporter.log_access(make_exchange(number, started_at=now + step))
    assert exporter.stop()
    found = audited(dsn)
    assert (found.verdict, counts(found)) == ("complete", {"seen": 20, "rows": 20})
    day = datetime.fromtimestamp(now + step_days * _DAY_SECONDS, UTC)
    found = audited(dsn, day, day + timedelta(seconds=1))
    assert (found.verdict, counts(found)) == ("complete", {"seen": 10, "rows": 10})


def test_running_proxy_is_complete_up_to_now(dsn: str) -> None:
    exporter = Exporter(replace(Settings(node="gate-1").with_dsn(dsn), batch=_FAST))
    for number in range(10):
        exporter.log_access(make_exchange(number))
    eventually(lambda: exporter.status()["written"] == 10)
    assert audited(dsn).verdict == "complete"
    assert exporter.stop()


def test_spool_is_complete_when_another_proxy_has_delivered_it(dsn: str) -> None:
    _stop_during_outage(dsn, requests=7)
    # The run could not report its stop.
    assert audited(dsn).verdict != "incomplete"
    log(dsn, range(100, 103), node="gate-2")
    found = audited(dsn)
    assert (found.verdict, counts(found)) == ("complete", {"seen": 10, "rows": 10})


def test_spool_delivered_to_another_database_is_a_hole_in_the_first(
    dsn: str, postgres: Postgres
) -> None:
    _stop_during_outage(dsn, requests=7, report_stop=True)
    with temporary_schema(postgres) as other:
        assert redirect_spool(Settings().with_dsn(other)) == 1
        log(other, range(100, 103), node="gate-2")
        found = audited(other)
        assert (found.verdict, counts(found)) == ("complete", {"seen": 10, "rows": 10})
    found = audited(dsn)
    assert (found.verdict, counts(found)) == ("incomplete", {"seen": 7, "undelivered": 7})


def _stop_during_outage(dsn: str, requests: int, *, report_stop: bool = False) -> None:
    """Leave rows in the spool for the database of `dsn`, as a proxy that stops during an outage does."""
    quick = replace(
        Settings(node="gate-1").with_dsn(dsn), shutdown=ShutdownSettings(drain_seconds=0.4)
    )
    exporter = Exporter(quick)
    eventually(lambda: _has_run(dsn))
    # A lock stops the writer as an unreachable server would.
    with psycopg.connect(dsn, autocommit=True) as blocker, blocker.transaction():
        blocker.execute("LOCK TABLE access_log, access_log_run IN ACCESS EXCLUSIVE MODE")
        for number in range(requests):
            exporter.log_access(make_exchange(number))
        exporter.stop()
    assert exporter.status()["spooled"] == requests
    if report_stop:
        run = Run.start("reporter")
        database = Database(
            DatabaseSettings(dsn=dsn), ledger=RunLedger(run, lambda: RunCounts(0, 0, 0, 0, 0))
        )
        with psycopg.connect(dsn, autocommit=True) as connection:
            row = connection.execute("SELECT run_id::text FROM access_log_run").fetchone()
        assert row
        end = RunEnd(
            replace(run, run_id=row[0], node="gate-1"),
            RunCounts(0, 0, 0, 0, requests),
            "stopped",
            run.started_at,
        )
        database.report_end(end)
        database.close()


def _has_run(dsn: str) -> bool:
    try:
        with psycopg.connect(dsn) as connection:
            return bool(connection.execute("SELECT 1 FROM access_log_run").fetchall())
    except psycopg.errors.UndefinedTable:
        return False


def test_pruned_days_are_no_holes(dsn: str, query: Query) -> None:
    log(dsn, range(30))
    log(dsn, range(30, 35), started_at=1_700_000_000.0 + 3 * _DAY_SECONDS)
    with connect(dsn, DatabaseSettings()) as connection:
        for _ in roll_up(connection):
            pass
        assert [it.rows for it in prune(connection, datetime(2023, 11, 16, tzinfo=UTC), None)] == [
            30
        ]
    found = audited(dsn)
    assert (found.verdict, counts(found)) == ("complete", {"seen": 35, "rows": 5, "pruned": 30})
    # Rows that arrive later, and one that someone deletes.
    log(dsn, range(40, 43))
    assert audited(dsn).verdict == "complete"
    query("DELETE FROM access_log WHERE flow_id = %s", make_exchange(41).flow_id)
    assert counts(audited(dsn))["missing_rows"] == 1


def test_archived_days_are_counted_in_their_files(dsn: str, query: Query, tmp_path: Path) -> None:
    log(dsn, range(30))
    log(dsn, range(30, 35), started_at=1_700_000_000.0 + 3 * _DAY_SECONDS)
    with connect(dsn, DatabaseSettings()) as connection:
        list(prune(connection, datetime(2023, 11, 16, tzinfo=UTC), tmp_path))
        rows = {"seen": 35, "rows": 35}
        assert counts(audited(dsn, archive=tmp_path)) == rows
        restore_day(connection, tmp_path, date(2023, 11, 14))  # the rows are in both now
    assert counts(audited(dsn, archive=tmp_path)) == rows
    query("DELETE FROM access_log WHERE flow_id = %s", make_exchange(7).flow_id)
    assert counts(audited(dsn, archive=tmp_path)) == rows
    query("DELETE FROM access_log WHERE flow_id = %s", make_exchange(31).flow_id)
    assert counts(audited(dsn, archive=tmp_path)) == {"seen": 35, "rows": 34, "missing_rows": 1}
    (file,) = tmp_path.glob("day=*/*.parquet")
    file.write_bytes(file.read_bytes()[:-100])
    done = call("--dsn", dsn, "audit", "--archive", str(tmp_path))
    assert (done.returncode, f"{file} is damaged" in done.stderr) == (3, True)


def test_pruned_rows_must_be_in_the_archive_if_one_is_named(dsn: str, tmp_path: Path) -> None:
    log(dsn, range(30))
    archive = tmp_path / "archive"
    with connect(dsn, DatabaseSettings()) as connection:
        for _ in roll_up(connection):
            pass
        list(prune(connection, datetime(2023, 11, 16, tzinfo=UTC), archive))
    assert audited(dsn).verdict == audited(dsn, archive=archive).verdict == "complete"
    (file,) = archive.rglob("*.parquet")
    file.unlink()
    assert audited(dsn).verdict == "complete"
    done = call("--dsn", dsn, "audit", "--archive", str(archive))
    assert done.returncode == 1
    assert "30 rows that were pruned are missing from the archive" in done.stdout


@pytest.mark.slow
def test_audit_that_takes_seconds_shows_a_progress_bar(dsn: str) -> None:
    log(dsn, range(3))
    # A lock makes the count take long.
    with psycopg.connect(dsn) as blocker:
        blocker.execute("LOCK TABLE access_log IN ACCESS EXCLUSIVE MODE")
        release = threading.Timer(6.0, blocker.rollback)
        release.start()
        shown = on_terminal(120, "--dsn", dsn, "audit")
        release.join()
    assert "counting rows" in shown
    assert "Complete: " in shown


# --- holes


def test_deleted_row_is_found(dsn: str, query: Query) -> None:
    log(dsn, range(30))
    query("DELETE FROM access_log WHERE flow_id = %s", make_exchange(7).flow_id)
    found = audited(dsn)
    assert (found.verdict, counts(found)) == (
        "incomplete",
        {"seen": 30, "rows": 29, "missing_rows": 1},
    )
    done = call("--dsn", dsn, "audit")
    assert done.returncode == 1
    assert done.stdout.splitlines() == [
        "Not complete: in the whole log, 1 row that was written is missing from the table.",
        "gate-1: 30 requests seen; 29 rows found; no gaps; 1 row missing (2023-11-14 1)",
    ]


def test_dropped_partition_is_found(dsn: str, query: Query) -> None:
    log(dsn, range(30))
    log(dsn, range(30, 35), started_at=1_700_000_000.0 + 3 * _DAY_SECONDS)
    query("DROP TABLE access_log_20231117")
    found = audited(dsn)
    (node,) = found.nodes
    assert found.verdict == "incomplete"
    assert [(str(it.day), it.count) for it in node.missing_rows] == [("2023-11-17", 5)]


def test_gaps_are_holes_and_a_deleted_gap_is_found(dsn: str, query: Query) -> None:
    bounds = {"buffer": BufferSettings(max_entries=10), "batch": BatchSettings(max_seconds=3600)}
    exporter = Exporter(replace(Settings(node="gate-1").with_dsn(dsn), **bounds))
    eventually(lambda: _has_run(dsn))
    for number in range(25):
        exporter.log_access(make_exchange(number))
    exporter.stop()
    found = audited(dsn)
    assert (found.verdict, counts(found)) == ("incomplete", {"seen": 25, "rows": 10})
    assert found.nodes[0].lost == {"buffer_full": 15}
    query("DELETE FROM access_log_gap")
    found = audited(dsn)
    assert found.verdict == "incomplete"
    assert counts(found) == {"seen": 25, "rows": 10, "missing_gaps": 15}


def test_killed_proxy_with_a_journal_is_known_exactly(dsn: str) -> None:
    """The next run writes what the journal holds, and a gap for what was in flight."""
    killed = Run.start("gate-1")
    now = datetime.now(UTC).isoformat()
    recovering = RunLedger(Run.start("gate-1"), lambda: RunCounts(0, 0, 0, 0, 0))
    database = Database(DatabaseSettings(dsn=dsn), ledger=recovering)
    assert database.write([make_entry(n) for n in range(5)], killed.run_id) == []
    end = RunEnd(killed, RunCounts(0, 2, 0, 5, 0), "killed", killed.started_at)
    database.report_end(end)
    database.write_gaps([Gap(str(uuid.uuid4()), "gate-1", now, now, "killed", 2, killed.run_id)])
    database.report_run("stopped")
    database.close()
    found = audited(dsn)
    assert found.verdict == "incomplete"
    assert sum(node.seen for node in found.nodes) == 7
    assert [node.lost for node in found.nodes if node.lost] == [{"killed": 2}]
    assert counts(found) == {"seen": 7, "rows": 5}


# --- unknown


def test_proxy_that_vanished_makes_the_time_since_unknown(dsn: str, query: Query) -> None:
    log(dsn, range(3))
    query(
        "UPDATE access_log_run SET ended_at = NULL, end_reason = NULL, last_seen_at = now() - interval '1 hour'"
    )
    found = audited(dsn)
    assert found.verdict == "unknown"
    (span,) = found.nodes[0].unknown
    assert 3500 < span.duration.total_seconds() < 3700
    done = call("--dsn", dsn, "audit", "--json")
    assert done.returncode == 2
    answer = json.loads(done.stdout)
    assert (answer["verdict"], [node["verdict"] for node in answer["nodes"]]) == (
        "unknown",
        ["unknown"],
    )
    # The next run of this name starts.
    log(dsn, range(3, 6))
    (span,) = audited(dsn).nodes[0].unknown
    assert span.to_at < datetime.now(UTC)


def test_rows_of_earlier_versions_are_unknown_and_not_wrong(dsn: str) -> None:
    write(dsn, 1, 2, 3)  # without a ledger
    log(dsn, range(10, 20), node="test")
    found = audited(dsn)
    assert found.verdict == "unknown"
    assert counts(found) == {"seen": 10, "rows": 13, "uncounted_rows": 3}


def test_deleted_run_is_found(dsn: str, query: Query) -> None:
    log(dsn, range(3))
    query("DELETE FROM access_log_run")
    found = audited(dsn)
    assert (found.verdict, found.missing_runs) == ("unknown", 1)


# --- the command


def test_filters_select_nodes_and_days(dsn: str) -> None:
    log(dsn, range(5))
    log(dsn, range(10, 12), node="gate-2", started_at=1_700_000_000.0 + 3 * _DAY_SECONDS)

    def rows(*options: str) -> list[int]:
        done = call("--dsn", dsn, "audit", "--json", *options)
        assert done.returncode == 0, done.stderr
        return [node["rows"] for node in json.loads(done.stdout)["nodes"]]

    assert rows() == [5, 2]
    assert rows("--node", "*-2") == [2]
    assert rows("--until", "2023-11-15T00:00Z", "--node", "gate-*") == [5]
    assert rows("--since", "2023-11-15T00:00Z", "--until", "2023-11-18T00:00Z") == [2]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--node", "gate-3"), "no proxy named gate-3 has written to this log"),
        (("--since", "2100-01-01T00:00Z"), "since 2100-01-01 00:00 (UTC) is in the future"),
    ],
)
def test_selection_of_nothing_is_a_mistake_and_not_complete(
    dsn: str, options: tuple[str, str], reason: str
) -> None:
    log(dsn, range(3))
    done = call("--dsn", dsn, "audit", *options)
    assert done.returncode == 3
    assert reason in done.stderr


@pytest.mark.parametrize("options", [(), ("--since", "soon"), ("--node",), ("--nonsense",)])
def test_exit_code_3_if_the_log_could_not_be_read(options: tuple[str, ...]) -> None:
    unreachable = ("--dsn", f"host=127.0.0.1 port={free_port()}")
    done = call(*unreachable, "audit", *options)
    assert done.returncode == 3
    assert done.stderr.splitlines()[-1].startswith("Error: ")


def test_exit_code_3_for_wrong_settings(tmp_path: Any) -> None:
    assert call("--config", str(tmp_path / "none.yaml"), "audit").returncode == 3


def test_reader_role_can_audit_and_list_nodes(dsn: str) -> None:
    log(dsn, range(3))
    with connect(dsn, DatabaseSettings()) as connection:
        ensure_schema(connection)
        schema = schema_name(connection)
        reader = f"{schema}_reader"
        connection.execute(f"CREATE ROLE {reader} LOGIN".encode())
        connection.execute(
            grants(schema, reader, reader, is_distributed=bool(CLUSTER_DSN)).encode()
        )
        try:
            as_reader = dsn.replace("user=postgres", f"user={reader}")
            assert audited(as_reader).verdict == "complete"
            with connect(as_reader, DatabaseSettings()) as session:
                assert [node.node for node in find_nodes(session)] == ["gate-1"]
        finally:
            connection.execute(f"DROP OWNED BY {reader}; DROP ROLE {reader}".encode())


# --- nodes


def test_nodes_lists_what_runs_and_what_is_silent(dsn: str, query: Query) -> None:
    log(dsn, range(3), node="old")
    log(dsn, range(3, 5), node="stopped")
    log(dsn, range(5, 9), node="stopped")
    log(dsn, range(9, 10), node="gone")
    query(
        "UPDATE access_log_run SET last_seen_at = now() - interval '8 days' WHERE node = 'old';"
        "UPDATE access_log_run SET last_seen_at = now() - interval '1 hour', ended_at = NULL, end_reason = NULL"
        " WHERE node = 'gone'"
    )
    exporter = Exporter(replace(Settings(node="running").with_dsn(dsn), batch=_FAST))
    try:
        eventually(lambda: query("SELECT 1 FROM access_log_run WHERE node = 'running'"))
        lines = call("--dsn", dsn, "nodes", "--json").stdout.splitlines()
        found = [json.loads(line) for line in lines]
        assert [(it["node"], it["state"], it["written"]) for it in found] == [
            ("gone", "silent", 1),
            ("running", "running", 0),
            ("stopped", "stopped", 4),
        ]
        done = call("--dsn", dsn, "nodes")
        assert (done.returncode, done.stderr) == (0, "")
        head, *rows = done.stdout.splitlines()
        assert head.split() == [
            *(
                "node",
                "state",
                "version",
                "last",
                "seen",
                "rows/s",
                "written",
                "waiting",
                "spooled",
            ),
            *("dropped", "rejected"),
        ]
        assert [row.split()[:2] for row in rows] == [
            ["gone", "silent"],
            ["running", "running"],
            ["stopped", "stopped"],
        ]
    finally:
        assert exporter.stop()


def test_nodes_without_any_proxy(dsn: str) -> None:
    write(dsn)
    done = call("--dsn", dsn, "nodes")
    assert done.returncode == 0
    assert done.stdout.startswith("No proxy has written to this database")


def test_summary_is_amber_for_a_silent_proxy_and_red_for_lost_rows(dsn: str, query: Query) -> None:
    def summary() -> tuple[str, str] | None:
        with connect(dsn, DatabaseSettings()) as connection, read_only(connection, 10):
            found = nodes_summary(connection, UTC)
        return None if found is None else (found.level, found.sentence)

    with connect(dsn, DatabaseSettings()) as connection:
        ensure_schema(connection)
    assert summary() is None
    exporter = Exporter(replace(Settings(node="running").with_dsn(dsn), batch=_FAST))
    try:
        eventually(lambda: query("SELECT 1 FROM access_log_run"))
        assert summary() == ("green", "1 proxy running.")
        query(
            "INSERT INTO access_log_run (run_id, node, started_at, last_seen_at, seen, written, dropped, rejected,"
            " spooled, owner) SELECT gen_random_uuid(), 'gone', '2026-01-01', now() - interval '1 hour',"
            " 0, 0, 0, 0, 0, session_user"
        )
        level, sentence = summary() or ("", "")
        assert level == "amber"
        assert sentence.startswith("1 proxy running, 1 silent since 20")
        query(
            "INSERT INTO access_log_gap VALUES (gen_random_uuid(), 'gone', now(), now(), 'rejected', 5)"
        )
        level, sentence = summary() or ("", "")
        assert level == "red"
        assert "5 requests lost within a day" in sentence
    finally:
        assert exporter.stop()
