"""Keep the figures of a running proxy in a file, so that `artifactapi status` can show them at any time.

The database knows them too, but not during an outage. A thread of its own writes the file every two
seconds: what the proxy or the writer waits for delays nothing here, and a hung disk delays neither.

A running proxy holds a lock on its file. The operating system releases the lock of a killed process.
"""

from __future__ import annotations

import fcntl
import logging
import os
import stat
import threading
import time
import zlib
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from .settings import create_private_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

logger = logging.getLogger(__name__)

THREAD_NAME = "artifactapi-status"
_SUFFIX = ".status"
_WRITE_SECONDS = 2.0
_SILENT_SECONDS = 30.0  # as in access_log_run_state
_JOIN_SECONDS = 1.0
_MODE = 0o600
_READ_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
_MAX_BYTES = 64 * 1024
_CHECKSUM_LENGTH = 8
_READ_ATTEMPTS = 5  # while the proxy may be writing
_OVERLAP_SECONDS = 10.0  # for so long, the proxy before a restart may still be there


class ProxyStatus(msgspec.Struct, frozen=True):
    """The figures of one proxy, and how old they are."""

    state: Literal[
        "running", "silent", "killed"
    ]  # silent: it runs, and has written nothing for 30 s
    age_seconds: float
    pid: int
    status: dict[str, Any]  # see `Exporter.status`


class _Content(msgspec.Struct, frozen=True):
    at: float  # epoch seconds
    pid: int
    status: dict[str, Any]


class StatusFile:
    """Owns one thread and one file from the construction until `stop`. Thread-safe."""

    def __init__(self, folder: Path, run_id: str, status: Callable[[], dict[str, Any]]) -> None:
        """`run_id` names the file; `status` returns the figures, and may be called in any thread."""
        self._folder = folder
        self._path = folder / f"{run_id}{_SUFFIX}"
        self._status = status
        self._stopping = threading.Event()
        self._has_warned = False
        self._look_for_twins_at = time.monotonic() + _OVERLAP_SECONDS
        self._thread = threading.Thread(target=self._run, name=THREAD_NAME, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Delete the file, for at most a second. Idempotent."""
        self._stopping.set()
        self._thread.join(_JOIN_SECONDS)

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                self._keep()
            except Exception as e:  # noqa: BLE001 - a full disk, or a bug of ours; the log goes on
                if not self._has_warned:
                    self._has_warned = True
                    logger.info(
                        "artifactapi: `artifactapi status` does not show this proxy: %s: %s",
                        self._folder,
                        getattr(e, "strerror", None) or f"{e} ({type(e).__name__})",
                    )
                self._stopping.wait(_SILENT_SECONDS)

    def _keep(self) -> None:
        """Write the file until the stop. Raises OSError."""
        create_private_folder(self._folder)
        delete_dead(self._folder)
        # It gets its name once it is locked, so nobody takes it for the file of a dead process.
        unnamed = self._path.with_suffix(".new")
        file = os.open(unnamed, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, _MODE)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            size = self._write(file, 0)
            unnamed.rename(self._path)
            while not self._stopping.wait(_WRITE_SECONDS):
                size = self._write(file, size)
                self._look_for_twins()
        finally:
            for path in (unnamed, self._path):
                path.unlink(missing_ok=True)
            os.close(file)

    def _look_for_twins(self) -> None:
        """Warn once, some time after the start, if another proxy has our name. Raises OSError."""
        if time.monotonic() < self._look_for_twins_at:
            return
        self._look_for_twins_at = float("inf")
        own = self._status()
        for path in self._folder.glob(f"*{_SUFFIX}"):
            other = _read(path) if path != self._path else None
            if other is None or other.state == "killed":
                continue
            if all(other.status[key] == own[key] for key in ("node", "database")):
                logger.warning(
                    "artifactapi: process %d is a proxy named %s too, so nobody can tell which of them a row is"
                    " from; set node in the settings of one of them",
                    other.pid,
                    own["node"],
                )

    def _write(self, file: int, size: int) -> int:
        """Write the figures over the former `size` bytes; returns how many bytes the file has now."""
        content = msgspec.json.encode(_Content(time.time(), os.getpid(), self._status()))
        content = content.ljust(size - _CHECKSUM_LENGTH)
        written = b"%08x" % zlib.crc32(content) + content
        os.pwrite(file, written, 0)
        return len(written)


def read_statuses(folder: Path) -> list[ProxyStatus]:
    """The figures of the proxies that use this data folder, by name. Raises OSError."""
    found = [status for path in folder.glob(f"*{_SUFFIX}") if (status := _read(path))]
    return sorted(found, key=lambda it: (str(it.status["node"]), it.pid))


def delete_dead(folder: Path, run_id: str | None = None) -> None:
    """Delete the files of processes that were killed; with `run_id`, only that one's. Raises OSError."""
    for path, file in _dead_files(folder):
        try:
            if run_id in {None, path.stem}:
                path.unlink(missing_ok=True)
        finally:
            os.close(file)


def _read(path: Path) -> ProxyStatus | None:
    """The figures in a file; None if its proxy has just ended, or if it is not ours."""
    file = _open(path)
    if file is None:
        return None
    try:
        is_running = not _try_lock(file)
        for _ in range(_READ_ATTEMPTS):
            content = os.pread(file, _MAX_BYTES, 0)
            if content[:_CHECKSUM_LENGTH] == b"%08x" % zlib.crc32(content[_CHECKSUM_LENGTH:]):
                decoded = msgspec.json.decode(content[_CHECKSUM_LENGTH:], type=_Content)
                break
        else:
            return None
    except msgspec.MsgspecError:
        return None
    finally:
        os.close(file)
    age_seconds = max(0.0, time.time() - decoded.at)
    is_silent = age_seconds > _SILENT_SECONDS
    state: Literal["running", "silent", "killed"] = "silent" if is_silent else "running"
    return ProxyStatus(state if is_running else "killed", age_seconds, decoded.pid, decoded.status)


def _dead_files(folder: Path) -> Iterator[tuple[Path, int]]:
    """The files of proxies that were killed, locked and open."""
    for path in folder.glob(f"*{_SUFFIX}"):
        with suppress(OSError):  # what we cannot open is not ours
            file = _open(path)
            if file is None:
                continue
            if _try_lock(file):
                yield path, file
            else:
                os.close(file)


def _open(path: Path) -> int | None:
    """Open a file to read it; None if it is gone or not a regular file. Raises OSError."""
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            return None
        return os.open(path, _READ_FLAGS)
    except FileNotFoundError:
        return None


def _try_lock(file: int) -> bool:
    """Lock the file; False if a running process has locked it."""
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
