"""Kill a process that logs, and test that the next one, or a command, writes what it had not written."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner
from msgspec.structs import replace

from addon.cli.main import main
from exporter import DatabaseUnavailable, Exporter, Settings, recover_journals
from exporter.settings import BatchSettings, DatabaseSettings, JournalSettings, SpoolSettings
from tests.support.access_log import temporary_schema
from tests.support.relay import Relay
from tests.support.repeated_kills import kill_repeatedly
from tests.support.samples import make_exchange
from tests.support.wait import eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.support.postgres import Postgres

    Query = Callable[..., list[tuple[object, ...]]]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="journals need tmpfs"),
]

_ROOT = Path(__file__).resolve().parents[2]
_ROWS = "SELECT count(*), count(DISTINCT flow_id), min(node), max(node) FROM access_log"
_GAPS = "SELECT reason, sum(entries)::int FROM access_log_gap GROUP BY 1 ORDER BY 1"
_RUNS = """
    SELECT node, end_reason, seen, written, dropped, rejected, waiting, spooled FROM access_log_run
    ORDER BY node, seen DESC
"""
_UNREACHABLE = "host=127.0.0.1 port=1 user=nobody"

# Arguments: connection string, rows to write first, further requests, requests in flight, more code.
_LOG_UNTIL_KILLED = """
import signal, sys
from msgspec.structs import replace
from exporter import Exporter, Settings
from exporter.settings import BatchSettings, JournalSettings
from tests.support.samples import make_exchange
from tests.support.wait import eventually

dsn, written, waiting, in_flight, extra = sys.argv[1:]
journal = JournalSettings()
exec(extra)
batch = BatchSettings(max_entries=max(int(written), 1), max_seconds=3600)
exporter = Exporter(replace(Settings(node="killed").with_dsn(dsn), batch=batch, journal=journal))
builder = exporter._writer.builder
eventually(lambda: builder._worker)
first_worker = builder._worker
wheel = b"/packages/aa/bb/demo-1.0-py3-none-any.whl?token=s3cret"

def log(numbers):
    for number in numbers:
        exporter.begin(1.7e9 + number)
        exporter.log_access(make_exchange(number, host="pypi.example", target=wheel))

log(range(int(written)))
eventually(lambda: exporter.status()["written"] == int(written))
exporter.reconfigure(replace(exporter._settings, batch=BatchSettings(max_entries=10_000, max_seconds=3600)))
# The new settings are in use, and the new worker runs its own code: until then, it has our lock.
eventually(lambda: builder._worker not in {None, first_worker})
log(range(int(written), int(written) + int(waiting)))
for number in range(int(in_flight)):
    exporter.begin(1.8e9 + number)
print("ready", flush=True)
signal.pause()
"""


def kill_after(
    dsn: str, *, written: int = 0, waiting: int = 10, in_flight: int = 0, extra: str = ""
) -> None:
    """Log in another process, and kill it. `extra` is more code for it."""
    arguments = [dsn, str(written), str(waiting), str(in_flight), extra]
    command = [sys.executable, "-c", _LOG_UNTIL_KILLED, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=_ROOT) as process:
        assert process.stdout
        assert process.stdout.readline() == b"ready\n"
        process.send_signal(signal.SIGKILL)


def settings(dsn: str, **sections: object) -> Settings:
    batch = BatchSettings(max_seconds=0.05)
    return replace(Settings(node="next", batch=batch).with_dsn(dsn), **sections)


def run_next(dsn: str, recovered: int, **sections: object) -> Exporter:
    """Start the next run, and wait until it has recovered so many rows. It is stopped."""
    exporter = Exporter(settings(dsn, **sections))
    eventually(lambda: exporter.status()["recovered"] == recovered)
    assert exporter.stop()
    return exporter


def assert_ledger_equals_table(query: Query) -> None:
    """Each request that a run has seen is a row or a gap."""
    for run_id, seen in query("SELECT run_id, seen FROM access_log_run WHERE seen > 0"):
        rows, lost = query(
            "SELECT sum(rows)::int, sum(lost)::int FROM access_log_run_day WHERE origin_run_id = %s",
            run_id,
        )[0]
        assert rows + lost == seen  # type: ignore[operator]
    in_table = "(SELECT count(*)::int FROM access_log), (SELECT coalesce(sum(entries), 0)::int FROM access_log_gap)"
    counted = query("SELECT sum(rows)::int, sum(lost)::int FROM access_log_run_day")
    assert counted == query(f"SELECT {in_table}")


def journals(runtime: Path) -> list[Path]:
    return list(runtime.iterdir())


def test_next_run_writes_what_a_killed_one_had_not_written(
    dsn: str, query: Query, runtime: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    kill_after(dsn, written=100, waiting=300, in_flight=7)
    assert query(_ROWS)[0][0] == 100
    assert len(journals(runtime)) == 1
    following = run_next(dsn, 300)
    assert query(_ROWS) == [(400, 400, "killed", "killed")]
    assert query("SELECT count(*) FROM access_log WHERE query = 'token=REDACTED'") == [(400,)]
    assert query("SELECT fetches FROM artifact") == [(400,)]
    (gap,) = query("SELECT node, from_at, to_at, reason, entries FROM access_log_gap")
    assert (gap[0], *gap[3:]) == ("killed", "killed", 7)
    assert gap[1] < gap[2]  # type: ignore[operator]
    assert query("SELECT extract(epoch FROM to_at)::bigint FROM access_log_gap") == [
        (1_800_000_006,)
    ]
    assert query(_RUNS) == [
        ("killed", "killed", 407, 100, 7, 0, 300, 0),
        ("next", "stopped", 0, 0, 0, 0, 0, 0),
    ]
    assert_ledger_equals_table(query)
    status = following.status()
    assert (status["seen"], status["written"], status["waiting"]) == (0, 0, 0)
    assert journals(runtime) == []
    assert "artifactapi: recovered 300 rows of a killed proxy, 7 lost (killed, run " in caplog.text


def test_rows_that_are_in_the_table_already_are_not_counted_again(
    dsn: str, query: Query, runtime: Path
) -> None:
    """The process is killed after PostgreSQL had the rows, but before its journal knew."""
    without_release = (
        "from exporter.write.journal import Journal; Journal.release = lambda *_: None"
    )
    kill_after(dsn, written=50, waiting=20, extra=without_release)
    run_next(dsn, 70)
    assert query(_ROWS)[0][:2] == (70, 70)
    assert query("SELECT fetches FROM artifact") == [(70,)]
    assert query(_GAPS) == []
    assert journals(runtime) == []
    assert_ledger_equals_table(query)


def test_two_processes_recover_a_journal_once(dsn: str, query: Query, runtime: Path) -> None:
    kill_after(dsn, waiting=3000, in_flight=2)
    with ThreadPoolExecutor(4) as pool:
        runs = list(pool.map(lambda _: list(recover_journals(settings(dsn))), range(4)))
    assert sorted(len(run) for run in runs) == [0, 0, 0, 1]
    assert query(_ROWS)[0][:2] == (3000, 3000)
    assert query("SELECT fetches FROM artifact") == [(3000,)]
    assert query(_GAPS) == [("killed", 2)]
    assert journals(runtime) == []
    assert_ledger_equals_table(query)


def test_recovery_that_is_killed_is_repeated(dsn: str, query: Query, runtime: Path) -> None:
    """The rows and the gaps are written, and then the journal is not deleted."""
    kill_after(dsn, waiting=200, in_flight=3)
    (path,) = journals(runtime)
    content = path.read_bytes()
    for _ in range(3):
        (run,) = recover_journals(settings(dsn))
        assert (run.entries, run.lost, run.run.node) == (200, 3, "killed")
        path.write_bytes(content)
        path.chmod(0o600)
    assert query(_ROWS)[0][:2] == (200, 200)
    assert query("SELECT fetches FROM artifact") == [(200,)]
    assert query(_GAPS) == [("killed", 3)]
    assert_ledger_equals_table(query)


@pytest.fixture
def relay(postgres: Postgres) -> Iterator[Relay]:
    with Relay(("127.0.0.1", postgres.port), postgres=True) as relay:
        yield relay


def test_rows_go_to_disk_while_postgres_is_unavailable(
    dsn: str, query: Query, runtime: Path, home: Path, postgres: Postgres, relay: Relay
) -> None:
    through = dsn.replace(f"port={postgres.port}", f"port={relay.address[1]}")
    database = DatabaseSettings(dsn=through, retry_max_seconds=0.2, connect_seconds=1.0)
    kill_after(through, waiting=300, in_flight=5)
    relay.cut()
    stopped = Exporter(settings(through, database=database))
    eventually(lambda: not journals_of_killed(runtime, stopped))
    status = stopped.status()
    assert stopped.stop()
    assert (status["spooled"], status["waiting"]) == (0, 0), "they are rows of an earlier run"
    assert journals(runtime) == []
    assert len(list((home / "spool").glob("*.spool"))) >= 1
    relay.mend()
    run_next(through, 300, database=database)
    assert query(_ROWS) == [(300, 300, "killed", "killed")]
    assert query("SELECT fetches FROM artifact") == [(300,)]
    assert query(_GAPS) == [("killed", 5)]
    assert list((home / "spool").iterdir()) == []
    assert_ledger_equals_table(query)


def journals_of_killed(runtime: Path, exporter: Exporter) -> list[Path]:
    return [path for path in journals(runtime) if exporter.status()["run_id"] not in path.name]


def test_rows_wait_in_the_journal_if_there_is_no_disk_either(
    dsn: str, query: Query, runtime: Path, postgres: Postgres, relay: Relay
) -> None:
    through = dsn.replace(f"port={postgres.port}", f"port={relay.address[1]}")
    database = DatabaseSettings(dsn=through, retry_max_seconds=0.2, connect_seconds=1.0)
    without_spool = settings(through, database=database, spool=SpoolSettings(max_bytes=0))
    kill_after(through, waiting=300, in_flight=5)
    relay.cut()
    with pytest.raises(DatabaseUnavailable):
        list(recover_journals(settings("host=127.0.0.1 port=1"), any_database=True))
    exporter = Exporter(without_spool)
    eventually(lambda: exporter.status()["retries"] > 2)
    assert len(journals_of_killed(runtime, exporter)) == 1
    relay.mend()
    eventually(lambda: exporter.status()["recovered"] == 300)
    assert exporter.stop()
    assert query(_ROWS)[0][:2] == (300, 300)
    assert query(_GAPS) == [("killed", 5)]
    assert journals(runtime) == []
    assert_ledger_equals_table(query)


def test_row_that_postgres_rejects_is_a_gap_once(dsn: str, query: Query, runtime: Path) -> None:
    list(recover_journals(settings(dsn)))
    kill_after(dsn, waiting=10)
    query(
        "ALTER TABLE access_log ADD CONSTRAINT not_three CHECK (left(flow_id::text, 8) <> '00000003')"
    )
    (path,) = journals(runtime)
    content = path.read_bytes()
    for _ in range(2):
        (run,) = recover_journals(settings(dsn))
        assert (run.entries, run.lost) == (9, 1)
        path.write_bytes(content)
        path.chmod(0o600)
    assert query(_ROWS)[0][:2] == (9, 9)
    assert query(_GAPS) == [("rejected", 1)]
    assert_ledger_equals_table(query)


def test_drops_that_were_no_gap_yet_become_one(dsn: str, query: Query) -> None:
    full = "import exporter.write.progress as p; p.Progress.count_drops = lambda *_: None\n"
    full += "import exporter.settings as s; old = Exporter.__init__\n"
    full += "def small(self, given): old(self, replace(given, buffer=s.BufferSettings(max_entries=10)))\n"
    full += "Exporter.__init__ = small\n"
    full += "from exporter.write.intake import Intake; Intake.wait = lambda *_: signal.pause()"
    kill_after(dsn, waiting=25, extra=full)
    list(recover_journals(settings(dsn)))
    assert query(_ROWS)[0][:2] == (10, 10)
    assert query(_GAPS) == [("buffer_full", 15)]
    assert_ledger_equals_table(query)


@pytest.mark.timeout(240)
@pytest.mark.not_on_citus("compares rows with a join that Citus refuses")
def test_every_answer_has_a_row_after_kills_at_random_times(
    dsn: str, postgres: Postgres, runtime: Path
) -> None:
    summary, complaints = kill_repeatedly(postgres, dsn, runtime, seed=1, kills=5)
    assert complaints == [], summary


def test_full_journal_becomes_a_gap(dsn: str, query: Query) -> None:
    kill_after(dsn, waiting=200, extra="journal = JournalSettings(max_bytes=20_000)")
    (run,) = recover_journals(settings(dsn))
    assert 20 < run.entries < 100
    assert query(_ROWS)[0][0] == run.entries
    assert query(_GAPS) == [("killed", 200 - run.entries)]
    assert_ledger_equals_table(query)


def test_rows_of_another_database_are_written_only_on_request(
    dsn: str, postgres: Postgres, query: Query, runtime: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with temporary_schema(postgres) as other:
        kill_after(other, waiting=10)
        exporter = Exporter(settings(dsn))
        eventually(lambda: "a killed proxy has left rows for another database" in caplog.text)
        assert exporter.stop()
        assert len(journals(runtime)) == 1
    result = CliRunner().invoke(main, ["--dsn", dsn, "recover", "--redirect"])
    assert result.output.startswith("recovered 10 rows")
    assert query(_ROWS)[0][:2] == (10, 10)
    assert journals(runtime) == []


def test_run_that_ends_in_order_leaves_nothing_behind(dsn: str, runtime: Path) -> None:
    exporter = Exporter(settings(dsn))
    assert [exporter.status()["run_id"] in path.name for path in journals(runtime)] == [True]
    for number in range(300):
        exporter.begin(1.7e9)
        exporter.log_access(make_exchange(number))
    assert exporter.stop()
    assert journals(runtime) == []


def test_journal_is_released_when_rows_are_in_postgres_or_on_disk(dsn: str) -> None:
    """A small journal suffices for many requests, whichever way they take."""
    journal = JournalSettings(max_bytes=200_000)
    for name in (dsn, _UNREACHABLE):
        exporter = Exporter(settings(name, journal=journal))
        for number in range(3000):
            exporter.log_access(make_exchange(number))
            if number % 100 == 99:
                eventually(lambda: exporter.status()["waiting"] == 0, timeout=20)  # noqa: B023
        assert exporter.status()["unjournaled"] == 0
        exporter.stop()


def test_status_shows_the_journal(dsn: str) -> None:
    exporter = Exporter(settings(dsn, journal=JournalSettings(max_bytes=20_000)))
    for number in range(3):
        exporter.begin(float(number))
    exporter.skip()
    exporter.log_access(make_exchange(1, target=b"/" * 30_000))
    status = exporter.status()
    assert (status["in_flight"], status["unjournaled"], status["journal"]) == (1, 1, "on")
    assert status["run_id"] == exporter.status()["run_id"]
    exporter.watch(5, lambda: None)
    assert exporter.status()["in_flight"] == 5
    assert exporter.stop()


def test_command_recovers_without_a_proxy(dsn: str, query: Query, runtime: Path) -> None:
    kill_after(dsn, waiting=12, in_flight=1)
    status = CliRunner().invoke(main, ["status"])
    assert (status.exit_code, "\nKilled: " in status.output) == (2, True)
    result = CliRunner().invoke(main, ["--dsn", dsn, "recover"])
    assert result.exit_code == 0, result.output
    assert result.output.startswith("recovered 12 rows of a killed proxy, 1 lost (killed, run ")
    assert query(_ROWS)[0][:2] == (12, 12)
    assert journals(runtime) == []
    nodes = CliRunner().invoke(main, ["--dsn", dsn, "nodes", "--json"])
    (run,) = map(json.loads, nodes.output.splitlines())
    counts = {name: run[name] for name in ("state", "seen", "written", "waiting", "dropped")}
    assert counts == {"state": "killed", "seen": 13, "written": 12, "waiting": 0, "dropped": 1}
    audit = json.loads(CliRunner().invoke(main, ["--dsn", dsn, "audit", "--json"]).output)
    (node,) = audit["nodes"]
    assert (node["seen"], node["rows"], node["lost"]) == (13, 12, {"killed": 1})
    assert not node["undelivered"]
    assert not node["missing_rows"]
    assert CliRunner().invoke(main, ["status"]).exit_code == 3  # nothing is left to say of it
    again = CliRunner().invoke(main, ["--dsn", dsn, "recover"])
    assert (again.exit_code, again.output) == (
        0,
        "No killed proxy has left anything for this database.\n",
    )


@pytest.mark.usefixtures("runtime")
def test_rows_of_a_killed_run_of_another_role_are_counted_too(dsn: str, query: Query) -> None:
    kill_after(dsn, waiting=12, in_flight=1)
    query("CREATE ROLE other_owner SUPERUSER LOGIN")
    try:
        other = dsn.replace("user=postgres", "user=other_owner")
        (run,) = recover_journals(Settings(node="killed").with_dsn(other), any_database=True)
        assert (run.entries, run.lost) == (12, 1)
        audit = json.loads(CliRunner().invoke(main, ["--dsn", dsn, "audit", "--json"]).output)
    finally:
        query("DROP OWNED BY other_owner")
        query("DROP ROLE other_owner")
    (node,) = audit["nodes"]
    assert (node["rows"], node["lost"]) == (12, {"killed": 1})
    assert (node["missing_rows"], node["uncounted_rows"], node["undelivered"]) == ([], [], 0)
