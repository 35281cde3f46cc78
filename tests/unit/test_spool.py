"""Test the spool: bounded size, private files, replay after a restart, damaged files and full disks."""

from __future__ import annotations

import contextlib
import os
import resource
import sqlite3
import stat
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from exporter.write.gaps import Gap, UnwrittenGaps
from exporter.write.spool import Spool, redirect, waiting_rows
from tests.support.samples import make_entry

if TYPE_CHECKING:
    from collections.abc import Iterator

_AMPLE_BYTES = 1 << 28


def drain(spool: Spool) -> list[str]:
    """Remove all batches, oldest first, and return the first 8 digits of each flow id."""
    found = []
    while batch := spool.oldest():
        found += [entry.flow_id[:8] for entry in batch.entries]
        spool.remove(batch)
    return found


def test_batches_are_returned_unchanged_and_in_order(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool", "db", _AMPLE_BYTES)
    first, second = [make_entry(1), make_entry(2, path="\u20ac\t")], [make_entry(3)]
    assert spool.append(first)
    assert spool.append(second)
    assert spool.entries == 3
    batch = spool.oldest()
    assert batch is not None
    assert batch.entries == first
    assert spool.remove(batch)
    assert drain(spool) == ["00000003"]
    assert spool.entries == 0
    assert spool.append(first)
    assert drain(spool) == ["00000001", "00000002"]
    spool.settle()
    assert list((tmp_path / "spool").iterdir()) == []


def test_sample_holds_entries_of_all_files_and_takes_none(tmp_path: Path) -> None:
    earlier = Spool(tmp_path / "spool", "db", _AMPLE_BYTES)
    assert earlier.sample(8) == []
    assert earlier.append([make_entry(1)])
    earlier.close()
    spool = Spool(tmp_path / "spool", "db", _AMPLE_BYTES)
    for number in range(2, 6):
        assert spool.append([make_entry(number)])
    assert {entry.flow_id[:8] for entry in spool.sample(8)} == {f"{n:08x}" for n in range(1, 6)}
    assert len(spool.sample(2)) <= 4  # two of each file
    assert spool.append([make_entry(6), make_entry(7)])
    sampled = {entry.flow_id[:8] for _ in range(100) for entry in spool.sample(8)}
    assert sampled == {f"{n:08x}" for n in range(1, 8)}
    assert drain(spool) == [f"{n:08x}" for n in range(1, 8)]
    assert spool.sample(8) == []
    spool.settle()


def test_no_folder_is_created_before_the_first_append(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool", "db", _AMPLE_BYTES)
    assert spool.oldest() is None
    spool.keep_gaps([])
    spool.close()
    assert not (tmp_path / "spool").exists()


def test_files_are_accessible_only_to_their_owner(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool", "db", _AMPLE_BYTES)
    spool.append([make_entry(1)])
    assert stat.S_IMODE((tmp_path / "spool").stat().st_mode) == 0o700
    assert {stat.S_IMODE(f.stat().st_mode) for f in (tmp_path / "spool").iterdir()} == {0o600}
    spool.close()


def test_full_spool_refuses_rows_until_it_is_drained(tmp_path: Path) -> None:
    spool = Spool(tmp_path, "db", 200_000)
    appended = 0
    while spool.append([make_entry(appended)]):
        appended += 1
        assert appended < 5000
    assert sum(f.stat().st_size for f in tmp_path.iterdir()) < 200_000 + 5_000_000
    spool.keep_gaps([Gap("00000000-0000-0000-0000-000000000001", "n", "a", "b", "buffer_full", 1)])
    assert len(drain(spool)) == appended == len(set(range(appended)))
    assert spool.append([make_entry(1)])
    drain(spool)
    spool.settle()


def test_spool_with_size_zero_refuses_rows(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool", "db", 0)
    assert not spool.append([make_entry(1)])
    assert not (tmp_path / "spool").exists()


def test_rows_and_gaps_of_an_earlier_run_come_first(tmp_path: Path) -> None:
    before = Spool(tmp_path, "db", _AMPLE_BYTES)
    before.append([make_entry(1)])
    gap = Gap("00000000-0000-0000-0000-000000000001", "n", "a", "b", "shutdown", 7)
    before.keep_gaps([gap])
    before.close()
    current = Spool(tmp_path, "db", _AMPLE_BYTES)
    current.append([make_entry(2)])
    assert current.inherited_gaps() == [gap]
    assert current.entries == 1
    assert drain(current) == ["00000001", "00000002"]
    current.settle()
    assert list(tmp_path.iterdir()) == []


def test_file_of_a_running_process_is_skipped_and_of_a_killed_one_replayed(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", _SPOOL_AND_WAIT, tmp_path],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        meanwhile = Spool(tmp_path, "db", _AMPLE_BYTES)
        assert meanwhile.oldest() is None
        meanwhile.close()
        process.kill()
    after = Spool(tmp_path, "db", _AMPLE_BYTES)
    assert drain(after) == ["00000001", "00000002"]
    after.settle()


_SPOOL_AND_WAIT = """
import signal, sys
from pathlib import Path
from exporter.write.spool import Spool, redirect, waiting_rows
from tests.support.samples import make_entry
spool = Spool(Path(sys.argv[1]), "db", 1 << 28)
spool.append([make_entry(1)])
spool.append([make_entry(2)])
print("ready", flush=True)
signal.pause()
"""


@pytest.mark.parametrize(
    "damage", ["random bytes", "other database", "zeroed tail", "invalid rows"]
)
def test_damaged_file_is_renamed_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    before = Spool(tmp_path, "db", _AMPLE_BYTES)
    for number in range(50):
        before.append([make_entry(number * 10 + i) for i in range(10)])
    before.close()
    (path,) = tmp_path.rglob("*.spool")
    if damage == "random bytes":
        path.write_bytes(os.urandom(5000))
    elif damage == "other database":
        path.unlink()
        with sqlite3.connect(path) as other_database:
            other_database.execute("CREATE TABLE other (x)")
        other_database.close()
    elif damage == "zeroed tail":
        content = path.read_bytes()
        path.write_bytes(content[:8192] + bytes(len(content) - 8192))
    else:
        spool_file = sqlite3.connect(path)
        spool_file.execute("UPDATE batch SET entries = x'c1'")
        spool_file.commit()
        spool_file.close()
    current = Spool(tmp_path, "db", _AMPLE_BYTES)
    current.append([make_entry(1)])
    assert drain(current) == ["00000001"]
    current.settle()
    assert [f.suffix for f in tmp_path.rglob("*.damaged")] == [".damaged"]
    assert "spool file damaged; moved to" in caplog.text


@pytest.mark.parametrize("version", [1, 9])
def test_file_of_another_version_waits_for_that_version(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, version: int
) -> None:
    before = Spool(tmp_path, "db", _AMPLE_BYTES)
    before.append([make_entry(7)])
    before.close()
    (path,) = tmp_path.rglob("*.spool")
    set_version(path, version)
    current = Spool(tmp_path, "db", _AMPLE_BYTES)
    current.append([make_entry(1)])
    assert drain(current) == ["00000001"]
    current.settle()
    current.close()
    assert f"left in place: another artifactapi wrote it, in format {version}" in caplog.text
    set_version(path, 2)
    later = Spool(tmp_path, "db", _AMPLE_BYTES)
    assert drain(later) == ["00000007"]
    later.close()


def set_version(path: Path, version: int) -> None:
    connection = sqlite3.connect(path)
    connection.execute(f"PRAGMA user_version = {version}")
    connection.commit()
    connection.close()


def test_unwritable_folder_logs_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "spool").write_text("a file")
    spool = Spool(tmp_path / "spool", "db", _AMPLE_BYTES)
    assert not spool.append([make_entry(1)])
    assert spool.oldest() is None
    assert "spool not writable" in caplog.text
    spool.close()


def test_gaps_grow_until_they_are_sent() -> None:
    gaps = UnwrittenGaps()
    gaps.add("n", "buffer_full", "2026-01-02")
    gaps.add("n", "buffer_full", "2026-01-01", 4)
    (sent,) = gaps.to_send()
    assert sent[1:] == ("n", "2026-01-01", "2026-01-02", "buffer_full", 5, None)
    gaps.add("n", "buffer_full", "2026-01-03")
    assert sent in gaps.to_send()  # unchanged: it may be in the database already
    assert len(gaps.snapshot()) == 2
    gaps.written([sent])
    assert [gap.entries for gap in gaps.snapshot()] == [1]
    gaps.written(gaps.snapshot())
    assert not gaps


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """Make writes fail as on a full disk: no file of this process may grow, and Python ignores SIGXFSZ."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_full_disk_is_logged_once_and_leaves_no_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "spool"
    spool = Spool(folder, "db", 1_000_000)
    with full_disk():
        for _ in range(3):
            assert not spool.append([make_entry()])
            spool._retry_at = 0.0
    assert list(folder.iterdir()) == []
    assert len(caplog.records) == 1
    assert spool.append([make_entry()])
    spool.close()


def test_file_is_deleted_on_a_full_disk_once_all_rows_are_written(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool", "db", 1_000_000)
    assert spool.append([make_entry()])
    batch = spool.oldest()
    assert batch is not None
    with full_disk():
        assert spool.remove(batch)
        assert spool.settle()
    assert list((tmp_path / "spool").iterdir()) == []
    assert spool.append([make_entry(1)])
    spool.close()


def test_new_size_limit_applies_to_the_open_file(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool", "db", 10_000_000)
    large = [make_entry(number, path="/" + "x" * 2000) for number in range(100)]
    assert spool.append(large)
    spool.reconfigure("db", 100_000)
    assert not spool.append(large)
    spool.reconfigure("db", 0)
    assert not spool.append([make_entry()])
    spool.reconfigure("db", 10_000_000)
    assert spool.append(large)
    spool.close()


def test_rows_wait_for_their_database_until_redirected(tmp_path: Path) -> None:
    before = Spool(tmp_path, "host-a:5432/logs", _AMPLE_BYTES)
    assert before.append([make_entry(1)])
    before.close()
    other = Spool(tmp_path, "host-b:5432/logs", _AMPLE_BYTES)
    assert other.oldest() is None
    (waiting,) = other.waiting_for_others()
    assert (waiting.database, waiting.files) == ("host-a:5432/logs", 1)
    other.close()
    same = Spool(tmp_path, "host-a:5432/logs", _AMPLE_BYTES)
    assert same.oldest() is not None
    assert redirect(tmp_path, "host-b:5432/logs") == 0  # a running proxy uses the file
    same.close()
    assert redirect(tmp_path, "host-b:5432/logs") == 1
    assert redirect(tmp_path, "host-b:5432/logs") == 0
    after = Spool(tmp_path, "host-b:5432/logs", _AMPLE_BYTES)
    assert after.waiting_for_others() == []
    assert drain(after) == ["00000001"]
    after.close()


def test_files_of_earlier_runs_keep_their_database_after_reconfigure(tmp_path: Path) -> None:
    before = Spool(tmp_path, "a", _AMPLE_BYTES)
    before.append([make_entry(1)])
    before.close()
    spool = Spool(tmp_path, "a", _AMPLE_BYTES)
    assert spool.oldest() is not None
    spool.append([make_entry(2)])
    spool.reconfigure("b", _AMPLE_BYTES)
    assert drain(spool) == ["00000002"]
    spool.close()
    assert [waiting.database for waiting in waiting_rows(tmp_path)] == ["a"]
