"""Run a real PostgreSQL server of a given version on a loopback port, for tests."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path
from typing import Self

import psutil

from exporter.postgres.embedded import programs
from exporter.postgres.server_user import ServerUser, change_owner, run_as, runnable_programs

_DEBIAN = Path("/usr/lib/postgresql")
_TIMEOUT_SECONDS = 120.0


def available() -> dict[str, Path]:
    """Return the program folder of each PostgreSQL version, from our dependency and Debian packages."""
    found = {"18": programs()}
    for folder in sorted(_DEBIAN.glob("[0-9]*")):
        if (folder / "bin" / "initdb").exists():
            found.setdefault(folder.name, folder / "bin")
    return found


def free_port() -> int:
    """Return a free port. Another process may take it before you use it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Postgres:
    """A new server without fsync, as a context manager. If you are root, it runs as `nobody`.

    Args:
        program_folder: The programs of its version.
        primary: The server, which must run, that this one shall be a streaming standby of.
    """

    def __init__(self, program_folder: Path, primary: Postgres | None = None) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="artifactapi-pg-"))
        self.data = self.folder / "data"
        self.port = free_port()
        self._user = None
        if os.geteuid() == 0:
            account = pwd.getpwnam("nobody")
            self._user = ServerUser(account.pw_uid, account.pw_gid)
            change_owner(self.folder, self._user)
        self._programs = runnable_programs(program_folder, self._user, self.folder)
        if primary is None:
            encoding = ("--encoding=UTF8", "--locale=C")  # same as the embedded server
            self.run(
                "initdb", "-D", self.data, "-U", "postgres", "--auth=trust", "--no-sync", *encoding
            )
        else:
            source = ("--dbname", primary.dsn(), "--write-recovery-conf", "--checkpoint=fast")
            self.run("pg_basebackup", "-D", self.data, "--no-sync", *source)
        self.configure(
            fsync="off", max_connections="60", unix_socket_directories=f"'{self.folder}'"
        )

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(subprocess.CalledProcessError):
            self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def dsn(
        self, dbname: str = "postgres", host: str = "127.0.0.1", port: int | None = None
    ) -> str:
        """Return a connection string."""
        return f"host={host} port={port or self.port} user=postgres dbname={dbname}"

    def configure(self, **settings: str) -> None:
        """Append settings to postgresql.conf. They apply at the next start or reload."""
        with (self.data / "postgresql.conf").open("a", encoding="utf-8") as file:
            file.writelines(f"{key} = {value}\n" for key, value in settings.items())

    def start(self) -> None:
        """Start the server and wait until it accepts connections."""
        options = f"-h 127.0.0.1 -p {self.port}"
        log = self.folder / "log"
        try:
            self.run("pg_ctl", "start", "-w", "-D", self.data, "-l", log, "-o", options)
        except subprocess.CalledProcessError as e:
            raise RuntimeError(f"{e.output}\n{log.read_text()[-2000:]}") from None

    def promote(self) -> None:
        """Make a standby a primary, and wait until it accepts writes."""
        self.run("pg_ctl", "promote", "-w", "-D", self.data)

    def stop(self, mode: str = "immediate") -> None:
        """Stop the server and wait until it has exited."""
        self.run("pg_ctl", "stop", "-w", "-D", self.data, "-m", mode)

    @property
    def pid(self) -> int:
        """Process id of the postmaster."""
        return int((self.data / "postmaster.pid").read_text().split("\n", 1)[0])

    def kill(self) -> None:
        """Kill all server processes with SIGKILL, like the kernel's out-of-memory killer."""
        postmaster = psutil.Process(self.pid)
        processes = [postmaster, *postmaster.children()]
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(processes, timeout=10)

    def run(self, program: str, *arguments: str | Path) -> str:
        """Run a PostgreSQL program, never as root, and return its output."""
        command: list[str | Path] = [self._programs / program, *arguments]
        result = run_as(self._user, command, _TIMEOUT_SECONDS)
        if result.returncode:
            raise subprocess.CalledProcessError(result.returncode, program, result.stdout)
        return result.stdout
