"""Run the exporter of an earlier commit of this repository, as a proxy that is upgraded later than others."""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Self

import pytest

from exporter.postgres.schema import MIGRATIONS

from .environment import clean_environment

_ROOT = Path(__file__).resolve().parents[2]
_FOLDERS = ("exporter", "configs", "tests/support")
# Logs what its input asks for with the code in the current folder, until the input ends.
_PROXY = """
import json, sys
from msgspec.structs import replace
from exporter import Exporter, Settings
from exporter.settings import BatchSettings
from tests.support.samples import make_exchange

settings = Settings(node=sys.argv[2]).with_dsn(sys.argv[1])
exporter = Exporter(replace(settings, batch=BatchSettings(max_seconds=0.05)))
for line in sys.stdin:
    for number in range(*map(int, line.split())):
        assert exporter.log_access(make_exchange(number))
assert exporter.stop()
print(json.dumps({name: exporter.status()[name] for name in ("seen", "written")}))
"""
_GRANTS = """
import sys
from exporter.postgres.schema import grants
print(grants(*sys.argv[1:]))
"""
_DISTRIBUTE = """
import sys
from exporter import Settings
from exporter.postgres.connection import connect
from exporter.postgres.schema import distribute_schema, ensure_schema
with connect(sys.argv[1], Settings().database) as connection:
    ensure_schema(connection)
    assert distribute_schema(connection)
"""
_TIMEOUT_SECONDS = 60.0


class OlderVersion:
    """The code of an earlier commit, in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def grants(self, schema: str, proxy_role: str, reader_role: str) -> str:
        """What its `artifactapi init` prints."""
        return self._run(_GRANTS, schema, proxy_role, reader_role)

    def distribute(self, dsn: str) -> None:
        """Create the schema and distribute it over a Citus cluster."""
        self._run(_DISTRIBUTE, dsn)

    def _run(self, script: str, *arguments: str) -> str:
        return subprocess.run(
            [sys.executable, "-c", script, *arguments],
            cwd=self._folder,
            check=True,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_SECONDS,
            env=clean_environment(),
        ).stdout

    def proxy(self, dsn: str, node: str, home: Path) -> OlderProxy:
        """Start a process that writes to this database."""
        return OlderProxy(self._folder, dsn, node, home)


class OlderProxy:
    """A process with the exporter of an earlier version. A context manager, which stops it."""

    def __init__(self, folder: Path, dsn: str, node: str, home: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _PROXY, dsn, node],
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**clean_environment(), "ARTIFACTAPI_HOME": str(home / f"of-{node}")},
        )

    def log(self, start: int, end: int) -> None:
        """Let it log the exchanges with these numbers."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{start} {end}\n")
        self._process.stdin.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.report, _errors = self._process.communicate(timeout=_TIMEOUT_SECONDS)
        finally:
            self._process.kill()
            self._process.wait()
        assert self._process.returncode == 0, "it lost rows, or failed"


def version_before(migration: str, folder: Path) -> OlderVersion:
    """The last version that did not have a migration yet. Skips the test if Git does not have it.

    Args:
        migration: The name of its file. If it is not committed yet, the version is HEAD.
        folder: Where to put the code.
    """
    path = (MIGRATIONS / migration).relative_to(_ROOT)
    added = _git("log", "--no-renames", "--diff-filter=A", "--format=%H", "-1", "--", str(path))
    commit = f"{added.decode().strip()}^" if added.strip() else "HEAD"
    archive = _git("archive", commit, *_FOLDERS)
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(folder, filter="data")
    return OlderVersion(folder)


def _git(*arguments: str) -> bytes:
    try:
        is_shallow = _run("rev-parse", "--is-shallow-repository") != b"false\n"
        if not is_shallow:
            return _run(*arguments)
    except (OSError, subprocess.CalledProcessError) as e:
        pytest.skip(f"Git has no earlier version here: {e}")
    pytest.skip("Git has no earlier version here: the clone is shallow")


def _run(*arguments: str) -> bytes:
    return subprocess.run(
        ["git", *arguments],
        cwd=_ROOT,
        check=True,
        capture_output=True,
        timeout=_TIMEOUT_SECONDS,
    ).stdout
