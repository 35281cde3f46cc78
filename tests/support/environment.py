"""Keep the settings of the person who runs the tests away from them, and find a place for test data."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - each test has its own folder in it


def personal_variables() -> list[str]:
    """Names of environment variables that would change how artifactapi, PostgreSQL or Python behave."""
    return [
        name
        for name in os.environ
        if name.startswith(("ARTIFACTAPI_", "PG", "PYTHON", "XDG_RUNTIME_DIR"))
        or name.lower().endswith("_proxy")
    ]


def clean_environment() -> dict[str, str]:
    """A copy of the environment without the personal variables."""
    return {name: value for name, value in os.environ.items() if name not in personal_variables()}


@contextlib.contextmanager
def temporary_runtime() -> Iterator[Path | None]:
    """A folder in memory for XDG_RUNTIME_DIR, removed afterwards; None if this system has none.

    Journals are in it, so no test finds those of another one.
    """
    if not _SHARED_MEMORY.is_dir():
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="artifactapi-test-", dir=_SHARED_MEMORY) as folder:
        yield Path(folder)


@contextlib.contextmanager
def temporary_home() -> Iterator[Path]:
    """A path for ARTIFACTAPI_HOME, which does not exist yet. It is removed afterwards.

    Root's embedded server cannot reach pytest's `tmp_path`, whose parents are closed to others.
    """
    with tempfile.TemporaryDirectory(prefix="artifactapi-home-") as folder:
        if os.geteuid() == 0:
            Path(folder).chmod(0o711)
        yield Path(folder, "home")
