"""Connecting: several servers of which some never answer, and parameters that users set elsewhere."""

from __future__ import annotations

import contextlib
import itertools
import socket
import time
from typing import TYPE_CHECKING

import psycopg
import pytest

from exporter import SettingsError, check_dsn
from exporter.postgres.connection import connect
from exporter.postgres.dsn import connection_string, server_addresses
from exporter.settings import DatabaseSettings
from tests.support.postgres import free_port

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.support.postgres import Postgres


@pytest.fixture
def silent() -> Iterator[int]:
    """The port of a server that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.mark.parametrize(
    "kinds",
    [
        *itertools.permutations(["silent", "refused", "good"]),
        ("silent", "silent", "silent", "good"),
        ("silent", "good"),
        ("good", "silent"),
    ],
    ids="-".join,
)
def test_the_one_server_that_answers_is_found(
    postgres: Postgres, silent: int, kinds: tuple[str, ...]
) -> None:
    ports = {"silent": silent, "refused": free_port(), "good": postgres.port}
    hosts = ",".join(["127.0.0.1"] * len(kinds))
    dsn = f"host={hosts} port={','.join(str(ports[it]) for it in kinds)} user=postgres dbname=postgres"
    started = time.monotonic()
    with connect(dsn, DatabaseSettings(connect_seconds=2.0)) as connection:
        assert connection.info.port == postgres.port
    assert time.monotonic() - started < 2.5


def test_a_name_that_cannot_be_resolved_does_not_stop_the_others(postgres: Postgres) -> None:
    dsn = f"host=nowhere.invalid,localhost port={postgres.port} user=postgres dbname=postgres"
    with connect(dsn, DatabaseSettings()) as connection:
        assert connection.info.port == postgres.port
    with pytest.raises(psycopg.OperationalError, match=r"'nowhere\.invalid' cannot be resolved"):
        connect("host=nowhere.invalid", DatabaseSettings())


def test_a_socket_folder_may_stand_among_the_hosts(postgres: Postgres) -> None:
    dsn = f"host=127.0.0.1,{postgres.folder} port={free_port()},{postgres.port} user=postgres"
    with connect(f"{dsn} dbname=postgres", DatabaseSettings()) as connection:
        assert connection.info.host == str(postgres.folder)


def test_a_primary_is_found_behind_other_servers(postgres: Postgres, silent: int) -> None:
    for attributes in ("read-write", "primary", "any", "prefer-standby"):
        dsn = (
            f"host=127.0.0.1,127.0.0.1 port={silent},{postgres.port} user=postgres dbname=postgres"
            f" target_session_attrs={attributes}"
        )
        with connect(dsn, DatabaseSettings(connect_seconds=3.0)) as connection:
            assert connection.info.port == postgres.port


def test_parameters_from_a_service_file_and_the_environment_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "services"
    file.write_text("[logs]\nhost=db.example\nconnect_timeout=9\nkeepalives_idle=77\n")
    monkeypatch.setenv("PGSERVICEFILE", str(file))
    ours = connection_string("service=logs", DatabaseSettings())
    assert "connect_timeout" not in ours
    assert "keepalives_idle" not in ours
    assert "application_name=artifactapi" in ours
    monkeypatch.setenv("PGAPPNAME", "mine")
    monkeypatch.setenv("PGCONNECT_TIMEOUT", "7")
    ours = connection_string("dbname=x", DatabaseSettings())
    assert "application_name" not in ours
    assert "connect_timeout" not in ours
    monkeypatch.setenv("PGSERVICE", "logs")
    assert "keepalives_idle" not in connection_string("dbname=x", DatabaseSettings())
    assert "keepalives_idle=5" in connection_string("keepalives_idle=5", DatabaseSettings())


def test_the_hosts_of_a_service_are_tried_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, postgres: Postgres, silent: int
) -> None:
    file = tmp_path / "services"
    ports = f"{silent},{postgres.port}"
    file.write_text(f"[logs]\nhost=127.0.0.1,127.0.0.1\nport={ports}\nuser=postgres\n")
    monkeypatch.setenv("PGSERVICEFILE", str(file))
    with connect("service=logs dbname=postgres", DatabaseSettings(connect_seconds=2.0)) as it:
        assert it.info.port == postgres.port


@pytest.mark.parametrize(
    "dsn",
    [
        "host=localhost,/socket",
        "host=@abstract",
        "host=db.example dbname=logs@home",
        "postgresql://u@db.example/logs%40home",
        "postgresql://u:p%40ss@h1:5432,h2:5433/x?application_name=a@b",
        "postgresql://%2Frun%2Fpostgresql/x",
    ],
)
def test_unusual_connection_strings_are_accepted(dsn: str) -> None:
    check_dsn(dsn)


@pytest.mark.parametrize("dsn", ["postgresql://u:p@ss@h/x", "postgresql://u:1/p@h/x", "port=x"])
def test_connection_strings_that_would_show_a_password_are_rejected(dsn: str) -> None:
    with pytest.raises(SettingsError):
        check_dsn(dsn)


def test_what_libpq_rejects_is_left_to_libpq() -> None:
    assert server_addresses("host=a,b port=1,2,3") == ["host=a,b port=1,2,3"]
    with contextlib.suppress(psycopg.OperationalError):
        connect("host=127.0.0.1,127.0.0.1 port=1,2,3", DatabaseSettings())
