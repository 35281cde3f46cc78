"""The embedded server: made once, shared, private, and there again whatever killed it."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pwd
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

from exporter.postgres.embedded import EmbeddedServer
from tests.support.wait import eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from multiprocessing.queues import SimpleQueue

_HOLD = """
import sys
from pathlib import Path
from exporter.postgres.embedded import EmbeddedServer
server = EmbeddedServer(Path(sys.argv[1]))
print(server.start(), flush=True)
sys.stdin.read()
server.release()
"""


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "server"
    yield folder
    pid_file = folder / "postgres" / "postmaster.pid"
    if pid_file.exists():
        with contextlib.suppress(psutil.NoSuchProcess):
            _postmaster(folder).kill()


def _postmaster(folder: Path) -> psutil.Process:
    return psutil.Process(int((folder / "postgres" / "postmaster.pid").read_text().split()[0]))


def _running(folder: Path) -> bool:
    return (folder / "postgres" / "postmaster.pid").exists()


def _ask(dsn: str, sql: str) -> object:
    with psycopg.connect(dsn, autocommit=True) as connection:
        row = connection.execute(sql.encode()).fetchone()
        return row[0] if row else None


def _holder(folder: Path) -> subprocess.Popen[str]:
    """Another process with a share in the server."""
    process = subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert process.stdout is not None
    assert process.stdout.readline().strip()
    return process


def test_it_is_a_postgresql_18_without_a_tcp_port_for_its_owner_alone(folder: Path) -> None:
    server = EmbeddedServer(folder)
    dsn = server.start()
    assert str(_ask(dsn, "SHOW server_version")).startswith("18.")
    assert _ask(dsn, "SHOW listen_addresses") == ""
    connections = _postmaster(folder).net_connections(kind="inet")
    assert [c for c in connections if c.status == psutil.CONN_LISTEN] == []
    (path,) = (folder / "postgres").glob(".s.PGSQL.*[0-9]")
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "postgres").stat().st_mode) == 0o700
    server.release()
    assert not _running(folder)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_cannot_reach_it(folder: Path) -> None:
    server = EmbeddedServer(folder)
    dsn = server.start()
    for parent in folder.parents:  # even if every folder above were open
        parent.chmod(parent.stat().st_mode | 0o755)
    folder.chmod(0o755)
    assert _as_nobody(_connect, _socket_path(dsn)) == "PermissionError"
    server.release()


def test_the_data_is_there_again_after_a_restart(folder: Path) -> None:
    server = EmbeddedServer(folder)
    _ask_nothing(server.start(), "CREATE TABLE kept AS SELECT 42 AS answer")
    server.release()
    assert _ask(server.start(), "SELECT answer FROM kept") == 42
    server.release()


def _ask_nothing(dsn: str, sql: str) -> None:
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(sql.encode())


def test_starting_and_releasing_are_idempotent(folder: Path) -> None:
    server = EmbeddedServer(folder)
    assert server.start() == server.start()
    server.release()
    server.release()
    assert not _running(folder)


def test_two_at_once_share_it_and_the_first_to_stop_leaves_it(folder: Path) -> None:
    servers = [EmbeddedServer(folder) for _ in range(2)]
    threads = [threading.Thread(target=server.start) for server in servers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    servers[0].release()
    assert _ask(servers[1].dsn, "SELECT 1") == 1
    servers[1].release()
    assert not _running(folder)


def test_a_killed_sharer_is_forgotten(folder: Path) -> None:
    other = _holder(folder)
    mine = EmbeddedServer(folder)
    mine.start()
    other.send_signal(signal.SIGKILL)
    other.communicate()
    mine.release()
    assert not _running(folder)


def test_a_sharer_in_another_process_keeps_it(folder: Path) -> None:
    mine = EmbeddedServer(folder)
    dsn = mine.start()
    other = _holder(folder)
    mine.release()
    assert _ask(dsn, "SELECT 1") == 1
    other.communicate("")
    assert not _running(folder)


def test_a_killed_server_starts_again_with_its_data(folder: Path) -> None:
    server = EmbeddedServer(folder)
    _ask_nothing(server.start(), "CREATE TABLE kept AS SELECT 42 AS answer")
    postmaster = _postmaster(folder)
    family = [postmaster, *postmaster.children()]
    for process in family:
        process.kill()
    psutil.wait_procs(family, timeout=10)
    dsn = server.start()
    eventually(lambda: _answers(dsn))
    assert _ask(dsn, "SELECT answer FROM kept") == 42
    server.release()


def _answers(dsn: str) -> bool:
    try:
        return _ask(dsn, "SELECT 1") == 1
    except psycopg.OperationalError:
        return False


def test_a_first_start_that_was_killed_half_way_is_made_good(folder: Path) -> None:
    (folder / "postgres").mkdir(parents=True)
    (folder / "postgres" / "half").write_text("made")
    server = EmbeddedServer(folder)
    assert _ask(server.start(), "SELECT 1") == 1
    server.release()


def test_a_folder_with_a_very_long_name_works(tmp_path: Path) -> None:
    folder = tmp_path / ("long" * 40)
    server = EmbeddedServer(folder)
    dsn = server.start()
    assert _ask(dsn, "SELECT 1") == 1
    socket_folder = _socket_path(dsn).parent
    assert stat.S_IMODE(socket_folder.stat().st_mode) == 0o700
    server.release()
    socket_folder.rmdir()


def test_why_it_does_not_start_is_said(folder: Path) -> None:
    server = EmbeddedServer(folder)
    server.start()
    server.release()
    with (folder / "postgres" / "postgresql.conf").open("a") as file:
        file.write("no_such_setting = 1\n")
    with pytest.raises(OSError, match="no_such_setting"):
        server.start()
    server.release()


def test_a_lock_that_is_held_ends_the_start_at_its_deadline(folder: Path) -> None:
    import fcntl  # noqa: PLC0415

    folder.mkdir()
    with (folder / "server.lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        started = time.monotonic()
        server = EmbeddedServer(folder)
        with pytest.raises(OSError, match="is held by another process"):
            server.start(time.monotonic() + 0.2)
        assert time.monotonic() - started < 5


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_an_ordinary_user_runs_it_too(tmp_path: Path) -> None:
    account = pwd.getpwnam("nobody")
    folder = tmp_path / "theirs"
    folder.mkdir()
    os.chown(folder, account.pw_uid, account.pw_gid)
    for parent in folder.parents:
        if not parent.stat().st_mode & 0o001:
            parent.chmod(parent.stat().st_mode | 0o001)
    assert _as_nobody(_start_and_release, folder) == "1"
    assert (folder / "postgres").stat().st_uid == account.pw_uid
    assert not _running(folder)


def _start_and_release(folder: Path) -> str:
    server = EmbeddedServer(folder)
    answer = _ask(server.start(), "SELECT 1")
    server.release()
    return str(answer)


def _connect(path: Path) -> str:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
    return "connected"


def _socket_path(dsn: str) -> Path:
    return Path(str(conninfo_to_dict(dsn)["host"])) / ".s.PGSQL.5432"


def _as_nobody(deed: Callable[[Path], str], argument: Path) -> str:
    """What `deed` returns, or the name of what it raises, in a process of another user."""
    context = multiprocessing.get_context("fork")  # that user may not be let near our interpreter
    results: SimpleQueue[str] = context.SimpleQueue()
    process = context.Process(target=_become_nobody_and, args=(deed, argument, results))
    process.start()
    result = results.get()
    process.join(10)
    process.close()
    results.close()
    return result


def _become_nobody_and(
    deed: Callable[[Path], str], argument: Path, results: SimpleQueue[str]
) -> None:
    account = pwd.getpwnam("nobody")
    os.setgroups([])
    os.setgid(account.pw_gid)
    os.setuid(account.pw_uid)
    try:
        results.put(deed(argument))
    except BaseException as e:  # noqa: BLE001 - the test wants to see it
        results.put(type(e).__name__)
