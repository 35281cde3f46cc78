"""Run a short, fixed schedule of chaos faults under load and check that the log is complete."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import psycopg
import pytest

from tests.chaos import outage_name, run, run_fleet
from tests.support.chaos_checks import Report
from tests.support.chaos_environment import Bounds, Step
from tests.support.chaos_server import Outage, ServerFleet, interrupt
from tests.support.citus import Cluster
from tests.support.postgres import free_port

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.chaos_environment import ChaosEnvironment
    from tests.support.postgres import Postgres

_SCHEDULE = (
    Step("postgres kill -9, restart", 1.0),
    Step("connection cut", 2.0),
    Step("commit reply cut off", 0.0),
    Step("commit reply swallowed", 0.0),
    Step("black hole", 3.0),
    Step("server SIGSTOP", 3.0),
    Step("ACCESS EXCLUSIVE lock", 3.0),
    Step("proxy SIGTERM, restart", 0.0),
    Step("hot reload", 0.0),
)
_KILLS = (
    Step("proxy kill -9", 0.0),
    Step("both kill -9, connection cut", 1.0),
    Step("kill -9, two recover", 0.0),
    Step("kill -9, journal damaged", 0.3),
    Step("kill -9, tmpfs full", 0.5),
    Step("worker kill -9", 0.5),
)
_BOUNDS = Bounds(call_seconds=1.0, connect_seconds=2.0, retry_max_seconds=1.0, rate=100.0)


def test_no_row_is_lost_or_duplicated_under_faults(tmp_path: Path) -> None:
    report = run(tmp_path, iter(_SCHEDULE), _BOUNDS, seconds=90)
    sys.stdout.write(report.text())  # pytest shows it if the next line fails
    assert report.complaints == []


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_log_on_a_running_server_is_complete_after_faults_and_leaves_nothing(
    postgres: Postgres | Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    schemas = "SELECT nspname FROM pg_namespace WHERE nspname LIKE 'artifactapi_chaos%'"
    fleet = ServerFleet(tmp_path, 2, postgres.dsn())
    stopped, started = tmp_path / "stopped", tmp_path / "started"
    outage = Outage(f"touch {stopped}", f"touch {started}")
    if not isinstance(postgres, Cluster):  # new connections wait meanwhile
        outage = Outage(
            f"{outage.stop}; kill -STOP {postgres.pid}",
            f"{outage.start}; kill -CONT {postgres.pid}",
        )
    schedule = (
        Step("connection cut", 1.0, 0.0),
        Step("commit reply cut off", 0.0, 0.0),
        Step("ACCESS EXCLUSIVE lock", 1.0, 0.0),
        Step(outage_name(0), 1.0, 0.0),
    )
    run_fleet(fleet, iter(schedule), seconds=60, outages=[outage])
    assert fleet.complaints == [], capsys.readouterr().out
    assert stopped.exists()
    assert started.exists()
    with psycopg.connect(postgres.dsn()) as connection:
        assert connection.execute(schemas).fetchall() == []


def test_server_that_cannot_be_stopped_is_started_and_ends_the_run(tmp_path: Path) -> None:
    started = tmp_path / "started"
    with pytest.raises(SystemExit, match="'false' failed with exit status 1"):
        interrupt(ServerFleet(tmp_path, 1, ""), 0.0, Outage("false", f"touch {started}"))
    assert started.exists()


def test_running_server_that_is_unavailable_is_reported_in_one_sentence(tmp_path: Path) -> None:
    dsn = f"host=127.0.0.1 port={free_port()} user=postgres"
    with pytest.raises(SystemExit, match=r"^--dsn: .*refused\.$"), ServerFleet(tmp_path, 1, dsn):
        pass


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.skipif(sys.platform != "linux", reason="journals need tmpfs")
def test_no_row_is_lost_by_kills_and_the_report_notices_a_missing_one(tmp_path: Path) -> None:
    reports: list[Report] = []

    def delete_a_row_of_a_killed_proxy(environment: ChaosEnvironment) -> None:
        reports.append(Report(environment))
        killed = {g.number for g in environment.generations if g.killed_at is not None}
        answered = [r for r in environment.traffic.requests() if r.answered]
        path = next(f"/n/{r.number}" for r in answered if r.generation in killed)
        with environment.admin() as connection:
            assert (
                connection.execute("DELETE FROM access_log WHERE path = %s", (path,)).rowcount == 1
            )

    after = run(tmp_path, iter(_KILLS), _BOUNDS, seconds=200, tamper=delete_a_row_of_a_killed_proxy)
    (before,) = reports
    sys.stdout.write(before.text())
    assert before.complaints == []
    assert len([it for it in after.complaints if "answered requests have no row: [" in it]) == 1
    assert "audit: missing_rows 1" in after.complaints
