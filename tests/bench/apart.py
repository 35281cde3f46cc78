"""Run one section of the bench in a process of its own, with a schema and a folder that go with it."""

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

from tests.bench.figures import Figure, Place
from tests.support.access_log import temporary_schema

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from multiprocessing.context import SpawnProcess

    from tests.support.postgres import Postgres

_PATIENCE_SECONDS = 600.0
_GRACE_SECONDS = 10.0


def measure_apart(section: str, server: Postgres, *, quick: bool) -> list[Figure]:
    """One section in a process of its own, which is ended when it takes too long.

    Raises:
        RuntimeError: it failed; with its traceback.
        TimeoutError: it took too long.
        EOFError: it was killed.
    """
    spawn = multiprocessing.get_context("spawn")
    receiver, sender = spawn.Pipe(duplex=False)
    with (
        tempfile.TemporaryDirectory(prefix="artifactapi-bench-") as folder,
        temporary_schema(server) as dsn,
    ):
        os.environ["ARTIFACTAPI_HOME"] = str(Path(folder, "home"))
        place = Place(dsn, Path(folder), quick)
        process = spawn.Process(target=_run, args=(sender, section, place))
        process.start()
        sender.close()
        try:
            if not receiver.poll(_PATIENCE_SECONDS):
                raise TimeoutError(f"{section} takes longer than {_PATIENCE_SECONDS:.0f} s")
            result: list[Figure] | str = receiver.recv()
        finally:
            receiver.close()
            _end(process)
    if isinstance(result, str):
        raise RuntimeError(result)  # noqa: TRY004 - what the other process said
    return result


def _end(process: SpawnProcess) -> None:
    """Wait for a process that is done; end one that is not, with all that it started."""
    process.join(_GRACE_SECONDS)
    if process.is_alive() and process.pid:
        family = psutil.Process(process.pid).children(recursive=True)
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        process.kill()
        process.join()


def _run(sender: Connection, section: str, place: Place) -> None:
    try:
        sender.send(import_module(f"tests.bench.{section}").measure(place))
    except BaseException:  # noqa: BLE001 - told by the other side
        sender.send(traceback.format_exc())
