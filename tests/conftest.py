"""Fixtures for all tests: real servers, a schema for each test, and leak detection."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import hypothesis
import psutil
import psycopg
import pytest

from tests.support.access_log import temporary_schema
from tests.support.citus import CLUSTER_DSN, VARIABLE, Cluster
from tests.support.environment import personal_variables, temporary_home, temporary_runtime
from tests.support.postgres import Postgres, available
from tests.support.wait import eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


# A busy machine must not fail a test.
hypothesis.settings.register_profile("without deadline", deadline=None)
hypothesis.settings.load_profile("without deadline")


def pytest_report_header() -> str:
    """Say whether the tests run on a Citus cluster."""
    if CLUSTER_DSN:
        return f"{VARIABLE} is set: the tests use distributed logs on that cluster"
    return f"{VARIABLE} is not set: no test uses a Citus cluster"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what cannot be on a Citus cluster; the marker says why."""
    for item in items if CLUSTER_DSN else ():
        for marker in item.iter_markers("not_on_citus"):
            item.add_marker(pytest.mark.skip(reason=marker.args[0]))


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres | Cluster]:
    """PostgreSQL 18, from the package that we depend on, or the Citus cluster that the environment names."""
    with Cluster(CLUSTER_DSN) if CLUSTER_DSN else Postgres(available()["18"]) as server:
        yield server


_VERSIONS = [
    pytest.param(version, marks=[] if version == "18" else pytest.mark.slow)
    for version in (["18"] if CLUSTER_DSN else sorted(available(), reverse=True))
]


@pytest.fixture(scope="session", params=_VERSIONS)
def any_postgres(request: pytest.FixtureRequest) -> Iterator[Postgres]:
    """Each version that is installed on this machine."""
    if request.param == "18":
        yield request.getfixturevalue("postgres")
        return
    with Postgres(available()[request.param]) as server:
        yield server


@pytest.fixture
def dsn(postgres: Postgres) -> Iterator[str]:
    """A connection string to an empty schema that only this test uses."""
    with temporary_schema(postgres) as dsn:
        yield dsn


@pytest.fixture
def any_dsn(any_postgres: Postgres) -> Iterator[str]:
    """Like `dsn`, on each version of PostgreSQL."""
    with temporary_schema(any_postgres) as dsn:
        yield dsn


@pytest.fixture
def query(dsn: str) -> Callable[..., list[tuple[object, ...]]]:
    """A function that runs SQL in the test's schema and returns the rows."""

    def run(sql: str, *values: object) -> list[tuple[object, ...]]:
        with psycopg.connect(dsn, autocommit=True) as connection:
            cursor = connection.execute(sql.encode(), values or None)
            return cursor.fetchall() if cursor.description else []

    return run


@pytest.fixture
def home() -> Iterator[Path]:
    """The data folder of this test, which does not exist yet."""
    with temporary_home() as home:
        yield home


@pytest.fixture
def runtime() -> Iterator[Path | None]:
    """The folder in memory of this test; see `temporary_runtime`."""
    with temporary_runtime() as folder:
        yield folder


@pytest.fixture(autouse=True)
def environment(home: Path, runtime: Path | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the tests and the settings and data of the person who runs them apart."""
    for name in personal_variables():
        monkeypatch.delenv(name)
    monkeypatch.setenv("ARTIFACTAPI_HOME", str(home))
    if runtime:
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))


@pytest.fixture(autouse=True)
def no_leaks() -> Iterator[None]:
    """No thread, child process or socket outlives its test."""
    me = psutil.Process()
    threads, children = set(threading.enumerate()), set(me.children())
    sockets = _sockets(me)
    yield
    eventually(lambda: not _alive(set(threading.enumerate()) - threads), timeout=5)
    eventually(lambda: not (set(me.children()) - children), timeout=5)
    eventually(lambda: _sockets(me) <= sockets, timeout=5)


def _alive(threads: set[threading.Thread]) -> list[str]:
    return [thread.name for thread in threads if thread.is_alive()]


def _sockets(process: psutil.Process) -> int:
    return len(process.net_connections(kind="all"))
