"""Run one section of the benchmarks in a separate process, with a temporary schema and folder."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import tempfile
import traceback
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from tests.bench.figures import Figure, Workspace
from tests.support.access_log import temporary_schema

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from multiprocessing.context import SpawnProcess

    from tests.support.postgres import Postgres

_SECTION_SECONDS = 3600.0  # timeout for one section; a year of rows takes half of it
_EXIT_SECONDS = 10.0


def measure_section(module: str, server: Postgres, *, quick: bool) -> list[Figure]:
    """Run the section in `module` in a separate process, and kill it at the timeout.

    Raises:
        RuntimeError: The section failed; the message is its traceback.
        TimeoutError: The section took too long.
        EOFError: The process was killed.
    """
    spawn = multiprocessing.get_context("spawn")
    receiver, sender = spawn.Pipe(duplex=False)
    with (
        tempfile.TemporaryDirectory(prefix="artifactapi-bench-") as folder,
        temporary_schema(server) as dsn,
    ):
        os.environ["ARTIFACTAPI_HOME"] = str(Path(folder, "home"))
        workspace = Workspace(dsn, Path(folder), quick)
        process = spawn.Process(target=_run, args=(sender, module, workspace))
        process.start()
        sender.close()
        try:
            if not receiver.poll(_SECTION_SECONDS):
                raise TimeoutError(f"{module} takes longer than {_SECTION_SECONDS:.0f} s")
            result: list[Figure] | str = receiver.recv()
        finally:
            receiver.close()
            _end(process)
    if isinstance(result, str):
        raise RuntimeError(result)  # noqa: TRY004 - the traceback of the other process
    return result


def _end(process: SpawnProcess) -> None:
    """Wait for the process to exit; otherwise kill it and its children."""
    process.join(_EXIT_SECONDS)
    if process.is_alive() and process.pid:
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        process.kill()
        process.join()


def _run(sender: Connection, module: str, workspace: Workspace) -> None:
    try:
        sender.send(import_module(f"tests.bench.{module}").measure(workspace))
    except BaseException:  # noqa: BLE001 - the parent process raises it
        sender.send(traceback.format_exc())
