"""The file with the figures of a proxy: whole, fresh, private, and gone after a stop."""

from __future__ import annotations

import fcntl
import itertools
import logging
import os
import stat
import time
from typing import TYPE_CHECKING, Any

import pytest

from exporter import status_file
from exporter.status_file import StatusFile, read_statuses
from tests.support.wait import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_STATUS = {"node": "proxy-1", "database": "logs", "seen": 3}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "home" / "status"


@pytest.fixture
def file(folder: Path) -> Iterator[StatusFile]:
    file = StatusFile(folder, "run-1", lambda: _STATUS)
    eventually(lambda: read_statuses(folder))
    yield file
    file.stop()


def test_figures_are_there_while_the_proxy_runs(folder: Path, file: StatusFile) -> None:
    (found,) = read_statuses(folder)
    assert (found.state, found.pid, found.status) == ("running", os.getpid(), _STATUS)
    assert 0 <= found.age_seconds < 3
    (path,) = folder.iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    file.stop()
    assert list(folder.iterdir()) == []
    assert read_statuses(folder) == []


@pytest.mark.parametrize("umask", [0o077, 0o022])
def test_server_of_root_can_pass_the_data_folder(folder: Path, umask: int) -> None:
    former = os.umask(umask)
    try:
        file = StatusFile(folder, "run-1", lambda: _STATUS)
        eventually(lambda: read_statuses(folder))
        file.stop()
    finally:
        os.umask(former)
    assert stat.S_IMODE(folder.parent.stat().st_mode) == (0o711 if os.geteuid() == 0 else 0o700)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_no_folder_is_no_proxy(folder: Path) -> None:
    assert read_statuses(folder) == []


@pytest.mark.usefixtures("file")
def test_proxy_that_does_not_report_is_silent(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(status_file, "_SILENT_SECONDS", 0.0)
    assert [it.state for it in read_statuses(folder)] == ["silent"]


def test_killed_proxy_is_shown_until_the_next_one_starts(folder: Path, file: StatusFile) -> None:
    content = (folder / "run-1.status").read_bytes()
    file.stop()
    (folder / "run-1.status").write_bytes(content)
    assert [it.state for it in read_statuses(folder)] == ["killed"]
    following = StatusFile(folder, "run-2", lambda: _STATUS | {"node": "proxy-2"})
    eventually(lambda: [it.status["node"] for it in read_statuses(folder)] == ["proxy-2"])
    following.stop()


@pytest.mark.parametrize(
    ("changes", "is_warned"), [({}, True), ({"node": "proxy-2"}, False), ({"database": "b"}, False)]
)
def test_second_proxy_with_the_same_name_warns_once(
    folder: Path,
    file: StatusFile,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    changes: dict[str, str],
    *,
    is_warned: bool,
) -> None:
    del file  # it began before, and has looked for others already or will find none
    monkeypatch.setattr(status_file, "_WRITE_SECONDS", 0.01)
    monkeypatch.setattr(status_file, "_OVERLAP_SECONDS", 0.0)
    calls = itertools.count()
    second = StatusFile(folder, "run-2", lambda: {**_STATUS, **changes, "n": next(calls)})
    eventually(lambda: next(calls) > 20)
    second.stop()
    text = f"process {os.getpid()} is a proxy named proxy-1 too"
    assert caplog.text.count(text) == is_warned


def test_restart_that_overlaps_is_no_second_proxy(
    folder: Path,
    file: StatusFile,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(status_file, "_WRITE_SECONDS", 0.01)
    monkeypatch.setattr(status_file, "_OVERLAP_SECONDS", 0.3)
    calls = itertools.count()
    following = StatusFile(folder, "run-2", lambda: {**_STATUS, "n": next(calls)})
    eventually(lambda: next(calls) > 2)
    file.stop()
    since = time.monotonic()
    eventually(lambda: time.monotonic() > since + 0.5)
    following.stop()
    assert "too, so nobody" not in caplog.text


def test_two_proxies_share_a_folder(folder: Path, file: StatusFile) -> None:
    del file
    other = StatusFile(folder, "run-2", lambda: _STATUS | {"node": "proxy-0"})
    eventually(lambda: len(read_statuses(folder)) == 2)
    found = read_statuses(folder)
    assert [(it.status["node"], it.state) for it in found] == [
        ("proxy-0", "running"),
        ("proxy-1", "running"),
    ]
    other.stop()


def test_reader_never_sees_half_a_write(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status_file, "_WRITE_SECONDS", 0.0)
    texts = itertools.cycle(["x" * 9000, "y", "z" * 500])

    def figures() -> dict[str, Any]:
        text = next(texts)
        return {"node": text, "length": len(text)}

    file = StatusFile(folder, "run-1", figures)
    eventually(lambda: read_statuses(folder))
    lengths: set[int] = set()

    def all_are_seen() -> bool:
        for found in read_statuses(folder):
            assert found.status["node"] == found.status["node"][0] * found.status["length"]
            lengths.add(found.status["length"])
        return lengths == {9000, 1, 500}

    for _ in range(20):
        lengths.clear()
        eventually(all_are_seen)
    file.stop()


@pytest.mark.parametrize("content", [b"", b"00000000{}", b"x" * 100_000, b"a3830348[]"])
def test_other_content_is_ignored(folder: Path, content: bytes) -> None:
    folder.mkdir(parents=True)
    (folder / "a.status").write_bytes(content)
    assert read_statuses(folder) == []


def test_links_pipes_and_folders_of_others_hide_no_proxy(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "link.status").symlink_to(folder / "elsewhere")
    (folder / "folder.status").mkdir()
    os.mkfifo(folder / "pipe.status")
    file = StatusFile(folder, "run-1", lambda: _STATUS)
    try:
        eventually(lambda: [it.status for it in read_statuses(folder)] == [_STATUS], timeout=5)
    finally:
        file.stop()
    assert len(list(folder.iterdir())) == 3


def test_folder_that_cannot_be_written_is_logged_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="exporter")
    (tmp_path / "home").write_text("a file")
    file = StatusFile(tmp_path / "home" / "status", "run-1", lambda: _STATUS)
    eventually(lambda: caplog.records)
    file.stop()
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    assert record.getMessage() == (
        f"artifactapi: `artifactapi status` does not show this proxy: {tmp_path}/home/status: Not a directory"
    )


def test_lock_of_a_reader_delays_nothing(folder: Path) -> None:
    """The next proxy takes a file that somebody reads just now for one in use, and leaves it."""
    folder.mkdir(parents=True)
    (folder / "run-1.status").write_bytes(b"")
    with (folder / "run-1.status").open("rb") as reader:
        fcntl.flock(reader, fcntl.LOCK_SH)
        file = StatusFile(folder, "run-2", lambda: _STATUS)
        eventually(lambda: read_statuses(folder))
        file.stop()
