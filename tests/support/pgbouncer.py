"""Run PgBouncer in front of a PostgreSQL server of the tests."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Self

import psycopg

from .postgres import free_port
from .wait import eventually

if TYPE_CHECKING:
    from .postgres import Postgres

PROGRAM = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
MISSING = "PgBouncer is not installed (Debian's package pgbouncer)"

_CONFIGURATION = """
[databases]
* = host=127.0.0.1 port={server_port}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
auth_type = trust
auth_file = {folder}/users
admin_users = postgres
pool_mode = transaction
default_pool_size = {pool_size}
max_client_conn = 200
server_login_retry = 1
logfile = {folder}/log
pidfile = {folder}/pid
"""


class PgBouncer:
    """PgBouncer in transaction mode on a loopback port, as a context manager. Logins need no password.

    Args:
        server: Where it leads to.
        pool_size: Connections to the server for each database and role.
        settings: Others of its settings.
    """

    def __init__(self, server: Postgres, pool_size: int, **settings: str) -> None:
        self.port = free_port()
        self.pool_size = pool_size
        self._folder = Path(tempfile.mkdtemp(prefix="artifactapi-pgbouncer-"))
        self._folder.chmod(0o777)  # it does not run as root
        configuration = _CONFIGURATION.format(
            server_port=server.port, port=self.port, folder=self._folder, pool_size=pool_size
        )
        configuration += "".join(f"{name} = {value}\n" for name, value in settings.items())
        (self._folder / "pgbouncer.ini").write_text(configuration)
        (self._folder / "users").write_text('"postgres" ""\n')
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop(signal.SIGKILL)
        shutil.rmtree(self._folder, ignore_errors=True)

    def dsn(self, dbname: str) -> str:
        """A connection string to a database through the pool."""
        return f"host=127.0.0.1 port={self.port} user=postgres dbname={dbname}"

    def start(self) -> None:
        """Start it, and wait until it accepts connections."""
        assert PROGRAM is not None
        account = pwd.getpwnam("nobody") if os.geteuid() == 0 else None
        self._process = subprocess.Popen(
            [PROGRAM, "--quiet", str(self._folder / "pgbouncer.ini")],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            user=account.pw_uid if account else None,
            group=account.pw_gid if account else None,
            extra_groups=[] if account else None,
        )
        eventually(self._answers)

    def stop(self, how: signal.Signals = signal.SIGTERM) -> None:
        """Stop it and wait for its end. SIGTERM ends all connections at once, as SIGKILL does."""
        process, self._process = self._process, None
        if process is not None:
            process.send_signal(how)
            process.wait(10)

    def _answers(self) -> bool:
        assert self._process is not None
        log = self._folder / "log"
        assert self._process.poll() is None, log.read_text() if log.exists() else "no log"
        with (
            contextlib.suppress(psycopg.OperationalError),
            psycopg.connect(self.dsn("pgbouncer"), autocommit=True) as console,
        ):
            console.pgconn.exec_(b"SHOW VERSION")  # it knows no extended queries
            return True
        return False
