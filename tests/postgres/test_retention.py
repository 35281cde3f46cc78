"""Rollups and pruning of old days: nothing is lost, nothing is counted twice, nobody waits."""

from __future__ import annotations

import contextlib
import itertools
import subprocess
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import psycopg
import pytest

from exporter import Settings
from exporter.archive.files import archive_day, archived_days, rows_in_archive, verify_day
from exporter.postgres.connection import connect
from exporter.postgres.embedded import programs
from exporter.postgres.locks import HOUSEKEEPING, only_session
from exporter.postgres.schema import MIGRATIONS, ensure_schema, grants, schema_name
from exporter.retention.days import (
    LogInUseError,
    Partition,
    create_days_ahead,
    detach,
    old_partitions,
    owns_log,
)
from exporter.retention.housekeeping import Housekeeping
from exporter.retention.prune import KeptDaysError, oldest_kept, prunable, prune
from exporter.retention.restore import restore_day
from exporter.retention.rollups import roll_up
from exporter.retention.steps import keep_in_order
from exporter.run import Run
from exporter.settings import DatabaseSettings, RetentionSettings
from exporter.write.database import Database
from exporter.write.insert import COLUMNS
from exporter.write.ledger import RunCounts, RunLedger
from tests.support.access_log import temporary_schema, write_entries
from tests.support.citus import CLUSTER_DSN
from tests.support.command import call
from tests.support.samples import make_entry
from tests.support.wait import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from exporter import AccessLogEntry
    from tests.support.postgres import Postgres

pytestmark = pytest.mark.slow

Query = Callable[..., list[tuple[object, ...]]]

DAY_MS = 86_400_000
FIRST_DAY = datetime(2023, 11, 14, tzinfo=UTC)
_DAYS = "SELECT DISTINCT (started_at AT TIME ZONE 'UTC')::date::text FROM access_log ORDER BY 1"
# What `access_log_daily` must say, from the rows.
_DAILY_FROM_ROWS = """
    SELECT (started_at AT TIME ZONE 'UTC')::date AS day, node, coalesce(remote, host) AS remote,
           status_code / 100 AS status_class, cache_status, count(*),
           coalesce(sum(response_bytes), 0)::bigint, count(*) FILTER (WHERE access_log_failed(status_code))
    FROM access_log GROUP BY 1, 2, 3, 4, 5 ORDER BY 1, 2, 3, 4, 5
"""
# Where pg_dump is at the rows of a day.
_DUMPED = """
    SELECT DISTINCT nspname::text FROM pg_stat_activity JOIN pg_locks USING (pid)
    JOIN pg_class ON relation = pg_class.oid JOIN pg_namespace ON relnamespace = pg_namespace.oid
    WHERE application_name = 'pg_dump' AND query LIKE 'COPY %access_log_2023%' AND relname = 'access_log_20231114'
"""
_DAILY = "SELECT * FROM access_log_daily ORDER BY 1, 2, 3, 4, 5"
_FETCHES_FROM_ROWS = """
    SELECT DISTINCT (started_at AT TIME ZONE 'UTC')::date AS day, proxy_user, purl
    FROM access_log_fetches ORDER BY 1, 2, 3
"""
_FETCHES = "SELECT day, proxy_user, purl FROM access_log_daily_fetches ORDER BY 1, 2, 3"
_FETCHES_BY_ARTIFACT = """
    SELECT (from_at AT TIME ZONE 'UTC')::date AS day, users[number], purl
    FROM access_log_rollup JOIN access_log_rollup_artifact USING (rollup_id)
    CROSS JOIN unnest(user_numbers) AS number ORDER BY 1, 2, 3
"""


def fetch(number: int, purl: str = "pkg:pypi/demo@1.0", **changes: object) -> AccessLogEntry:
    return make_entry(
        number, **{"artifact_kind": "artifact", "purl": purl, "remote": "pypi", **changes}
    )


@pytest.fixture
def owner(any_dsn: str) -> Iterator[psycopg.Connection]:
    """A connection of the owner to a log of three old days with ten rows each."""
    write_entries(
        any_dsn,
        *(
            fetch(
                day * DAY_MS + n,
                f"pkg:pypi/demo@{n % 3}.0",
                proxy_user=None if n == 9 else f"build-{n % 2}",
                status_code=404 if n == 8 else 200,
                remote="pypi" if n % 2 else None,
                cache_status="HIT" if n % 4 == 0 else None,
            )
            for day in range(3)
            for n in range(10)
        ),
    )
    with connect(any_dsn, Settings().database) as connection:
        yield connection


def rows(connection: psycopg.Connection, query: str) -> list[tuple[object, ...]]:
    return connection.execute(query.encode()).fetchall()


def prune_all(connection: psycopg.Connection, before: datetime) -> list[tuple[str, int]]:
    return [(f"{it.from_at:%d}", it.rows) for it in prune(connection, before, None)]


def test_rollups_equal_the_rows(owner: psycopg.Connection) -> None:
    assert len(list(roll_up(owner))) == 3
    assert rows(owner, _DAILY) == rows(owner, _DAILY_FROM_ROWS)
    assert rows(owner, _FETCHES) == rows(owner, _FETCHES_FROM_ROWS)
    (quarters,) = owner.execute(
        "SELECT quarter_requests FROM access_log_rollup ORDER BY from_at LIMIT 1"
    ).fetchone() or ((),)
    assert len(quarters) == 96
    assert quarters[22 * 4 + 13 // 15] == 10  # 22:13:20 UTC
    assert sum(quarters) == 10


def test_rollups_remember_who_fetched_each_of_many_artifacts(any_dsn: str) -> None:
    entries = [
        fetch(number, f"pkg:pypi/p{number % 2100}@1", proxy_user=f"build-{number % 13}")
        for number in range(2500)
    ]
    write_entries(any_dsn, *entries)
    with connect(any_dsn, Settings().database) as connection:
        list(roll_up(connection))
        expected = rows(connection, _FETCHES_FROM_ROWS)
        assert len(expected) > 2400
        assert rows(connection, _FETCHES) == expected
        assert rows(connection, _FETCHES_BY_ARTIFACT) == expected
        assert rows(connection, "SELECT cardinality(artifacts) FROM access_log_rollup_chunk") == [
            (1000,),
            (1000,),
            (100,),
        ]


def test_rollups_of_earlier_versions_stay(owner: psycopg.Connection) -> None:
    list(roll_up(owner))
    expected = rows(owner, _FETCHES)
    owner.execute(
        "INSERT INTO access_log_rollup_unpacked SELECT * FROM access_log_rollup_artifact WHERE rollup_id ="
        " (SELECT max(rollup_id) FROM access_log_rollup)"
    )
    owner.execute(
        "DELETE FROM access_log_rollup_chunk WHERE rollup_id = (SELECT max(rollup_id) FROM access_log_rollup)"
    )
    assert rows(owner, _FETCHES) == expected
    assert rows(owner, _FETCHES_BY_ARTIFACT) == expected


def test_late_rows_are_rolled_up_and_unchanged_days_are_not(
    owner: psycopg.Connection, any_dsn: str
) -> None:
    list(roll_up(owner))
    owner.execute("UPDATE access_log SET logged_at = started_at")
    owner.execute("UPDATE access_log_rollup SET rolled_up_at = now() - interval '2 days'")
    assert list(roll_up(owner)) == []
    write_entries(any_dsn, fetch(50 + DAY_MS))

    assert [span.from_at for span in roll_up(owner)] == [FIRST_DAY + timedelta(days=1)]
    assert rows(owner, _DAILY) == rows(owner, _DAILY_FROM_ROWS)
    assert rows(owner, "SELECT count(*) FROM access_log_rollup") == [(3,)]


def test_no_change_of_the_clock_moves_a_day(any_dsn: str) -> None:
    start = datetime(2026, 3, 27, tzinfo=UTC)
    write_entries(
        any_dsn,
        *(
            fetch(n)._replace(started_at=f"{start + n * timedelta(hours=8):%FT%TZ}")
            for n in range(18)
        ),
    )
    with connect(any_dsn, Settings().database) as connection:
        connection.execute("SET timezone = 'Europe/Berlin'")  # summer time begins on March 29
        day = start + timedelta(days=2, hours=23)
        # what an earlier version made
        connection.execute(
            "SELECT access_log_roll_up('access_log', %s, %s)", (day, day + timedelta(days=1))
        )
        connection.execute((MIGRATIONS / "017_archived_rows.sql").read_bytes())
        days = [start + timedelta(days=n) for n in range(6)]
        assert [span.from_at for span in roll_up(connection)] == days
        daily, fetches = rows(connection, _DAILY_FROM_ROWS), rows(connection, _FETCHES_FROM_ROWS)
        assert rows(connection, _DAILY) == daily
        pruned = list(prune(connection, days[-1], None))
        assert [(it.from_at.isoformat(), it.until_at.isoformat()) for it in pruned] == [
            (day.isoformat(), (day + timedelta(days=1)).isoformat()) for day in days[:-1]
        ]
        list(roll_up(connection))
        assert rows(connection, _DAILY) == daily
        assert rows(connection, _FETCHES) == fetches


def test_hour_that_is_not_over_is_not_rolled_up(dsn: str) -> None:
    now = datetime.now(UTC)
    write_entries(dsn, make_entry(1)._replace(started_at=now.isoformat()))
    with connect(dsn, Settings().database) as connection:
        assert list(roll_up(connection)) == []


def test_parts_of_a_day_are_rolled_up_until_their_day_replaces_them(any_dsn: str) -> None:
    now = datetime.now(UTC)
    day = oldest_kept(0, now - timedelta(hours=2))  # the oldest that is not due
    hour = (now - timedelta(minutes=20)).replace(minute=0, second=0, microsecond=0)
    quarters = int((now - timedelta(minutes=15) - hour) / timedelta(minutes=15))
    end = hour + quarters * timedelta(minutes=15)
    times = [now - timedelta(minutes=5 * n) for n in range(40 * 12)]
    write_entries(
        any_dsn,
        *(fetch(n)._replace(started_at=time.isoformat()) for n, time in enumerate(times)),
    )
    with connect(any_dsn, Settings().database) as connection:
        spans = list(roll_up(connection))
        assert list(roll_up(connection)) == spans  # their rows have just arrived
        parts = [span for span in spans if span.from_at >= day]
        assert [part.from_at for part in parts] == [
            *(day + timedelta(hours=n) for n in range((hour - day) // timedelta(hours=1))),
            *(hour + timedelta(minutes=15 * n) for n in range(quarters)),
        ]
        assert all(one.until_at == next_.from_at for one, next_ in itertools.pairwise(parts))
        counted = sum(time < end for time in times)
        assert rows(connection, "SELECT sum(requests)::integer FROM access_log_daily") == [
            (counted,)
        ]
        fetches = rows(connection, _FETCHES)
        assert len(fetches) == len(set(fetches)) > 1

        connection.execute(
            "SELECT access_log_roll_up('access_log', %s, %s)", (day, day + timedelta(days=1))
        )
        left = [span for span in spans if not day <= span.from_at < day + timedelta(days=1)]
        assert rows(connection, "SELECT count(*) FROM access_log_rollup") == [(len(left) + 1,)]


def test_old_days_leave_and_their_totals_stay(owner: psycopg.Connection) -> None:
    daily, fetches = rows(owner, _DAILY_FROM_ROWS), rows(owner, _FETCHES_FROM_ROWS)
    before = FIRST_DAY + timedelta(days=2)
    assert [(it.rows, it.from_at) for it in prunable(owner, before)] == [
        (10, FIRST_DAY),
        (10, FIRST_DAY + timedelta(days=1)),
    ]
    assert rows(owner, _DAYS) == [("2023-11-14",), ("2023-11-15",), ("2023-11-16",)]

    assert prune_all(owner, before) == [("14", 10), ("15", 10)]

    assert rows(owner, _DAYS) == [("2023-11-16",)]
    assert rows(owner, "SELECT name FROM access_log_partitions") == [("access_log_20231116",)]
    assert len(list(roll_up(owner))) == 1
    assert rows(owner, _DAILY) == daily
    assert rows(owner, _FETCHES) == fetches
    assert rows(owner, "SELECT day::text, node, requests FROM access_log_pruned ORDER BY 1") == [
        ("2023-11-14", "test", 10),
        ("2023-11-15", "test", 10),
    ]
    assert prune_all(owner, before) == []


def test_rows_that_arrive_after_their_day_left_add_up(
    owner: psycopg.Connection, any_dsn: str
) -> None:
    before = FIRST_DAY + timedelta(days=1)
    assert prune_all(owner, before) == [("14", 10)]
    write_entries(any_dsn, fetch(77))
    assert len(list(roll_up(owner))) == 3
    assert rows(owner, "SELECT sum(requests) FROM access_log_daily WHERE day = '2023-11-14'") == [
        (11,)
    ]

    assert prune_all(owner, before) == [("14", 1)]
    assert rows(owner, "SELECT sum(requests) FROM access_log_pruned") == [(11,)]
    assert rows(owner, "SELECT sum(requests) FROM access_log_daily WHERE day = '2023-11-14'") == [
        (11,)
    ]


def test_interrupted_run_continues(owner: psycopg.Connection) -> None:
    before = FIRST_DAY + timedelta(days=2)
    first, second = old_partitions(owner, before)
    detach(owner, first)  # killed before the drop
    assert rows(owner, _DAYS) == [("2023-11-15",), ("2023-11-16",)]

    assert prune_all(owner, before) == [("14", 10), ("15", 10)]
    assert rows(owner, "SELECT sum(requests) FROM access_log_pruned") == [(20,)]
    assert second.state == "attached"


def test_detached_days_of_another_log_in_the_same_database_stay(
    owner: psycopg.Connection, any_postgres: Postgres
) -> None:
    before = FIRST_DAY + timedelta(days=1)
    (first,) = old_partitions(owner, before)
    detach(owner, first)
    with (
        temporary_schema(any_postgres) as other_dsn,
        connect(other_dsn, Settings().database) as other,
    ):
        ensure_schema(other)
        assert prune_all(other, before) == []
    assert prune_all(owner, before) == [("14", 10)]


def test_nothing_is_detached_while_a_long_transaction_uses_the_log(
    owner: psycopg.Connection, any_dsn: str
) -> None:
    before = FIRST_DAY + timedelta(days=1)
    with psycopg.connect(any_dsn) as dump:
        dump.execute("SELECT count(*) FROM access_log")  # holds its locks until the end
        with pytest.raises(LogInUseError, match="perhaps a pg_dump"):
            prune_all(owner, before)
        write_entries(
            any_dsn, make_entry(500), make_entry(500 + DAY_MS)
        )  # neither old nor new days wait
        assert dump.execute("SELECT count(*) FROM access_log_20231114").fetchone() == (11,)

    assert prune_all(owner, before) == [("14", 11)]
    assert rows(owner, "SELECT count(*) FROM access_log") == [(21,)]


@pytest.mark.not_on_citus("pg_dump needs a partition in which all rows are on one node")
def test_a_dump_and_a_writer_go_on_while_a_day_is_to_leave(
    owner: psycopg.Connection, any_dsn: str
) -> None:
    """Nobody reads what pg_dump writes, so that it stops in the middle of the rows, with its locks."""
    copied = ", ".join(column for column in COLUMNS if column != "flow_id")
    owner.execute(
        f"INSERT INTO access_log (flow_id, {copied}) SELECT gen_random_uuid(), {copied} "
        "FROM access_log_20231114 CROSS JOIN generate_series(1, 4000)"
    )
    schema = schema_name(owner)
    command = [str(programs() / "pg_dump"), "-d", any_dsn, "--schema", schema, "--data-only"]
    before = FIRST_DAY + timedelta(days=1)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as dump:
        eventually(lambda: rows(owner, _DUMPED) == [(schema,)])
        with pytest.raises(LogInUseError, match="perhaps a pg_dump"):
            prune_all(owner, before)
        write_entries(any_dsn, make_entry(500), make_entry(500 + DAY_MS))
        assert dump.poll() is None
        text, errors = dump.communicate()
    assert (dump.returncode, errors) == (0, b"")
    assert text.count(b"registry.example") == 40_030
    assert prune_all(owner, before) == [("14", 40_011)]


@pytest.mark.not_on_citus("a DEFAULT partition hinders only DETACH CONCURRENTLY")
def test_day_that_somebody_detaches_after_a_run_failed_is_kept(owner: psycopg.Connection) -> None:
    before = FIRST_DAY + timedelta(days=1)
    owner.execute("CREATE TABLE elsewhere PARTITION OF access_log DEFAULT")
    with pytest.raises(psycopg.Error, match="default partition"):
        prune_all(owner, before)
    owner.execute(
        "DROP TABLE elsewhere; ALTER TABLE access_log DETACH PARTITION access_log_20231114"
    )
    assert prune_all(owner, before) == []
    assert rows(owner, "SELECT count(*) FROM access_log_20231114") == [(10,)]


def test_proxies_write_and_reports_read_while_days_leave(
    owner: psycopg.Connection, any_dsn: str
) -> None:
    before = FIRST_DAY + timedelta(days=3)
    stop = threading.Event()
    written = itertools.count(1000)

    def write_and_read() -> None:
        while not stop.is_set():
            write_entries(any_dsn, make_entry(next(written) + 10 * DAY_MS))
            with psycopg.connect(any_dsn) as reader:
                reader.execute("SELECT count(*) FROM access_log")

    with ThreadPoolExecutor(1) as pool:
        work = pool.submit(write_and_read)
        try:
            assert len(prune_all(owner, before)) == 3
        finally:
            stop.set()
        work.result(30)
    assert rows(owner, "SELECT count(*) FROM access_log") == [(next(written) - 1000,)]


def test_a_partition_of_many_days_leaves_with_its_last_day(owner: psycopg.Connection) -> None:
    owner.execute("ALTER TABLE access_log DETACH PARTITION access_log_20231114")
    owner.execute("ALTER TABLE access_log DETACH PARTITION access_log_20231115")
    owner.execute(
        "CREATE TABLE spring PARTITION OF access_log FOR VALUES FROM ('2023-11-01Z') TO ('2023-11-16Z')"
    )
    owner.execute("INSERT INTO access_log SELECT * FROM access_log_20231114")
    owner.execute("INSERT INTO access_log SELECT * FROM access_log_20231115")
    assert prune_all(owner, FIRST_DAY + timedelta(days=1)) == []
    assert prune_all(owner, FIRST_DAY + timedelta(days=2)) == [("01", 20)]
    assert rows(owner, "SELECT day::text, requests FROM access_log_pruned ORDER BY 1") == [
        ("2023-11-14", 10),
        ("2023-11-15", 10),
    ]


def test_tables_of_others_are_never_dropped(owner: psycopg.Connection) -> None:
    owner.execute("ALTER TABLE access_log DETACH PARTITION access_log_20231114")
    owner.execute("COMMENT ON TABLE access_log_20231114 IS 'Kept for the court'")

    assert prune_all(owner, FIRST_DAY + timedelta(days=1)) == []
    assert rows(owner, "SELECT count(*) FROM access_log_20231114") == [(10,)]


def test_day_that_a_view_needs_stays(owner: psycopg.Connection, any_dsn: str) -> None:
    before = FIRST_DAY + timedelta(days=1)
    owner.execute("CREATE VIEW mine AS SELECT * FROM access_log_20231114")
    owner.execute("CREATE VIEW theirs AS SELECT * FROM access_log")
    with pytest.raises(KeptDaysError, match=r"access_log_20231114 .* because view mine depends"):
        prune_all(owner, before)
    done = call("--dsn", any_dsn, "prune", "--keep", "90d")
    assert (done.returncode, "let it read access_log" in done.stderr) == (1, True)
    assert rows(owner, "SELECT count(*) FROM access_log") == [(10,)]  # the other days left
    owner.execute("DROP VIEW mine")
    assert prune_all(owner, before) == [("14", 10)]


def test_partition_of_another_schema_is_archived_itself(
    owner: psycopg.Connection, any_postgres: Postgres, tmp_path: Path
) -> None:
    before = FIRST_DAY + timedelta(days=2)
    with temporary_schema(any_postgres) as elsewhere:
        schema = elsewhere.split("search_path=")[1]
        owner.execute(f"ALTER TABLE access_log_20231114 SET SCHEMA {schema}".encode())
        owner.execute("CREATE TABLE access_log_20231114 (LIKE access_log)")
        owner.execute(f"ALTER TABLE access_log_20231115 SET SCHEMA {schema}".encode())
        assert [it.rows for it in prune(owner, before, tmp_path)] == [10, 10]
    assert [rows_in_archive(tmp_path, day) for day in archived_days(tmp_path)] == [10, 10]
    assert rows(owner, "SELECT count(*) FROM access_log_20231114") == [(0,)]


def test_days_ahead_exist_before_they_begin(dsn: str, query: Query) -> None:
    with connect(dsn, Settings().database) as connection:
        ensure_schema(connection)
        create_days_ahead(connection)
        create_days_ahead(connection)
    assert query(
        "SELECT (max(until_at) - now()) > interval '3 days' FROM access_log_partitions"
    ) == [(True,)]
    assert query("SELECT count(*) FROM access_log_partitions") == [(4,)]


def test_today_and_whole_days_before_it_are_kept() -> None:
    now = datetime(2026, 11, 27, 23, 59, tzinfo=UTC)
    assert oldest_kept(1, now) == datetime(2026, 11, 26, tzinfo=UTC)
    assert oldest_kept(90, now) == datetime(2026, 8, 29, tzinfo=UTC)


def test_days_of_a_partition_follow_its_bounds() -> None:
    zone = datetime.fromisoformat("2026-01-01T05:30:00+05:30")
    partition = Partition("s", "p", zone, zone + timedelta(days=2), 0, "attached")
    assert [str(day) for day in partition.days] == ["2026-01-01", "2026-01-02"]


@contextlib.contextmanager
def housekeeping(settings: Settings) -> Iterator[Housekeeping]:
    running = Housekeeping(settings, first_seconds=0)
    try:
        yield running
    finally:
        running.stop()


@pytest.mark.usefixtures("owner")
def test_proxy_keeps_its_table_in_order(any_dsn: str, caplog: pytest.LogCaptureFixture) -> None:
    settings = Settings(retention=RetentionSettings(days=30)).with_dsn(any_dsn)
    with (
        caplog.at_level("INFO"),
        housekeeping(settings),
        psycopg.connect(any_dsn, autocommit=True) as other,
    ):
        eventually(lambda: rows(other, "SELECT count(*) FROM access_log") == [(0,)])
        eventually(lambda: rows(other, "SELECT sum(requests) FROM access_log_daily") == [(30,)])
        eventually(lambda: rows(other, "SELECT count(*) FROM access_log_partitions") == [(4,)])
        eventually(lambda: "pruned access_log_20231116: 10 rows" in caplog.text)


@pytest.mark.usefixtures("owner")
def test_one_proxy_of_a_fleet_does_it(any_dsn: str) -> None:
    settings = Settings(retention=RetentionSettings(days=30)).with_dsn(any_dsn)
    with contextlib.ExitStack() as fleet, psycopg.connect(any_dsn, autocommit=True) as other:
        for _ in range(5):
            fleet.enter_context(housekeeping(settings))
        eventually(lambda: rows(other, "SELECT count(*) FROM access_log") == [(0,)])
        eventually(lambda: rows(other, "SELECT sum(requests) FROM access_log_pruned") == [(30,)])
        assert rows(other, "SELECT count(*) FROM access_log_rollup") == [(3,)]


def test_role_that_may_only_write_says_what_to_do(
    dsn: str, caplog: pytest.LogCaptureFixture
) -> None:
    write_entries(dsn, make_entry(1))
    with connect(dsn, Settings().database) as connection:
        schema = schema_name(connection)
        proxy = f"{schema}_proxy"
        connection.execute(f"CREATE ROLE {proxy} LOGIN".encode())
        connection.execute(grants(schema, proxy, proxy, is_distributed=bool(CLUSTER_DSN)).encode())
        as_proxy = dsn.replace("user=postgres", f"user={proxy}")
        try:
            with connect(as_proxy, Settings().database) as session:
                assert not owns_log(session)
            with housekeeping(Settings(retention=RetentionSettings(days=1)).with_dsn(as_proxy)):
                eventually(lambda: "run `artifactapi prune` as its owner" in caplog.text)
            done = call("--dsn", as_proxy, "prune", "--keep", "30d")
            assert done.returncode == 1
            assert "does not own the table access_log" in done.stderr
        finally:
            connection.execute(f"DROP OWNED BY {proxy}; DROP ROLE {proxy}".encode())
        assert connection.execute("SELECT count(*) FROM access_log").fetchone() == (1,)


def test_command_does_not_disturb_a_proxy_at_it(dsn: str, query: Query) -> None:
    write_entries(dsn, make_entry(1))
    with (
        connect(dsn, Settings().database) as proxy,
        only_session(proxy, HOUSEKEEPING) as is_free,
    ):
        assert is_free
        done = call("--dsn", dsn, "prune", "--keep", "90d")
        assert (done.returncode, done.stdout) == (1, "")
        assert "A proxy or another `artifactapi prune` is at it already" in done.stderr
        assert query("SELECT count(*) FROM access_log") == [(1,)]


def test_command_lists_then_prunes(dsn: str, query: Query) -> None:
    write_entries(dsn, make_entry(1), make_entry(1 + DAY_MS))
    in_new_york = f"{dsn}\\ -ctimezone=America/New_York"  # days are those of UTC
    done = call("--dsn", in_new_york, "prune", "--keep", "90d", "--dry-run")
    assert (done.returncode, done.stderr) == (0, "")
    assert [line.split()[:3] for line in done.stdout.splitlines()[:2]] == [
        ["2023-11-14", "1", "row"],
        ["2023-11-15", "1", "row"],
    ]
    assert "2 rows from before" in done.stdout
    assert query("SELECT count(*) FROM access_log") == [(2,)]

    done = call("--dsn", dsn, "prune", "--keep", "90d")
    assert (done.returncode, done.stderr) == (0, "")
    assert query("SELECT count(*) FROM access_log") == [(0,)]
    assert query("SELECT sum(requests) FROM access_log_daily") == [(2,)]


@pytest.mark.parametrize("keep", ["0d", "36h", "soon", "-1d", "10", "36501d"])
def test_command_rejects_other_spans(dsn: str, keep: str) -> None:
    done = call("--dsn", dsn, "prune", f"--keep={keep}")
    assert done.returncode == 2
    assert (
        f"--keep {keep!r} is not valid; expected whole days, such as 90d, at most 36500."
        in done.stderr
    )


def test_command_needs_to_know_how_long(dsn: str) -> None:
    done = call("--dsn", dsn, "prune")
    assert done.returncode == 2
    assert "Nothing says how long to keep rows" in done.stderr


def test_archived_days_leave_and_every_row_is_in_a_file(
    owner: psycopg.Connection, any_dsn: str, tmp_path: Path
) -> None:
    before = FIRST_DAY + timedelta(days=2)
    archive = tmp_path / "archive"
    assert [it.rows for it in prune(owner, before, archive)] == [10, 10]
    write_entries(any_dsn, fetch(5), fetch(77))  # one of them is in the archive already
    assert [it.rows for it in prune(owner, before, archive)] == [1]

    assert archived_days(archive) == [FIRST_DAY.date(), FIRST_DAY.date() + timedelta(days=1)]
    assert rows_in_archive(archive, FIRST_DAY.date()) == 11
    assert len(verify_day(archive, FIRST_DAY.date())) == 2


def test_row_that_arrives_while_another_is_deleted_is_archived(
    owner: psycopg.Connection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def late(connection: psycopg.Connection, partition: Partition) -> None:
        """As many rows as when they were archived, but others."""
        connection.execute(
            "DELETE FROM access_log_20231114 WHERE flow_id = (SELECT min(flow_id::text)::uuid FROM access_log_20231114)"
        )
        connection.execute(
            "INSERT INTO access_log (started_at, flow_id, node) VALUES ('2023-11-14T20:00Z', gen_random_uuid(), 'late')"
        )
        detach(connection, partition)

    monkeypatch.setattr("exporter.retention.prune.detach", late)
    assert [it.rows for it in prune(owner, FIRST_DAY + timedelta(days=1), tmp_path)] == [10]
    assert rows_in_archive(tmp_path, FIRST_DAY.date()) == 11


@pytest.fixture
def ledger(any_dsn: str) -> Iterator[Database]:
    """A writer with a ledger."""
    counts = RunLedger(Run.start("gate"), lambda: RunCounts(0, 0, 0, 0, 0))
    database = Database(DatabaseSettings(dsn=any_dsn), ledger=counts)
    database.open()
    yield database
    database.close()


_BATCH = [fetch(n, f"pkg:pypi/demo@{n % 3}.0", node="gate") for n in range(10)]
_LATER = [fetch(n, node="gate") for n in range(50, 60)]
_ARTIFACTS = (
    "SELECT purl, fetches, bytes, first_seen, last_seen, first_user FROM artifact ORDER BY 1"
)


@pytest.mark.parametrize("again", [_BATCH, [*_BATCH[:4], *_LATER]])
def test_rows_that_are_written_again_after_they_left_count_once(
    any_dsn: str, ledger: Database, tmp_path: Path, again: list[AccessLogEntry]
) -> None:
    """As from a spool, if the answer to their batch was lost."""
    late = [entry for entry in again if entry not in _BATCH]
    before = FIRST_DAY + timedelta(days=1)
    settings = DatabaseSettings(dsn=any_dsn)
    with connect(any_dsn, settings) as connection:
        assert ledger.write(_BATCH) == []
        artifacts = rows(connection, _ARTIFACTS)
        assert [it.rows for it in keep_in_order(connection, settings, before, tmp_path)] == [10]
        assert ledger.write(again) == []

        # Without a prune, the rollups and the table come right.
        assert list(keep_in_order(connection, settings, None, tmp_path)) == []
        total = 10 + len(late)
        assert rows(connection, "SELECT count(*) FROM access_log") == [(len(late),)]
        assert rows(connection, "SELECT sum(requests) FROM access_log_daily") == [(total,)]
        if not late:
            assert rows(connection, _ARTIFACTS) == artifacts
        assert rows(connection, "SELECT sum(fetches) FROM artifact") == [(total,)]
        for arguments in ((), ("--archive", str(tmp_path))):
            audit = call("--dsn", any_dsn, "audit", *arguments)
            assert f"{total} requests seen" in audit.stdout, audit
            assert "missing" not in audit.stdout, audit

        # A prune alone does it too.
        assert ledger.write(again) == []
        assert [it.rows for it in prune(connection, before, tmp_path)] == [len(late)]
        assert rows(connection, "SELECT sum(requests) FROM access_log_pruned") == [(total,)]
        assert rows(connection, "SELECT sum(requests) FROM access_log_daily") == [(total,)]
        assert rows(connection, "SELECT sum(fetches) FROM artifact") == [(total,)]
        assert rows_in_archive(tmp_path, FIRST_DAY.date()) == total

        # A day that is restored is no repetition.
        assert ledger.write(again) == []
        restored = restore_day(connection, tmp_path, FIRST_DAY.date())
        assert (restored.rows, restored.inserted, restored.counted_twice) == (total, total, False)
        assert list(keep_in_order(connection, settings, None, tmp_path)) == []
        assert rows(connection, "SELECT count(*) FROM access_log") == [(total,)]
        assert rows(connection, "SELECT sum(requests) FROM access_log_daily") == [(total,)]
        audit = call("--dsn", any_dsn, "audit")
        assert f"{total} requests seen; {total} rows found" in audit.stdout, audit
        assert [it.rows for it in prune(connection, before, tmp_path)] == [total]
        assert rows(connection, "SELECT sum(requests) FROM access_log_daily") == [(total,)]


def test_archive_of_another_log_is_refused(
    owner: psycopg.Connection, any_postgres: Postgres, tmp_path: Path
) -> None:
    before = FIRST_DAY + timedelta(days=1)
    list(prune(owner, before, tmp_path))
    (tmp_path / "artifactapi.json").unlink()  # an archive of an earlier version
    assert [it.rows for it in prune(owner, before + timedelta(days=1), tmp_path)] == [10]
    with (
        temporary_schema(any_postgres) as other_dsn,
        connect(other_dsn, DatabaseSettings()) as other,
    ):
        write_entries(other_dsn, fetch(1))
        with pytest.raises(KeptDaysError, match=rf"{tmp_path} has the days of another log"):
            list(prune(other, before, tmp_path))
        assert rows(other, "SELECT count(*) FROM access_log") == [(1,)]
        (tmp_path / "artifactapi.json").write_text("{}")
        with pytest.raises(KeptDaysError, match="does not say which log"):
            list(prune(other, before, tmp_path))
    assert rows_in_archive(tmp_path, FIRST_DAY.date()) == 10


def test_rows_that_an_interrupted_prune_has_archived_are_not_taken_for_repeated_ones(
    owner: psycopg.Connection, any_dsn: str, tmp_path: Path
) -> None:
    before = FIRST_DAY + timedelta(days=1)
    list(prune(owner, before, tmp_path))
    write_entries(any_dsn, fetch(77), fetch(78))
    archive_day(owner, "access_log_20231114", FIRST_DAY.date(), tmp_path)  # and killed
    list(keep_in_order(owner, DatabaseSettings(dsn=any_dsn), None, tmp_path))
    assert rows(owner, "SELECT count(*) FROM access_log") == [(22,)]
    assert [it.rows for it in prune(owner, before, tmp_path)] == [2]
    assert rows(owner, "SELECT sum(requests) FROM access_log_pruned") == [(12,)]


def test_rows_that_an_earlier_version_pruned_are_known_too(
    owner: psycopg.Connection, any_dsn: str, tmp_path: Path
) -> None:
    before = FIRST_DAY + timedelta(days=1)
    list(prune(owner, before, tmp_path))
    owner.execute("UPDATE access_log_rollup SET archive_files = NULL")
    write_entries(any_dsn, fetch(3), fetch(77))
    assert [it.rows for it in prune(owner, before, tmp_path)] == [1]
    assert rows(owner, "SELECT sum(requests) FROM access_log_pruned") == [(11,)]
    write_entries(any_dsn, fetch(3), fetch(77))
    assert [it.rows for it in prune(owner, before, tmp_path)] == [0]
    done = restore_day(owner, tmp_path, FIRST_DAY.date())
    assert (done.inserted, done.counted_twice) == (11, False)
    assert rows(owner, "SELECT count(*) FROM access_log_pruned") == [(0,)]


def test_day_stays_if_it_cannot_be_archived(owner: psycopg.Connection, tmp_path: Path) -> None:
    (tmp_path / "archive").write_text("a file")
    with pytest.raises(KeptDaysError, match="access_log_20231114 and 1 more could not be removed"):
        list(prune(owner, FIRST_DAY + timedelta(days=2), tmp_path / "archive"))
    assert rows(owner, "SELECT count(*) FROM access_log") == [(30,)]


def test_day_that_cannot_be_archived_does_not_hold_up_the_others(
    owner: psycopg.Connection, any_dsn: str, tmp_path: Path
) -> None:
    list(prune(owner, FIRST_DAY + timedelta(days=1), tmp_path))
    (file,) = tmp_path.glob("day=2023-11-14/*.parquet")
    file.write_bytes(file.read_bytes()[:-100])
    write_entries(any_dsn, fetch(77))
    done = call("--dsn", any_dsn, "prune", "--keep", "1d", "--archive", str(tmp_path))
    assert done.returncode == 1
    assert "access_log_20231114 and 1 more could not be removed: " in done.stderr
    assert "is damaged" in done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["2023-11-15", "2023-11-16"]
    assert rows(owner, _DAYS) == [("2023-11-14",)]
    # The steps after the prune ran too.
    assert rows(owner, "SELECT count(*) FROM access_log_rollup_month") == [(1,)]
