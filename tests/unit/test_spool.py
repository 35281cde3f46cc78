"""The spool: bounded, private, found again, and never a reason to fail."""

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

_PLENTY = 1 << 28


def numbers(spool: Spool) -> list[str]:
    """Take everything out, oldest first."""
    found = []
    while batch := spool.oldest():
        found += [entry.flow_id[:8] for entry in batch.entries]
        spool.remove(batch)
    return found


def test_batches_come_back_in_order_as_they_went(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool", "db", _PLENTY)
    first, second = [make_entry(1), make_entry(2, path="\u20ac\t")], [make_entry(3)]
    assert spool.append(first)
    assert spool.append(second)
    assert spool.entries == 3
    batch = spool.oldest()
    assert batch is not None
    assert batch.entries == first
    assert spool.remove(batch)
    assert numbers(spool) == ["00000003"]
    assert spool.entries == 0
    assert spool.append(first)
    assert numbers(spool) == ["00000001", "00000002"]
    spool.settle()
    assert list((tmp_path / "spool").iterdir()) == []


def test_nothing_is_on_disk_before_there_is_something_to_keep(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool", "db", _PLENTY)
    assert spool.oldest() is None
    spool.keep_gaps([])
    spool.close()
    assert not (tmp_path / "spool").exists()


def test_files_are_for_their_owner_alone(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool", "db", _PLENTY)
    spool.append([make_entry(1)])
    assert stat.S_IMODE((tmp_path / "spool").stat().st_mode) == 0o700
    assert {stat.S_IMODE(f.stat().st_mode) for f in (tmp_path / "spool").iterdir()} == {0o600}
    spool.close()


def test_a_full_spool_says_so_and_has_room_again_when_emptied(tmp_path: Path) -> None:
    spool = Spool(tmp_path, "db", 200_000)
    taken = 0
    while spool.append([make_entry(taken)]):
        taken += 1
        assert taken < 5000
    assert sum(f.stat().st_size for f in tmp_path.iterdir()) < 200_000 + 5_000_000
    spool.keep_gaps([Gap("00000000-0000-0000-0000-000000000001", "n", "a", "b", "buffer_full", 1)])
    assert len(numbers(spool)) == taken == len(set(range(taken)))
    assert spool.append([make_entry(1)])
    numbers(spool)
    spool.settle()


def test_a_spool_of_no_size_takes_nothing(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool", "db", 0)
    assert not spool.append([make_entry(1)])
    assert not (tmp_path / "spool").exists()


def test_the_legacy_of_a_run_before_comes_first_with_its_gaps(tmp_path: Path) -> None:
    before = Spool(tmp_path, "db", _PLENTY)
    before.append([make_entry(1)])
    gap = Gap("00000000-0000-0000-0000-000000000001", "n", "a", "b", "shutdown", 7)
    before.keep_gaps([gap])
    before.close()
    now = Spool(tmp_path, "db", _PLENTY)
    now.append([make_entry(2)])
    assert now.inherited_gaps() == [gap]
    assert now.entries == 1
    assert numbers(now) == ["00000001", "00000002"]
    now.settle()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_found_and_what_a_living_one_holds_is_not(
    tmp_path: Path,
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", _SPOOL_AND_WAIT, tmp_path],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        alive = Spool(tmp_path, "db", _PLENTY)
        assert alive.oldest() is None
        alive.close()
        process.kill()
    after = Spool(tmp_path, "db", _PLENTY)
    assert numbers(after) == ["00000001", "00000002"]
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


@pytest.mark.parametrize("damage", ["garbage", "foreign", "torn", "newer", "wrong blob"])
def test_a_damaged_or_foreign_file_is_set_aside_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    before = Spool(tmp_path, "db", _PLENTY)
    for number in range(50):
        before.append([make_entry(number * 10 + i) for i in range(10)])
    before.close()
    (path,) = tmp_path.rglob("*.spool")
    if damage == "garbage":
        path.write_bytes(os.urandom(5000))
    elif damage == "foreign":
        path.unlink()
        with sqlite3.connect(path) as foreign:
            foreign.execute("CREATE TABLE mine (x)")
        foreign.close()
    elif damage == "torn":
        content = path.read_bytes()
        path.write_bytes(content[:8192] + bytes(len(content) - 8192))
    else:
        ours = sqlite3.connect(path)
        ours.execute(
            "PRAGMA user_version = 9" if damage == "newer" else "UPDATE batch SET entries = x'c1'"
        )
        ours.commit()
        ours.close()
    now = Spool(tmp_path, "db", _PLENTY)
    now.append([make_entry(1)])
    assert numbers(now) == ["00000001"]
    now.settle()
    assert [f.suffix for f in tmp_path.rglob("*.damaged")] == [".damaged"]
    assert "spool file damaged; moved to" in caplog.text


def test_a_folder_that_cannot_be_written_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "spool").write_text("a file")
    spool = Spool(tmp_path / "spool", "db", _PLENTY)
    assert not spool.append([make_entry(1)])
    assert spool.oldest() is None
    assert "spool not writable" in caplog.text
    spool.close()


def test_gaps_grow_until_they_are_offered() -> None:
    gaps = UnwrittenGaps()
    gaps.add("n", "buffer_full", "2026-01-02")
    gaps.add("n", "buffer_full", "2026-01-01", 4)
    (sent,) = gaps.to_send()
    assert sent[1:] == ("n", "2026-01-01", "2026-01-02", "buffer_full", 5)
    gaps.add("n", "buffer_full", "2026-01-03")
    assert sent in gaps.to_send()  # unchanged: it may be in the database already
    assert len(gaps.snapshot()) == 2
    gaps.written([sent])
    assert [gap.entries for gap in gaps.snapshot()] == [1]
    gaps.written(gaps.snapshot())
    assert not gaps


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """No file of this process may grow: Python ignores SIGXFSZ, and writing fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_takes_nothing_is_told_once_and_left_clean(
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


def test_what_a_full_disk_does_not_let_us_delete_is_gone_once_all_is_written(
    tmp_path: Path,
) -> None:
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


def test_another_bound_holds_for_the_file_that_is_open(tmp_path: Path) -> None:
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


def test_rows_wait_for_their_database_until_they_are_redirected(tmp_path: Path) -> None:
    before = Spool(tmp_path, "host-a:5432/logs", _PLENTY)
    assert before.append([make_entry(1)])
    before.close()
    other = Spool(tmp_path, "host-b:5432/logs", _PLENTY)
    assert other.oldest() is None
    (waiting,) = other.waiting_for_others()
    assert (waiting.database, waiting.files) == ("host-a:5432/logs", 1)
    other.close()
    same = Spool(tmp_path, "host-a:5432/logs", _PLENTY)
    assert same.oldest() is not None
    assert redirect(tmp_path, "host-b:5432/logs") == 0  # a running proxy uses the file
    same.close()
    assert redirect(tmp_path, "host-b:5432/logs") == 1
    assert redirect(tmp_path, "host-b:5432/logs") == 0
    after = Spool(tmp_path, "host-b:5432/logs", _PLENTY)
    assert after.waiting_for_others() == []
    assert numbers(after) == ["00000001"]
    after.close()


def test_another_database_leaves_the_files_of_earlier_runs_to_theirs(tmp_path: Path) -> None:
    before = Spool(tmp_path, "a", _PLENTY)
    before.append([make_entry(1)])
    before.close()
    spool = Spool(tmp_path, "a", _PLENTY)
    assert spool.oldest() is not None
    spool.append([make_entry(2)])
    spool.reconfigure("b", _PLENTY)
    assert numbers(spool) == ["00000002"]
    spool.close()
    assert [it.database for it in waiting_rows(tmp_path)] == ["a"]
