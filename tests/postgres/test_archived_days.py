"""`--archive`: commands return for days in files, in the table, or in both what they return for days in the table."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import re
import shutil
import sys
from datetime import UTC, date, datetime, timedelta
from typing import TYPE_CHECKING, Any

import duckdb
import psycopg
import pytest
from click.testing import CliRunner
from msgspec.structs import replace

from addon.cli.main import main
from exporter import Settings
from exporter.archive.files import archive_day, archived_days
from exporter.archive.parquet import ArchiveError
from exporter.postgres.locks import HOUSEKEEPING, only_session
from exporter.postgres.schema import grants, schema_name
from exporter.read import archived
from exporter.read.archived import rows_loaded, with_archive
from exporter.read.export import stream_rows
from exporter.read.report import make_report
from exporter.read.sbom import sbom
from exporter.read.selection import FILTER_NAMES, Selection
from exporter.read.session import open_database
from exporter.read.tail import tail
from exporter.retention import restore
from exporter.retention.days import detach, drop, old_partitions
from exporter.retention.prune import prune
from exporter.retention.restore import DayBusyError, restore_day
from exporter.retention.rollups import roll_up
from tests.support.citus import CLUSTER_DSN
from tests.support.seeded_log import Plan, seeded_log

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from click.testing import Result

    from exporter.postgres.connection import DeadlineConnection
    from tests.support.access_log import AccessLog
    from tests.support.postgres import Postgres

pytestmark = pytest.mark.slow

ROWS = 1600
NOW = datetime(2026, 5, 31, 15, 30, tzinfo=UTC)
DAYS = [date(2026, 5, day) for day in (28, 29, 30, 31)]  # the first and the last are not whole
ONLY_IN_FILES, IN_BOTH, PARTLY_IN_BOTH, ONLY_IN_TABLE = DAYS
ROLE = "archive_reader"
SELECTIONS = {
    "all rows": {},
    "remote": {"remote": "pypi"},
    "host with wildcard": {"host": "*.example"},
    "package with wildcard": {"package": "*a*"},
    "method": {"method": "get"},
    "status": {"status": "404"},
    "status class": {"status": "4xx"},
    "no response": {"status": "none"},
    "failed": {"failed": "yes"},
    "not failed": {"failed": "no"},
    "any error": {"error": "any"},
    "no error": {"error": "none"},
    "error type": {"error": "connect"},
    "slower": {"slower": "50ms"},
    "user": {"user": "web-*"},
    "who with wildcard": {"who": "web-*7*"},
    "who as address": {"who": "10.20.0.7"},
    "client": {"client": "10.20.0.3"},
    "client network": {"client": "10.20.0.0/29"},
    "node": {"node": "seed-2"},
    "text": {"text": "AMBER"},
    "text outside ASCII": {"text": "\u00e9"},
    "time": {"since": "2026-05-29T07:00Z", "until": "2026-05-30T08:00Z"},
    "nothing": {"since": "2025-01-01T00:00Z", "until": "2025-02-01T00:00Z"},
    "several": {
        "remote": "npm",
        "status": "2xx",
        "since": "2026-05-28T20:00Z",
        "client": "10.20.0.0/16",
    },
}


class Logs:
    """The same rows twice: all of them in a table, and partly in an archive."""

    def __init__(self, whole: str, rest: str, folder: Path) -> None:
        self.whole = whole
        self.rest = rest
        self.folder = folder


@contextlib.contextmanager
def split_log(server: Postgres, folder: Path) -> Iterator[Logs]:
    plan = Plan(ROWS, NOW, days=3, seed=5)
    with seeded_log(server, plan) as whole, seeded_log(server, plan) as rest:
        with psycopg.connect(rest.dsn, autocommit=True) as connection:
            _archive_some(connection, folder)
        yield Logs(whole.dsn, rest.dsn, folder)


@pytest.fixture(scope="module")
def logs(postgres: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Logs]:
    with split_log(postgres, tmp_path_factory.mktemp("archive")) as logs:
        yield logs


@pytest.fixture(scope="module")
def any_logs(any_postgres: Postgres, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Logs]:
    with split_log(any_postgres, tmp_path_factory.mktemp("archive")) as logs:
        yield logs


def _archive_some(connection: psycopg.Connection[Any], folder: Path) -> None:
    for day in (ONLY_IN_FILES, IN_BOTH, PARTLY_IN_BOTH):
        partition = f"access_log_{day:%Y%m%d}"
        noon = datetime(day.year, day.month, day.day, 20, tzinfo=UTC)
        # Two files for each day: the rows of the evening arrive late.
        connection.execute(
            f"CREATE TEMP TABLE early AS SELECT * FROM {partition} WHERE started_at < '{noon}'".encode()
        )
        assert archive_day(connection, "early", day, folder).written > 10
        connection.execute("DROP TABLE early")
        assert archive_day(connection, partition, day, folder).written > 10
        if day == ONLY_IN_FILES:
            connection.execute(f"DROP TABLE {partition}".encode())
        elif day == PARTLY_IN_BOTH:
            connection.execute(f"DELETE FROM {partition} WHERE status_code <> 200".encode())
    # The tables must be all that differs.
    connection.execute("ANALYZE access_log")


@contextlib.contextmanager
def opened(dsn: str) -> Iterator[DeadlineConnection]:
    with open_database(Settings().with_dsn(dsn)) as connection:
        yield connection


def newest(dsn: str, selection: Selection, count: int, archive: Path | None = None) -> list[Any]:
    notices: list[str] = []
    batches = tail(
        Settings().with_dsn(dsn),
        selection,
        count,
        following=False,
        as_json=True,
        notify=notices.append,
        archive=archive,
    )
    rows = [row for batch in batches for row in batch]
    assert notices == []
    return rows


@pytest.mark.parametrize("texts", SELECTIONS.values(), ids=SELECTIONS)
def test_commands_return_the_same_as_without_an_archive(logs: Logs, texts: dict[str, str]) -> None:
    selection = Selection.parse(texts)
    since = selection.since or NOW - timedelta(days=4)
    in_time = Selection.parse({**texts, "since": since.isoformat()})
    with opened(logs.whole) as whole, opened(logs.rest) as rest:
        rows = list(stream_rows(whole, selection, "jsonl"))
        assert list(stream_rows(rest, selection, "jsonl", archive=logs.folder)) == rows
        expected = replace(make_report(whole, in_time, NOW), log=None)  # the size of the table
        assert make_report(rest, in_time, NOW, archive=logs.folder) == expected
        assert artifacts(sbom(rest, selection, logs.folder)) == artifacts(sbom(whole, selection))
    for count in (1, 30, 2 * ROWS):
        assert newest(logs.rest, in_time, count, logs.folder) == newest(logs.whole, in_time, count)
    assert bool(rows) == ("2025" not in str(texts) and "\u00e9" not in str(texts))


def test_every_filter_is_tried() -> None:
    """A new filter must mean the same in DuckDB, or be left to PostgreSQL: see `Selection.portable_where`."""
    assert {name for texts in SELECTIONS.values() for name in texts} == set(FILTER_NAMES)


def artifacts(document: str) -> Any:
    """The artifacts of an SBOM without its random references, which also decide the order of their files."""
    found = json.loads(re.sub(r"BomRef[.\d]+", "", document)).get("components")
    for artifact in found or ():
        artifact.get("components", []).sort(key=json.dumps)
    return found


def test_csv_has_one_header(logs: Logs) -> None:
    with opened(logs.rest) as connection:
        lines = stream_rows(connection, Selection(), "csv", archive=logs.folder)
        rows = list(csv.DictReader(io.StringIO(b"".join(lines).decode())))
    assert len(rows) == ROWS
    assert len({row["flow_id"] for row in rows}) == ROWS
    assert rows == sorted(rows, key=lambda row: (row["started_at"], row["flow_id"]))


def test_tail_stops_at_the_day_that_no_older_one_can_beat(
    logs: Logs, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[date] = []
    load = archived.ArchiveLoader.load

    def record(self: Any, selection: Any, spans: Any, **options: Any) -> None:
        loaded.extend(span.day for span in spans)
        load(self, selection, spans, **options)

    monkeypatch.setattr(archived.ArchiveLoader, "load", record)
    newest(logs.rest, Selection(), 5, logs.folder)
    assert loaded == []
    newest(logs.rest, Selection(until=datetime(2026, 5, 29, tzinfo=UTC)), 5, logs.folder)
    assert loaded == [ONLY_IN_FILES]


def test_nothing_is_left_behind(logs: Logs) -> None:
    with opened(logs.rest) as connection:
        make_report(connection, Selection(), NOW, archive=logs.folder)
        left = connection.execute(
            "SELECT count(*) FROM pg_class WHERE relnamespace = pg_my_temp_schema()"
        ).fetchone()
        assert left == (0,)
        with_files = make_report(connection, Selection(since=NOW - timedelta(days=4)), NOW)
    assert with_files.requests < ROWS


def test_reader_role_needs_only_its_grants_and_temporary_tables(
    any_logs: Logs,
) -> None:
    logs = any_logs
    with psycopg.connect(logs.rest, autocommit=True) as owner:
        schema = schema_name(owner)
        owner.execute(f"CREATE ROLE {ROLE} LOGIN; CREATE ROLE archive_proxy".encode())
        owner.execute(
            grants(schema, "archive_proxy", ROLE, is_distributed=bool(CLUSTER_DSN)).encode()
        )
        owner.execute(f"ALTER ROLE {ROLE} SET default_transaction_read_only = on".encode())
        try:
            reader = logs.rest.replace("user=postgres", f"user={ROLE}")
            assert (
                len(newest(reader, Selection(since=NOW - timedelta(days=4)), 2 * ROWS, logs.folder))
                == ROWS
            )
            database = owner.info.dbname
            owner.execute(f"REVOKE TEMPORARY ON DATABASE {database} FROM PUBLIC".encode())
            with pytest.raises(ArchiveError, match=f"GRANT TEMPORARY ON DATABASE {database}"):
                newest(reader, Selection(), 5, logs.folder)
        finally:
            owner.execute(f"GRANT TEMPORARY ON DATABASE {database} TO PUBLIC".encode())
            owner.execute(f"DROP OWNED BY {ROLE}, archive_proxy".encode())
            owner.execute(f"DROP ROLE {ROLE}, archive_proxy".encode())


def test_loaded_rows_are_bounded(logs: Logs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archived, "MAX_LOADED_ROWS", 1100)
    with opened(logs.rest) as connection:
        with pytest.raises(ArchiveError, match="More than 1,100 archived rows match"):
            make_report(connection, Selection(since=NOW - timedelta(days=4)), NOW, logs.folder)
        # A day at a time is fine: an export may cover any number of days.
        rows = stream_rows(connection, Selection(), "jsonl", archive=logs.folder)
        assert sum(1 for _ in rows) == ROWS


def test_no_day_leaves_the_table_while_a_command_reads(any_logs: Logs) -> None:
    logs = any_logs
    with opened(logs.rest) as reader, psycopg.connect(logs.rest, autocommit=True) as owner:
        owner.execute("SET lock_timeout = '200ms'")
        with with_archive(reader, logs.folder):
            for statement in (
                f"DROP TABLE access_log_{IN_BOTH:%Y%m%d}",
                f"ALTER TABLE access_log DETACH PARTITION access_log_{IN_BOTH:%Y%m%d}",
            ):
                with pytest.raises(psycopg.errors.LockNotAvailable):
                    owner.execute(statement.encode())


def test_rows_are_read_in_one_read_only_transaction(logs: Logs) -> None:
    with opened(logs.rest) as connection, rows_loaded(connection, logs.folder, Selection()):
        with pytest.raises(psycopg.errors.ReadOnlySqlTransaction), connection.transaction():
            connection.execute("DELETE FROM artifact_by_node")
        settings = connection.execute(
            "SELECT current_setting('transaction_isolation'), current_setting('transaction_read_only')"
        )
        assert settings.fetchone() == ("repeatable read", "on")


# --- the commands


def call(dsn: str, *arguments: str) -> Result:
    return CliRunner().invoke(main, ["--dsn", dsn, *arguments])


def test_command_line_takes_the_folder(logs: Logs) -> None:
    given = ("--archive", str(logs.folder), "--since", "2026-05-01")
    done = call(logs.rest, "tail", *given, "--json")
    assert len(done.stdout.splitlines()) == ROWS
    summary = call(logs.rest, "report", *given, "--until", "2026-06-01", "--json")
    assert json.loads(summary.stdout)["requests"] == ROWS
    assert len(call(logs.rest, "export", "jsonl", *given).stdout.splitlines()) == ROWS
    missing = call(logs.rest, "tail", "--archive", "/no/such/folder")
    assert (missing.exit_code, "does not exist" in missing.stderr) == (2, True)


def test_missing_package_is_named(logs: Logs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "duckdb", None)
    for command in (("tail",), ("report",), ("export", "csv"), ("audit",)):
        done = call(logs.rest, *command, "--since", "2026-05-01", "--archive", str(logs.folder))
        assert done.exit_code == (3 if command == ("audit",) else 1)
        assert "need an optional package: pip install 'duckdb>=1.4,<3'.\n" in done.stderr
    done = call(logs.rest, "export", "parquet", "-o", str(logs.folder / "rows.parquet"))
    assert done.exit_code == 1
    assert "Error: Parquet files need an optional package: pip install 'duckdb" in done.stderr
    assert not (logs.folder / "rows.parquet").exists()


def test_damaged_file_is_named(logs: Logs, tmp_path: Path) -> None:
    folder = tmp_path / "archive"
    shutil.copytree(logs.folder, folder)
    damaged = next(folder.glob(f"day={ONLY_IN_FILES}/*.parquet"))
    damaged.write_bytes(b"PAR1 is not enough")
    for command in (
        ("tail", "--since", "2026-05-01"),
        ("report", "--since", "2026-05-01"),
        ("export", "csv"),
    ):
        done = call(logs.rest, *command, "--archive", str(folder))
        assert done.exit_code == 1
        assert f"{damaged} is damaged" in done.stderr


def test_parquet_is_written_to_a_file(logs: Logs, tmp_path: Path) -> None:
    file = tmp_path / "rows.parquet"
    done = call(
        logs.rest,
        "export",
        "parquet",
        "-o",
        str(file),
        "--archive",
        str(logs.folder),
        "--status",
        "4xx",
    )
    assert done.exit_code == 0, done.output
    with psycopg.connect(logs.whole) as connection:
        expected = connection.execute(
            "SELECT flow_id, response_bytes FROM access_log WHERE status_code BETWEEN 400 AND 499"
            " ORDER BY started_at, flow_id"
        ).fetchall()
    with duckdb.connect() as reader:
        query = "SELECT flow_id, response_bytes FROM read_parquet(?)"
        assert reader.execute(query, [str(file)]).fetchall() == expected
    assert done.stderr == f"{len(expected)} rows written to {file}.\n"
    assert [*tmp_path.iterdir()] == [file]


def test_failed_export_keeps_the_former_file(logs: Logs, tmp_path: Path) -> None:
    file = tmp_path / "rows.parquet"
    file.write_bytes(b"former")
    folder = tmp_path / "archive"
    shutil.copytree(logs.folder, folder)
    # The file is damaged between its head and its end, so that reading begins and then fails.
    damaged = max(
        folder.glob(f"day={PARTLY_IN_BOTH}/*.parquet"), key=lambda path: path.stat().st_size
    )
    content = bytearray(damaged.read_bytes())
    content[1000 : len(content) // 2] = bytes(len(content) // 2 - 1000)
    damaged.write_bytes(content)
    done = call(logs.rest, "export", "parquet", "-o", str(file), "--archive", str(folder))
    assert done.exit_code == 1
    assert file.read_bytes() == b"former"
    assert sorted(tmp_path.iterdir()) == [folder, file]


@pytest.mark.parametrize("arguments", [("parquet",), ("csv", "-o", "x.csv")])
def test_only_parquet_goes_to_a_file(logs: Logs, arguments: tuple[str, ...]) -> None:
    done = call(logs.rest, "export", *arguments)
    assert (done.exit_code, "parquet needs --output FILE" in done.stderr) == (2, True)


def test_export_replaces_no_link_and_no_pipe(logs: Logs, tmp_path: Path) -> None:
    file, link, pipe = (tmp_path / name for name in ("rows.parquet", "newest", "pipe"))
    link.symlink_to(file)
    os.mkfifo(pipe)
    assert call(logs.rest, "export", "parquet", "-o", str(link)).exit_code == 0
    assert link.is_symlink()
    assert file.stat().st_size > 1000
    done = call(logs.rest, "export", "parquet", "-o", str(pipe))
    assert done.stderr == f"Error: Cannot write {pipe}: it is a device or a pipe; name a file.\n"
    assert pipe.is_fifo()
    assert sorted(tmp_path.iterdir()) == sorted([file, link, pipe])


def test_unwritable_output_is_one_sentence(logs: Logs, tmp_path: Path) -> None:
    file = tmp_path / "no" / "rows.parquet"
    done = call(logs.rest, "export", "parquet", "-o", str(file))
    assert done.exit_code == 1
    assert re.fullmatch(r"Error: Cannot write .*rows\.parquet[^\n]*: [^\n]+\.\n", done.stderr)


# --- restore


@pytest.fixture
def pruned(postgres: Postgres, tmp_path: Path) -> Iterator[tuple[str, Path, list[Any], list[Any]]]:
    """A log whose only days are in files: its connection string, the folder, its former rows and artifacts."""
    with seeded_log(postgres, Plan(600, NOW, days=2, seed=2)) as log:
        rows = log.rows()
        with psycopg.connect(log.dsn, autocommit=True) as connection:
            artifacts = connection.execute("SELECT * FROM artifact ORDER BY purl").fetchall()
            for day in sorted({row["started_at"].date() for row in rows}):
                archive_day(connection, f"access_log_{day:%Y%m%d}", day, tmp_path)
                connection.execute(f"DROP TABLE access_log_{day:%Y%m%d}".encode())
        yield log.dsn, tmp_path, rows, artifacts


def test_restored_days_equal_the_former_ones(
    pruned: tuple[str, Path, list[Any], list[Any]],
) -> None:
    dsn, folder, rows, artifacts = pruned
    days = archived_days(folder)
    assert len(days) == 3
    for day in days:
        done = call(dsn, "restore", "--day", str(day), "--archive", str(folder))
        assert done.exit_code == 0, done.output
        count = sum(row["started_at"].date() == day for row in rows)
        assert done.stdout == f"{count:,} rows of {day} restored; 0 were in the log already.\n"
    with psycopg.connect(dsn, row_factory=psycopg.rows.dict_row) as connection:
        found = connection.execute("SELECT * FROM access_log ORDER BY started_at, path").fetchall()
        assert found == rows
    with psycopg.connect(dsn) as connection:
        assert connection.execute("SELECT * FROM artifact ORDER BY purl").fetchall() == artifacts
    done = call(dsn, "restore", "--day", str(days[0]), "--archive", str(folder))
    assert done.stdout.startswith("0 rows of ")


def test_restoring_completes_a_day(pruned: tuple[str, Path, list[Any], list[Any]]) -> None:
    dsn, folder, rows, _ = pruned
    day = archived_days(folder)[1]
    with psycopg.connect(dsn, autocommit=True) as connection:
        first = restore_day(connection, folder, day)
        assert first.inserted == first.rows > 100
        connection.execute("DELETE FROM access_log WHERE status_code = 200")
        again = restore_day(connection, folder, day)
        assert 0 < again.inserted < again.rows == first.rows
        # A restored day is archived already.
        assert archive_day(connection, f"access_log_{day:%Y%m%d}", day, folder).written == 0
    assert first.rows == sum(row["started_at"].date() == day for row in rows)


def test_day_with_a_computed_column_is_restored(
    pruned: tuple[str, Path, list[Any], list[Any]],
) -> None:
    dsn, folder, _, _ = pruned
    day = archived_days(folder)[1]
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(
            "ALTER TABLE access_log ADD megabytes numeric GENERATED ALWAYS AS (response_bytes / 1e6) STORED"
        )
        for _ in range(2):  # the second file has the column too
            assert restore_day(connection, folder, day).inserted > 100
            assert connection.execute("SELECT sum(megabytes) > 0 FROM access_log").fetchone() == (
                True,
            )
            for file in (folder / f"day={day}").iterdir():
                file.unlink()
            assert len(list(prune(connection, NOW + timedelta(days=1), folder))) >= 1


def totals(connection: psycopg.Connection[Any]) -> list[Any]:
    connection.execute("SET timezone = 'UTC'")
    for _ in roll_up(connection):
        pass
    query = "SELECT day, sum(requests) FROM access_log_daily GROUP BY 1 ORDER BY 1"
    return connection.execute(query).fetchall()


@pytest.fixture
def two_days(postgres: Postgres) -> Iterator[tuple[AccessLog, psycopg.Connection]]:
    """A log of two days, and a connection of its owner."""
    with (
        seeded_log(postgres, Plan(600, NOW, days=2, seed=2)) as log,
        psycopg.connect(log.dsn, autocommit=True) as connection,
    ):
        yield log, connection


def test_totals_count_a_restored_day_once(
    two_days: tuple[AccessLog, psycopg.Connection], tmp_path: Path
) -> None:
    log, connection = two_days
    expected = totals(connection)
    assert [rows for _, rows in expected] == [
        len(log.rows("started_at::date = %s", day)) for day, _ in expected
    ]
    pruned = list(prune(connection, NOW, tmp_path))
    assert len(pruned) == len(archived_days(tmp_path)) == 2
    assert totals(connection) == expected
    day = archived_days(tmp_path)[0]
    assert not restore_day(connection, tmp_path, day).counted_twice
    assert totals(connection) == expected
    query = "SELECT day FROM access_log_pruned GROUP BY 1"
    assert connection.execute(query).fetchall() == [(archived_days(tmp_path)[1],)]
    assert [p.rows for p in prune(connection, NOW, tmp_path)] == [pruned[0].rows]
    assert totals(connection) == expected


def test_totals_count_a_day_that_is_restored_after_late_rows(
    two_days: tuple[AccessLog, psycopg.Connection], tmp_path: Path
) -> None:
    log, connection = two_days
    (day, count), *_ = totals(connection)
    assert list(prune(connection, NOW, tmp_path))
    connection.execute("SELECT access_log_ensure_partition(%s)", (day,))
    connection.execute(
        "INSERT INTO access_log (started_at, flow_id, node, logged_at)"
        " VALUES (%s, gen_random_uuid(), 'test', %s)",
        (late := f"{day}T20:00Z", late),
    )
    assert totals(connection)[0] == (day, count + 1)
    assert restore_day(connection, tmp_path, day).inserted == count
    selection = Selection(since=NOW - timedelta(days=10), until=NOW)
    with open_database(Settings().with_dsn(log.dsn)) as reader:
        assert make_report(reader, selection, NOW).requests == 601
    assert totals(connection)[0] == (day, count + 1)


def test_reports_count_a_day_between_its_detachment_and_its_removal(
    two_days: tuple[AccessLog, psycopg.Connection], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, connection = two_days
    counted = []

    def drop_later(*arguments: Any) -> int:
        selection = Selection(since=NOW - timedelta(days=10), until=NOW)
        with open_database(Settings().with_dsn(log.dsn)) as reader:
            counted.append(make_report(reader, selection, NOW).requests)
        return drop(*arguments)

    monkeypatch.setattr("exporter.retention.prune.drop", drop_later)
    assert len(list(prune(connection, NOW, tmp_path))) == 2
    assert counted == [600, 600]


def test_commands_say_that_older_days_are_in_files(
    two_days: tuple[AccessLog, psycopg.Connection], tmp_path: Path
) -> None:
    log, connection = two_days
    notice = "Days until 2026-05-29 (UTC) have left the table; add --archive DIR"
    assert "have left" not in call(log.dsn, "tail", "-n", "1000").stderr
    assert len(list(prune(connection, NOW - timedelta(days=1), tmp_path))) == 1
    for incomplete in (
        ("tail", "-n", "1000"),
        ("tail", "--since", "2026-05-29"),
        ("export", "csv"),
    ):
        assert notice in call(log.dsn, *incomplete).stderr, incomplete
    complete: list[tuple[str, ...]] = [
        ("tail", "-n", "3"),
        ("tail", "--since", "2026-05-30T00:00Z"),
        ("tail", "-n", "1000", "--archive", str(tmp_path)),
        ("export", "csv", "--archive", str(tmp_path)),
    ]
    for arguments in complete:
        assert "have left" not in call(log.dsn, *arguments).stderr, arguments


def test_restore_reads_the_files_that_a_prune_wrote_just_before(
    two_days: tuple[AccessLog, psycopg.Connection], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, connection = two_days
    (day, count), *_ = totals(connection)
    assert list(prune(connection, NOW, tmp_path))
    assert restore_day(connection, tmp_path, day).inserted == count
    connection.execute(
        "INSERT INTO access_log (started_at, flow_id, node) VALUES (%s, gen_random_uuid(), 'test')",
        (f"{day}T20:00Z",),
    )
    check = restore._check_free

    def prune_first(*arguments: Any) -> None:
        with psycopg.connect(log.dsn, autocommit=True) as other:
            assert [it.rows for it in prune(other, NOW, tmp_path)] == [count + 1]
            other.execute("SELECT access_log_ensure_partition(%s)", (day,))
        check(*arguments)

    monkeypatch.setattr(restore, "_check_free", prune_first)
    done = restore_day(connection, tmp_path, day)
    assert (done.inserted, done.counted_twice) == (count + 1, False)
    assert totals(connection)[0] == (day, count + 1)


def test_day_that_is_being_pruned_is_not_restored(
    two_days: tuple[AccessLog, psycopg.Connection], tmp_path: Path
) -> None:
    log, connection = two_days
    expected = totals(connection)
    partition = old_partitions(connection, NOW)[0]
    (day,) = partition.days
    archive_day(connection, partition.table, day, tmp_path)
    detach(connection, partition)  # killed before the drop
    with pytest.raises(DayBusyError, match=f"left rows of {day} in the table {partition.name}"):
        restore_day(connection, tmp_path, day)
    with (
        psycopg.connect(log.dsn, autocommit=True) as proxy,
        only_session(proxy, HOUSEKEEPING),
    ):
        done = call(log.dsn, "restore", "--day", str(day), "--archive", str(tmp_path))
        assert done.exit_code == 1
        assert done.stderr.endswith("is rolling up or pruning the log; try again later.\n")
    assert len(list(prune(connection, NOW, tmp_path))) >= 1
    assert restore_day(connection, tmp_path, day).inserted > 0
    assert totals(connection) == expected


def test_rows_pruned_without_the_archive_keep_their_totals(
    two_days: tuple[AccessLog, psycopg.Connection], tmp_path: Path
) -> None:
    log, connection = two_days
    (day, rows), *_ = totals(connection)
    assert len(list(prune(connection, NOW, None))) == 2
    late = day.isoformat() + "T20:00Z"
    connection.execute("SELECT access_log_ensure_partition(%s)", (day,))
    insert = (
        "INSERT INTO access_log (started_at, flow_id, node) VALUES (%s, gen_random_uuid(), 'test')"
    )
    connection.execute(insert, (late,))
    assert [p.rows for p in prune(connection, NOW, tmp_path)] == [1]
    done = restore_day(connection, tmp_path, day)
    assert (done.inserted, done.counted_twice) == (1, False)
    assert totals(connection)[0] == (day, rows + 1)
    connection.execute(
        "UPDATE access_log_rollup SET requests = requests + 1 WHERE pruned_at IS NULL"
    )
    connection.execute("UPDATE access_log_rollup SET pruned_at = now()")
    output = call(log.dsn, "restore", "--day", str(day), "--archive", str(tmp_path))
    assert output.stderr.startswith(f"access_log_daily counts rows of {day} twice now")


def test_missing_day_is_named(dsn: str, tmp_path: Path) -> None:
    done = call(dsn, "restore", "--day", "2026-11-27", "--archive", str(tmp_path))
    assert done.exit_code == 1
    assert done.stderr == f"Error: The archive {tmp_path} has no rows of 2026-11-27.\n"
    done = call(dsn, "restore", "--day", "yesterday", "--archive", str(tmp_path))
    assert done.exit_code == 2


def test_role_that_may_not_write_cannot_restore(
    pruned: tuple[str, Path, list[Any], list[Any]],
) -> None:
    dsn, folder, _, _ = pruned
    day = archived_days(folder)[1]
    with psycopg.connect(dsn, autocommit=True) as owner:
        owner.execute(f"CREATE ROLE {ROLE} LOGIN; CREATE ROLE archive_proxy".encode())
        schema = schema_name(owner)
        owner.execute(
            grants(schema, "archive_proxy", ROLE, is_distributed=bool(CLUSTER_DSN)).encode()
        )
        try:
            reader = dsn.replace("user=postgres", f"user={ROLE}")
            done = call(reader, "restore", "--day", str(day), "--archive", str(folder))
            assert (done.exit_code, "permission denied" in done.stderr) == (1, True)
        finally:
            owner.execute(f"DROP OWNED BY {ROLE}, archive_proxy".encode())
            owner.execute(f"DROP ROLE {ROLE}, archive_proxy".encode())
