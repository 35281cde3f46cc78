"""Run a real PostgreSQL of a given version on a loopback port, for tests."""

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

_DEBIAN = Path("/usr/lib/postgresql")


def available() -> dict[str, Path]:
    """Folders of PostgreSQL programs by version: ours, and what Debian has installed."""
    found = {"18": programs()}
    for folder in sorted(_DEBIAN.glob("[0-9]*")):
        if (folder / "bin" / "initdb").exists():
            found.setdefault(folder.name, folder / "bin")
    return found


def free_port() -> int:
    """A port nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Postgres:
    """A server from `initdb` to `stop`, without fsync; a context manager."""

    def __init__(self, program_folder: Path) -> None:
        self._programs = program_folder
        self.folder = Path(tempfile.mkdtemp(prefix="artifactapi-pg-"))
        self.data = self.folder / "data"
        self.port = free_port()
        self._account = pwd.getpwnam("nobody") if os.geteuid() == 0 else None
        if self._account:
            os.chown(self.folder, self._account.pw_uid, self._account.pw_gid)
        self.run("initdb", "-D", self.data, "-U", "postgres", "--auth=trust", "--no-sync")
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
        """A connection string."""
        return f"host={host} port={port or self.port} user=postgres dbname={dbname}"

    def configure(self, **settings: str) -> None:
        """Append to postgresql.conf; takes effect at the next start or reload."""
        with (self.data / "postgresql.conf").open("a", encoding="utf-8") as file:
            file.writelines(f"{key} = {value}\n" for key, value in settings.items())

    def start(self) -> None:
        """Start and wait until it accepts connections."""
        options = f"-h 127.0.0.1 -p {self.port}"
        log = self.folder / "log"
        try:
            self.run("pg_ctl", "start", "-w", "-D", self.data, "-l", log, "-o", options)
        except subprocess.CalledProcessError as e:
            raise RuntimeError(f"{e.output}\n{log.read_text()[-2000:]}") from None

    def stop(self, mode: str = "immediate") -> None:
        """Stop and wait."""
        self.run("pg_ctl", "stop", "-w", "-D", self.data, "-m", mode)

    @property
    def pid(self) -> int:
        """Process id of the postmaster."""
        return int((self.data / "postmaster.pid").read_text().split("\n", 1)[0])

    def kill(self) -> None:
        """As the machine's out-of-memory killer would do, with all its processes."""
        postmaster = psutil.Process(self.pid)
        family = [postmaster, *postmaster.children()]
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(family, timeout=10)

    def run(self, program: str, *arguments: str | Path) -> str:
        """Run one of PostgreSQL's programs as an account it accepts; its output."""
        with tempfile.TemporaryFile("w+") as output:
            done = subprocess.run(
                [self._programs / program, *arguments],
                stdout=output,
                stderr=subprocess.STDOUT,
                check=False,
                cwd="/",
                user=self._account.pw_uid if self._account else None,
                group=self._account.pw_gid if self._account else None,
                extra_groups=[] if self._account else None,
            )
            output.seek(0)
            text = output.read()
        if done.returncode:
            raise subprocess.CalledProcessError(done.returncode, program, text)
        return text
