"""Run the `artifactapi` command as a process, and write rows for it to read."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import psycopg

from exporter.postgres.schema import ensure_schema
from exporter.write.database import insert_access_log_batch

from .samples import make_entry

if TYPE_CHECKING:
    from collections.abc import Iterator

COMMAND = str(Path(sys.executable).with_name("artifactapi"))


def call(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run `artifactapi` and wait for its exit, for up to 60 seconds."""
    return subprocess.run(
        [COMMAND, *arguments],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, **env},
        timeout=60,
    )


@contextlib.contextmanager
def started(output: Path, *arguments: str, **env: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run `artifactapi` in the background with its output in a file. Interrupt it at the end."""
    with output.open("wb") as file:
        process = subprocess.Popen(
            [COMMAND, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **env},
        )
        try:
            yield process
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
            process.wait(20)


def write(dsn: str, *numbers: int, **changes: object) -> None:
    """Write one sample row per number, each in its own transaction. Create the schema if needed."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        ensure_schema(connection)
        for number in numbers:
            entry = make_entry(number, **changes)
            day = entry.started_at[:10]
            connection.execute("SELECT access_log_ensure_partition(%s)", (day,))
            insert_access_log_batch(connection, [entry])
