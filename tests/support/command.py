"""Run the command `artifactapi` as a user runs it, and put rows before it."""

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
    """Run `artifactapi` to its end."""
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
    """Run `artifactapi` beside the test, its output in a file, and interrupt it at the end."""
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
    """Put rows into the table, one after another."""
    with psycopg.connect(dsn, autocommit=True) as connection:
        ensure_schema(connection)
        for number in numbers:
            entry = make_entry(number, **changes)
            day = entry.started_at[:10]
            connection.execute("SELECT access_log_ensure_partition(%s)", (day,))
            insert_access_log_batch(connection, [entry])
