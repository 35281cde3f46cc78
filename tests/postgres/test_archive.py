"""Days in the archive: the files hold exactly the rows of the table, whatever happens while they are written."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import signal
import subprocess
import sys
from datetime import UTC, date, datetime, timedelta
from typing import TYPE_CHECKING, Any

import duckdb
import psycopg
import pytest

from exporter.archive import parquet
from exporter.archive.files import (
    ArchiveBusyError,
    archive_day,
    archived_days,
    files_of_day,
    rows_in_archive,
    verify_day,
)
from exporter.archive.parquet import ArchiveError
from exporter.postgres.schema import ensure_schema
from exporter.read.session import COLUMN_NAMES
from exporter.write.database import insert_access_log_batch
from tests.support.archive import small_disk
from tests.support.samples import make_entry

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.slow

DAY = date(2023, 11, 14)  # of the sample rows
PARTITION = "access_log_20231114"
HOSTILE = (
    "",
    " leading and trailing ",
    '"quoted", and, commas',
    "line\nbreak\r\nand\ra tab\t",
    "\\N",
    "\\.",
    "\\x41",
    "NULL",
    "\x01\x02\x1b]0;x\x07\x9b\u202e",
    "e\u0301 \u00e9 \U0001f4e6",
    "'; DROP TABLE access_log; --",
    "x" * 200_000,
)

type Connection = psycopg.Connection[tuple[Any, ...]]


@pytest.fixture
def connection(any_dsn: str) -> Iterator[Connection]:
    with psycopg.connect(any_dsn, autocommit=True) as connection:
        ensure_schema(connection)
        connection.execute("SELECT access_log_ensure_partition(%s)", (DAY,))
        yield connection


def write_rows(connection: Connection, *numbers: int, **changes: Any) -> None:
    insert_access_log_batch(connection, [make_entry(number, **changes) for number in numbers])


def in_files(folder: Path) -> list[tuple[Any, ...]]:
    """The values in the files as DuckDB prints them, sorted by the key."""
    with duckdb.connect() as reader:
        reader.execute("SET TimeZone = 'UTC'")
        columns = ", ".join(
            f"epoch_us({name})" if name in {"started_at", "logged_at"} else name
            for name in COLUMN_NAMES
        )
        files = str(folder / "day=*" / "*.parquet")
        query = f"SELECT {columns} FROM read_parquet(?) ORDER BY started_at, flow_id"
        return reader.execute(query, [files]).fetchall()


def in_table(connection: Connection) -> list[tuple[Any, ...]]:
    columns = ", ".join(
        f"(extract(epoch FROM {name}) * 1000000)::bigint"
        if name in {"started_at", "logged_at"}
        else f"CASE WHEN {name} IS NOT NULL THEN concat({name}) END"
        if name in {"client_ip", "server_ip"}
        else f"{name}::float8"
        if name.endswith("_ms")
        else name
        for name in COLUMN_NAMES
    )
    query = f"SELECT {columns} FROM access_log ORDER BY started_at, flow_id"
    return connection.execute(query.encode()).fetchall()


def test_file_holds_every_value(connection: Connection, tmp_path: Path) -> None:
    for number, text in enumerate(HOSTILE):
        write_rows(connection, number, path=text, error=text, proxy_user=text, package=text)
    write_rows(connection, 100, client_ip="2001:db8::1", server_ip=None, sha256=f"\\x{'0f' * 32}")
    write_rows(connection, 101, duration_ms=1e-38, ttfb_ms=3.4e38, connect_ms=0.1, status_code=None)
    write_rows(connection, 102, request_bytes=2**62, response_bytes=0, artifact_complete=False)
    write_rows(connection, 103, started_at="2023-11-14T23:59:59.999999+00:00", sha256="\\x")
    write_rows(connection, 104, requested_url="https://pypi.example/a,b")
    done = archive_day(connection, PARTITION, DAY, tmp_path / "archive")
    assert done.rows == done.written == len(HOSTILE) + 5
    assert in_files(tmp_path / "archive") == in_table(connection)


def test_file_has_the_types_and_comments_of_the_table(
    connection: Connection, tmp_path: Path
) -> None:
    write_rows(connection, 1)
    done = archive_day(connection, PARTITION, DAY, tmp_path)
    with duckdb.connect() as reader:
        described = reader.execute("DESCRIBE SELECT * FROM read_parquet(?)", [str(done.file)])
        types = {name: kind for name, kind, *_ in described.fetchall()}
        metadata = reader.execute("SELECT value FROM parquet_kv_metadata(?)", [str(done.file)])
        (text,) = metadata.fetchone() or ()
    assert tuple(types) == (*COLUMN_NAMES, "day")
    assert types.pop("day") == "DATE"  # from the name of the folder
    expected = dict.fromkeys(COLUMN_NAMES, "VARCHAR")
    expected |= dict.fromkeys(("started_at", "logged_at"), "TIMESTAMP WITH TIME ZONE")
    expected |= dict.fromkeys(("client_port", "port", "cache_age_s"), "INTEGER")
    expected |= dict.fromkeys(("request_bytes", "response_bytes"), "BIGINT")
    expected |= dict.fromkeys(("duration_ms", "ttfb_ms", "connect_ms"), "FLOAT")
    expected |= {"flow_id": "UUID", "status_code": "SMALLINT", "artifact_complete": "BOOLEAN"}
    assert types == expected | {"sha256": "BLOB"}
    assert b"started_at" in text
    assert b"Status the client received; NULL = no response, or unknown" in text


def test_rows_are_sorted_by_the_key(connection: Connection, tmp_path: Path) -> None:
    for number in (5, 1, 3, 2, 4):
        write_rows(connection, number)
    done = archive_day(connection, PARTITION, DAY, tmp_path)
    with duckdb.connect() as reader:
        rows = reader.execute("SELECT epoch_us(started_at) FROM read_parquet(?)", [str(done.file)])
        times = [at for (at,) in rows.fetchall()]
    assert times == sorted(times)
    assert len(times) == 5


def test_many_rows_keep_their_order(
    connection: Connection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet, "_ROWS_PER_PIPE", 7)
    monkeypatch.setattr(parquet, "_ROW_GROUP_ROWS", 2048)
    write_rows(connection, *random.Random(1).sample(range(5000), 5000))
    done = archive_day(connection, PARTITION, DAY, tmp_path)
    assert in_files(tmp_path) == in_table(connection)
    with duckdb.connect() as reader:
        rows = reader.execute(
            "SELECT epoch_us(started_at) FROM read_parquet(?, file_row_number = true)"
            " ORDER BY file_row_number",
            [str(done.file)],
        ).fetchall()
        groups = reader.execute(
            "SELECT count(DISTINCT row_group_id) FROM parquet_metadata(?)", [str(done.file)]
        ).fetchone()
    assert rows == sorted(rows)
    assert groups == (3,)


def test_memory_does_not_grow_with_the_rows(
    connection: Connection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DuckDB fails if it needs more than its limit. The rows have more text than that."""
    monkeypatch.setitem(parquet._SETTINGS, "memory_limit", "140MB")
    connection.execute(
        "INSERT INTO access_log (started_at, flow_id, node, path)"
        " SELECT '2023-11-14 00:00Z'::timestamptz + n * interval '1 second', gen_random_uuid(), 'test',"
        " repeat(md5(n::text), 100) FROM generate_series(1, 55000) AS n"
    )
    assert archive_day(connection, PARTITION, DAY, tmp_path).written == 55_000


def test_detached_partition_is_archived(connection: Connection, tmp_path: Path) -> None:
    write_rows(connection, *range(10))
    rows = in_table(connection)
    connection.execute(f"ALTER TABLE access_log DETACH PARTITION {PARTITION}".encode())
    assert archive_day(connection, PARTITION, DAY, tmp_path).written == 10
    assert in_files(tmp_path) == rows


def test_second_call_writes_nothing(connection: Connection, tmp_path: Path) -> None:
    write_rows(connection, *range(10))
    first = archive_day(connection, PARTITION, DAY, tmp_path)
    again = archive_day(connection, PARTITION, DAY, tmp_path)
    assert (again.rows, again.written, again.file) == (10, 0, None)
    assert files_of_day(tmp_path, DAY) == [first.file]


def test_late_rows_go_to_another_file(connection: Connection, tmp_path: Path) -> None:
    write_rows(connection, *range(10))
    archive_day(connection, PARTITION, DAY, tmp_path)
    write_rows(connection, *range(10, 13))
    done = archive_day(connection, PARTITION, DAY, tmp_path)
    assert (done.rows, done.written) == (13, 3)
    assert archive_day(connection, PARTITION, DAY, tmp_path).written == 0
    assert in_files(tmp_path) == in_table(connection)
    assert rows_in_archive(tmp_path, DAY) == 13
    assert len(files_of_day(tmp_path, DAY)) == 2


def test_row_that_arrives_again_is_not_written_again(
    connection: Connection, tmp_path: Path
) -> None:
    """A batch whose reply was lost can come back after its day was archived, with another logged_at."""
    write_rows(connection, *range(3))
    archive_day(connection, PARTITION, DAY, tmp_path)
    connection.execute("TRUNCATE access_log")
    write_rows(connection, 1, 2, 3)
    done = archive_day(connection, PARTITION, DAY, tmp_path)
    assert (done.rows, done.written) == (3, 1)
    assert rows_in_archive(tmp_path, DAY) == 4


def test_column_that_a_file_lacks_is_written(connection: Connection, tmp_path: Path) -> None:
    write_rows(connection, 1)
    archive_day(connection, PARTITION, DAY, tmp_path)
    connection.execute("ALTER TABLE access_log ADD COLUMN added numeric DEFAULT 1.50")
    write_rows(connection, 2)
    done = archive_day(connection, PARTITION, DAY, tmp_path)
    assert (done.rows, done.written) == (2, 1)
    with duckdb.connect() as reader:
        query = "SELECT added FROM read_parquet(?, union_by_name = true) ORDER BY started_at"
        rows = reader.execute(query, [[str(path) for path in files_of_day(tmp_path, DAY)]])
        assert sorted(rows.fetchall(), key=repr) == [("1.50",), (None,)]


def test_empty_table_leaves_no_file(connection: Connection, tmp_path: Path) -> None:
    done = archive_day(connection, PARTITION, DAY, tmp_path)
    assert (done.rows, done.written, done.file) == (0, 0, None)
    assert archived_days(tmp_path) == []


def test_hidden_files_are_no_part_of_a_day(connection: Connection, tmp_path: Path) -> None:
    write_rows(connection, 1)
    done = archive_day(connection, PARTITION, DAY, tmp_path)
    (tmp_path / f"day={DAY}" / "._access_log.parquet").write_bytes(b"not Parquet")
    assert files_of_day(tmp_path, DAY) == [done.file]
    assert archive_day(connection, PARTITION, DAY, tmp_path).rows == 1


def test_days_are_listed_in_order(connection: Connection, tmp_path: Path) -> None:
    for days in (2, 0, 1):
        day = DAY + timedelta(days=days)
        at = datetime(day.year, day.month, day.day, 22, 14, tzinfo=UTC)
        connection.execute("SELECT access_log_ensure_partition(%s)", (day,))
        write_rows(connection, days, started_at=at.isoformat())
        archive_day(connection, f"access_log_{day:%Y%m%d}", day, tmp_path)
    for name in ("day=2020-01-01", "day=2020-02-31", "other"):
        (tmp_path / name).mkdir()
    assert archived_days(tmp_path) == [DAY + timedelta(days=days) for days in range(3)]


def test_partition_of_several_days_is_archived_by_day(
    connection: Connection, tmp_path: Path
) -> None:
    next_day = DAY + timedelta(days=1)
    connection.execute("SELECT access_log_ensure_partition(%s)", (next_day,))
    write_rows(connection, 1, 2)
    write_rows(connection, 3, started_at="2023-11-15T00:00:00+00:00")
    assert archive_day(connection, "access_log", DAY, tmp_path).rows == 2
    assert archive_day(connection, "access_log", next_day, tmp_path).written == 1
    assert in_files(tmp_path) == in_table(connection)


# --- faults


def test_damaged_file_is_named_and_nothing_is_skipped(
    connection: Connection, tmp_path: Path
) -> None:
    write_rows(connection, *range(50))
    done = archive_day(connection, PARTITION, DAY, tmp_path)
    assert done.file is not None
    content = bytearray(done.file.read_bytes())
    assert verify_day(tmp_path, DAY)[0].rows == 50
    content[100] ^= 0xFF  # among the values of the first column
    done.file.write_bytes(content)
    with pytest.raises(ArchiveError, match=f"{done.file} is damaged"):
        verify_day(tmp_path, DAY)
    with pytest.raises(ArchiveError, match=f"{done.file} is damaged"):
        archive_day(connection, PARTITION, DAY, tmp_path)
    done.file.write_bytes(content[: len(content) // 2])
    with pytest.raises(ArchiveError, match=f"{done.file} is damaged"):
        rows_in_archive(tmp_path, DAY)


def test_foreign_file_is_refused(connection: Connection, tmp_path: Path) -> None:
    write_rows(connection, 1)
    (tmp_path / f"day={DAY}").mkdir()
    with duckdb.connect() as writer:
        writer.execute(f"COPY (SELECT 1 AS x) TO '{tmp_path}/day={DAY}/x.parquet' (FORMAT parquet)")
    with pytest.raises(ArchiveError, match="not from an archive of artifactapi"):
        archive_day(connection, PARTITION, DAY, tmp_path)


def test_two_archivers_take_turns(connection: Connection, tmp_path: Path) -> None:
    write_rows(connection, 1)
    archive_day(connection, PARTITION, DAY, tmp_path)
    code = (
        "import fcntl, sys; f = open(sys.argv[1]); fcntl.flock(f, fcntl.LOCK_EX);"
        " print('locked', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"locked\n"
        with pytest.raises(ArchiveBusyError, match="Another process is writing to the archive"):
            archive_day(connection, PARTITION, DAY, tmp_path)
        other.communicate()
    assert archive_day(connection, PARTITION, DAY, tmp_path).rows == 1


def test_leftovers_of_a_killed_archiver_are_removed(connection: Connection, tmp_path: Path) -> None:
    write_rows(connection, 1)
    (tmp_path / "day=2020-01-01").mkdir()
    partial = tmp_path / "day=2020-01-01" / "access_log-0123456789abcdef.partial"
    partial.write_bytes(b"PAR1")
    other = partial.with_name("access_log-0123456789abcdef.parquet.x1.partial")  # of rclone
    other.write_bytes(b"PAR1")
    archive_day(connection, PARTITION, DAY, tmp_path)
    assert not partial.exists()
    assert other.exists()


def test_full_disk_leaves_nothing(connection: Connection, tmp_path: Path) -> None:
    write_rows(connection, *range(3000), error=None)
    connection.execute(
        "UPDATE access_log SET path = md5(flow_id::text) || md5('2' || flow_id::text)"
    )
    with small_disk(tmp_path, "100k") as disk:
        with pytest.raises(ArchiveError, match="No space left on device"):
            archive_day(connection, PARTITION, DAY, disk / "archive")
        assert [*disk.rglob("*.parquet"), *disk.rglob("*.partial")] == []
    with small_disk(tmp_path, "10m") as disk:
        archive_day(connection, PARTITION, DAY, disk / "archive")
        assert in_files(disk / "archive") == in_table(connection)


def test_file_size_limit_leaves_nothing(
    connection: Connection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(connection, *range(3000))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # the limit would truncate it
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(ArchiveError, match="File too large"):
            archive_day(connection, PARTITION, DAY, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert archived_days(tmp_path) == []
    assert archive_day(connection, PARTITION, DAY, tmp_path).written == 3000


@pytest.mark.parametrize("place", ["no/such/folder", "file", "file/archive"])
def test_unusable_folder_is_named(connection: Connection, tmp_path: Path, place: str) -> None:
    write_rows(connection, 1)
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(ArchiveError, match=f"Cannot use the archive {tmp_path / place}: "):
        archive_day(connection, PARTITION, DAY, tmp_path / place)


def test_missing_package_is_named(
    connection: Connection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "duckdb", None)
    with pytest.raises(ArchiveError, match="pip install 'duckdb"):
        archive_day(connection, PARTITION, DAY, tmp_path / "archive")
    assert not (tmp_path / "archive").exists()


@pytest.mark.not_on_citus("Citus refuses the view that makes the query slow")
def test_lost_connection_leaves_nothing(connection: Connection, tmp_path: Path) -> None:
    write_rows(connection, *range(100))
    pid = connection.info.backend_pid
    # The sleep makes the COPY long enough to be ended from outside.
    with contextlib.suppress(psycopg.Error):
        connection.execute("SELECT 1")
    connection.execute(
        f"CREATE VIEW slow AS SELECT entry.* FROM {PARTITION} AS entry, LATERAL"
        " (SELECT pg_sleep(0.05) WHERE entry.flow_id IS NOT NULL) AS pause".encode()
    )
    code = (
        "import psycopg, sys, time;"
        "c = psycopg.connect(sys.argv[1], autocommit=True);"
        "c.execute('SELECT pg_sleep(0.3)');"
        "c.execute('SELECT pg_terminate_backend(%s)', (int(sys.argv[2]),))"
    )
    command = [sys.executable, "-c", code, connection.info.dsn, str(pid)]
    with (
        subprocess.Popen(command) as killer,
        pytest.raises(psycopg.OperationalError, match="terminat"),
    ):
        archive_day(connection, "slow", DAY, tmp_path)
    assert killer.returncode == 0
    assert archived_days(tmp_path) == []
    assert [*tmp_path.rglob("*.partial")] == []


def test_interrupted_call_leaves_nothing(
    connection: Connection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(connection, *range(100))

    def interrupt(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("exporter.archive.files.sync_file", interrupt)
    with pytest.raises(KeyboardInterrupt):
        archive_day(connection, PARTITION, DAY, tmp_path)
    assert [*tmp_path.rglob("*.parquet"), *tmp_path.rglob("*.partial")] == []
